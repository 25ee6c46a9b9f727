"""Row-norm: every row of the momentum scaled to length one."""

from collections.abc import Generator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.rules.matrix import Matrix, center_rows, row_lengths
from symdist.rules.registry import rule
from symdist.rules.requests import Asking

Eps: TypeAlias = Literal["none", "reference"]

_REFERENCE_EPS = 1e-8


def unit_rows(x: Tensor, *, eps: Eps = "none", noise: float = 0.0) -> Generator[Any, Any, Tensor]:
    """Scale rows to length one: `D(x)·x` with `D = diag(1/‖x_i‖₂)`.

    A zero row stays zero. A row whose length is a denormal number becomes zero, because such numbers have too few
    significant digits to be scaled up.

    Args:
        x: `[b, rows here, columns here]`.
        eps: "none" (default), or "reference" to add 1e-8 to every length, as the published code does.
        noise: Rows of at most this length become zero; 0 (default) keeps all rows.

    Returns:
        The scaled rows, in the shape of `x`.
    """
    lengths = yield from row_lengths(x)
    if noise:
        x = torch.where(lengths > noise, x, 0)
    if eps == "reference":
        lengths = lengths + _REFERENCE_EPS
    return x / torch.where(lengths >= torch.finfo(x.dtype).tiny, lengths, torch.inf)


@rule("row_norm", splits=("rows", "columns"))
def row_norm(matrix: Matrix, *, centered: bool = False, eps: Eps = "none") -> Asking:
    """Row normalisation: `U = D(M)·M`, every row scaled to length one; with `centered`, `U = Π·D(ΠM)·ΠM`.

    Equivariant under row permutations and column rotations; with `centered`, also invariant to adding `1aᵀ` to M. It
    communicates m numbers if the columns are split over ranks, and nothing if the rows are split, except that centring
    then communicates n numbers twice.
    Source: Lau & Su, arXiv 2605.18106.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        centered: Whether to subtract the mean row before and after; False by default. Set it for heads and routers,
            whose function does not change if one vector is added to all rows; never for embeddings.
        eps: "none" (default) divides by the lengths alone. "reference" adds 1e-8 to them, as the published code does.
            This matters for rare tokens: the momentum row of a token that occurs once in millions is about 1e-8 long.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [head.weight], "rule": "row_norm", "lr": 0.01, "centered": True}])
    """
    m = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    u = yield from unit_rows(m, eps=eps)
    return (yield from center_rows(matrix, u)) if centered else u
