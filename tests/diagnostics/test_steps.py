"""Measures of a step are those of the whole model on every mesh, and a step that waits says for what."""

import math
from functools import cache
from typing import Any

import pytest
import torch

from symdist.diagnostics import StepMonitor
from tests.diagnostics import steps_ranks
from tests.models.parallel_ranks import Mesh
from tests.ranks import Ranks

RECIPE: dict[str, Any] = {
    "embedding": {"rule": "right_spectral", "lr": 0.02, "momentum": 0.9},
    "head": {"rule": "row_norm", "centered": True, "lr": 0.01, "weight_decay": 0.1},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "muon", "lr": 0.01},
    "experts": {"rule": "polar", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 1e-3, "weight_decay": 0.01},
}


@cache
def alone() -> tuple[dict[str, float], dict[str, float]]:
    """What the monitor says of one process, and the same from weights before and after, by role."""
    model, optimizer = steps_ranks.prepared(RECIPE)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    monitor = StepMonitor(optimizer)
    monitor.arm()
    optimizer.step()
    said = monitor.summary()
    after = dict(model.named_parameters())
    expected: dict[str, float] = {}
    for role in {group["role"] for group in optimizer.param_groups}:
        groups = [group for group in optimizer.param_groups if group["role"] == role]
        steps = torch.cat(
            [
                (before[name] * (1 - group["lr"] * group["weight_decay"]) - after[name].detach()).flatten()
                for group in groups
                for name in group["param_names"]
            ]
        )
        weights = torch.cat([after[name].detach().flatten() for group in groups for name in group["param_names"]])
        expected[f"update_rms/{role}"] = float(steps.square().mean().sqrt())
        expected[f"weight_rms/{role}"] = float(weights.square().mean().sqrt())
    momentum = optimizer.state[after["model.embed_tokens.weight"]]["momentum"]
    expected["nu/embedding"] = float(torch.linalg.svdvals(momentum).sum())
    return said, expected


def test_they_are_those_of_weights_before_and_after() -> None:
    said, expected = alone()
    nu = expected.pop("nu/embedding")
    assert {name: said[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    # By the polynomial of the rule, not by singular values.
    assert said["nu/embedding"] == pytest.approx(nu, rel=0.05)
    assert {name for name in said if name.startswith("nu/attention")} == {f"nu/attention_{part}" for part in "kvqo"}
    assert {name for name in said if name.startswith("optimizer_ms/")} == {
        "optimizer_ms/coordinate",
        "optimizer_ms/local",
    }


@pytest.mark.parametrize(
    "shape",
    [{"dp_shard": 4}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "ep": 2}],
    ids=str,
)
def test_they_are_the_same_on_every_mesh(ranks: Ranks, shape: Mesh) -> None:
    expected = {name: value for name, value in alone()[0].items() if not name.startswith("optimizer_ms")}
    found = ranks.run(math.prod(shape.values()), steps_ranks.measured, shape, RECIPE)
    assert all(each == found[0] for each in found)
    assert {name: found[0][name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert found[0]["optimizer_ms/owner"] > 0
    assert found[0]["optimizer_ms/exchange"] > 0


def test_a_step_that_was_not_armed_is_not_measured() -> None:
    _, optimizer = steps_ranks.prepared(RECIPE)
    monitor = StepMonitor(optimizer)
    optimizer.step()
    assert monitor.summary() == {}
    monitor.arm()
    optimizer.skip_next_step()
    optimizer.step()
    assert monitor.summary() == {}
    assert optimizer.skipped_steps == 1


def test_a_step_that_is_left_out_changes_nothing() -> None:
    model, optimizer = steps_ranks.prepared(RECIPE)
    before = [weight.detach().clone() for weight in model.parameters()]
    momenta = [state["momentum"].clone() for state in optimizer.state.values() if "momentum" in state]
    optimizer.skip_next_step()
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    now = [state["momentum"] for state in optimizer.state.values() if "momentum" in state]
    assert all(torch.equal(old, new) for old, new in zip(momenta, now, strict=True))
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_rank_that_waits_says_for_what(ranks: Ranks) -> None:
    seen, _ = ranks.run(2, steps_ranks.waited_for, RECIPE)
    assert seen[-1] == ""
    told = next(where for where in seen if "gather over ranks " in where)
    assert told.startswith("wave 1 of 1, gather over ranks 0, 1 for model.layers.0.self_attn.")
    assert told.endswith(" more")


def test_a_collective_that_fails_is_named(ranks: Ranks) -> None:
    for said in ranks.run(2, steps_ranks.broken_off, RECIPE):
        assert "wave 1 of 1, gather over ranks 0, 1 for model.layers.0.self_attn." in said
        assert said.endswith("failed: connection closed by peer")
