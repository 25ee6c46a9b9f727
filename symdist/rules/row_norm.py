"""Row-norm: every row of the momentum scaled to length one."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.registry import rule
from symdist.rules.requests import Asking, Sum


def unit_rows(x: Tensor, *, eps: float) -> Generator[Any, Any, Tensor]:
    """`D(x)·x` with `D = diag(1/(‖x_i‖₂ + eps))`; a zero row stays zero even where eps is 0."""
    squares = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
    # Below √tiny squares vanish: such a row counts as that long, and is not magnified beyond one.
    return x / (squares.sqrt() + eps).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)


@rule("row_norm", splits=("rows", "columns"))
def row_norm(matrix: Matrix, *, centered: bool = False, eps: float = 1e-8) -> Asking:
    """`U = D(M)·M`; centred, `U = Π·D(ΠM)·ΠM`.

    Equivariant under row permutations and column rotations; centred, also invariant to adding `1aᵀ` to M.
    Costs nothing under row blocks, m numbers under column blocks, n numbers twice where centred under row blocks.
    Source: Lau & Su, arXiv 2605.18106.
    """
    m = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    u = yield from unit_rows(m, eps=eps)
    return (yield from center_rows(matrix, u)) if centered else u
