"""A mixture of experts under FSDP2 and DDP: few collectives at any depth, and the losses of the unsharded model."""

from statistics import mean

import pytest

from tests import olmoe
from tests.ranks import Ranks

SPECTRAL = {
    "embedding": {"rule": "right_spectral", "lr": 0.02},
    "head": {"rule": "hybrid", "centered": True, "lr": 0.02},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "polar", "lr": 0.01, "alpha": 1.0, "scale": "nuclear_over_frobenius"},
    "experts": {"rule": "hybrid", "view": "neurons", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 1e-3},
}
MUON = {"matrix": {"rule": "muon", "lr": 0.01}, "default": {"rule": "adamw", "lr": 4e-3}}
RECIPES = {"small-moe": "small-moe", "spectral": SPECTRAL, "muon": MUON}


@pytest.mark.parametrize("recipe", RECIPES)
def test_collectives_do_not_grow_with_depth(ranks: Ranks, recipe: str) -> None:
    counts = {layers: ranks.run(2, olmoe.stepped, layers, RECIPES[recipe])[0][0] for layers in (2, 8)}
    assert counts[2] == counts[8]
    assert 2 <= counts[2] <= 12


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_those_of_the_unsharded_model(ranks: Ranks, recipe: str, world: int) -> None:
    expected = olmoe.alone(2, RECIPES[recipe])
    assert abs(expected[-1] - expected[0]) > 20 * 2e-4
    assert mean_losses(ranks.run(world, olmoe.stepped, 2, RECIPES[recipe])) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("recipe", ["small-moe", "spectral"])
def test_replicas_stay_alike(ranks: Ranks, recipe: str) -> None:
    results = ranks.run(2, olmoe.replicated, 2, RECIPES[recipe])
    assert results[0][0] == results[1][0]
    assert mean_losses(results) == pytest.approx(olmoe.alone(2, RECIPES[recipe]), abs=2e-4)


def mean_losses(results: list[tuple[float, list[float]]]) -> list[float]:
    """Over ranks, a step each."""
    return [mean(step) for step in zip(*(losses for _, losses in results), strict=True)]
