"""What a step sends under Megatron is what its trace says, collective by collective."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.symdist_megatron.cases import recipe
from tests.symdist_megatron.how import How

Worlds = Callable[[int], Ranks]
COUNTED = "tests.symdist_megatron.wire_ranks:counted"
HOW = How(dtype="float32", layers=4)
LAYOUTS: dict[str, How] = {
    "tp4": replace(HOW, tp=4, etp=4),
    "tp2 dp2": replace(HOW, tp=2, etp=2),
    "tp2 dp2, distributed": replace(HOW, tp=2, etp=2, distributed=True),
    "tp2 ep2": replace(HOW, tp=2, ep=2),
    "ep2 dp2, distributed": replace(HOW, ep=2, distributed=True),
    "pp2 dp2, distributed": replace(HOW, pp=2, distributed=True),
    "dp4": HOW,
    "dp4, distributed": replace(HOW, distributed=True),
}


@pytest.mark.parametrize("case", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_plan_is_what_is_sent(worlds: Worlds, layout: str, case: int) -> None:
    found = worlds(4).run(4, COUNTED, LAYOUTS[layout], recipe(case), {"vocabulary": 37})
    for planned, started in found:
        assert planned == started
    assert all(started for _, started in found)


@pytest.mark.parametrize("layout", ["tp2 dp2", "tp2 dp2, distributed"])
def test_collectives_do_not_grow_with_depth(worlds: Worlds, layout: str) -> None:
    kinds = []
    for layers in (2, 8):
        how = replace(LAYOUTS[layout], layers=layers)
        found = worlds(4).run(4, COUNTED, how, recipe(0), {})
        kinds.append([kind for kind, _, _ in found[0][1]])
    assert kinds[0] == kinds[1]


def test_row_rules_move_next_to_nothing(worlds: Worlds) -> None:
    """Where tensor parallelism cuts rows nothing but whether all is finite; in runs, at most a cut row each way."""
    rows: dict[str, Any] = {"rule": "row_norm", "lr": 0.1}
    given = {"default": rows, "other": {"rule": "adamw", "lr": 0.1}, "attention_o": {"rule": "adamw", "lr": 0.1}}
    given |= {"mlp_down": {"rule": "adamw", "lr": 0.1}, "expert_down": {"rule": "adamw", "lr": 0.1}}
    for _, started in worlds(4).run(4, COUNTED, LAYOUTS["tp4"], given, {}):
        assert [kind for kind, _, _ in started] == ["all_reduce"]
    how = LAYOUTS["dp4, distributed"]
    for _, started in worlds(4).run(4, COUNTED, how, given, {}):
        # Of every matrix a rank has at most two cut rows, and each is sent there and back.
        matrices = 1 + 1 + how.layers * 3 + (how.layers // 2) * (1 + how.experts)
        assert sum(sent for _, _, sent in started) <= 4 * 2 * 2 * how.hidden * matrices
