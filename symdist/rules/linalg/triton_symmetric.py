"""Batched products of matrices whose result is symmetric, of which one triangle is computed and the other copied.

That halves the work of a full product. Importing this module imports Triton, so the callers import it only where a
kernel can run: on a GPU, or in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# The number of programs along the first axis of a grid. Both CUDA and HIP allow at most this many, and far fewer along
# the others.
_MAX_PROGRAMS = 2**31 - 1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def symmetric(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Compute `alpha·a@b + beta·c` for a batch of matrices, where the caller knows that the result is symmetric.

    It is, for example, if `b = aᵀ`, or if a and b are symmetric and commute; c must be symmetric as well. Only the
    lower triangle is computed. Of a result that would not have been symmetric, the upper triangle is thus wrong.

    Args:
        a: `[n, d, k]`, in float16, bfloat16 or float32, with any strides.
        b: `[n, k, d]`, in the dtype of a, with any strides.
        c: `[n, d, d]`, with any strides; only its lower triangle is read. None (default) for zero.
        alpha: The factor of the product; 1 by default.
        beta: The factor of c. If it is 0 (default), c is not read.
        out: `[n, d, d]`, in the dtype of a, where to write the result; None (default) for a new tensor.

    Returns:
        `[n, d, d]` in the dtype of a, which equals its transpose exactly. Sums are in float32.
        Float32 is multiplied as such, without TF32.

    Raises:
        ValueError: If the shapes, the dtypes or the devices do not fit.
    """
    _check(a, b, c)
    n, d, _ = a.shape
    if out is None:
        out = torch.empty(n, d, d, dtype=a.dtype, device=a.device)
    elif tuple(out.shape) != (n, d, d) or out.dtype != a.dtype or out.device != a.device:
        raise ValueError(f"out must be [{n}, {d}, {d}] in {a.dtype} on {a.device}, got {list(out.shape)} {out.dtype}")
    _launch(out, a, b, c if beta else None, alpha, beta)
    return out


def _check(a: Tensor, b: Tensor, c: Tensor | None) -> None:
    # A kernel would read past the end of what does not fit, without a word.
    n, d, k = a.shape if a.ndim == 3 else (-1, -1, -1)
    if (*b.shape,) != (n, k, d) or (c is not None and (*c.shape,) != (n, d, d)):
        shapes = [list(each.shape) for each in (a, b, c) if each is not None]
        raise ValueError(f"expected [n, d, k], [n, k, d] and [n, d, d], got {shapes}")
    if a.dtype not in _DTYPES or b.dtype != a.dtype:
        raise ValueError(f"expected two factors in one of {_DTYPES}, got {a.dtype} and {b.dtype}")
    if any(each.device != a.device for each in (b, c) if each is not None):
        raise ValueError("the matrices are on different devices")


def _tiling(d: int, dtype: torch.dtype) -> dict[str, int]:
    # Every rank must choose the same tiles, because the order of the sums depends on them. Therefore the choice is a
    # function of the shape and the dtype alone; timing the candidates could differ from rank to rank.
    stages = 2 if torch.version.hip else 3
    if d <= 32:
        return {"TILE": 32, "TILE_K": 32, "num_warps": 2, "num_stages": stages}
    if dtype == torch.float32:
        # Products in full float32 run outside of the tensor cores and keep the whole tile in registers.
        return {"TILE": 64, "TILE_K": 32, "num_warps": 4, "num_stages": stages}
    if d < 512:
        return {"TILE": 64, "TILE_K": 64, "num_warps": 4, "num_stages": stages}
    return {"TILE": 128, "TILE_K": 64, "num_warps": 8, "num_stages": stages}


def _launch(out: Tensor, a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float) -> None:
    n, d, k = a.shape
    if n == 0 or d == 0:
        return
    tiling = _tiling(d, a.dtype)
    side = triton.cdiv(d, tiling["TILE"])
    tiles = side * (side + 1) // 2
    step = _MAX_PROGRAMS // tiles
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(a):
        for start in range(0, n, step):
            batch = slice(start, start + step)
            parts = [each[batch] for each in (out, a, b)]
            parts.append(parts[0] if c is None else c[batch])
            _kernel[(len(parts[0]) * tiles,)](
                *parts,
                d,
                k,
                float(alpha),
                float(beta),
                *(stride for part in parts for stride in part.stride()),
                HAS_C=c is not None,
                **tiling,
            )


@triton.jit
def _place(index: tl.tensor, side: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    # Lay the triangle of tiles out as a rectangle: its rows from the last one upwards, each followed by one of the
    # short rows from the top. Together two such rows have `width` tiles, and the place is exact in integers, unlike the
    # square root that inverts the triangular numbers.
    width = side | 1
    pair = index // width
    at = index % width
    long = side - pair
    return tl.where(at < long, long - 1, pair + width - side - 1), tl.where(at < long, at, at - long)


@triton.jit
def _kernel(
    out: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    k: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    out_batch: tl.tensor,
    out_row: tl.tensor,
    out_col: tl.tensor,
    a_batch: tl.tensor,
    a_row: tl.tensor,
    a_col: tl.tensor,
    b_batch: tl.tensor,
    b_row: tl.tensor,
    b_col: tl.tensor,
    c_batch: tl.tensor,
    c_row: tl.tensor,
    c_col: tl.tensor,
    HAS_C: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    TILE_K: tl.constexpr,  # noqa: N803
) -> None:
    side = tl.cdiv(d, TILE)
    tiles = side * (side + 1) // 2
    row, col = _place(tl.program_id(0) % tiles, side)
    # Strides have 32 bits where they fit, and so would their products with indices. Therefore every index has 64.
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    rows = row.to(tl.int64) * TILE + tl.arange(0, TILE)
    cols = col.to(tl.int64) * TILE + tl.arange(0, TILE)

    a += batch * a_batch + rows[:, None] * a_row
    b += batch * b_batch + cols[None, :] * b_col
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(0, k, TILE_K):
        inner = (start + tl.arange(0, TILE_K)).to(tl.int64)
        left = tl.load(a + inner[None, :] * a_col, mask=(rows[:, None] < d) & (inner[None, :] < k), other=0.0)
        right = tl.load(b + inner[:, None] * b_row, mask=(inner[:, None] < k) & (cols[None, :] < d), other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")

    total *= alpha
    inside = (rows[:, None] < d) & (cols[None, :] < d)
    if HAS_C:
        c += batch * c_batch + rows[:, None] * c_row + cols[None, :] * c_col
        total += beta * tl.load(c, mask=inside, other=0.0).to(tl.float32)
    tile = total.to(out.dtype.element_ty)
    out += batch * out_batch
    if row == col:
        tile = tl.where(rows[:, None] >= cols[None, :], tile, tl.trans(tile))
    else:
        mirrored = (cols[:, None] < d) & (rows[None, :] < d)
        tl.store(out + cols[:, None] * out_row + rows[None, :] * out_col, tl.trans(tile), mask=mirrored)
    tl.store(out + rows[:, None] * out_row + cols[None, :] * out_col, tile, mask=inside)
