"""Sharded equals single-process: every rule, view, strategy and layout on 1 to 8 real ranks."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests import parity
from tests.cases import CASES, is_row_rule, tensors
from tests.grids import WAYS
from tests.ranks import Ranks

DTYPES = {"float64": torch.float64, "float32": torch.float32}
SMALL_WAVES = {"exchange": {"bucket_bytes": 4000}}
Key = tuple[str, int, str]


@cache
def oracle() -> dict[Key, Tensor]:
    return parity.alone(torch.float64)


@cache
def on_ranks(many: Ranks, way: str, dtype: str, small_waves: bool = False) -> tuple[dict[Key, Tensor], dict]:
    options = SMALL_WAVES if small_waves else {}
    results = many.run(WAYS[way].mesh, parity.sharded, way, DTYPES[dtype], options)
    for _, strategies in results:
        assert strategies == results[0][1]
    shapes = {case: shape for case, (shape, _) in CASES.items()}
    whole = {key: WAYS[way].whole([pieces[key] for pieces, _ in results], shapes[key[0]]) for key in results[0][0]}
    return whole, results[0][1]


def error(case: str, key: Key, weight: Tensor) -> float:
    """Distance to the oracle, relative to the distance the oracle moved."""
    expected, start = oracle()[case, key[1], "auto"], tensors(case, key[1])[0]
    moved = (expected - start).norm()
    assert moved > 0.1
    return float((weight.double() - expected).norm() / moved)


def worst(case: str, weights: dict[Key, Tensor]) -> float:
    errors = [error(case, key, weight) for key, weight in weights.items() if key[0] == case]
    assert len(errors) >= parity.COPIES * 2
    return max(errors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_float64_is_exact(many: Ranks, case: str, way: str) -> None:
    assert worst(case, on_ranks(many, way, "float64")[0]) < 1e-9


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_float32_is_near(many: Ranks, case: str, way: str) -> None:
    assert worst(case, on_ranks(many, way, "float32")[0]) < (1e-5 if is_row_rule(case) else 1e-3)


@pytest.mark.parametrize("way", ["shard0 on 3", "fsdp over row-wise tp on 2 x 3", "hsdp on 2 x 3"])
@pytest.mark.parametrize("case", CASES)
def test_waves_change_nothing(many: Ranks, case: str, way: str) -> None:
    assert worst(case, on_ranks(many, way, "float64", True)[0]) < 1e-9


@pytest.mark.parametrize(
    "way", ["fsdp over column-wise tp on 2 x 2", "fsdp over row-wise tp on 2 x 2", "hsdp on 2 x 2"]
)
def test_meshes_may_number_ranks_in_any_order(ranks: Ranks, way: str) -> None:
    results = [pieces for _, pieces in sorted(ranks.run(4, parity.shuffled, way), key=lambda result: result[0])]
    for key in results[0]:
        weight = WAYS[way].whole([pieces[key] for pieces in results], CASES[key[0]][0])
        assert error(key[0], key, weight) < 1e-9


@cache
def replicas(many: Ranks, world: int) -> list:
    return many.run(world, parity.replicas, torch.float64)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_plain_replicas_share_the_work(many: Ranks, case: str, world: int) -> None:
    for weights, _ in replicas(many, world):
        assert worst(case, weights) < 1e-9
        assert all(torch.equal(weight, replicas(many, world)[0][0][key]) for key, weight in weights.items())


def test_all_three_strategies_ran(many: Ranks) -> None:
    for way, name, strategy in (
        ("shard0 on 3", "row/0/auto", "reduce"),
        ("shard0 on 3", "right/0/reduce", "reduce"),
        ("shard0 on 3", "right/0/owner", "owner"),
        ("shard0 on 3", "row_experts/0/auto", "local"),
        ("shard0 on 3", "row_experts/0/owner", "owner"),
        ("shard0 on 3", "row_stacked/0/auto", "owner"),
        ("shard0 on 3", "muon_heads_out/0/auto", "local"),
        ("fsdp over column-wise tp on 2 x 2", "right/0/reduce", "reduce"),
        ("fsdp over row-wise tp on 2 x 3", "row_centered/0/reduce", "reduce"),
        ("fsdp over row-wise tp on 2 x 3", "right/0/auto", "owner"),
        ("hsdp on 2 x 3", "muon_tall/0/owner", "owner"),
        ("replicated on 3", "muon_tall/0/local", "local"),
        ("replicated on 3", "muon_tall/0/owner", "owner"),
        ("shard0 on 3", "row_sections/0/reduce[1]", "reduce"),
        ("shard0 on 3", "muon_sections_heads/0/auto[0]", "owner"),
        ("hsdp on 2 x 3", "muon_sections_heads/0/owner[2]", "owner"),
    ):
        assert on_ranks(many, way, "float64")[1][name] == strategy
    assert replicas(many, 2)[0][1]["muon_tall/0/owner"] == "owner"
