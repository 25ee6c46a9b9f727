"""The matrix a rule works on, and helpers that rules share: centring, row lengths, scaling to unit size."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symdist.rules.requests import Sum


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the matrices of a stack store their part of what their stage of the residual stream shares.

    Attributes:
        width: Number of columns of the shared tensor.
        firsts: For each matrix, the first shared column that it stores, in the leading columns of its own state; −1 if
            it stores none.
    """

    width: int
    firsts: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """A stack of b matrices, as far as this rank holds them.

    Attributes:
        values: `[b, rows here, columns here]`; rules must not write to it.
        rows: Number of rows m of the whole matrix, without padding.
        columns: Number of columns n of the whole matrix.
        real: `[rows here, 1]`, 1 for rows that exist and 0 for padding rows, whose values are zero; None where no row
            is padding.
        first_column: Index in the whole matrix of the first column here.
        state: What the rule remembers, by the names it was registered with. Each tensor is shaped like `values` and
            zero before the first step; rules must not write to it.
        places: Given only to rules that couple the matrices of a stage; see `Places`.
    """

    values: Tensor
    rows: int
    columns: int
    real: Tensor | None = None
    first_column: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    places: Places | None = None


def center_rows(matrix: Matrix, x: Tensor) -> Generator[Any, Any, Tensor]:
    """Subtract the mean row: `Πx = x − mean over all rows of x`.

    This projection removes the direction `1aᵀ`, along which the function of a head or router does not change.

    Args:
        matrix: The stack that `x` comes from.
        x: `[b, rows here, columns here]`, in the layout of `matrix`.

    Returns:
        The centred rows, shaped like `x`; padding rows are zero.
    """
    total = yield Sum(values=x.sum(-2, keepdim=True), across="rows")
    centered = x - total / matrix.rows
    return centered if matrix.real is None else centered * matrix.real


def row_lengths(x: Tensor) -> Generator[Any, Any, Tensor]:
    """Compute the 2-norms of whole rows, accurate at any scale.

    Squares of float32 numbers overflow above 1e19 and vanish below 1e-19. So each row is first divided by its largest
    number, and squares are summed over ranks in float64.

    Args:
        x: `[b, rows here, columns here]`.

    Returns:
        `[b, rows here, 1]`, in the dtype of `x`.
    """
    peak = _largest(x, (-1,))
    here = peak * torch.linalg.vector_norm(x / torch.where(peak > 0, peak, 1), dim=-1, keepdim=True)
    squares = yield Sum(values=here.double().square(), across="columns")
    return squares.sqrt().to(x.dtype)


def at_unit_scale(x: Tensor) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """Divide each whole matrix by a power of two near its largest number.

    This rounds nothing, and keeps later squares and sums within the range of the dtype. A matrix whose numbers are all
    denormal becomes zero, since it has no digits left: such is an expert's momentum after thousands of steps without a
    token.

    Args:
        x: `[b, rows here, columns here]`.

    Returns:
        The scaled `x`, and the powers of two, `[b, 1, 1]`.
    """
    # Only sums run across ranks. The sum of the pieces' maxima is too large at most by their number.
    size = yield Sum(values=_largest(x, (-2, -1)), across="all")
    tiny = torch.finfo(x.dtype).tiny
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_min(-125))
    return x * torch.where(size >= tiny, 1 / unit, 0), unit


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude along `dims`, which are kept; 0 where a dimension is empty."""
    if any(x.shape[dim] == 0 for dim in dims):
        return x.new_zeros([1 if dim - x.dim() in dims else size for dim, size in enumerate(x.shape)])
    return x.abs().amax(dims, keepdim=True)
