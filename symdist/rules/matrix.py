"""The matrix a rule is given, and the one operation most rules share: removing the mean over its rows."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

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
