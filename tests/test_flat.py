"""Flat layouts: every rule, view and strategy on runs of elements equals the single process."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist
from symdist.layouts import FlatLayout, Group
from tests import flat_ranks, parity
from tests.cases import CASES, is_row_rule, tensors
from tests.ranks import Ranks

WAYS = [
    ("each", 2),
    ("each", 3),
    ("each", 4),
    ("one", 2),
    ("one", 3),
    ("one", 8),
    ("anywhere", 3),
    ("anyhow", 4),
    ("shuffled", 4),
    ("columns", 3),
]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
COPIES = 5
SMALL_WAVES = {"exchange": {"bucket_bytes": 3000}}
Whole = dict[tuple[str, int, str], Tensor]


@cache
def oracle() -> dict[tuple[str, int, str], Tensor]:
    return parity.alone(torch.float64)


@cache
def on_ranks(many: Ranks, way: str, world: int, dtype: str, small_waves: bool = False) -> tuple[Whole, dict[str, str]]:
    return joined(many.run(world, flat_ranks.train, way, DTYPES[dtype], SMALL_WAVES if small_waves else {}), way)


@cache
def sending(many: Ranks, way: str, world: int) -> tuple[Whole, dict[str, str]]:
    return joined(many.run(world, flat_ranks.train_sending, way, torch.float64), way)


def joined(results: list[tuple[dict, dict[str, str]]], way: str) -> tuple[Whole, dict[str, str]]:
    """Whole tensors from the pieces of all ranks, and where the rules ran."""
    assert all(strategies == results[0][1] for _, strategies in results)
    cut = flat_ranks.cut(flat_ranks.all_keys(), way, len(results))
    matrices = {key: flat_ranks.put_together([pieces[key] for pieces, _ in results], cut[key]) for key in results[0][0]}
    wholes: dict[tuple[str, int, str], list[Tensor]] = {}
    for (case, copy, strategy, _), matrix in matrices.items():
        wholes.setdefault((case, copy, strategy), []).append(matrix)
    return {key: torch.stack(found).view(CASES[key[0]][0]) for key, found in wholes.items()}, results[0][1]


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


@pytest.mark.parametrize("case", CASES)
def test_whole_matrices_may_go_elsewhere(many: Ranks, case: str) -> None:
    found, strategies = sending(many, "one", 3)
    assert worst(case, found) < 1e-9
    elsewhere = on_ranks(many, "one", 3, "float64")[1]
    moved, usual = (sum(where == "owner" for where in found.values()) for found in (strategies, elsewhere))
    assert moved > usual


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("way", ["each", "one"])
@pytest.mark.parametrize("rule", ["row_norm", "adamw"])
def test_only_cut_rows_travel(many: Ranks, rule: str, way: str, world: int) -> None:
    """A rank sends at most what lies here of the row that it shares with the rank before, and gets it back."""
    width = 11
    group = {"rule": rule, "skip_zero_grad_rows": True} if rule == "adamw" else {"rule": rule}
    layers = 2 if rule == "adamw" else 1
    results = many.run(world, flat_ranks.counted, (29, width), group, way, COPIES)
    for sent, kinds, _ in results:
        assert kinds == ["all_to_all", "all_to_all"]
        # To the one before, and home to the one after.
        assert sent <= COPIES * 2 * (width - 1) * 4 * layers
    cut = {start for _, _, runs in results for start, stop in runs if start < stop and start % width}
    assert cut
    assert sum(sent for sent, _, _ in results) > 0


def test_whole_rows_need_nobody(many: Ranks) -> None:
    for sent, kinds, _ in many.run(4, flat_ranks.counted, (32, 8), {"rule": "row_norm"}, "each", 2):
        assert (sent, kinds) == (0, [])
    for sent, kinds, _ in many.run(4, flat_ranks.counted, (32, 8), {"rule": "row_norm"}, "one", 4):
        assert (sent, kinds) == (0, [])


def test_a_large_gram_is_summed_where_it_lies(many: Ranks) -> None:
    """Of a tall matrix cut over all ranks the Gram travels, not the matrix."""
    for sent, kinds, _ in many.run(4, flat_ranks.counted, (4000, 8), {"rule": "right_spectral"}, "each", 1):
        assert kinds == ["reduce_scatter", "all_gather"] or "reduce_scatter" in kinds
        assert 0 < sent < 4000


def test_bounds_that_cover_nothing_are_refused() -> None:
    ranks = Group(ranks=(0, 1), index=0)
    with pytest.raises(ValueError, match=r"bounds \(0, 5, 7\) must run from 0 to 8, the number of elements"):
        FlatLayout(shape=(2, 4), group=ranks, bounds=(0, 5, 7))
    with pytest.raises(ValueError, match="must be 3 offsets in ascending order"):
        FlatLayout(shape=(2, 4), group=ranks, bounds=(0, 9, 8))
    layout = FlatLayout(shape=(2, 4), group=ranks, bounds=(0, 5, 8))
    with pytest.raises(ValueError, match=r"w: this rank's tensor has shape \(4,\), but its layout says \(5,\)"):
        SymDist([{"params": [("w", nn.Parameter(torch.ones(4)))], "layouts": [layout], "rule": "row_norm", "lr": 0.1}])
