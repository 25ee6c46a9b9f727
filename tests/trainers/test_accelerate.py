"""`accelerator.prepare` shards the model under an optimizer that was built before: training is that of one process."""

import pytest

from tests.ranks import Ranks
from tests.trainers import language, trainer_ranks

CASES = [("dense", "spectral"), ("dense", "adamw"), ("experts", "spectral"), ("experts", "rows")]


@pytest.mark.parametrize(("kind", "recipe"), CASES)
def test_fsdp2(pair: Ranks, kind: str, recipe: str) -> None:
    found = pair.run(2, trainer_ranks.accelerated, kind, recipe, 2)
    language.agree(found, kind, recipe, language.alone(kind, recipe))


@pytest.mark.parametrize(("kind", "recipe"), [("experts", "spectral"), ("dense", "adamw")])
def test_fsdp1_with_the_optimizer_of_the_prepared_model(pair: Ranks, kind: str, recipe: str) -> None:
    found = pair.run(2, trainer_ranks.accelerated, kind, recipe, 1, True)
    language.agree(found, kind, recipe, language.alone(kind, recipe))
