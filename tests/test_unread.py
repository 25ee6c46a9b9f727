"""A step and a clip on an accelerator: nothing is read back, nothing changes if a gradient is not finite."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from symdist import SymDist, build_optimizer, clip_grad_norm_
from symdist.gradients import clipping, nonfinite
from symdist.rules import polar_factor
from symdist.rules.linalg import orthonormal
from symdist.step import check_capturable
from symdist.tools.models import build
from tests.cases import CASES, MUON

READS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_consecutive"}


class Watch(TorchDispatchMode):
    """Counts operators besides views, and fails on those for which a host waits for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        assert name not in READS, f"{name} waits for the device"
        # A view launches nothing.
        if not any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns):
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and clips take the CPU for a device that must not be read from."""
    for module in (nonfinite, clipping):
        monkeypatch.setattr(module, "may_read", lambda tensors: False)
    monkeypatch.setattr("symdist.optimizer.may_read", lambda tensors: False)
    monkeypatch.setattr(polar_factor, "_CACHE", 1 << 40)
    monkeypatch.setattr(orthonormal, "_on_host", lambda tensor: False)


Shape = tuple[int, ...]
MATRIX: tuple[Shape, dict[str, Any]] = ((96, 80), MUON)


def model_of(
    case: tuple[Shape, dict[str, Any]], *, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], SymDist]:
    """Two matrices and a vector, and their optimizer."""
    torch.manual_seed(0)
    shape, rule = case
    matrices = [nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(2)]
    vector = nn.Parameter(torch.randn(7, dtype=dtype))
    groups = [
        {"params": matrices, "lr": 0.1, "weight_decay": 0.1, **rule, "strategy": "auto"},
        {"params": [vector], "rule": "adamw", "lr": 0.1, "weight_decay": 0.1},
    ]
    return [*matrices, vector], SymDist(groups, **options)


def grow(parameters: Sequence[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def state_of(optimizer: SymDist) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("extra", [{}, {"cautious_weight_decay": True}], ids=["", "cautious"])
def test_a_step_reads_nothing_and_is_the_same(accelerated: None, name: str, extra: dict[str, Any]) -> None:
    shape, rule = CASES[name][0], {**CASES[name][1], **extra}
    unread, optimizer = model_of((shape, rule))
    read, host = model_of((shape, rule))
    host._reads = lambda: True  # type: ignore[method-assign]
    for step in range(3):
        grow(unread, step)
        grow(read, step)
        with Watch():
            clip_grad_norm_(unread, 1.0)
            optimizer.step()
        clip_grad_norm_(read, 1.0)
        host.step()
    for ours, theirs in zip(unread, read, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_changes_if_a_gradient_is_not_finite(
    accelerated: None, name: str, dtype: torch.dtype, bad: float
) -> None:
    parameters, optimizer = model_of(CASES[name], dtype=dtype, nonfinite="skip")
    grow(parameters, 0)
    optimizer.step()
    grow(parameters, 1)
    before, state = [parameter.detach().clone() for parameter in parameters], state_of(optimizer)
    assert parameters[1].grad is not None
    parameters[1].grad.view(-1)[1] = bad
    optimizer.step()
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert all(torch.equal(new, old) for new, old in zip(state_of(optimizer), state, strict=True))
    assert optimizer.skipped_steps == 1
    grow(parameters, 2)
    optimizer.step()
    assert not any(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("ask", ["step", "state_dict"])
def test_the_error_comes_with_the_next_step_or_question(accelerated: None, ask: str) -> None:
    parameters, optimizer = model_of(MATRIX)
    grow(parameters, 0)
    before = parameters[0].detach().clone()
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = math.nan
    optimizer.step()
    with pytest.raises(FloatingPointError, match="a gradient of param_0 is not finite; no weight was changed"):
        getattr(optimizer, ask)()
    assert torch.equal(parameters[0], before)
    grow(parameters, 1)
    optimizer.step()
    assert not torch.equal(parameters[0], before)


def test_a_clip_leaves_gradients_that_are_not_finite(accelerated: None) -> None:
    parameters, _ = model_of(MATRIX)
    grow(parameters, 0)
    assert parameters[0].grad is not None
    parameters[0].grad[0, 0] = math.inf
    before = [parameter.grad.clone() for parameter in parameters]
    with Watch():
        norm = clip_grad_norm_(parameters, 1.0)
    assert norm.isinf()
    assert all(torch.equal(parameter.grad, old) for parameter, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("recipe", ["muon", "small-moe"])
def test_a_deeper_model_launches_no_more(accelerated: None, recipe: str) -> None:
    counts = []
    for layers in (2, 8, 32):
        model = build("olmoe-tiny", seed=0, overrides={"num_hidden_layers": layers})
        optimizer = build_optimizer(model, recipe)
        for step in range(2):
            grow(list(model.parameters()), step)
            with Watch() as clip:
                clip_grad_norm_(model.parameters(), 1.0)
            with Watch() as watch:
                optimizer.step()
        counts.append(clip.operators + watch.operators)
    for small, large in ((counts[0], counts[1]), (counts[1], counts[2])):
        assert {key: (small[key], n) for key, n in large.items() if small[key] != n} == {}


def test_rates_may_be_tensors() -> None:
    parameters, optimizer = model_of(MATRIX)
    others, with_tensors = model_of(MATRIX)
    for group in with_tensors.param_groups:
        group["lr"], group["weight_decay"] = torch.tensor(0.1), torch.tensor(0.1)
    for step in range(2):
        for all_of, one in ((parameters, optimizer), (others, with_tensors)):
            grow(all_of, step)
            one.step()
    for ours, theirs in zip(parameters, others, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_a_graph_cannot_repeat_is_refused() -> None:
    parameters, optimizer = model_of(MATRIX, capturable=True)
    with pytest.raises(ValueError, match="cannot raise in a graph"):
        optimizer.step()
    parameters, optimizer = model_of(MATRIX, capturable=True, nonfinite="skip")
    with pytest.raises(ValueError, match="param_0 has no gradient"):
        optimizer.step()
    grow(parameters, 0)
    with Watch():
        optimizer.step()


@pytest.mark.parametrize("columns", [[], [3], [0, 1, 9], [11]])
def test_dependent_columns_are_found_without_the_host(monkeypatch: pytest.MonkeyPatch, columns: list[int]) -> None:
    a = torch.randn(2, 40, 12, generator=torch.Generator().manual_seed(0))
    for column in columns:
        # Zero, if it is the first, or a sum of those before.
        a[0, :, column] = a[0, :, :column].sum(-1)
    a[1] = 0
    expected = orthonormal.orthonormal(a)
    monkeypatch.setattr(orthonormal, "_on_host", lambda tensor: False)
    torch.testing.assert_close(orthonormal.orthonormal(a), expected, rtol=0, atol=2e-5)


def test_rates_of_a_graph_are_on_its_device() -> None:
    with FakeTensorMode():
        weight, rate = torch.empty(4, 4, device="cuda"), torch.empty((), device="cuda")
    group = {"params": [weight], "param_names": ["w"], "role": "", "weight_rounding": "nearest", "weight_decay": 0.0}
    check_capturable([{**group, "lr": rate}], [], nonfinite="skip", observed=False)
    check_capturable([{**group, "lr": rate, "weight_decay": rate}], [], nonfinite="skip", observed=False)
    with pytest.raises(ValueError, match=r"lr of param group 'w' is 0\.1, which a graph would keep for ever"):
        check_capturable([{**group, "lr": 0.1}], [], nonfinite="skip", observed=False)
