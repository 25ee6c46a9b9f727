"""The matrix that a rule works on, and operations that rules share: centring, row lengths, scaling to unit size."""

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symdist.hardware import Hardware
from symdist.rules.requests import Sum

LARGEST = 2.0**113
LARGEST_FLOAT64 = 2.0**400
"""The largest magnitudes of gradients and of updates, so that moments and sums of them stay in range; see `largest`."""
_BLOCK = 256
"""As many rows can be summed in float32, whatever the momentum: it exceeds `LARGEST` at most by `1/(1 − β)`."""


def largest(dtype: torch.dtype) -> float:
    """Return the largest magnitude of gradients and updates: `LARGEST_FLOAT64` for float64, otherwise `LARGEST`."""
    return LARGEST_FLOAT64 if dtype == torch.float64 else LARGEST


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the matrices of a stack store their parts of the tensor that a stage of the residual stream shares.

    Attributes:
        width: The number of columns of the shared tensor.
        firsts: For each matrix, the index of the first shared column that it stores, or −1 if it stores none. A matrix
            keeps its shared columns in the leading columns of its own state.
    """

    width: int
    firsts: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """The part of a stack of b matrices that this rank holds.

    Attributes:
        values: `[b, rows here, columns here]`; rules must not write to it.
        rows: The number of rows m of the whole matrix, without padding.
        columns: The number of columns n of the whole matrix.
        real: `[rows here, 1]`, 1 for real rows and 0 for padding rows, whose values are zero. None (default) if no row
            is padding.
        first_column: The index, in the whole matrix, of the first column held here; 0 by default.
        state: The state that the rule keeps between steps, by the names it was registered with. Each tensor has the
            shape of `values` and is zero before the first step; rules must not write to it.
        places: Set only for rules that couple the matrices of a stage, see `Places`; otherwise None (the default).
        parts: For each axis ("rows", "columns") along which the matrix is split, over how many ranks. Empty (default)
            if it is whole.
        hardware: What the ranks can do, by which precisions are chosen; None (default) for that of the device.
    """

    values: Tensor
    rows: int
    columns: int
    real: Tensor | None = None
    first_column: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    places: Places | None = None
    parts: Mapping[Any, int] = field(default_factory=dict)
    hardware: Hardware | None = None


def center_rows(matrix: Matrix, x: Tensor) -> Generator[Any, Any, Tensor]:
    """Subtract the mean row: `Πx = x − mean over all rows of x`.

    This projection removes the direction `1aᵀ`, along which the function of a head or router does not change. It yields
    one `Sum` over the ranks that hold the other rows.

    Args:
        matrix: The stack of matrices that `x` belongs to.
        x: `[b, rows here, columns here]`, in the layout of `matrix`.

    Returns:
        The centred rows, in the shape of `x`; padding rows are zero.

    Example:
        Inside a rule:

            m = yield from center_rows(matrix, matrix.values)
    """
    mean = yield Sum(values=_sum_of_rows(x, matrix.rows), across="rows")
    centered = x - mean
    return centered if matrix.real is None else centered * matrix.real


def row_lengths(x: Tensor) -> Generator[Any, Any, Tensor]:
    """Compute the 2-norms of whole rows, accurately at any scale.

    Squares of float32 numbers overflow for numbers above 1e19 and vanish for numbers below 1e-19. Therefore each row is
    first divided by its largest magnitude, and the squares are summed over ranks in float64. This yields one `Sum` over
    the ranks that hold the other columns.

    Args:
        x: `[b, rows here, columns here]`.

    Returns:
        `[b, rows here, 1]`, in the dtype of `x`.
    """
    peak = largest_magnitude(x, (-1,))
    local_lengths = peak * torch.linalg.vector_norm(x / torch.where(peak > 0, peak, 1), dim=-1, keepdim=True)
    squares = yield Sum(values=local_lengths.double().square(), across="columns")
    return squares.sqrt().to(x.dtype)


def _sum_of_rows(x: Tensor, divisor: int) -> Tensor:
    """Return the sum of the rows divided by a number at least as large as their number, `[b, 1, columns here]`."""
    whole = x.shape[-2] // _BLOCK * _BLOCK
    rest = x[..., whole:, :].sum(-2, keepdim=True) / divisor
    if not whole:
        return rest
    blocks = x[..., :whole, :].unflatten(-2, (-1, _BLOCK)).sum(-2)
    return rest + (blocks / divisor).sum(-2, keepdim=True)


def at_unit_scale(x: Tensor) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """Divide each whole matrix by a power of two near its largest magnitude.

    The division rounds nothing, and it keeps later squares and sums within the range of the dtype. A matrix that
    contains only denormal numbers becomes zero, because such numbers have no significant digits left. This happens to
    the momentum of an expert after thousands of steps without a token. The function yields one `Sum` over all ranks
    that hold the matrix.

    Args:
        x: `[b, rows here, columns here]`.

    Returns:
        The scaled `x`, and the powers of two, `[b, 1, 1]`.
    """
    # Rules can request only sums across ranks. The sum of the pieces' maxima exceeds the maximum at most by a factor of
    # the number of pieces. Of thousands of pieces, it may leave the range.
    limits = torch.finfo(x.dtype)
    size = yield Sum(values=largest_magnitude(x, (-2, -1)), across="all")
    size = size.clamp_max(0.5 / limits.tiny)
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_min(math.frexp(limits.tiny)[1]))
    return x * torch.where(size >= limits.tiny, 1 / unit, 0), unit


def largest_magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the largest magnitude along dimensions.

    Args:
        x: Of any shape.
        dims: The dimensions, as negative numbers; they are kept with size 1.

    Returns:
        The magnitudes; 0 where one of the dimensions is empty.
    """
    if x.numel() == 0:
        return x.new_zeros([1 if dim - x.dim() in dims else size for dim, size in enumerate(x.shape)])
    # Faster than a norm on CPUs, and without a copy as large as x.
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True))
