"""Hybrid rules: row normalisation and the polar map, one after the other."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from symdist.rules.linalg.inverse_root import Method, Numerics
from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.registry import rule
from symdist.rules.requests import Asking
from symdist.rules.row_norm import Eps, unit_rows
from symdist.rules.spectral import Scale, Side, check_scale, polar_factor, scaled, spectral_splits

_NOISE = 100.0


def _check(options: Mapping[str, Any]) -> None:
    check_scale(options)
    if options["order"] == "polar_then_row" and options["alpha"] is not None:
        raise ValueError(
            "alpha has no effect with order='polar_then_row' (the row norms divide it out); "
            "remove alpha or use order='row_then_polar'"
        )


@rule("hybrid", splits=spectral_splits, check=_check)
def hybrid(
    matrix: Matrix,
    *,
    order: Literal["row_then_polar", "polar_then_row"] = "row_then_polar",
    side: Side = "auto",
    centered: bool = False,
    alpha: float | None = None,
    scale: Scale = "nuclear",
    eps: Eps = "none",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
) -> Asking:
    """`U = ν^α·polar(X)`, `X = D(M)·M`, `ν = ‖X‖_*`; or `U = D(Q)·Q`, `Q = polar(M)`.

    Centred, M is replaced by ΠM, X by ΠX, and the result is projected again. α is 0 unless given, `eps` row-norm's.
    Equivariant under row permutations and column rotations. Moves what its row norms and its Gram move.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        order: Which of the two maps comes first.
        side: The Gram to take: "right" `MᵀM`, "left" `MMᵀ`, or "auto" for the smaller. Name one to fix which split of
            the matrix runs by sums.
        centered: Whether the mean row is taken out, before and after. For heads and routers.
        alpha: The power of ν, 0 unless given; has no meaning with "polar_then_row", where the row norms divide it out.
        scale: What ν is: the "nuclear" norm, "nuclear_over_frobenius", or "none", which needs `alpha` 0.
        eps: As of `row_norm`.
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.

    Source: Lau & Su, arXiv 2605.18106.
    """
    numerics = Numerics(method=method, steps=ns_steps, damping=damping)
    x = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    if order == "row_then_polar":
        x = yield from unit_rows(x, eps=eps)
        if centered:
            x = yield from center_rows(matrix, x)
        u, root = yield from polar_factor(matrix, x, side=side, numerics=numerics, unit_scale=True)
        u = scaled(u, root, alpha=alpha or 0.0, scale=scale)
    else:
        q, _ = yield from polar_factor(matrix, x, side=side, numerics=numerics)
        # A row without momentum is one of rounding in a polar factor, whose singular values are about one.
        u = yield from unit_rows(q, eps=eps, noise=_NOISE * torch.finfo(q.dtype).eps)
    return (yield from center_rows(matrix, u)) if centered else u
