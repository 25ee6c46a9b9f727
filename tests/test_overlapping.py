"""Groups of ranks that overlap: whatever waves are in flight, in whatever order, no rank waits for ever."""

import random

import pytest

from tests import overlapping_ranks
from tests.grids import Way
from tests.overlapping_ranks import Lane
from tests.ranks import Ranks


def drawn_lanes(seed: int, count: int) -> list[Lane]:
    """Different sets of two to eight ranks."""
    source = random.Random(seed)
    lanes: list[Lane] = []
    while len(lanes) < count:
        lane = tuple(sorted(source.sample(range(8), source.choice((2, 2, 3, 3, 4, 5, 8)))))
        lanes += [lane] * (lane not in lanes)
    return lanes


LANES: dict[str, list[Lane]] = {
    "three": [(0, 1), (1, 2, 3), (0, 2)],
    "ring": [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (0, 7)],
    "nested": [(0, 1), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7), (4, 5), (2, 3, 4, 5)],
    **{f"drawn {seed}": drawn_lanes(seed, 8) for seed in range(2)},
}


@pytest.mark.parametrize(("bucket_bytes", "seconds"), [(1, 0.02), (3000, 0.02), (1 << 30, 0.02)])
@pytest.mark.parametrize("lanes", LANES)
def test_no_ring_of_waits_closes(many: Ranks, lanes: str, bucket_bytes: int, seconds: float) -> None:
    expected = overlapping_ranks.alone(LANES[lanes])
    seed = list(LANES).index(lanes)
    results = many.run(8, overlapping_ranks.overlapped, LANES[lanes], bucket_bytes, seed, seconds)
    for (lane, number), whole in expected.items():
        way = Way((len(lane),), ((0, 0),))
        found = way.whole([results[rank][lane, number] for rank in lane], tuple(whole.shape))
        moved = (whole - overlapping_ranks.draw(lane, number, 0)).norm()
        assert (found - whole).norm() <= 1e-9 * moved
    assert all(set(results[rank]) == {key for key in expected if rank in key[0]} for rank in range(8))
