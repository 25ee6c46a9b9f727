"""Fifty steps of OLMoE-tiny are the same training on every mesh, and a step's collectives do not grow with depth.

In float64 losses differ by 1e-7, for transformers' norms still round to float32. In float32 they differ by 1e-6 until
the second and third expert of some token are so close that rounding decides between them. From then on two trainings
differ by some 1e-4 in loss and norm, and by some percent in that expert's weights, so only the losses are compared.
"""

import math
from functools import cache
from statistics import mean
from typing import Any

import pytest
import torch

from tests import training_ranks
from tests.models.parallel_ranks import Mesh
from tests.ranks import Ranks
from tests.training_ranks import Run

SPECTRAL = {
    "embedding": {"rule": "right_spectral", "lr": 0.02},
    "head": {"rule": "hybrid", "centered": True, "lr": 0.01},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "polar", "lr": 0.01, "alpha": 1.0, "scale": "nuclear_over_frobenius"},
    "experts": {"rule": "muon", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 1e-3},
}
RECIPES: dict[str, Any] = {"small-moe": "small-moe", "spectral": SPECTRAL}
CROSSED: list[Mesh] = [{"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "ep": 2}]
SHAPES: list[Mesh] = [{"dp_shard": 4}, *CROSSED, {"ep": 2}, {"ddp": 2}]
CASES = [*((recipe, shape) for recipe in RECIPES for shape in SHAPES), ("small-moe", {"tp": 2})]


def label(value: Any) -> str:
    return " ".join(f"{key}={size}" for key, size in value.items()) if isinstance(value, dict) else str(value)


@cache
def alone(recipe: str, dtype: torch.dtype) -> Run:
    return training_ranks.alone(RECIPES[recipe], dtype)


def together(ranks: Ranks, shape: Mesh, recipe: str, dtype: torch.dtype) -> list[Run]:
    return ranks.run(math.prod(shape.values()), training_ranks.together, shape, RECIPES[recipe], dtype)


def losses(found: list[Run]) -> list[float]:
    """The mean over ranks, a step each; ranks of `tp` have the same tokens, and count alike."""
    return [mean(step) for step in zip(*(run.losses for run in found), strict=True)]


@pytest.mark.parametrize(("recipe", "shape"), CASES, ids=label)
def test_training_is_that_of_the_unsharded_model(ranks: Ranks, recipe: str, shape: Mesh) -> None:
    expected, found = alone(recipe, torch.float64), together(ranks, shape, recipe, torch.float64)
    assert losses(found) == pytest.approx(expected.losses, abs=1e-6)
    start = {name: weight.detach() for name, weight in training_ranks.small(2, torch.float64).named_parameters()}
    for run in found:
        assert run.norms == pytest.approx(expected.norms, rel=1e-5)
        assert run.weights.keys() == expected.weights.keys()
        for name, weight in expected.weights.items():
            # Against how far it came from its start; spectral rules magnify the smallest parts of a gradient.
            error = (run.weights[name] - weight).norm() / (weight - start[name]).norm()
            assert error < 1e-4, f"{name}: {float(error)}"


@pytest.mark.parametrize("shape", [{"dp_shard": 2, "ep": 2}], ids=label)
def test_losses_in_float32_are_those_of_the_unsharded_model(ranks: Ranks, shape: Mesh) -> None:
    expected, found = alone("small-moe", torch.float32), together(ranks, shape, "small-moe", torch.float32)
    assert losses(found) == pytest.approx(expected.losses, abs=1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns(recipe: str) -> None:
    run = alone(recipe, torch.float64)
    assert mean(run.losses[-5:]) < run.losses[0] - 1
    # Some steps are clipped.
    assert max(run.norms) > 1.2


@pytest.mark.parametrize("shape", CROSSED, ids=label)
@pytest.mark.parametrize("recipe", RECIPES)
def test_collectives_do_not_grow_with_depth(ranks: Ranks, recipe: str, shape: Mesh) -> None:
    shallow, deep = (ranks.run(4, training_ranks.counted, shape, layers, RECIPES[recipe]) for layers in (2, 6))
    assert shallow == deep
    assert all(len(clipping) <= 3 and 2 <= len(step) <= 15 for clipping, step in shallow)
