"""Flat layouts: every rule, view and placement on runs of elements equals the single process."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests import flat_ranks, parity
from tests.cases import CASES, is_row_rule, tensors
from tests.ranks import Ranks

WAYS = [("each", 2), ("each", 3), ("each", 4), ("one", 2), ("one", 3), ("one", 8), ("anywhere", 3), ("anyhow", 4)]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SMALL_WAVES = {"wave_bytes": 3000}
Whole = dict[tuple[str, int, str], Tensor]


@cache
def oracle() -> dict[tuple[str, int, str], Tensor]:
    return parity.alone(torch.float64)


@cache
def on_ranks(many: Ranks, way: str, world: int, dtype: str, small_waves: bool = False) -> tuple[Whole, dict[str, str]]:
    results = many.run(world, flat_ranks.train, way, DTYPES[dtype], SMALL_WAVES if small_waves else {})
    assert all(placements == results[0][1] for _, placements in results)
    matrices = {key: torch.cat([pieces[key] for pieces, _ in results]) for key in results[0][0]}
    wholes: dict[tuple[str, int, str], list[Tensor]] = {}
    for (case, copy, placement, _), matrix in matrices.items():
        wholes.setdefault((case, copy, placement), []).append(matrix)
    return {key: torch.cat(found).view(CASES[key[0]][0]) for key, found in wholes.items()}, results[0][1]


def worst(case: str, weights: Whole) -> float:
    errors = []
    for (found, copy, _), weight in weights.items():
        if found == case:
            expected, start = oracle()[case, copy, "auto"], tensors(case, copy)[0]
            errors.append(float((weight.double() - expected).norm() / (expected - start).norm()))
    assert len(errors) >= 2 * flat_ranks.COPIES
    return max(errors)


@pytest.mark.parametrize(("way", "world"), WAYS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(many: Ranks, case: str, way: str, world: int) -> None:
    assert worst(case, on_ranks(many, way, world, "float64")[0]) < 1e-9


@pytest.mark.parametrize(("way", "world"), [("each", 3), ("one", 3), ("anywhere", 3)])
@pytest.mark.parametrize("case", CASES)
def test_float32_is_near(many: Ranks, case: str, way: str, world: int) -> None:
    assert worst(case, on_ranks(many, way, world, "float32")[0]) < (1e-5 if is_row_rule(case) else 1e-3)


@pytest.mark.parametrize(("way", "world"), [("each", 3), ("one", 3), ("anyhow", 4)])
@pytest.mark.parametrize("case", CASES)
def test_small_waves_change_nothing(many: Ranks, case: str, way: str, world: int) -> None:
    assert worst(case, on_ranks(many, way, world, "float64", True)[0]) < 1e-9
