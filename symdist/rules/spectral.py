"""One-sided spectral rules and the polar family: the momentum times the inverse root of one of its Grams."""

from collections.abc import Mapping
from typing import Any

from symdist.rules.linalg.inverse_root import Method, Numerics
from symdist.rules.linalg.precision import Precision, check_precision
from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.polar_factor import Scale, Side, gram_side, numerics_of, polar_factor, scaled
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking


def spectral_splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    """Return the split under which the Gram is a sum over ranks: "rows" for a right Gram, "columns" for a left one."""
    return ("rows",) if gram_side(options["side"], rows, columns) == "right" else ("columns",)


def check_spectral(options: Mapping[str, Any]) -> None:
    """Check that options do not contradict each other: `alpha` and `scale`, and `precision` and others.

    Raises:
        ValueError: If `alpha` is not 0 and `scale` is "none", or as `check_precision`.
    """
    check_precision(options)
    if options.get("alpha") and options["scale"] == "none":
        raise ValueError(
            f"alpha={options['alpha']} scales the update by a power of its norm, but scale='none' turns that scaling "
            "off; remove one of the two options"
        )


def _spectral(matrix: Matrix, *, side: Side, centered: bool, alpha: float, scale: Scale, numerics: Numerics) -> Asking:
    m = (yield from center_rows(matrix, matrix.values)) if centered else matrix.values
    polar = yield from polar_factor(matrix, m, side=side, numerics=numerics)
    u = (yield from center_rows(matrix, polar.factor)) if centered else polar.factor
    return (yield from scaled(u, polar, alpha=alpha, scale=scale))


@rule("right_spectral", splits=("rows",), check=check_spectral)
def right_spectral(
    matrix: Matrix,
    *,
    centered: bool = False,
    alpha: float = 0.0,
    scale: Scale = "nuclear",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
    precision: Precision = "auto",
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
        >>> SymDist([{"params": [embedding.weight], "rule": "right_spectral", "lr": 0.01}])
    """
    numerics = numerics_of(matrix, side="right", method=method, ns_steps=ns_steps, damping=damping, precision=precision)
    return (yield from _spectral(matrix, side="right", centered=centered, alpha=alpha, scale=scale, numerics=numerics))


@rule("left_spectral", splits=("columns",), check=check_spectral)
def left_spectral(
    matrix: Matrix,
    *,
    centered: bool = False,
    alpha: float = 0.0,
    scale: Scale = "nuclear",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
    precision: Precision = "auto",
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
        >>> SymDist([{"params": [router.weight], "rule": "left_spectral", "lr": 0.01, "centered": True}])
    """
    numerics = numerics_of(matrix, side="left", method=method, ns_steps=ns_steps, damping=damping, precision=precision)
    return (yield from _spectral(matrix, side="left", centered=centered, alpha=alpha, scale=scale, numerics=numerics))


@rule("polar", splits=spectral_splits, check=check_spectral)
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
    precision: Precision = "auto",
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
        >>> SymDist([{"params": [linear.weight], "rule": "polar", "lr": 0.01, "alpha": 1.0}])
    """
    numerics = numerics_of(matrix, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision)
    return (yield from _spectral(matrix, side=side, centered=centered, alpha=alpha, scale=scale, numerics=numerics))
