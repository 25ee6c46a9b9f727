"""The Triton kernel of symmetric products, in Triton's interpreter on the CPU, against products in float64."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.processes import end_with_parent

# The interpreters of older versions fail with NumPy 2.4. The kernel itself compiles from 3.5 on.
triton = pytest.importorskip("triton", minversion="3.7")

import triton.language as tl  # noqa: E402

from symdist.rules.linalg import triton_symmetric  # noqa: E402
from symdist.rules.linalg.triton_symmetric import symmetric  # noqa: E402

Run = Callable[..., Any]

# Not bfloat16: NumPy has none, so the interpreter multiplies its bits as integers, and answers wrongly without a word.
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3}
DTYPES = list(BOUNDS)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Run]:
    """Call a function in a process whose Triton interprets.

    Triton decides when it is imported. In this process another test may have imported it, and others may compile.
    """
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=end_with_parent)
        assert pool.submit(is_interpreted).result()
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result()


def is_interpreted() -> bool:
    return type(triton_symmetric._kernel).__name__ == "InterpretedFunction"


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def symmetric_normal(n: int, d: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    x = normal(n, d, d, dtype=torch.float64, seed=seed)
    return ((x + x.mT) / 2).to(dtype)


def check(
    found: Tensor, a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0
) -> None:
    """The lower triangle is right, relative to the largest sum of absolute values; the upper one mirrors it exactly."""
    expected, scale = alpha * a.double() @ b.double(), abs(alpha) * a.double().abs() @ b.double().abs()
    if c is not None:
        expected, scale = expected + beta * c.double(), scale + abs(beta) * c.double().abs()
    assert found.shape == expected.shape
    assert found.dtype == a.dtype
    assert found.is_contiguous()
    error = (found.double() - expected).tril().abs().amax((-2, -1))
    assert (error <= BOUNDS[a.dtype] * scale.amax((-2, -1))).all()
    assert found.equal(found.mT)


@pytest.mark.parametrize("k", [1, 7, 64, 100])
@pytest.mark.parametrize("d", [1, 5, 16, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram(interpreted: Run, dtype: torch.dtype, d: int, k: int) -> None:
    for n in (1, 3):
        a, c = normal(n, d, k, dtype=dtype), symmetric_normal(n, d, dtype)
        check(interpreted(symmetric, a, a.mT), a, a.mT)
        check(interpreted(symmetric, a, a.mT, c, alpha=-0.5, beta=1.75), a, a.mT, c, alpha=-0.5, beta=1.75)


@pytest.mark.parametrize("d", [1, 5, 16, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_that_commute(interpreted: Run, dtype: torch.dtype, d: int) -> None:
    a = symmetric_normal(3, d, torch.float64) / d**0.5
    b = (2 * torch.eye(d) - 3 * a + 0.5 * a @ a).to(dtype)
    a = a.to(dtype)
    check(interpreted(symmetric, a, b), a, b)
    check(interpreted(symmetric, a, b, b, alpha=1.5, beta=-2.0), a, b, b, alpha=1.5, beta=-2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_tiles(interpreted: Run, dtype: torch.dtype) -> None:
    a, c = normal(1, 520, 70, dtype=dtype), symmetric_normal(1, 520, dtype)
    check(interpreted(symmetric, a, a.mT, c, beta=1.0), a, a.mT, c, beta=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(interpreted: Run, dtype: torch.dtype) -> None:
    c = symmetric_normal(6, 74, dtype)[::2, ::2, ::2]
    for a in (
        normal(3, 20, 37, dtype=dtype).mT,
        normal(3, 74, 60, dtype=dtype)[:, ::2, ::3],
        normal(37, 20, 3, dtype=dtype).permute(2, 0, 1),
        normal(1, 37, 20, dtype=dtype).expand(3, -1, -1),
        normal(4, 40, 21, dtype=dtype)[1:, 3:, 1:],
    ):
        for b in (a.mT, a.mT.contiguous(), a.contiguous().mT):
            for each in (c, c.mT, c[:1].expand(3, -1, -1)):
                check(interpreted(symmetric, a, b, each, beta=0.5), a, b, each, beta=0.5)


@pytest.mark.parametrize("d", [20, 64, 130])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_lower_triangle_is_mirrored(interpreted: Run, dtype: torch.dtype, d: int) -> None:
    # Here the product is not symmetric. Otherwise a result that computes both triangles would pass too.
    a, b, c = (normal(2, *shape, dtype=dtype, seed=i) for i, shape in enumerate(((d, 9), (9, d), (d, d))))
    check(interpreted(symmetric, a, b, c, beta=2.0), a, b, c, beta=2.0)


def test_operands_are_only_read(interpreted: Run) -> None:
    # The other process is given the memory of these tensors, not copies.
    operands = [normal(2, 37, 37, dtype=torch.float32), symmetric_normal(2, 37, torch.float32)]
    before = [each.clone() for each in operands]
    a, c = operands
    interpreted(symmetric, a, a.mT, c, alpha=2.0, beta=3.0)
    assert all(each.is_shared() and each.equal(old) for each, old in zip(operands, before, strict=True))


def test_c_is_not_read_for_a_beta_of_zero(interpreted: Run) -> None:
    a = normal(2, 37, 5, dtype=torch.float32)
    check(interpreted(symmetric, a, a.mT, torch.full((2, 37, 37), torch.nan)), a, a.mT)


@pytest.mark.parametrize(("n", "d", "k"), [(0, 5, 7), (3, 0, 7), (0, 0, 0), (3, 37, 0)])
def test_nothing_to_sum(interpreted: Run, n: int, d: int, k: int) -> None:
    a, c = normal(n, d, k, dtype=torch.float32), symmetric_normal(n, d, torch.float32)
    assert interpreted(symmetric, a, a.mT).equal(torch.zeros(n, d, d))
    assert interpreted(symmetric, a, a.mT, c, alpha=3.0, beta=2.0).equal(2 * c)


def test_what_does_not_fit_is_refused() -> None:
    a, square = torch.ones(3, 5, 7), torch.ones(3, 5, 5)
    for operands in ((a, a), (a[0], a[0].mT), (a, a[:1].mT), (a, a.mT, square[:1]), (a, a.mT, a)):
        with pytest.raises(ValueError, match="expected \\[n, d, k\\]"):
            symmetric(*operands)
    for dtypes in ((torch.float64, torch.float64), (torch.float16, torch.float32)):
        with pytest.raises(ValueError, match="expected two factors"):
            symmetric(a.to(dtypes[0]), a.mT.to(dtypes[1]))
    with pytest.raises(ValueError, match="devices"):
        symmetric(a, a.mT, square.to("meta"))


def in_parts_of(programs: int, a: Tensor, c: Tensor) -> tuple[Tensor, list[int]]:
    spy = mock.MagicMock()
    spy.__getitem__.side_effect = triton_symmetric._kernel.__getitem__
    with mock.patch.multiple(triton_symmetric, _MAX_PROGRAMS=programs, _kernel=spy):
        result = symmetric(a, a.mT, c, beta=1.0)
    return result, [call.args[0][0] for call in spy.__getitem__.call_args_list]


@pytest.mark.parametrize(("programs", "grids"), [(6, [6] * 7), (17, [12, 12, 12, 6]), (42, [42])])
def test_a_grid_that_is_too_large_is_split(interpreted: Run, programs: int, grids: list[int]) -> None:
    a, c = normal(7, 130, 3, dtype=torch.float32), symmetric_normal(7, 130, torch.float32)
    found, launched = interpreted(in_parts_of, programs, a, c)
    check(found, a, a.mT, c, beta=1.0)
    assert launched == grids


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _places(out: tl.tensor, side: tl.tensor, first: tl.tensor) -> None:
    row, col = triton_symmetric._place(first + tl.program_id(0), side)
    tl.store(out + 2 * tl.program_id(0), row)
    tl.store(out + 2 * tl.program_id(0) + 1, col)


def places(side: int, first: int, count: int) -> list[list[int]]:
    out = torch.full((count, 2), -1, dtype=torch.int32)
    _places[(count,)](out, side, first)
    return out.tolist()


def test_every_tile_has_its_program(interpreted: Run) -> None:
    for side in range(1, 13):
        expected = [[row, col] for row in range(side) for col in range(row + 1)]
        assert sorted(interpreted(places, side, 0, len(expected))) == expected
    # As many tiles as a grid may have. There, the square root in float32 is off by whole rows.
    side = 65535
    for first, last in ((0, [side - 1, 0]), (side * (side + 1) // 2 - 1, [side // 2 - 1, side // 2 - 1])):
        assert interpreted(places, side, first, 1) == [last]


def far_apart(x: Tensor, axis: int) -> Tensor:
    """A copy whose last entries along an axis lie more than 2**31 elements after the first.

    The stride itself has 32 bits. The memory between the entries is never touched, so that the system provides none.
    """
    stride = 2**31 // (x.shape[axis] - 1) + 1
    assert stride < 2**31
    strides = list(x.contiguous().stride())
    strides[axis] = stride
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
    assert size > 2**31
    return torch.empty(size, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)


def product_of_far(operand: str, axis: int) -> list[Tensor]:
    a = normal(3, 5, 7, dtype=torch.float16)
    operands = {"out": torch.zeros(3, 5, 5, dtype=a.dtype), "a": a, "b": a.mT, "c": symmetric_normal(3, 5, a.dtype)}
    operands[operand] = far_apart(operands[operand], axis)
    out, a, b, c = operands.values()
    triton_symmetric._launch(out, a, b, c, alpha=1.0, beta=2.0)
    return [each.contiguous() for each in (out, a, b, c)]


@pytest.mark.parametrize(("operand", "axis"), product(("out", "a", "b", "c"), range(3)))
def test_offsets_past_32_bits(interpreted: Run, operand: str, axis: int) -> None:
    out, a, b, c = interpreted(product_of_far, operand, axis)
    check(out, a, b, c, beta=2.0)


TARGETS = [("cuda", 90, 32), ("hip", "gfx942", 64)]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_it_compiles_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: tuple[str, int | str, int]
) -> None:
    # The interpreter accepts much that the compiler refuses.
    if is_interpreted():
        pytest.skip("TRITON_INTERPRET is set")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for dtype, d in ((torch.float16, 16), (torch.bfloat16, 1024), (torch.float32, 1024)):
        tiling = triton_symmetric._tiling(d, dtype)
        pointer = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        constants = {"HAS_C": True, "TILE": tiling["TILE"], "TILE_K": tiling["TILE_K"], "a_col": 1, "b_row": 1}
        signature = dict.fromkeys(triton_symmetric._kernel.arg_names, "i32")
        signature |= dict.fromkeys(("out", "a", "b", "c"), pointer) | dict.fromkeys(("alpha", "beta"), "fp32")
        signature |= dict.fromkeys(("a_batch", "out_row"), "i64") | dict.fromkeys(constants, "constexpr")
        # Multiples of 16, as the launcher finds them: only then are loads wide, and buffered in shared memory.
        attributes = {
            (i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind in ("i32", pointer)
        }
        options = {name: tiling[name] for name in ("num_warps", "num_stages")}
        source = ASTSource(triton_symmetric._kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=GPUTarget(*target), options=options)
        # What a block may have on the smallest of these GPUs: compute capabilities 8.6 and 8.9, and CDNA 3.
        assert compiled.metadata.shared <= (64 if target[0] == "hip" else 99) * 1024
        assert "tf32" not in compiled.asm.get("ptx", "")
