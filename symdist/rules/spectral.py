"""One-sided spectral rules and the polar family: the momentum times the inverse root of one of its Grams."""

from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.rules.linalg.inverse_root import InverseRoot, Method, Numerics
from symdist.rules.matrix import Matrix, at_unit_scale, center_rows
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking, Root

Side: TypeAlias = Literal["auto", "right", "left"]
Scale: TypeAlias = Literal["nuclear", "nuclear_over_frobenius", "none"]


def gram_side(side: Side, rows: int, columns: int) -> Literal["right", "left"]:
    """Choose the Gram to use.

    "auto" chooses the smaller Gram. If the matrix is not square, the larger Gram is singular.
    """
    if side != "auto":
        return side
    return "right" if rows >= columns else "left"


def spectral_splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    """Return the split under which the Gram is a sum over ranks: "rows" for a right Gram, "columns" for a left one."""
    return ("rows",) if gram_side(options["side"], rows, columns) == "right" else ("columns",)


def check_scale(options: Mapping[str, Any]) -> None:
    """Check that `alpha` and `scale` do not contradict each other.

    Raises:
        ValueError: If `alpha` is not 0 and `scale` is "none".
    """
    if options.get("alpha") and options["scale"] == "none":
        raise ValueError(
            f"alpha={options['alpha']} scales the update by a power of its norm, but scale='none' turns that scaling "
            "off; remove one of the two options"
        )


def polar_factor(
    matrix: Matrix, x: Tensor, *, side: Side, numerics: Numerics, unit_scale: bool = False
) -> Generator[Any, Any, tuple[Tensor, InverseRoot]]:
    """Compute the polar factor, `x·(xᵀx)^{-1/2}` (right) or `(xxᵀ)^{-1/2}·x` (left).

    Args:
        matrix: The stack that `x` comes from; it gives the size of the whole matrix.
        x: `[b, rows here, columns here]`.
        side: Which Gram to use.
        numerics: How the inverse root is computed.
        unit_scale: Whether the caller guarantees that the magnitudes in `x` do not exceed about one. This saves one
            sum over ranks. If False (default), `x` is first divided by a power of two near its largest magnitude.

    Returns:
        The polar factor, in the shape of `x`, and the inverse root of the scaled `x` with the norms of `x` itself.
    """
    unit = None
    if not unit_scale:
        x, unit = yield from at_unit_scale(x)
    if gram_side(side, matrix.rows, matrix.columns) == "right":
        root = yield Root(gram=x.mT @ x, across="rows", numerics=numerics, unit=unit)
        return x @ root.matrix, root
    root = yield Root(gram=x @ x.mT, across="columns", numerics=numerics, unit=unit)
    return root.matrix @ x, root


def scaled(u: Tensor, root: InverseRoot, *, alpha: float, scale: Scale) -> Tensor:
    """Return `ν^alpha·u`, where ν is the nuclear norm or its ratio to the Frobenius norm, depending on `scale`."""
    if alpha == 0:
        return u
    nu = root.nuclear
    if scale == "nuclear_over_frobenius":
        nu = nu / root.frobenius.clamp_min(torch.finfo(nu.dtype).tiny)
    return nu.clamp_min(0).pow(alpha) * u


def _spectral(matrix: Matrix, *, side: Side, centered: bool, alpha: float, scale: Scale, numerics: Numerics) -> Asking:
    m = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    u, root = yield from polar_factor(matrix, m, side=side, numerics=numerics)
    if centered:
        u = yield from center_rows(matrix, u)
    return scaled(u, root, alpha=alpha, scale=scale)


@rule("right_spectral", splits=("rows",), check=check_scale)
def right_spectral(
    matrix: Matrix,
    *,
    centered: bool = False,
    alpha: float = 0.0,
    scale: Scale = "nuclear",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
) -> Asking:
    """Right spectral update, for embeddings and heads: `U = ν^α·M·(MᵀM)^{-1/2}`.

    With `centered`, M is replaced by ΠM and the result is projected again. Equivariant under left and right rotations;
    with `centered`, under row permutations and column rotations. If the rows are split over ranks, it communicates the
    n² elements of the Gram. Source: Lau & Su, arXiv 2605.18106.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        centered: Whether to subtract the mean row from M and again from the result; False by default. Set it for heads
            and routers, whose function does not change if one vector is added to all rows.
        alpha: The power of ν. 0 (default) gives the plain spectral step, 1 multiplies it by ν.
        scale: The meaning of ν: the "nuclear" norm (default), "nuclear_over_frobenius", the ratio of the two norms, or
            "none", which requires `alpha` 0.
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: The number of polynomial steps. 0 (default) means the method's own number: 5 for "polar_express", 15
            for "newton_schulz". More steps bring smaller singular values closer to one.
        damping: The number added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 1e-8 by default.
            Increase it for matrices of low rank, so that their noise is not amplified.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [embedding.weight], "rule": "right_spectral", "lr": 0.01}])
    """
    numerics = Numerics(method=method, steps=ns_steps, damping=damping)
    return (yield from _spectral(matrix, side="right", centered=centered, alpha=alpha, scale=scale, numerics=numerics))


