"""Where a weight lies in memory: any strides, and nothing beside it is touched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import SymDist
from tests.cases import CASES, LR, STEPS, tensors

# A storage, and the weight as a view of it that has `shape`.
Lying = Callable[[tuple[int, ...]], tuple[Tensor, Callable[[Tensor], Tensor]]]


def wider(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Some columns of a wider tensor: gaps in every row."""
    return torch.zeros(*shape[:-1], shape[-1] + 3), lambda base: base[..., 1 : shape[-1] + 1]


def taller(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Some rows of a taller tensor."""
    return torch.zeros(shape[0] + 3, *shape[1:]), lambda base: base[2 : shape[0] + 2]


def transposed(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return torch.zeros(*reversed(shape)), lambda base: base.permute(*reversed(range(base.dim())))


def sliced_and_transposed(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    def view(base: Tensor) -> Tensor:
        return base[..., 1 : shape[0] + 1].permute(*reversed(range(base.dim())))

    return torch.zeros(*reversed(shape[1:]), shape[0] + 2), view


def every_other(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    return torch.zeros(*shape[:-1], 2 * shape[-1]), lambda base: base[..., ::2]


LYING: dict[str, Lying] = {
    "wider": wider,
    "taller": taller,
    "transposed": transposed,
    "sliced and transposed": sliced_and_transposed,
    "every other": every_other,
}
BESIDE = 12345.0


def lying(how: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The whole storage, filled with a number no weight has, and the weight in it."""
    base, view = LYING[how](tuple(weight.shape))
    base = base.to(weight.dtype).fill_(BESIDE)
    seen = view(base)
    assert seen.shape == weight.shape
    seen.copy_(weight)
    return base, seen


def trained(dtype: torch.dtype, place: Callable[[Tensor], Tensor], **more: Any) -> dict[str, nn.Parameter]:
    parameters = {case: nn.Parameter(place(tensors(case)[0].to(dtype))) for case in CASES}
    groups = [{"params": [(case, parameters[case])], "lr": LR, **group, **more} for case, (_, group) in CASES.items()]
    optimizer = SymDist(groups)
    for step in range(STEPS):
        for case, parameter in parameters.items():
            parameter.grad = tensors(case)[1][step].to(dtype)
        optimizer.step()
    return parameters


@pytest.mark.filterwarnings("ignore:.*bfloat16")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", LYING)
def test_weights_are_stepped_where_they_lie(how: str, dtype: torch.dtype) -> None:
    bases: list[tuple[Tensor, Tensor]] = []

    def place(weight: Tensor) -> Tensor:
        bases.append(lying(how, weight))
        return bases[-1][1]

    expected = trained(dtype, lambda weight: weight.clone())
    found = trained(dtype, place)
    close = {torch.float64: 1e-12, torch.float32: 1e-3, torch.bfloat16: 5e-2}[dtype]
    for case, (base, seen), weight in zip(CASES, bases, found.values(), strict=True):
        start = tensors(case)[0].to(dtype)
        assert weight.data_ptr() == seen.data_ptr()
        moved = (expected[case] - start).norm()
        assert (weight - expected[case]).norm() <= close * moved, case
        assert moved > 0
        seen.fill_(BESIDE)
        assert base.eq(BESIDE).all(), f"{case}: what lies beside the weight was changed"


@pytest.mark.parametrize("rule", ["adamw", "muon", "row_norm"])
def test_a_gradient_may_lie_otherwise(rule: str) -> None:
    group = {"rule": rule, "lr": 0.1}
    weight, gradient = torch.randn(6, 4), torch.randn(6, 4)
    found = []
    for grad in (gradient, gradient.T.contiguous().T, torch.cat([gradient, gradient], 1)[:, :4]):
        parameter = nn.Parameter(weight.clone())
        parameter.grad = grad
        SymDist([{"params": [("w", parameter)], **group}]).step()
        found.append(parameter.detach())
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert torch.allclose(found[0], found[2], atol=1e-6)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_an_expanded_weight_is_refused(rule: str) -> None:
    weight = nn.Parameter(torch.ones(1, 4).expand(6, 4))
    with pytest.raises(ValueError, match=r"w is an expanded tensor: .* strides \(0, 1\)"):
        SymDist([{"params": [("w", weight)], "rule": rule, "lr": 0.1}])
