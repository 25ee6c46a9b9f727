"""What one step does to weights and state, in one process: decay, skipped rows, missing and broken gradients, AdamW."""

from typing import Any

import pytest
import torch
from torch import nn

from symdist import SymDist
from symdist.rules import get_rule
from tests.test_optimizer import RULES, advance, every_rule, normal, parameters, same, snapshot, weight

ROW: dict[str, Any] = {"rule": "row_norm", "lr": 0.1}


def one(*shape: int, **group: Any) -> tuple[nn.Parameter, SymDist]:
    w = weight(*shape)
    return w, SymDist([{"params": [w], "lr": 0.1, **group}])


def test_a_missing_gradient_is_a_zero_gradient() -> None:
    first, second = SymDist(every_rule()), SymDist(every_rule())
    for optimizer in (first, second):
        advance(optimizer, 0)
    before = snapshot(first)
    for mine, theirs in zip(parameters(first)[1::2], parameters(second)[1::2], strict=True):
        mine.grad = None
        theirs.grad = torch.zeros_like(theirs)
    for optimizer in (first, second):
        optimizer.step()
    assert same(snapshot(first), snapshot(second))
    held = [i for i, (a, b) in enumerate(zip(snapshot(first), before, strict=True)) if torch.equal(a, b)]
    # Of the last group, which skips rows of zero gradients, the one weight without a gradient.
    assert held == [len(before) - 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_decay_is_decoupled(rule: str, dtype: torch.dtype) -> None:
    """With no gradient but zero, `W ← W·(1 − lr·wd)` and nothing else; with one, decay comes on top of the update."""
    decay = {"weight_decay": 0.5, "skip_zero_grad_rows": False}
    w = weight(8, 6, dtype=dtype)
    start = w.detach().clone()
    optimizer = SymDist([{"params": [w], "lr": 0.25, **RULES[rule], **decay}])
    w.grad = torch.zeros_like(w)
    optimizer.step()
    assert torch.equal(w.detach(), (start.float() * (1 - 0.25 * 0.5)).to(dtype))
    ends = []
    for wd in (0.0, 0.5):
        w = weight(8, 6, dtype=torch.float64)
        optimizer = SymDist([{"params": [w], "lr": 0.25, **RULES[rule], **decay, "weight_decay": wd}])
        advance(optimizer, 0)
        ends.append(w.detach())
    assert torch.allclose(ends[0] - ends[1], 0.125 * normal(8, 6).double(), atol=1e-12)


@pytest.mark.parametrize("view", ["as_stored", "transposed"])
@pytest.mark.parametrize("rule", ["row_norm", "right_spectral", "adamw"])
def test_rows_of_zero_gradients_are_skipped_or_move(rule: str, view: str) -> None:
    for skip in (True, False):
        w, optimizer = one(6, 6, rule=rule, view=view, skip_zero_grad_rows=skip, weight_decay=0.3)
        advance(optimizer, 0)
        before, state = w.detach().clone(), snapshot(optimizer)[1:]
        gradient = normal(6, 6, seed=7)
        (gradient.mT if view == "transposed" else gradient)[[1, 4]] = 0
        w.grad = gradient
        optimizer.step()
        moved = (w.detach() != before).any(dim=1 if view == "as_stored" else 0)
        assert moved.tolist() == [True, not skip, True, True, not skip, True]
        # State takes the zeros in all the same.
        assert not any(torch.equal(a, b) for a, b in zip(snapshot(optimizer)[1:], state, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_and_momentum_are_not_overwritten(dtype: torch.dtype) -> None:
    optimizer = SymDist(every_rule(dtype))
    expected = [torch.zeros_like(optimizer.state[p].get("momentum", p)) for p in parameters(optimizer)]
    for step in range(3):
        for i, p in enumerate(parameters(optimizer)):
            p.grad = normal(*p.shape, seed=100 * step + i, dtype=dtype)
        gradients = [p.grad.clone() for p in parameters(optimizer) if p.grad is not None]
        optimizer.step()
        for i, p in enumerate(parameters(optimizer)):
            assert p.grad is not None
            assert torch.equal(p.grad, gradients[i])
            rule = optimizer.param_groups[i // 2]["rule"]
            if rule != "adamw":
                wide = gradients[i].to(expected[i].dtype)
                expected[i] = 0.95 * expected[i] + wide if rule == "muon" else expected[i].lerp(wide, 1 - 0.95)
                assert torch.equal(optimizer.state[p]["momentum"], expected[i])


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_looks_ahead(nesterov: bool) -> None:
    w, optimizer = one(5, 3, rule="muon", method="exact", adjust_lr="none", nesterov=nesterov, momentum=0.5)
    gradients = [normal(5, 3, seed=i).double() for i in (1, 2)]
    for gradient in gradients:
        before = w.detach().double()
        w.grad = gradient.float()
        optimizer.step()
    momentum = 0.5 * gradients[0] + gradients[1]
    u, _, vh = torch.linalg.svd(gradients[1] + 0.5 * momentum if nesterov else momentum, full_matrices=False)
    assert torch.allclose((before - w.detach().double()) / 0.1, u @ vh, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "skip"),
    [((), False), ((5,), False), ((6, 4), False), ((2, 3, 3, 3), False), ((5,), True), ((6, 4), True)],
)
def test_adamw_is_pytorchs(shape: tuple[int, ...], skip: bool) -> None:
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}
    mine, theirs = weight(*shape, dtype=torch.float64), weight(*shape, dtype=torch.float64)
    ours = SymDist([{"params": [mine], "rule": "adamw", "skip_zero_grad_rows": skip, **options}])
    reference = torch.optim.AdamW([theirs], **options)
    for step in range(5):
        mine.grad = normal(*shape, seed=step).double()
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-14)


def _type(rule: str, option: str) -> type:
    return type(get_rule(RULES[rule]["rule"]).defaults.get(option))


EXTREMES = [
    RULES[rule] | options
    for rule in RULES
    for options in ({}, {"eps": "reference"}, {"eps": 0.0}, {"damping": 0.0})
    if rule != "adamw_hold" and all(type(value) is _type(rule, key) for key, value in options.items())
]


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1), (5, 6)])
@pytest.mark.parametrize("group", EXTREMES)
def test_thin_and_zero_matrices_stay_finite(group: dict[str, Any], shape: tuple[int, int]) -> None:
    w, optimizer = one(*shape, **group)
    start = w.detach().clone()
    w.grad = torch.zeros(shape)
    optimizer.step()
    assert torch.equal(w, start)
    advance(optimizer, 1)
    assert w.isfinite().all()
    assert (w.detach() - start).abs().max(dim=0).values.sum() < 10
    if "centered" not in group:
        assert not torch.equal(w, start)


