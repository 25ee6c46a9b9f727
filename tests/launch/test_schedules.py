"""Schedules: values at the joints, choice per group, and a JSON round trip of the scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from launch.loop.schedules import Schedule, build_scheduler


def test_linear_holds_then_falls_to_final() -> None:
    schedule = Schedule(shape="linear", warmup=4, constant=0.5, final=0.1)
    assert [schedule.factor(step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert {schedule.factor(step, 20) for step in range(4, 11)} == {1.0}
    assert schedule.factor(15, 20) == pytest.approx(0.55)
    assert schedule.factor(20, 20) == schedule.factor(25, 20) == 0.1
    falling = [schedule.factor(step, 20) for step in range(10, 21)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) == len(falling)


def test_linear_waits_for_a_long_warmup() -> None:
    schedule = Schedule(shape="linear", warmup=8, constant=0.2)
    assert schedule.factor(7, 10) == 1.0
    assert schedule.factor(8, 10) == 1.0
    assert schedule.factor(9, 10) == pytest.approx(0.5)


def test_linear_without_a_fall_is_one_up_to_the_last_step() -> None:
    schedule = Schedule(shape="linear", constant=1.0)
    assert {schedule.factor(step, 7) for step in range(7)} == {1.0}


def test_cosine_falls_from_the_end_of_warmup() -> None:
    schedule = Schedule(shape="cosine", warmup=2, final=0.2)
    assert schedule.factor(0, 10) == 0.5
    assert schedule.factor(2, 10) == 1.0
    assert schedule.factor(6, 10) == pytest.approx(0.6)
    assert schedule.factor(4, 10) == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert schedule.factor(10, 10) == 0.2


def test_constant_only_warms_up() -> None:
    schedule = Schedule(shape="constant", warmup=2, final=0.3)
    assert [schedule.factor(step, 5) for step in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule(shape="square"), "unknown schedule shape 'square'"),  # type: ignore[arg-type]
        (lambda: Schedule(shape="linear", constant=1.5), "constant is 1.5"),
        (lambda: Schedule(shape="linear", constant=-0.1), "constant is -0.1"),
        (lambda: Schedule(shape="linear", warmup=-1), "cannot be negative"),
        (lambda: Schedule(shape="linear", warmup=11).factor(0, 10), "11 steps but the run has only 10"),
        (lambda: Schedule(shape="linear").factor(0, 0), "at least one step"),
    ],
)
def test_wrong_values_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def _optimizer() -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    return torch.optim.SGD(
        [
            {"params": [weights[0]], "lr": 1.0, "role": "head", "rule": "sign"},
            {"params": [weights[1]], "lr": 2.0, "role": "norm", "rule": "sign"},
            {"params": [weights[2]], "lr": 4.0, "role": "norm", "rule": "adamw"},
        ],
        lr=1.0,
    )


_SCHEDULES = {
    "head": Schedule(shape="constant", warmup=2),
    "sign": Schedule(shape="linear", constant=0.0),
    "default": Schedule(shape="constant", warmup=4),
}


def test_role_goes_before_rule_before_default() -> None:
    optimizer = _optimizer()
    scheduler = build_scheduler(optimizer, _SCHEDULES, 4)
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert seen == [[0.5, 2.0, 1.0], [1.0, 1.5, 2.0], [1.0, 1.0, 3.0], [1.0, 0.5, 4.0]]


def test_a_role_takes_the_schedule_of_the_one_it_falls_back_to() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight], "role": "output_norm", "rule": "sign"}], lr=1.0)
    build_scheduler(optimizer, _SCHEDULES | {"norm": Schedule(shape="constant", warmup=5)}, 5)
    assert optimizer.param_groups[0]["lr"] == 0.2


def test_group_without_schedule_is_named() -> None:
    with pytest.raises(ValueError, match=r"group 2 \(role 'norm', rule 'adamw'\) has no schedule"):
        build_scheduler(_optimizer(), {"head": _SCHEDULES["head"], "sign": _SCHEDULES["sign"]}, 4)


def test_groups_of_many_roles_say_their_schedule() -> None:
    optimizer = _optimizer()
    optimizer.param_groups[1]["schedule"] = "head"
    optimizer.param_groups[2]["schedule"] = None
    build_scheduler(optimizer, _SCHEDULES, 4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0, 1.0]
    group = {"params": [torch.nn.Parameter(torch.ones(2))], "rules": {"norm": "adamw", "bias": "adamw"}}
    many = torch.optim.SGD([{**group, "schedule": None}], lr=1.0)
    with pytest.raises(ValueError, match=r"group 0 \(rules by role: norm adamw, bias adamw\) has no schedule"):
        build_scheduler(many, {"head": _SCHEDULES["head"]}, 4)


def test_warmup_longer_than_the_run_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match="4 steps but the run has only 3"):
        build_scheduler(_optimizer(), _SCHEDULES, 3)


def test_state_continues_after_json() -> None:
    def rates(optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR) -> list[list[float]]:
        seen = []
        for _ in range(3):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return seen

    optimizer = _optimizer()
    scheduler = build_scheduler(optimizer, _SCHEDULES, 7)
    rates(optimizer, scheduler)
    state = json.loads(json.dumps(scheduler.state_dict()))
    optimizer_state = optimizer.state_dict()
    expected = rates(optimizer, scheduler)

    restored = _optimizer()
    restored_scheduler = build_scheduler(restored, _SCHEDULES, 7)
    restored.load_state_dict(optimizer_state)
    restored_scheduler.load_state_dict(state)
    assert rates(restored, restored_scheduler) == expected
