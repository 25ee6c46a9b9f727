"""DeepSpeed's mixture of experts, whose experts have process groups of their own."""

from collections.abc import Callable

import pytest

from tests.ranks import Ranks
from tests.symdist_deepspeed import engines, experts

Worlds = Callable[[int], Ranks]
RECIPE = {
    "embedding": {"rule": "row_norm", "lr": 0.1},
    "head": {"rule": "right_spectral", "lr": 0.03, "centered": True},
    "router": {"rule": "left_spectral", "lr": 0.01},
    "matrix": {"rule": "muon", "lr": 0.02},
    "other": {"rule": "adamw", "lr": 0.01},
}
STEPS = 12


def config(stage: int) -> engines.Config:
    settings = engines.config([], zero_optimization={"stage": stage})
    settings["optimizer"]["params"] = {"recipe": RECIPE}
    return settings


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> list[float]:
    """One rank, stage 0: nothing is cut and nothing is sent."""
    ((found, rules),) = worlds(1).run(1, experts.losses, config(0), 1, STEPS)
    assert found[0] - found[-1] > 0.5
    assert rules["moe.deepspeed_moe.gate.wg.weight"] == "left_spectral"
    assert rules["embedding.weight"] == "row_norm"
    assert rules["head.weight"] == "right_spectral"
    assert rules["moe.deepspeed_moe.experts.deepspeed_experts.0.fc1.weight"] == "muon"
    assert rules["moe.deepspeed_moe.experts.deepspeed_experts.0.fc1.bias"] == "adamw"
    return found


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_losses_are_those_of_one_rank(worlds: Worlds, alone: list[float], stage: int, world: int, ep_size: int) -> None:
    results = worlds(world).run(world, experts.losses, config(stage), ep_size, STEPS)
    for found, _ in results:
        assert found == pytest.approx(alone, abs=1e-4)