@pytest.mark.parametrize("rule", ["row_norm", "hybrid"])
@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-22, 1e-18])
def test_a_vanishing_row_is_not_magnified(rule: str, scale: float) -> None:
    """Squares of such rows are zero in float32; a row that has seen no gradient for long decays to this."""
    w, optimizer = one(8, 4, rule=rule)
    gradient = normal(8, 4, seed=3)
    gradient[2] *= scale
    start = w.detach().clone()
    w.grad = gradient
    optimizer.step()
    moved = (w.detach() - start).norm(dim=1) / 0.1
    assert moved.max() < 1.5
    assert moved[[0, 1, 3]].min() > 0.1


@pytest.mark.parametrize("scale", [1e-9, 1e-15, 1e-21, 1e-24, 1e-30, 1e-38])
@pytest.mark.parametrize("rule", RULES)
def test_a_vanishing_momentum_stays_bounded(rule: str, scale: float) -> None:
    """An expert without tokens for a thousand steps has such a momentum, in one stack with those that have theirs."""
    w, optimizer = one(2, 8, 6, **RULES[rule])
    start = w.detach().clone()
    w.grad = normal(2, 8, 6, seed=3)
    w.grad[1] *= scale
    optimizer.step()
    moved = (w.detach() - start).abs().amax((1, 2))
    assert moved.max() < 0.5
    assert moved[0] > 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero"])
def test_gradients_that_are_not_finite(nonfinite: str, bad: float) -> None:
    optimizer, reference = (SymDist(every_rule(), nonfinite=nonfinite) for _ in range(2))  # type: ignore[arg-type]
    for each in (optimizer, reference):
        advance(each, 0)
    before = snapshot(optimizer)
    for i, p in enumerate(parameters(optimizer)):
        p.grad = normal(*p.shape, seed=100 + i)
        parameters(reference)[i].grad = p.grad.clone()
    for i in (3, len(parameters(optimizer)) - 1):
        for each, value in ((optimizer, bad), (reference, 0.0)):
            gradient = parameters(each)[i].grad
            assert gradient is not None
            gradient[2, 1] = value
    if nonfinite == "raise":
        with pytest.raises(
            FloatingPointError, match=r"of row_centered_columns.1, adamw_hold.1 is not finite; no weight"
        ):
            optimizer.step()
        assert same(snapshot(optimizer), before)
        assert optimizer.skipped_steps == 0
    elif nonfinite == "skip":
        optimizer.step()
        optimizer.step()
        assert same(snapshot(optimizer), before)
        assert optimizer.skipped_steps == 2
    else:
        optimizer.step()
        reference.step()
        assert same(snapshot(optimizer), snapshot(reference))
        assert optimizer.skipped_steps == 0
    advance(optimizer, 2)
    assert not any(torch.equal(a, b) for a, b in zip(snapshot(optimizer), before, strict=True))


def test_a_gradient_whose_square_overflows_is_finite() -> None:
    w, optimizer = one(4, 3, rule="adamw")
    start = w.detach().clone()
    # Its square, and so the sum that first tells, is not.
    w.grad = torch.full((4, 3), 1e34)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert w.isfinite().all()
    assert w.shape == start.shape


def test_a_sparse_gradient_is_refused_by_name() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    optimizer = SymDist([{"params": list(embedding.named_parameters()), **ROW}])
    with pytest.raises(ValueError, match=r"weight has a sparse gradient.*sparse=False"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
def test_a_weight_need_not_be_contiguous(rule: str, dtype: torch.dtype) -> None:
    ends = []
    for turn in (False, True):
        w = nn.Parameter(normal(6, 8, dtype=dtype).mT if turn else normal(6, 8, dtype=dtype).mT.contiguous())
        assert w.is_contiguous() != turn
        optimizer = SymDist([{"params": [w], "lr": 0.1, **RULES[rule]}])
        advance(optimizer, 0)
        ends.append(w.detach())
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
