"""Gradients that lie otherwise than their weights, and strided shards on one axis: what one process makes of them."""

import itertools
from typing import Any

import pytest
from torch.distributed.tensor import Partial, Replicate, Shard

from tests import elsewhere_ranks
from tests.elsewhere_ranks import DEALT, GROUPS, REFUSED, SHAPES, STEPS
from tests.grids import Way
from tests.ranks import Ranks

S0, S1, R, SUM, MEAN = Shard(0), Shard(1), Replicate(), Partial(), Partial("avg")
# Weight, gradient, and whether another rank is needed for it.
KINDS: dict[str, tuple[list, list, bool]] = {
    "whole for shards": ([S0], [R], False),
    "whole for columns": ([S1], [R], False),
    "columns for rows": ([S0], [S1], True),
    "rows for whole": ([R], [S0], True),
    "parts for shards": ([S0], [SUM], True),
    "parts for whole": ([R], [MEAN], True),
}
ON_TWO: dict[str, tuple[list, list, bool]] = {
    "whole for both": ([S0, S1], [R, R], False),
    "whole along one": ([S0, S1], [S0, R], False),
    "changed places": ([S0, S1], [S1, S0], True),
    "parts along one": ([R, S0], [SUM, S0], True),
    "parts along both": ([S0, S1], [SUM, MEAN], True),
}


def check(results: list, way: Way, size: str, how: dict[str, Any], needed: bool, base: list[int]) -> None:
    weights, norms = elsewhere_ranks.alone(size, how)
    for i in range(len(GROUPS)):
        found = way.whole([pieces[i] for pieces, _, _ in results], SHAPES[size])
        moved = (weights[i] - elsewhere_ranks.draw(SHAPES[size], i)).norm()
        assert (found - weights[i]).norm() <= 1e-9 * moved
    for _, found, collectives in results:
        assert found == pytest.approx(norms, rel=1e-6)
        # Clipping has brought them home already. Else: which ones, their sum, and once more whether all are finite.
        more = 3 if needed and "clipped" not in how else 0
        # On a mesh of another order they may lie where the weight does after all.
        assert "turned" in how or collectives == [count + more for count in base]


@pytest.mark.parametrize("how", [{}, {"clipped": 0.5}], ids=str)
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_brought_to_their_weights(
    ranks: Ranks, kind: str, size: str, world: int, how: dict[str, Any]
) -> None:
    weight, gradient, needed = KINDS[kind]
    way = Way((world,), tuple((0, p.dim) for p in weight if isinstance(p, Shard)))
    base = ranks.run(world, elsewhere_ranks.trained, size, weight, weight, {})[0][2]
    check(ranks.run(world, elsewhere_ranks.trained, size, weight, gradient, how), way, size, how, needed, base)


@pytest.mark.parametrize("how", [{}, {"clipped": 0.5}, {"turned": True}], ids=str)
@pytest.mark.parametrize("size", ["uneven", "experts"])
@pytest.mark.parametrize("kind", ON_TWO)
def test_so_they_are_on_two_axes(many: Ranks, kind: str, size: str, how: dict[str, Any]) -> None:
    weight, gradient, needed = ON_TWO[kind]
    mesh = (2, 2) if how.get("turned") else (2, 3)
    cuts = tuple((axis, p.dim) for axis, p in enumerate(weight) if isinstance(p, Shard))
    base = many.run(mesh, elsewhere_ranks.trained, size, weight, weight, {})[0][2]
    results = many.run(mesh, elsewhere_ranks.trained, size, weight, gradient, how)
    check(results, Way(mesh, cuts), size, how, needed, base)


def test_a_rank_without_gradients_takes_part(ranks: Ranks) -> None:
    """What it had counts as zero; the others do not wait for ever."""
    results = ranks.run(3, elsewhere_ranks.trained, "uneven", [S0], [SUM], {"missing": 1})
    found = [Way((3,), ((0, 0),)).whole([pieces[i] for pieces, _, _ in results], SHAPES["uneven"]) for i in range(3)]
    assert all(each.isfinite().all() for each in found)
    # A third of every sum was its, and no rule here minds a common factor but AdamW, hardly.
    weights, _ = elsewhere_ranks.alone("uneven", {})
    assert all((a - b).norm() < 1e-2 * b.norm() for a, b in zip(found, weights, strict=True))


def test_gradients_on_other_ranks_are_refused(many: Ranks) -> None:
    for said in many.run((2, 2), elsewhere_ranks.on_other_ranks, ("inner",)):
        assert len(said) == 2
        assert all("weight: its gradient lies on ranks" in message for message in said)


@pytest.mark.parametrize("whole_gradients", [False, True])
@pytest.mark.parametrize("mesh", [(2,), (3,), (4,), (2, 2), (2, 3)], ids=str)
def test_dealt_out_shards_are_a_layout_like_any_other(
    many: Ranks, mesh: tuple[int, ...], whole_gradients: bool
) -> None:
    expected = elsewhere_ranks.dealt_alone()
    results = many.run(mesh, elsewhere_ranks.dealt, whole_gradients)
    for coordinate, pieces in zip(itertools.product(*map(range, mesh)), results, strict=True):
        for seed, name in enumerate(DEALT):
            piece = elsewhere_ranks.dealt_piece(name, expected[name], mesh, coordinate)
            moved = (expected[name] - elsewhere_ranks.draw(DEALT[name][0], seed)).norm()
            assert moved > 0
            assert (pieces[name] - piece).norm() <= 1e-9 * moved, name
    assert STEPS > 1


def test_what_their_order_mixes_is_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, elsewhere_ranks.refused):
        for message, words in zip(said, REFUSED, strict=True):
            assert message.startswith("w: ")
            assert words in message
