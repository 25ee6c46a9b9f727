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
    """`D(x)·x` with `D = diag(1/‖x_i‖₂)`, or with 1e-8 added to every length, as in the reference code.

    A zero row stays zero, and a denormal one, which has no digits left, counts as long as the smallest normal number.
    Rows no longer than `noise` become zero.
    """
    lengths = yield from row_lengths(x)
    if noise:
        x = torch.where(lengths > noise, x, 0)
    if eps == "reference":
        lengths = lengths + _REFERENCE_EPS
    return x / lengths.clamp_min(torch.finfo(x.dtype).tiny)


@rule("row_norm", splits=("rows", "columns"))
def row_norm(matrix: Matrix, *, centered: bool = False, eps: Eps = "none") -> Asking:
    """`U = D(M)·M`; centred, `U = Π·D(ΠM)·ΠM`.

    Args:
        matrix: The stack of matrices, `[b, m, n]` on an unsharded rank.
        centered: Whether the mean row is taken out, before and after. For heads and routers, whose function does not
            change when all rows shift by one vector; never for embeddings.
        eps: "reference" adds 1e-8 to the lengths, as the published code does. That decides how rare tokens move: the
            row of one seen once in millions is about as long. "none" leaves lengths alone.

    Equivariant under row permutations and column rotations; centred, also invariant to adding `1aᵀ` to M.
    Costs nothing under row blocks, m numbers under column blocks, n numbers twice where centred under row blocks.
    Source: Lau & Su, arXiv 2605.18106.
    """
    m = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    u = yield from unit_rows(m, eps=eps)
    return (yield from center_rows(matrix, u)) if centered else u
