"""FSDP1: every rule on the stretches of flat parameters that ranks hold, equal to one process."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import fsdp1_ranks, parity
from tests.cases import CASES, tensors
from tests.ranks import Ranks

WORLDS = [
    ("full", 2),
    ("full", 3),
    ("full", 4),
    ("hybrid", 2),
    ("hybrid", 3),
    ("hybrid", 4),
    ("grad_op", 3),
    ("none", 2),
]


@cache
def oracle() -> dict[tuple[str, int, str], Tensor]:
    return parity.alone(torch.float64)


@cache
def on_ranks(ranks: Ranks, strategy: str, world: int, bucket_bytes: int = 1 << 30) -> Any:
    return ranks.run(world, fsdp1_ranks.trained, strategy, bucket_bytes)


@pytest.mark.parametrize(("strategy", "world"), WORLDS)
def test_every_rule_is_exact(ranks: Ranks, strategy: str, world: int) -> None:
    seen = set()
    for weights, stepped_by in on_ranks(ranks, strategy, world):
        assert stepped_by == on_ranks(ranks, strategy, world)[0][1]
        for (case, how), weight in weights.items():
            expected, start = oracle()[case, 0, "auto"], tensors(case)[0]
            error = float((weight - expected).norm() / (expected - start).norm())
            assert error < 1e-9, f"{case} {how}: {error}"
            # A weight, or each of its sections.
            ran = {where for name, where in stepped_by.items() if name.partition("[")[0] == f"{case}/{how}"}
            assert ran
            seen |= {(case, where) for where in ran}
    assert {case for case, _ in seen} == set(CASES)
    assert {how for _, how in seen} >= ({"local"} if strategy == "none" else {"owner", "reduce"})


def test_waves_change_nothing(ranks: Ranks) -> None:
    small, large = (on_ranks(ranks, "full", 3, bucket_bytes)[0][0] for bucket_bytes in (4000, 1 << 30))
    assert all((small[key] - large[key]).norm() <= 1e-12 * large[key].norm() for key in large)


@pytest.mark.parametrize("kind", [{}, {"tied": True}, {"frozen": True}], ids=str)
@pytest.mark.parametrize("clip", list(fsdp1_ranks.CLIPS))
@pytest.mark.parametrize(("strategy", "world"), [("full", 2), ("full", 4), ("hybrid", 4), ("grad_op", 3), ("none", 2)])
def test_training_is_that_of_one_process(
    ranks: Ranks, strategy: str, world: int, clip: str, kind: dict[str, Any]
) -> None:
    # FSDP's own clipping knows no float64.
    kind = {**kind, "dtype": torch.float64 if clip == "ours" else torch.float32}
    norms, expected = fsdp1_ranks.alone(clip, kind)
    start = dict(fsdp1_ranks.language(**kind).named_parameters())
    for found, weights in ranks.run(world, fsdp1_ranks.learned, strategy, clip, False, kind):
        assert found == pytest.approx(norms, rel=1e-5)
        assert set(weights) == set(expected)
        for name, weight in weights.items():
            assert (weight - expected[name]).abs().max() < (1e-9 if clip == "ours" else 1e-4)
            assert torch.equal(weight, start[name].detach()) != start[name].requires_grad, name


@pytest.mark.parametrize("strategy", ["full", "none"])
def test_a_model_may_be_wrapped_after_the_optimizer_is_made(ranks: Ranks, strategy: str) -> None:
    expected = fsdp1_ranks.alone("none", {})[1]
    for _, weights in ranks.run(3, fsdp1_ranks.learned, strategy, "none", True, {}):
        assert all((weights[name] - expected[name]).abs().max() < 1e-9 for name in expected)


def test_mixed_precision_keeps_float32_masters(ranks: Ranks) -> None:
    for away in ranks.run(2, fsdp1_ranks.in_low_precision):
        assert max(away.values()) < 0.2
        assert max(away.values()) > 1e-6


@pytest.mark.parametrize("way", ["by names", "flat"])
@pytest.mark.parametrize(
    ("first", "then"), [(("full", 2), ("full", 4)), (("full", 4), ("grad_op", 3)), (("full", 3), ("none", 2))]
)
def test_state_is_cut_anew(ranks: Ranks, way: str, first: tuple[str, int], then: tuple[str, int]) -> None:
    expected = fsdp1_ranks.alone("ours", {})[1]
    weights, state = ranks.run(first[1], fsdp1_ranks.saved, first[0], way)[0]
    for found in ranks.run(then[1], fsdp1_ranks.resumed, then[0], way, weights, state):
        assert all((found[name] - expected[name]).abs().max() < 1e-9 for name in expected)


@pytest.mark.parametrize(("strategy", "world"), [("full", 2), ("full", 4), ("none", 2)])
def test_fsdps_own_functions_save_and_load(ranks: Ranks, strategy: str, world: int) -> None:
    expected = fsdp1_ranks.alone("ours", {})[1]
    for found in ranks.run(world, fsdp1_ranks.resumed_by_fsdp, strategy):
        assert all((found[name] - expected[name]).abs().max() < 1e-9 for name in expected)


def test_what_does_not_tell_of_matrices_is_refused(ranks: Ranks) -> None:
    for said in ranks.run(2, fsdp1_ranks.refused):
        assert all("use_orig_params=True" in message for message in said[:2])
        assert all("symdist.build_optimizer(model, recipe)" in message for message in said[2:])
