"""Sharded equals single-process: every rule, view and placement on 1 to 4 real ranks, uneven and empty shards."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests import parity
from tests.cases import CASES, is_row_rule, tensors
from tests.ranks import Ranks

WORLDS = (1, 2, 3, 4)
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@cache
def oracle() -> dict[tuple[str, int, str], Tensor]:
    return parity.alone(torch.float64)


@cache
def on_ranks(ranks: Ranks, world: int, dtype: str, dim: int = 0, wave_bytes: int = 1 << 30) -> tuple[dict, dict]:
    results = ranks.run(world, parity.sharded, DTYPES[dtype], dim, wave_bytes)
    for weights, placements in results[1:]:
        assert placements == results[0][1]
        assert all(torch.equal(weights[key], results[0][0][key]) for key in weights)
    return results[0]


def error(case: str, key: tuple[str, int, str], weight: Tensor) -> float:
    """Distance to the oracle, relative to the distance the oracle moved."""
    expected, start = oracle()[case, key[1], "auto"], tensors(case, key[1])[0]
    moved = (expected - start).norm()
    assert moved > 0.1
    return float((weight.double() - expected).norm() / moved)


def worst(case: str, weights: dict) -> float:
    errors = [error(case, key, weight) for key, weight in weights.items() if key[0] == case]
    assert len(errors) >= parity.COPIES * 2
    return max(errors)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(ranks: Ranks, case: str, world: int) -> None:
    assert worst(case, on_ranks(ranks, world, "float64")[0]) < 1e-9


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_float32_is_near(ranks: Ranks, case: str, world: int) -> None:
    assert worst(case, on_ranks(ranks, world, "float32")[0]) < (1e-5 if is_row_rule(case) else 1e-3)


@pytest.mark.parametrize("case", CASES)
def test_split_along_another_dimension(ranks: Ranks, case: str) -> None:
    assert worst(case, on_ranks(ranks, 3, "float64", dim=1)[0]) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_waves_change_nothing(ranks: Ranks, case: str) -> None:
    assert worst(case, on_ranks(ranks, 3, "float64", wave_bytes=2000)[0]) < 1e-9


def test_all_three_placements_ran(ranks: Ranks) -> None:
    placements = set(on_ranks(ranks, 3, "float64")[1].items())
    for name, placement in (
        ("row/0/auto", "reduce"),
        ("right/0/reduce", "reduce"),
        ("right/0/owner", "owner"),
        ("row_experts/0/auto", "local"),
        ("row_experts/0/owner", "owner"),
        ("row_stacked/0/auto", "owner"),
        ("muon_heads_out/0/auto", "local"),
    ):
        assert (name, placement) in placements