@rule("left_spectral", splits=("columns",), check=check_scale)
def left_spectral(
    matrix: Matrix,
    *,
    centered: bool = False,
    alpha: float = 0.0,
    scale: Scale = "nuclear",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
) -> Asking:
    """Left spectral update, for routers: `U = ν^α·(MMᵀ)^{-1/2}·M`.

    A router's Gram is small, `[experts, experts]`. With `centered`, M is replaced by ΠM and the result is projected
    again. Equivariant under left and right rotations; with `centered`, under row permutations and column rotations. If
    the columns are split over ranks, it communicates the m² elements of the Gram. Source: Lau & Su, arXiv 2605.18106.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        centered: Whether to subtract the mean row from M and again from the result; False by default. Set it for heads
            and routers, whose function does not change if one vector is added to all rows.
        alpha: The power of ν. 0 (default) gives the plain spectral step, 1 multiplies it by ν.
        scale: The meaning of ν: the "nuclear" norm (default), "nuclear_over_frobenius", the ratio of the two norms, or
            "none", which requires `alpha` 0.
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: The number of polynomial steps. 0 (default) means the method's own number: 5 for "polar_express", 15
            for "newton_schulz". More steps bring smaller singular values closer to one.
        damping: The number added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 1e-8 by default.
            Increase it for matrices of low rank, so that their noise is not amplified.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [router.weight], "rule": "left_spectral", "lr": 0.01, "centered": True}])
    """
    numerics = Numerics(method=method, steps=ns_steps, damping=damping)
    return (yield from _spectral(matrix, side="left", centered=centered, alpha=alpha, scale=scale, numerics=numerics))


@rule("polar", splits=spectral_splits, check=check_scale)
def polar(
    matrix: Matrix,
    *,
    side: Side = "auto",
    centered: bool = False,
    alpha: float = 0.0,
    scale: Scale = "nuclear",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
) -> Asking:
    """Polar update: `U = ν^α·polar(M)`, computed from either Gram.

    `alpha = 1` is PolarGrad and, without momentum (`momentum = 0`), stochastic spectral descent, `‖G‖_*·polar(G)`.
    Equivariant under O(m) × O(n); with `centered`, under row permutations and column rotations. If the matrix is split,
    it communicates the Gram that `side` selects.
    Source: Lau, Long & Su, PolarGrad, arXiv 2505.21799; Carlson, Cevher & Carin, *Stochastic spectral descent for
    restricted Boltzmann machines*, AISTATS 2015.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Where the rows are
            split over ranks, only "right" can run on the pieces; where the columns are split, only "left". Otherwise
            whole matrices are sent to owners.
        centered: Whether to subtract the mean row from M and again from the result; False by default. Set it for heads
            and routers, whose function does not change if one vector is added to all rows.
        alpha: The power of ν. 0 (default) gives the plain spectral step, 1 multiplies it by ν.
        scale: The meaning of ν: the "nuclear" norm (default), "nuclear_over_frobenius", the ratio of the two norms, or
            "none", which requires `alpha` 0.
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: The number of polynomial steps. 0 (default) means the method's own number: 5 for "polar_express", 15
            for "newton_schulz". More steps bring smaller singular values closer to one.
        damping: The number added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 1e-8 by default.
            Increase it for matrices of low rank, so that their noise is not amplified.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [linear.weight], "rule": "polar", "lr": 0.01, "alpha": 1.0}])
    """
    numerics = Numerics(method=method, steps=ns_steps, damping=damping)
    return (yield from _spectral(matrix, side=side, centered=centered, alpha=alpha, scale=scale, numerics=numerics))
