"""transformers.Trainer, its clipping and its schedule: training is that of one process that does the same by hand."""

from pathlib import Path

import pytest

from tests.ranks import Ranks
from tests.trainers import language, trainer_ranks
from tests.trainers.language import CLIP, Weights

TOGETHER = [("ddp", "object"), ("ddp", "factory"), ("fsdp1", "factory"), ("fsdp2", "factory")]


def expected(kind: str, recipe: str, how: str) -> Weights:
    return language.alone(kind, recipe, clip=CLIP, fade=True, dtype=trainer_ranks.dtype_of(how))


def test_clipping_and_schedule_make_a_difference() -> None:
    by_hand = expected("dense", "spectral", "ddp")
    for other in (language.alone("dense", "spectral", fade=True), language.alone("dense", "spectral", clip=CLIP)):
        assert max(language.apart(by_hand, "dense", other).values()) > 1e-3


@pytest.mark.parametrize("way", ["object", "factory"])
def test_one_process(tmp_path: Path, way: str) -> None:
    found = trainer_ranks.run_trainer(str(tmp_path), "dense", "spectral", "alone", way)
    language.agree([found], "dense", "spectral", expected("dense", "spectral", "alone"))


@pytest.mark.parametrize(("kind", "recipe"), [("dense", "rows"), ("experts", "spectral"), ("experts", "adamw")])
@pytest.mark.parametrize(("how", "way"), TOGETHER)
def test_two_ranks(pair: Ranks, tmp_path: Path, kind: str, recipe: str, how: str, way: str) -> None:
    found = pair.run(2, trainer_ranks.by_trainer, str(tmp_path), kind, recipe, how, way)
    language.agree(found, kind, recipe, expected(kind, recipe, how))
