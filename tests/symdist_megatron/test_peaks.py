"""Megatron's scheduler says whether a resumed run has the checkpoint's rates or its own, for every matrix alike."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.symdist_megatron.how import How
from tests.symdist_megatron.versions import IDENTIFIED

Worlds = Callable[[int], Ranks]
RESUMED = "tests.symdist_megatron.peaks_ranks:resumed"
FIRST: dict[str, Any] = {"lr": 0.02, "decay": 0.1, "total": 20, "peaks": {"*router*": 0.05}}
# The new peak of one is the old peak of the other.
THEN: dict[str, Any] = {"lr": 0.05, "decay": 0.2, "total": 40, "peaks": {"*router*": 0.03}}
FLAGS = {
    "checkpoint": {"use_checkpoint_opt_param_scheduler": True},
    "config": {"use_checkpoint_opt_param_scheduler": False, "override_opt_param_scheduler": True},
}
SHARDED = "fully_reshardable"
WAYS: dict[str, tuple[How, str | None]] = {
    "plain": (How(dtype="float32", ep=2), None),
    "plain, sharded": (How(dtype="float32", ep=2), SHARDED),
    "bfloat16": (How(dtype="bfloat16", ep=2), None),
    "bfloat16, sharded": (How(dtype="bfloat16", ep=2), SHARDED),
    "distributed": (How(dtype="float32", ep=2, distributed=True), None),
    "distributed, sharded": (How(dtype="bfloat16", ep=2, distributed=True), SHARDED),
    "distributed, by buffers": (How(dtype="float32", distributed=True), "dp_reshardable"),
    "layer by layer": (How(dtype="float32", layer_wise=True), SHARDED),
}


@pytest.mark.parametrize("whose", FLAGS)
@pytest.mark.parametrize("way", WAYS)
def test_rates_are_those_asked_for(worlds: Worlds, way: str, whose: str) -> None:
    """Peaks, ends, warmups and decays, in the recipe's proportion, and where a group of Megatron's has its own peak."""
    how, form = WAYS[way]
    if IDENTIFIED and form != SHARDED:
        pytest.skip("this megatron-core tells groups apart by their peaks and loads none of another, in its own forms")
    for found in worlds(2).run(2, RESUMED, how, form, FIRST, THEN, FLAGS[whose]):
        other = found["config" if whose == "checkpoint" else "checkpoint"]
        assert found["resumed"] == pytest.approx(found[whose])
        assert all(found["resumed"][name] != pytest.approx(rate) for name, rate in other.items() if rate)
        assert any(rate for name, rate in other.items() if name.endswith("weight_decay"))
