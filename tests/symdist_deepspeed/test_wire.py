"""What a step sends under ZeRO is what `symdist plan --zero` says, collective by collective."""

from collections.abc import Callable

import pytest

from symdist.exchange import CountingTransport
from symdist.routing.recipes import RecipeLike
from symdist.tools.simulate import simulate
from tests.ranks import Ranks
from tests.symdist_deepspeed import language

Worlds = Callable[[int], Ranks]


SECTIONS = {
    "default": {"rule": "adamw", "lr": 0.1},
    "patterns": [{"match": "*.[qkv]_proj.weight", "rule": "muon", "lr": 0.1, "view": {"sections": [19, 9, 4]}}],
}


@pytest.mark.parametrize(
    "recipe", ["small-moe", "olmoe", "muon", SECTIONS], ids=["small-moe", "olmoe", "muon", "sections"]
)
@pytest.mark.parametrize(("stage", "world"), [(1, 3), (2, 4), (3, 2), (3, 3)])
def test_the_plan_is_what_is_sent(worlds: Worlds, stage: int, world: int, recipe: RecipeLike) -> None:
    results = worlds(world).run(world, language.counted, language.config(stage, recipe))
    with simulate(language.meta_model(), recipe, mesh={"dp_shard": world}, zero=stage) as simulated:
        for rank, log in enumerate(results):
            planned = CountingTransport()
            simulated.step(planned, rank=rank)
            assert [(moved.kind, moved.size, moved.sent) for moved in planned.log] == log
    assert all(log for log in results)


@pytest.mark.parametrize("stage", [1, 3])
def test_one_exchange_a_step(worlds: Worlds, stage: int) -> None:
    """However many groups and sub-groups DeepSpeed steps one by one."""
    whole = worlds(4).run(4, language.counted, language.config(stage))
    settings = language.config(stage)
    settings["zero_optimization"]["sub_group_size"] = 3000
    parts = worlds(4).run(4, language.counted, settings)
    assert [[kind for kind, _, _ in log] for log in whole] == [[kind for kind, _, _ in log] for log in parts]
