"""Ranks that plan different steps get an error, at construction, in place of a hang."""

import pytest

from tests import agreement_ranks
from tests.ranks import Ranks

DIFFERENCES = {
    "rule's option": ("ns_steps=0", "ns_steps=7"),
    "strategy": ("strategy owner", "strategy reduce"),
    "order": ("on 2 of shape (8, 6)", "on 1 of shape (4, 12)"),
    "budget": ("wave 1: ", "on 2 of shape", "on 1 of shape"),
    "shape": ("(4, 12)", "(4, 24)"),
    "frozen": ("wave 1: muon", "'nothing more'"),
}


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("change", DIFFERENCES)
def test_ranks_that_differ_are_told_where(ranks: Ranks, world: int, change: str) -> None:
    """On all ranks, the same that agree among themselves too."""
    messages = ranks.run(world, agreement_ranks.differently, change)
    assert len(set(messages)) == 1
    assert messages[0].startswith("ranks 0 and 1 must run the same collectives")
    for words in DIFFERENCES[change]:
        assert words in messages[0]


def test_ranks_that_do_not_differ_agree(ranks: Ranks) -> None:
    assert ranks.run(3, agreement_ranks.differently, "nothing") == ["", "", ""]


def test_groups_may_differ_from_each_other(many: Ranks) -> None:
    assert all(many.run((2, 3), agreement_ranks.groups_apart))
