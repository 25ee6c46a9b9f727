"""Steps on a card: the host never waits, a graph may capture them, and ranks exchange over NCCL."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist, clip_grad_norm_

Shape = tuple[int, ...]
GROUPS: dict[str, tuple[Shape, dict[str, Any]]] = {
    "row_norm": ((96, 80), {"rule": "row_norm", "centered": True}),
    "row_norm, held rows": ((96, 80), {"rule": "row_norm", "skip_zero_grad_rows": True, "padding_rows": 3}),
    "right_spectral": ((192, 80), {"rule": "right_spectral", "centered": True, "alpha": 1.0}),
    "left_spectral": ((16, 96), {"rule": "left_spectral", "centered": True, "alpha": 0.5}),
    "hybrid": ((96, 80), {"rule": "hybrid"}),
    "polar": ((96, 80), {"rule": "polar", "alpha": 1.0}),
    "muon": ((96, 80), {"rule": "muon"}),
    "muon, cautious": ((96, 80), {"rule": "muon", "cautious_weight_decay": True}),
    "muon, experts": ((4, 96, 80), {"rule": "muon"}),
    "muon, large": ((1280, 1024), {"rule": "muon"}),
    "normuon": ((96, 80), {"rule": "normuon"}),
    "aurora": ((96, 80), {"rule": "aurora"}),
    "scion": ((96, 80), {"rule": "scion"}),
    "aro": ((80, 96), {"rule": "aro"}),
    "aro, adam": ((80, 96), {"rule": "aro", "base": "adam"}),
    "aro, one rotation": ((80, 96), {"rule": "aro", "share": "residual_stage", "role": "attention_o"}),
    "adamw": ((96, 80), {"rule": "adamw"}),
    "adamw, cautious": ((96, 80), {"rule": "adamw", "cautious_weight_decay": True}),
}
PRECISIONS = ("float32", "float16", "bfloat16")
LR, DECAY = 0.05, 0.1
# Two layers, for rules that go by them.
NAMES = ("layers.0.weight", "layers.1.weight", "norm")


def model_of(card: torch.device, name: str, **options: Any) -> tuple[list[nn.Parameter], SymDist]:
    """Two matrices and a vector on the card, and their optimizer. What is not an option of SymDist is of the rule."""
    generator = torch.Generator().manual_seed(0)
    shape, rule = GROUPS[name]
    own = {key: options.pop(key) for key in ("precision", "weight_rounding") if key in options}
    dtype = options.pop("dtype", torch.float32)
    parameters = [nn.Parameter(torch.randn(size, generator=generator).to(card, dtype)) for size in (shape, shape, (7,))]
    named = [*zip(NAMES, parameters, strict=True)]
    groups = [
        {"params": named[:2], "lr": LR, "weight_decay": DECAY, **rule, **own},
        {"params": named[2:], "rule": "adamw", "lr": LR, "weight_decay": DECAY},
    ]
    return parameters, SymDist(groups, **options)


def grow(parameters: Sequence[nn.Parameter], seed: int) -> None:
    """Give all parameters gradients, in the memory of those that they have."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raise an error where the host would wait for the card."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def held_by(parameters: Sequence[nn.Parameter], optimizer: SymDist) -> list[Tensor]:
    """Copies of all weights and state."""
    state = [value for of_parameter in optimizer.state.values() for value in of_parameter.values()]
    return [tensor.detach().clone() for tensor in (*parameters, *state)]


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "zero"])
@pytest.mark.parametrize("name", GROUPS)
def test_a_step_never_waits(card: torch.device, name: str, nonfinite: str) -> None:
    parameters, optimizer = model_of(card, name, nonfinite=nonfinite)
    check_that_no_step_waits(parameters, optimizer)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name, (_, group) in GROUPS.items() if group["rule"] in ("polar", "muon")])
def test_no_precision_waits(card: torch.device, name: str, precision: str) -> None:
    check_that_no_step_waits(*model_of(card, name, precision=precision))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["muon", "row_norm, held rows", "adamw"])
def test_no_weights_in_bfloat16_wait(card: torch.device, name: str, rounding: str) -> None:
    check_that_no_step_waits(*model_of(card, name, dtype=torch.bfloat16, weight_rounding=rounding))


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_rates_on_the_card_never_wait(card: torch.device, nonfinite: str) -> None:
    parameters, optimizer = model_of(card, "muon", nonfinite=nonfinite)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = torch.tensor(LR, device=card), torch.tensor(DECAY, device=card)
    check_that_no_step_waits(parameters, optimizer)


