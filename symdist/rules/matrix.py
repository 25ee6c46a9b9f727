"""The matrix a rule is given, and what most rules share: means over its rows, lengths and sizes at any scale."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symdist.rules.requests import Sum


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the matrices of a stack keep what they share with the others of their stage.

    That has `width` columns in all. `firsts` has, of each matrix, which of them is the first that it keeps, in the
    first columns of its own state; −1 where it keeps none.
    """

    width: int
    firsts: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class Matrix:
    """A stack of b matrices as far as this rank holds them.

    `values` is `[b, rows here, columns here]` and must not be written to. `rows` and `columns` count the whole
    matrix, padding left out. `real` is 1 for rows that exist and 0 for padding, `[rows here, 1]`, or None where
    every row is real; padding rows of `values` are zero. `first_column` is where the columns here begin in the whole
    matrix. `state` has what the rule remembers, by the names it was registered with, each laid out like `values` and
    zero at the start; like `values` it must not be written to.
    `places` is given where a rule couples the matrices of a stage.
    """

    values: Tensor
    rows: int
    columns: int
    real: Tensor | None = None
    first_column: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    places: Places | None = None


def center_rows(matrix: Matrix, x: Tensor) -> Generator[Any, Any, Tensor]:
    """`Πx = x − mean over all rows of x`: the projection that removes the gauge direction `1aᵀ`.

    `x` is `[b, rows here, columns here]`, in the layout of `matrix`.
    """
    total = yield Sum(values=x.sum(-2, keepdim=True), across="rows")
    centered = x - total / matrix.rows
    return centered if matrix.real is None else centered * matrix.real


def row_lengths(x: Tensor) -> Generator[Any, Any, Tensor]:
    """The 2-norms of whole rows, `[b, rows here, 1]`, of `x` `[b, rows here, columns here]`; right at any scale.

    Squares of float32 numbers overflow from 1e19 on and vanish below 1e-19: each row is divided by its largest number
    first, and squares are summed over ranks in float64.
    """
    peak = _largest(x, (-1,))
    here = peak * torch.linalg.vector_norm(x / torch.where(peak > 0, peak, 1), dim=-1, keepdim=True)
    squares = yield Sum(values=here.double().square(), across="columns")
    return squares.sqrt().to(x.dtype)


def at_unit_scale(x: Tensor) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """Each whole matrix of `x` over a power of two near its largest number, and that power, `[b, 1, 1]`.

    Rounds nothing, and leaves what is squared and summed within its dtype. A matrix whose numbers are all denormal has
    no digits left, as an expert's momentum after thousands of steps without a token: it becomes zero.
    """
    # Of a split matrix, the sum over its pieces: it is at most as many times too large as there are pieces.
    size = yield Sum(values=_largest(x, (-2, -1)), across="all")
    tiny = torch.finfo(x.dtype).tiny
    unit = torch.ldexp(torch.ones_like(size), torch.frexp(size).exponent.clamp_min(-125))
    return x * torch.where(size >= tiny, 1 / unit, 0), unit


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest magnitude along `dims`, which are kept; 0 where there is nothing."""
    if any(x.shape[dim] == 0 for dim in dims):
        return x.new_zeros([1 if dim - x.dim() in dims else size for dim, size in enumerate(x.shape)])
    return x.abs().amax(dims, keepdim=True)
