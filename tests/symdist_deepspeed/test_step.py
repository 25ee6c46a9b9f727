"""What happens around the rules in a step: clipping, loss scaling, gradients that are not finite, schedules."""

from collections.abc import Callable

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from tests.cases import is_row_rule
from tests.ranks import Ranks
from tests.symdist_deepspeed import engines, language
from tests.symdist_deepspeed.engines import How

Worlds = Callable[[int], Ranks]
CASES = ["row_centered", "muon_tall", "adamw_vector", "hybrid", "right", "polar_experts"]
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_comes_before_the_rule(worlds: Worlds, stage: int) -> None:
    settings = engines.config(CASES, zero_optimization={"stage": stage}) | {"gradient_clipping": 7.5}
    expected, moments = engines.alone(CASES, How(), clip=7.5)
    loose = engines.alone(CASES, How())[0]
    for found, first in worlds(3).run(3, engines.stepped, CASES, settings, How()):
        for i, case in enumerate(CASES):
            name = f"p{i}"
            moved = (expected[name] - engines.weight(name, case).double()).norm()
            bound = 1e-4 if is_row_rule(case) else 1e-3
            assert (found[name].double() - expected[name]).norm() < bound * moved
            assert (loose[name] - expected[name]).norm() > 5 * bound * moved
            assert (first[name].double() - moments[name]).norm() <= 1e-5 * moments[name].norm()


@pytest.mark.skipif(not get_accelerator().is_fp16_supported(), reason="this CPU has no float16")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_overflow_skips_on_all_ranks(worlds: Worlds, stage: int) -> None:
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 100}
    settings = engines.config(CASES, zero_optimization={"stage": stage}, fp16=fp16)
    for scales, moved, steps in worlds(2).run(2, engines.overflowing, CASES, settings):
        assert scales == [256.0, 128.0, 128.0, 128.0]
        assert moved == [True, False, True, True]
        assert steps == [1.0, 1.0, 2.0, 3.0]


# Stages 0 and 3 find it themselves, and leave the step out.
@pytest.mark.parametrize("stage", [1, 2])
def test_what_deepspeed_lets_through_is_found(worlds: Worlds, stage: int) -> None:
    bf16 = {"enabled": True, "check_grad_overflow": False}
    settings = engines.config(CASES, zero_optimization={"stage": stage}, bf16=bf16)
    for message, still, goes_on, skipped in worlds(2).run(2, engines.nonfinite, CASES, settings):
        assert "is not finite; no weight was changed" in message
        assert still
        assert goes_on
        assert skipped == 0
    settings["optimizer"]["params"]["nonfinite"] = "skip"
    for message, still, goes_on, skipped in worlds(2).run(2, engines.nonfinite, CASES, settings):
        assert (message, still, goes_on, skipped) == ("", True, True, 1)


@pytest.mark.skipif(not hasattr(DeepSpeedZeroOptimizer, "offload_states"), reason="this DeepSpeed moves nothing away")
@pytest.mark.parametrize("stage", [1, 2])
def test_states_may_be_moved_away_and_back(worlds: Worlds, stage: int) -> None:
    settings = engines.config(CASES, zero_optimization={"stage": stage}, **BF16)
    expected = engines.alone(CASES, How(groups=True))[0]
    for alike, weights, _ in worlds(2).run(2, engines.moved_away, CASES, settings):
        assert alike == [True, True, True]
        for name, weight in weights.items():
            assert (weight.double() - expected[name]).norm() < 1e-3 * expected[name].norm()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_step_broken_off_leaves_nothing(worlds: Worlds, stage: int) -> None:
    settings = engines.config(CASES, zero_optimization={"stage": stage, "sub_group_size": 100})
    expected = engines.alone(CASES, How())[0]
    for message, weights, _ in worlds(2).run(2, engines.broken_off, CASES, settings):
        assert "of the loaded checkpoint has rules" in message
        for name, weight in weights.items():
            assert (weight.double() - expected[name]).norm() < 1e-3 * expected[name].norm()


def test_schedules_keep_rates_in_proportion(worlds: Worlds) -> None:
    """`lr` is the rate of the matrices; DeepSpeed's schedulers set it, and all others follow."""
    recipe = engines.recipe(CASES)
    recipe["patterns"][0]["lr"] = 4 * engines.LR
    settings = engines.config(CASES, zero_optimization={"stage": 1})
    settings["optimizer"]["params"] = {"recipe": recipe, "lr": 2 * engines.LR}
    scheduler = {"warmup_min_lr": 0.0, "warmup_max_lr": 0.5, "warmup_num_steps": 4, "warmup_type": "linear"}
    settings["scheduler"] = {"type": "WarmupLR", "params": scheduler}
    for rates, _ in worlds(2).run(2, engines.scheduled, CASES, settings):
        assert all(max(of_step) == pytest.approx(4 * min(of_step)) for of_step in rates)
        assert [min(of_step) for of_step in rates] == pytest.approx([0.0, 0.0, 0.125, 0.25])


def test_own_scale_of_a_recipe(worlds: Worlds) -> None:
    """Twice the rate of the matrices is twice every rate."""
    settings = engines.config(CASES, zero_optimization={"stage": 2})
    settings["optimizer"]["params"]["lr"] = 2 * engines.LR
    one = How(steps=1)
    expected = engines.alone(CASES, one)[0]
    for found, _ in worlds(2).run(2, engines.stepped, CASES, settings, one):
        for i, case in enumerate(CASES):
            start = engines.weight(f"p{i}", case)
            decay = 1 - 0.1 * 2 * engines.LR if case in ("muon_tall", "right") else 1.0
            kept = 1 - 0.1 * engines.LR if case in ("muon_tall", "right") else 1.0
            twice = start * decay + 2 * (expected[f"p{i}"].float() - start * kept)
            assert torch.allclose(found[f"p{i}"], twice, atol=1e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_weights_are_one(worlds: Worlds, stage: int) -> None:
    ((alone, _),) = worlds(1).run(1, language.tied, language.config(0))
    for losses, roles in worlds(2).run(2, language.tied, language.config(stage)):
        assert losses == pytest.approx(alone, abs=1e-4)
        assert losses[0] - losses[-1] > 0.1
        assert roles["model.embed_tokens.weight"] == "tied_embedding"
        assert "lm_head.weight" not in roles
