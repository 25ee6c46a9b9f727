"""Hybrid rules: row normalisation and the polar map, one after the other."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from symdist.rules.linalg.inverse_root import Method
from symdist.rules.linalg.precision import Precision
from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.polar_factor import Scale, Side, numerics_of, polar_factor, scaled
from symdist.rules.registry import rule
from symdist.rules.requests import Asking
from symdist.rules.row_norm import Eps, unit_rows
from symdist.rules.spectral import check_spectral, spectral_splits

_NOISE = 100.0


def _check(options: Mapping[str, Any]) -> None:
    check_spectral(options)
    if options["order"] == "polar_then_row" and options["alpha"] is not None:
        raise ValueError(
            "alpha has no effect with order='polar_then_row' (the row normalisation cancels it); "
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
    precision: Precision = "auto",
) -> Asking:
    """Row normalisation and the polar map in turn: `U = ν^α·polar(X)`, `X = D(M)·M`, `ν = ‖X‖_*`; or `U = D(Q)·Q`.

    The second form is `order` "polar_then_row", with `Q = polar(M)`. With `centered`, M is replaced by ΠM, X by ΠX, and
    the result is projected again. Equivariant under row permutations and column rotations. It communicates as much as
    `row_norm` and `polar` together. Source: Lau & Su, arXiv 2605.18106.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        order: Which map comes first: "row_then_polar" (default) or "polar_then_row".
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Where the rows are
            split over ranks, only "right" can run on the pieces; where the columns are split, only "left". Otherwise
            whole matrices are sent to owners.
        centered: Whether to subtract the mean row from M and again from the result; False by default. Set it for heads
            and routers, whose function does not change if one vector is added to all rows.
        alpha: The power of ν; None (default) means 0. Not allowed with "polar_then_row", where the row normalisation
            would cancel ν.
        scale: The meaning of ν: the "nuclear" norm (default), "nuclear_over_frobenius", the ratio of the two norms, or
            "none", which requires `alpha` 0.
        eps: "none" (default), or "reference" to add 1e-8 to the row lengths; see `row_norm`.
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: The number of polynomial steps. 0 (default) means the method's own number: 5 for "polar_express", 15
            for "newton_schulz". More steps bring smaller singular values closer to one.
        damping: The number added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 1e-8 by default.
            Increase it for matrices of low rank, so that their noise is not amplified.
        precision: In which dtype products are computed. "float32" (that of the weights if it is wider) takes all steps
            on one Gram. "float16" forms a new Gram after every second step, and splits the matrix into two numbers for
            the first, so that no rank or condition number costs it digits. "bfloat16" forms one after every step, which
            is Muon's usual iteration on the matrix itself. Norms and sums are in float32. "auto" (default) is what is
            fastest for this shape on this kind of device and no less exact than "bfloat16": one of these, or float16
            with other restarts and unsplit. `method` "exact" and damping above 1e-8 need "float32", and "auto" takes it
            then.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [linear.weight], "rule": "hybrid", "lr": 0.01, "order": "polar_then_row"}])
    """
    numerics = numerics_of(
        matrix,
        side=side,
        method=method,
        ns_steps=ns_steps,
        damping=damping,
        precision=precision,
        rows_scaled=order == "polar_then_row",
    )
    x = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    if order == "row_then_polar":
        x = yield from unit_rows(x, eps=eps)
        if centered:
            x = yield from center_rows(matrix, x)
        polar = yield from polar_factor(matrix, x, side=side, numerics=numerics, unit_scale=True)
        u = yield from scaled(polar.factor, polar, alpha=alpha or 0.0, scale=scale)
    else:
        polar = yield from polar_factor(matrix, x, side=side, numerics=numerics)
        q = polar.factor
        # The singular values of a polar factor are about one, so shorter rows than this contain only rounding errors.
        u = yield from unit_rows(q, eps=eps, noise=_NOISE * torch.finfo(q.dtype).eps)
    return (yield from center_rows(matrix, u)) if centered else u
