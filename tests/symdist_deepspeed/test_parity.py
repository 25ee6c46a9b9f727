"""Under DeepSpeed every rule is what it is in one process, wherever ZeRO cuts."""

import random
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
from packaging import version
from torch import Tensor

from tests.cases import KEPT_BY_ENGINES, is_row_rule
from tests.ranks import Ranks
from tests.symdist_deepspeed import engines
from tests.symdist_deepspeed.engines import How

Worlds = Callable[[int], Ranks]
BF16 = {"bf16": {"enabled": True}}


def check(found: list[tuple[dict[str, Tensor], dict[str, Tensor]]], cases: list[str], how: How) -> None:
    """Row rules to 1e-5, spectral ones to 1e-3 of what the weights moved; first moments to 1e-5."""
    weights, moments = engines.alone(cases, how)
    assert {case for case in cases if case not in how.frozen} == {cases[int(name[1:])] for name in weights}
    for on_rank, first in found:
        assert set(on_rank) == set(weights)
        for name, expected in weights.items():
            case = cases[int(name[1:])]
            moved = (expected - engines.weight(name, case).double()).norm()
            assert moved > 0.05
            error = float((on_rank[name].double() - expected).norm() / moved)
            assert error < (1e-5 if is_row_rule(case) else 1e-3), case
            assert (first[name].double() - moments[name]).norm() <= 1e-5 * moments[name].norm(), case


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_rule_at_every_stage(worlds: Worlds, stage: int, world: int, dtype: str) -> None:
    cases = random.Random(f"{stage} {world} {dtype}").sample(KEPT_BY_ENGINES, len(KEPT_BY_ENGINES))
    settings = engines.config(cases, zero_optimization={"stage": stage}, **(BF16 if dtype == "bf16" else {}))
    check(worlds(world).run(world, engines.stepped, cases, settings, How()), cases, How())


CPU = {"device": "cpu"}
WAYS: dict[str, tuple[int, dict[str, Any], dict[str, Any], How]] = {
    "round robin": (3, {"stage": 1, "round_robin_gradients": True}, {}, How()),
    "round robin, aligned": (2, {"stage": 1, "round_robin_gradients": True, "parameter_alignment": True}, BF16, How()),
    "round robin, stage 2": (4, {"stage": 2, "round_robin_gradients": True}, BF16, How(accumulation=2)),
    "aligned": (4, {"stage": 2, "parameter_alignment": True}, {}, How()),
    "accumulated in fp32": (3, {"stage": 1}, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, How(accumulation=2)),
    "accumulated in fp32, stage 2": (2, {"stage": 2}, BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, How()),
    "not contiguous": (3, {"stage": 2, "contiguous_gradients": False, "reduce_scatter": False}, {}, How()),
    "overlapping": (2, {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 100}, {}, How(accumulation=3)),
    "offloaded": (3, {"stage": 2, "offload_optimizer": CPU}, {}, How()),
    "offloaded, through another device": (3, {"stage": 1, "offload_optimizer": CPU}, {}, How(staged=True)),
    "offloaded, stage 1": (2, {"stage": 1, "offload_optimizer": CPU}, BF16, How(groups=True)),
    "offloaded, stage 3": (4, {"stage": 3, "offload_optimizer": CPU, "sub_group_size": 60}, BF16, How()),
    "sub-groups": (3, {"stage": 3, "sub_group_size": 40}, {}, How(groups=True)),
    "sub-groups, from zero.Init": (2, {"stage": 3, "sub_group_size": 100}, BF16, How(zero_init=True)),
    "persistent": (4, {"stage": 3, "stage3_param_persistence_threshold": 100}, {}, How(accumulation=2)),
    "not contiguous, stage 3": (2, {"stage": 3, "contiguous_gradients": False, "overlap_comm": False}, BF16, How()),
    "own groups": (3, {"stage": 1}, {}, How(groups=True)),
    "own groups, stage 0": (2, {"stage": 0}, BF16, How(groups=True, accumulation=2)),
    "frozen": (4, {"stage": 1}, {}, How(frozen=("row", "muon_tall", "adamw"))),
    "frozen, stage 3": (3, {"stage": 3, "sub_group_size": 90}, {}, How(frozen=("row", "muon_tall", "adamw"))),
}


SINCE = {
    "round robin, aligned": "0.19.7",
    "aligned": "0.19.7",
    "not contiguous": "0.19.8",
    "not contiguous, stage 3": "0.16.9",
}
"""The releases whose own code does these right."""


@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_configuration(worlds: Worlds, way: str) -> None:
    """Models and orders of parameters drawn anew for each."""
    world, zero, more, how = WAYS[way]
    if version.parse(deepspeed.__version__) < version.parse(SINCE.get(way, "0")):
        pytest.skip(f"DeepSpeed {deepspeed.__version__} cannot do this, with any optimizer")
    source = random.Random(way)
    cases = source.sample(KEPT_BY_ENGINES, 12) + source.choices(KEPT_BY_ENGINES, k=6)
    cases += [case for case in how.frozen if case not in cases]
    settings = engines.config(cases, how.frozen, zero_optimization=zero, **more)
    check(worlds(world).run(world, engines.stepped, cases, settings, how), cases, how)
