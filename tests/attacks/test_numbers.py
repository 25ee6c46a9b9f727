"""Numbers at the ends of their range: nothing overflows on the way, and what has no digits left is not magnified."""

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, clip_grad_norm_
from tests.cases import CASES, tensors

Group = dict[str, Any]

# PyTorch's AdamW has an absolute eps and squares in float32; nuclear norms are of the gradient's scale by their name.
SCALED = [case for case, (_, group) in CASES.items() if group["rule"] == "adamw" or group.get("alpha")]
REFERENCE: Group = {"rule": "row_norm", "eps": "reference"}


def steps(group: Group, weight: Tensor, gradients: list[Tensor], clip: float | None = None) -> Tensor:
    parameter = nn.Parameter(weight.clone())
    optimizer = SymDist([{"params": [("w", parameter)], "lr": 0.1, **group}])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        if clip is not None:
            clip_grad_norm_([parameter], clip)
        optimizer.step()
    return parameter.detach() - weight


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-8, 1e18, 1e30])
@pytest.mark.parametrize("case", [case for case in CASES if case not in SCALED])
def test_no_update_hangs_on_the_gradients_scale(case: str, scale: float) -> None:
    group = CASES[case][1] | {"weight_decay": 0.0}
    weight, gradients = tensors(case)
    expected = steps(group, torch.zeros_like(weight).float(), [each.float() for each in gradients])
    found = steps(group, torch.zeros_like(weight).float(), [(each * scale).float() for each in gradients])
    assert found.isfinite().all()
    assert (found - expected).norm() <= 2e-3 * expected.norm()


def test_the_published_eps_does_hang_on_it() -> None:
    weight, gradients = tensors("row")
    expected = steps(REFERENCE, weight, gradients)
    assert (steps(REFERENCE, weight, [each * 1e-8 for each in gradients]) - expected).norm() > 0.3 * expected.norm()


@pytest.mark.parametrize("clip", [None, 1.0, 1e-30])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e25, 1e33])
@pytest.mark.parametrize("case", CASES)
def test_finite_gradients_leave_weights_finite(case: str, scale: float, clip: float | None) -> None:
    weight, gradients = tensors(case)
    group = CASES[case][1] | ({"alpha": 0.0} if CASES[case][1].get("alpha") else {})
    moved = steps(group, weight.float(), [(each.sign() * scale).float() for each in gradients], clip)
    assert moved.isfinite().all()


ONE_A_RULE = list({group["rule"]: case for case, (_, group) in CASES.items()}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("cases", [ONE_A_RULE, list(CASES)], ids=["one a rule", "all"])
def test_an_idle_expert_stays_finite(cases: list[str], dtype: torch.dtype) -> None:
    """A thousand steps without a gradient: from 1e-30 on, momentum is denormal after 400, and stuck after 700."""
    groups, parameters = [], []
    for case in cases:
        group = CASES[case][1]
        weight, gradients = tensors(case)
        parameters.append(nn.Parameter(weight.to(dtype)))
        parameters[-1].grad = (gradients[0] * 1e-30).to(dtype)
        groups.append({"params": [(case, parameters[-1])], "lr": 1e-4, **copy.deepcopy(group)})
    with pytest.warns(UserWarning, match="bfloat16") if dtype == torch.bfloat16 else nullcontext():
        optimizer = SymDist(groups)
    for step in range(1000):
        optimizer.step()
        if step == 0:
            optimizer.zero_grad()
    for parameter in parameters:
        assert parameter.isfinite().all()
        assert all(state.isfinite().all() for state in optimizer.state[parameter].values())


@pytest.mark.parametrize("value", [3e38, -2e34])
def test_what_would_overflow_counts_as_not_finite(value: float) -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    weight.grad = torch.ones(4, 3)
    weight.grad[1, 2] = value
    optimizer = SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1}])
    with pytest.raises(FloatingPointError, match=r"of w is not finite; no weight was changed\. .*larger than 1e\+34"):
        optimizer.step()
    assert weight.eq(1).all()
    SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1}], nonfinite="zero").step()
    assert weight.isfinite().all()
    assert not weight.eq(1).all()


def test_weights_of_few_digits_are_warned_of() -> None:
    narrow, wide = nn.Parameter(torch.ones(4, 4).bfloat16()), nn.Parameter(torch.ones(4, 4))
    groups = [{"params": [("wide", wide), ("narrow", narrow)], "rule": "muon", "lr": 0.1}]
    with pytest.warns(
        UserWarning, match=r"1 weights, the first of them narrow, are bfloat16.*MixedPrecisionPolicy"
    ) as told:
        SymDist(groups)
    assert told[0].filename == __file__
    narrow.requires_grad_(False)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SymDist(groups)