def check_that_no_step_waits(parameters: list[nn.Parameter], optimizer: SymDist) -> None:
    """After a first step, in which kernels are compiled and handles are made."""
    for seed in range(3):
        grow(parameters, seed)
        before = held_by(parameters, optimizer)
        if seed == 0:
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        else:
            with never_waiting():
                clip_grad_norm_(parameters, 1.0)
                optimizer.step()
        assert not any(map(torch.equal, parameters, before))
        assert all(parameter.isfinite().all() for parameter in parameters)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("name", GROUPS)
def test_nothing_changes_if_a_gradient_is_not_finite(card: torch.device, name: str, nonfinite: str, bad: float) -> None:
    parameters, optimizer = model_of(card, name, nonfinite=nonfinite)
    grow(parameters, 0)
    optimizer.step()
    grow(parameters, 1)
    assert parameters[1].grad is not None
    parameters[1].grad.view(-1)[1] = bad
    before = held_by(parameters, optimizer)
    with never_waiting():
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert same(held_by(parameters, optimizer), before)
    if nonfinite == "raise":
        with pytest.raises(
            FloatingPointError, match=r"a gradient of layers\.1\.weight is not finite; no weight was changed"
        ):
            optimizer.step()
        assert same(held_by(parameters, optimizer), before)
    else:
        assert optimizer.skipped_steps == 1
    grow(parameters, 2)
    optimizer.step()
    assert not any(map(torch.equal, parameters, before))
    assert optimizer.skipped_steps == (1 if nonfinite == "skip" else 0)


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """Capture a step in a graph, which runs nothing yet, and return what replays it."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@contextmanager
def beside() -> Iterator[None]:
    """Run on a stream of its own, as what is captured later must have been before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
@pytest.mark.parametrize("name", GROUPS)
def test_a_graph_repeats_a_step(card: torch.device, name: str, nonfinite: str) -> None:
    parameters, optimizer = model_of(card, name, nonfinite=nonfinite, capturable=True)
    rates = [torch.tensor(LR, device=card) for _ in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"], group["weight_decay"] = rate, torch.tensor(DECAY, device=card)
    others, plain = model_of(card, name, nonfinite=nonfinite)
    warm_up, replays = 2, 3
    with beside():
        for seed in range(warm_up):
            grow(parameters, seed)
            optimizer.step()
    addresses = [parameter.grad.data_ptr() for parameter in parameters if parameter.grad is not None]
    before = held_by(parameters, optimizer)
    replay = captured(optimizer.step)
    assert same(held_by(parameters, optimizer), before), "a capture runs nothing"
    for seed in range(warm_up + replays):
        lr = LR if seed < warm_up else LR / (seed + 1)
        grow(others, seed)
        for group in plain.param_groups:
            group["lr"] = lr
        plain.step()
        if seed >= warm_up:
            grow(parameters, seed)
            for rate in rates:
                rate.fill_(lr)
            replay()
            for ours, theirs in zip(parameters, others, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    assert addresses == [parameter.grad.data_ptr() for parameter in parameters if parameter.grad is not None]
    if nonfinite == "skip":
        before = held_by(parameters, optimizer)
        assert parameters[0].grad is not None
        parameters[0].grad.view(-1)[0] = math.nan
        replay()
        assert same(held_by(parameters, optimizer), before)
        assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_numbers_that_a_graph_would_keep_are_refused(card: torch.device, key: str) -> None:
    parameters, optimizer = model_of(card, "muon", nonfinite="skip", capturable=True)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = torch.tensor(LR, device=card), torch.tensor(DECAY, device=card)
    grow(parameters, 0)
    optimizer.param_groups[0][key] = 0.1
    with pytest.raises(ValueError, match=f"capturable=True: {key} of param group .* is 0.1"):
        optimizer.step()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ranks_over_nccl_are_one_process(tmp_path: Path, precision: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA cards, and there are {torch.cuda.device_count()}")
    from tests.gpu import nccl_ranks

    changes = nccl_ranks.on_ranks(tmp_path, 2, precision)
    expected = nccl_ranks.changes_alone(precision="float32")
    bound = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 2e-1}[precision]
    assert changes.keys() == expected.keys()
    for name, change in expected.items():
        assert (changes[name] - change).norm() < bound * change.norm(), name
