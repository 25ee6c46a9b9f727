"""Rules and products on a card, in every precision and by every kernel, against float64 on the CPU."""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from symdist.rules import Matrix, get_rule, run_locally
from symdist.rules.linalg import products

RULES = ("polar", "muon", "right_spectral", "left_spectral", "hybrid", "normuon", "aurora", "scion")
# The last is large enough for Triton's kernel.
SHAPES = {"tall": (2, 640, 192), "square": (3, 128, 128), "wide": (2, 200, 520), "large": (1, 1536, 1024)}
ROOTS = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 2e-1, "auto": 2e-1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that float32 holds, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected).norm() / expected.norm())


def momentum(rule: str, shape: str) -> Tensor:
    """Random matrices, which one-sided rules get long on their own side: the other Gram is singular."""
    m = normal(*SHAPES[shape])
    turned = {"right_spectral": ("wide",), "left_spectral": ("tall", "large")}
    return m.mT.contiguous() if shape in turned.get(rule, ()) else m


def update(rule: str, values: Tensor, precision: str) -> Tensor:
    rows, columns = values.shape[-2:]
    state = {"row_sq": torch.zeros_like(values)} if rule == "normuon" else {}
    matrix = Matrix(values=values, rows=rows, columns=columns, state=state)
    found = run_locally(get_rule(rule).update(matrix, precision=precision))
    return found[0] if isinstance(found, tuple) else found


@functools.cache
def exact(rule: str, shape: str) -> Tensor:
    return update(rule, momentum(rule, shape), "float32")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ROOTS)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_that_of_float64(card: torch.device, rule: str, precision: str, shape: str) -> None:
    found = update(rule, momentum(rule, shape).float().to(card), precision)
    assert found.dtype == torch.float32
    assert found.device.type == card.type
    assert error(found, exact(rule, shape)) < ROOTS[precision]


Product = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float], Any]
PRODUCTS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Batch, size of the result, inner size: aligned, as quack needs it, and dividing no tile.
GRAMS = {
    "square": (2, 256, 256),
    "tall": (3, 256, 640),
    "flat": (2, 640, 64),
    "large": (1, 1024, 512),
    "odd": (3, 130, 77),
    "odd large": (1, 1111, 333),
}


def by_triton() -> Product:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    from symdist.rules.linalg.triton_symmetric import symmetric

    return lambda out, a, b, c, alpha, beta: symmetric(a, b, c, alpha=alpha, beta=beta, out=out)


def by_quack(card: torch.device, shape: str, dtype: torch.dtype) -> Product:
    kernel = products._quack(card)
    if kernel is None:
        pytest.skip("needs quack-kernels, and a Hopper or later")
    if dtype == torch.float32 or shape.startswith("odd"):
        pytest.skip("quack multiplies only half precision, in multiples of 16 bytes")
    return lambda out, a, b, c, alpha, beta: kernel(a, b, C=c, out=out, alpha=alpha, beta=beta)


def product_of(kind: str, card: torch.device, shape: str, dtype: torch.dtype) -> Product:
    if kind == "quack":
        return by_quack(card, shape, dtype)
    return {"whole": lambda: products._whole, "triton": by_triton, "chosen": lambda: torch.ops.symdist.symmetric}[
        kind
    ]()


@pytest.mark.parametrize("shape", GRAMS)
@pytest.mark.parametrize("with_c", [False, True], ids=["", "c"])
@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", ["whole", "triton", "quack", "chosen"])
def test_a_gram_is_that_of_float64(card: torch.device, kind: str, dtype: torch.dtype, with_c: bool, shape: str) -> None:
    n, d, k = GRAMS[shape]
    a, c = normal(n, d, k).to(card, dtype), normal(n, d, d, seed=1)
    c = (c + c.mT).to(card, dtype)
    alpha, beta = (-0.5, 1.75) if with_c else (1.0, 0.0)
    expected = alpha * a.cpu().double() @ a.cpu().double().mT + beta * c.cpu().double()
    product = product_of(kind, card, shape, dtype)
    out = torch.full((n, d, d), torch.nan, dtype=dtype, device=card)
    product(out, a, a.mT, c if with_c else None, alpha, beta)
    assert error(out, expected) < PRODUCTS[dtype]
    # The same numbers, stored the other way round: the Gram of a wide matrix, and of a tall one.
    other = a.mT.contiguous()
    product(out.fill_(torch.nan), other.mT, other, c if with_c else None, alpha, beta)
    assert error(out, expected) < PRODUCTS[dtype]


@pytest.mark.parametrize("shape", [name for name in GRAMS if GRAMS[name][1] <= 640])
@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
@pytest.mark.parametrize("kind", ["whole", "triton", "quack", "chosen"])
def test_polynomials_of_one_matrix(card: torch.device, kind: str, dtype: torch.dtype, shape: str) -> None:
    n, d, _ = GRAMS[shape]
    r = normal(n, d, d, seed=2)
    r = (r + r.mT) / (4 * d) ** 0.5
    z = (2 * torch.eye(d) - 3 * r + 0.5 * r @ r).to(card, dtype)
    r = r.to(card, dtype)
    expected = 1.5 * r.cpu().double() @ z.cpu().double() - 2 * z.cpu().double()
    out = torch.full((n, d, d), torch.nan, dtype=dtype, device=card)
    product_of(kind, card, shape, dtype)(out, r, z, z, 1.5, -2.0)
    # What rounding takes from z, the two factors no longer commute by.
    assert error(out, expected) < 2 * PRODUCTS[dtype]


@pytest.mark.parametrize("dtype", PRODUCTS, ids=str)
def test_one_triangle_is_the_mirror_of_the_other(card: torch.device, dtype: torch.dtype) -> None:
    product = by_triton()
    a = normal(2, 1111, 333).to(card, dtype)
    out = torch.empty(2, 1111, 1111, dtype=dtype, device=card)
    product(out, a, a.mT, None, 1.0, 0.0)
    assert out.equal(out.mT)
