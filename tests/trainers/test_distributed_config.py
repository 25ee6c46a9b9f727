"""Models that transformers lays out itself, as `DistributedConfig` says: training is that of one process."""

from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks
from tests.trainers import language
from tests.trainers.language import Sizes

pytest.importorskip("transformers", minversion="5.24")

from tests.trainers import distributed_config_ranks, trainer_ranks

TWO: list[tuple[str, Sizes]] = [
    ("dense", {"fsdp_size": 2}),
    ("dense", {"tp_size": 2}),
    ("experts", {"fsdp_size": 2}),
    ("experts", {"tp_size": 2}),
    ("experts", {"fsdp_size": 2, "ep_size": 2}),
    ("experts", {"tp_size": 2, "ep_size": 2}),
]
FOUR: list[tuple[str, Sizes]] = [
    ("dense", {"fsdp_size": 4}),
    ("dense", {"tp_size": 4}),
    ("dense", {"fsdp_size": 2, "tp_size": 2}),
    ("dense", {"dp_replicate_size": 2, "fsdp_size": 2}),
    ("experts", {"fsdp_size": 2, "tp_size": 2}),
    ("experts", {"fsdp_size": 4, "ep_size": 2}),
    ("experts", {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}),
    ("experts", {"fsdp_size": 2, "tp_size": 2, "ep_size": 4}),
]
EVERYWHERE = {"fsdp_size", "dp_replicate_size"}


def label(value: object) -> str:
    return " ".join(f"{key[:-5]}={size}" for key, size in value.items()) if isinstance(value, dict) else str(value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language.saved(tmp_path_factory.mktemp("models"))


def precision(sizes: Sizes, recipe: str) -> torch.dtype:
    """In float64 FSDP2 divides gradients twice that it has not to reduce: those of experts no other rank has."""
    unreduced = sizes.get("ep_size", 1) == sizes.get("fsdp_size", 1) * sizes.get("tp_size", 1)
    return torch.float32 if recipe == "adamw" and unreduced and "fsdp_size" in sizes else torch.float64


def check(ranks: Ranks, folder: Path, kind: str, sizes: Sizes, recipe: str) -> None:
    dtype = precision(sizes, recipe)
    where = distributed_config_ranks.trained
    found = ranks.run(ranks.size, where, str(folder), kind, sizes, recipe, dtype)
    language.agree([weights for weights, _ in found], kind, recipe, language.alone(kind, recipe, dtype=dtype))
    for weights, sharded in found:
        # Under tensor parallelism norms and router stay whole.
        assert sharded == weights.keys() if EVERYWHERE & sizes.keys() else len(sharded) > len(weights) / 3


@pytest.mark.parametrize("recipe", language.RECIPES)
@pytest.mark.parametrize(("kind", "sizes"), TWO, ids=label)
def test_two_ranks(pair: Ranks, folder: Path, kind: str, sizes: Sizes, recipe: str) -> None:
    check(pair, folder, kind, sizes, recipe)


@pytest.mark.parametrize("recipe", language.RECIPES)
@pytest.mark.parametrize(("kind", "sizes"), FOUR, ids=label)
def test_four_ranks(ranks: Ranks, folder: Path, kind: str, sizes: Sizes, recipe: str) -> None:
    check(ranks, folder, kind, sizes, recipe)


@pytest.mark.parametrize(
    ("kind", "sizes", "recipe"),
    [("dense", {"fsdp_size": 2}, "spectral"), ("experts", {"fsdp_size": 2, "ep_size": 2}, "adamw")],
    ids=label,
)
def test_under_trainer(pair: Ranks, folder: Path, kind: str, sizes: Sizes, recipe: str) -> None:
    dtype = precision(sizes, recipe)
    found = pair.run(2, trainer_ranks.of_laid_out, str(folder), kind, recipe, sizes, dtype)
    expected = language.alone(kind, recipe, clip=language.CLIP, fade=True, dtype=dtype)
    language.agree(found, kind, recipe, expected)
