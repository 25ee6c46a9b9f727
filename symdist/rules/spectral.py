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
    """Which Gram to take where none is named: the smaller, which is also the one that is not singular."""
    if side != "auto":
        return side
    return "right" if rows >= columns else "left"


def spectral_splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    """A right Gram is a sum over rows, a left Gram a sum over columns."""
    return ("rows",) if gram_side(options["side"], rows, columns) == "right" else ("columns",)


def check_scale(options: Mapping[str, Any]) -> None:
    """Check that alpha and the scale of ν do not contradict each other; ValueError where they do."""
    if options.get("alpha") and options["scale"] == "none":
        raise ValueError(f"alpha={options['alpha']} raises ν to a power, but scale='none' leaves ν out; drop one")


def polar_factor(
    matrix: Matrix, x: Tensor, *, side: Side, numerics: Numerics, unit_scale: bool = False
) -> Generator[Any, Any, tuple[Tensor, InverseRoot]]:
    """`x·(xᵀx)^{-1/2}` (right) or `(xxᵀ)^{-1/2}·x` (left), and the root of what `x` was divided by with `x`'s norms.

    `unit_scale` says that the numbers of `x` are about one at most, and nothing need be known of its size first.
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
    """`ν^alpha·u`, ν the nuclear norm or its ratio to the Frobenius norm, of each matrix on its own."""
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
    """`U = ν^α·M·(MᵀM)^{-1/2}`; centred, of ΠM and projected again.

    Equivariant under row permutations (any left rotation) and column rotations. Under row blocks it moves the
    n² numbers of the Gram. For embeddings and heads.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        centered: Whether the mean row is taken out, before and after. For heads and routers.
        alpha: The power of ν. 0 is the plain spectral step, 1 scales it by ν.
        scale: What ν is: the "nuclear" norm, "nuclear_over_frobenius", or "none", which needs `alpha` 0.
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.

    Source: Lau & Su, arXiv 2605.18106.
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
    """`U = ν^α·(MMᵀ)^{-1/2}·M`; centred, of ΠM and projected again.

    The router's rule: its Gram is `[experts, experts]`. Under column blocks it moves the m² numbers of the Gram.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        centered: Whether the mean row is taken out, before and after. For heads and routers.
        alpha: The power of ν. 0 is the plain spectral step, 1 scales it by ν.
        scale: What ν is: the "nuclear" norm, "nuclear_over_frobenius", or "none", which needs `alpha` 0.
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.

    Source: Lau & Su, arXiv 2605.18106.
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
    """`U = ν^α·polar(M)`, by the Gram of the side that is named or cheaper.

    `alpha = 1` is PolarGrad, and without momentum (`momentum = 0`) stochastic spectral descent, `‖G‖_*·polar(G)`; 0 is
    the plain spectral step. Equivariant under O(m) × O(n). Moves the smaller Gram, or the one named.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        side: The Gram to take: "right" `MᵀM`, "left" `MMᵀ`, or "auto" for the smaller. Name one to fix which split of
            the matrix runs by sums.
        centered: Whether the mean row is taken out, before and after. For heads and routers.
        alpha: The power of ν. 0 is the plain spectral step, 1 scales it by ν.
        scale: What ν is: the "nuclear" norm, "nuclear_over_frobenius", or "none", which needs `alpha` 0.
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.

    Source: Lau, Long & Su, PolarGrad, arXiv 2505.21799; Carlson, Cevher & Carin, *Stochastic spectral descent for
    restricted Boltzmann machines*, AISTATS 2015.
    """
    numerics = Numerics(method=method, steps=ns_steps, damping=damping)
    return (yield from _spectral(matrix, side=side, centered=centered, alpha=alpha, scale=scale, numerics=numerics))
