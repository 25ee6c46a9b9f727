"""One-sided spectral rules and the polar family: the momentum times the inverse root of one of its Grams."""

from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.hardware import hardware_of
from symdist.rules.linalg.inverse_root import HEADROOM, InverseRoot, Method, Numerics
from symdist.rules.linalg.precision import Precision, check_precision, with_precision
from symdist.rules.linalg.products import symmetric
from symdist.rules.matrix import Matrix, at_unit_scale, center_rows
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking, Factored, Root, Sum

Side: TypeAlias = Literal["auto", "right", "left"]
Scale: TypeAlias = Literal["nuclear", "nuclear_over_frobenius", "none"]


_ZERO = 2.0**-119
"""Matrices of at most this Frobenius norm are not iterated on in half precision."""
_CACHE = 1 << 20
"""The bytes of matrices that a CPU iterates on at a time, so that they stay in its cache: an eighth faster."""


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Polar:
    """A polar factor, and what the norms of its matrix are found from.

    Attributes:
        factor: The polar factor, in the shape and dtype of `values`.
        values: The matrices that it belongs to, `[b, rows here, columns here]`, divided by `unit`.
        unit: `[b, 1, 1]`, the factors that the matrices were divided by; None if they were not divided.
        across: The axis along which other ranks hold parts of the matrices, if any do.
        root: The inverse root that the factor was computed with; None if the iteration was restarted.
    """

    factor: Tensor
    values: Tensor
    unit: Tensor | None
    across: MatrixAxis
    root: InverseRoot | None

    def nu(self, scale: Scale) -> Generator[Any, Any, Tensor]:
        """Compute ν, `[b, 1, 1]`: the nuclear norm of the matrix or its ratio to the Frobenius norm.

        With restarts, it yields one `Sum`: the nuclear norm is then `⟨M, polar(M)⟩`, and no Gram of M is at hand.
        """
        if self.root is not None:
            nuclear, frobenius = self.root.nuclear, self.root.frobenius
        else:
            parts = [(self.values * self.factor).sum((-2, -1), keepdim=True)]
            parts.append(self.values.square().sum((-2, -1), keepdim=True))
            sums = yield Sum(values=torch.cat(parts, dim=-1), across=self.across)
            nuclear, frobenius = sums[..., :1], sums[..., 1:].sqrt()
            if scale != "nuclear_over_frobenius" and self.unit is not None:
                nuclear = nuclear * self.unit
        if scale == "nuclear_over_frobenius":
            return nuclear / frobenius.clamp_min(torch.finfo(nuclear.dtype).tiny)
        return nuclear


def numerics_of(
    matrix: Matrix,
    *,
    side: Side,
    method: Method,
    ns_steps: int,
    damping: float,
    precision: Precision,
    normalise: Literal["gram", "matrix"] = "gram",
    rows_scaled: bool = False,
) -> Numerics:
    """Return how a rule computes the polar factors of a stack, its precision chosen.

    Args:
        matrix: The stack.
        side: The option of that name.
        method: The option of that name.
        ns_steps: The option of that name.
        damping: The option of that name.
        precision: The option of that name.
        normalise: See `Numerics`.
        rows_scaled: Whether the rule scales up short rows of the polar factor; False by default. float16 loses rows
            that are shorter than the matrix by a factor of ten million, so "auto" then does not take it.

    Returns:
        The numerics, the same on all ranks that hold parts of the matrices.
    """
    right = gram_side(side, matrix.rows, matrix.columns) == "right"
    hardware = matrix.hardware or hardware_of(matrix.values.device)
    if rows_scaled and precision == "auto":
        hardware = replace(hardware, float16_flops=1.0)
    return with_precision(
        Numerics(method=method, steps=ns_steps, damping=damping, normalise=normalise),
        precision,
        dtype=matrix.values.dtype,
        edge=matrix.columns if right else matrix.rows,
        length=matrix.rows if right else matrix.columns,
        parts=matrix.parts.get("rows" if right else "columns", 1),
        hardware=hardware,
    )


def polar_factor(
    matrix: Matrix, x: Tensor, *, side: Side, numerics: Numerics, unit_scale: bool = False
) -> Generator[Any, Any, Polar]:
    """Compute the polar factor, `x·(xᵀx)^{-1/2}` (right) or `(xxᵀ)^{-1/2}·x` (left).

    Args:
        matrix: The stack that `x` comes from; it gives the size of the whole matrix.
        x: `[b, rows here, columns here]`.
        side: Which Gram to use.
        numerics: How the inverse root is computed; see `numerics_of`.
        unit_scale: Whether the caller guarantees that the magnitudes in `x` do not exceed about one. This saves one
            sum over ranks. If False (default), `x` is first divided by a power of two near its largest magnitude.

    Returns:
        The polar factor and norms.
    """
    right = gram_side(side, matrix.rows, matrix.columns) == "right"
    across: MatrixAxis = "rows" if right else "columns"
    root = unit = None
    if numerics.half is not None:
        u = yield from _restarted(x, right=right, across=across, numerics=numerics, whole=across not in matrix.parts)
    else:
        if not unit_scale:
            x, unit = yield from at_unit_scale(x)
        gram = symmetric(x.mT, x) if right else symmetric(x, x.mT)
        root = yield Root(gram=gram, across=across, numerics=numerics, unit=unit)
        del gram
        u = root.applied(x, right=right)
    yield Factored(values=x, polar=u, unit=unit, parts=matrix.parts.get(across, 1))
    return Polar(factor=u, values=x, unit=unit, across=across, root=root)


def _restarted(
    x: Tensor, *, right: bool, across: MatrixAxis, numerics: Numerics, whole: bool
) -> Generator[Any, Any, Tensor]:
    """Compute polar factors in half precision, forming a new Gram after each segment of steps.

    Args:
        x: As for `polar_factor`.
        right: Whether the Gram is `xᵀx`.
        across: The axis over which it is a sum.
        numerics: How the roots are computed.
        whole: Whether matrices are whole on this rank.

    Returns:
        The polar factors, in the shape and dtype of `x`.
    """
    assert numerics.half is not None
    # In float64 no square overflows or vanishes. A matrix that hardly has normal numbers counts as zero.
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
    norm = (yield Sum(values=norm.square(), across=across)).sqrt()
    scale = torch.where(norm > _ZERO, HEADROOM / norm, 0).to(x.dtype)
    result = torch.empty_like(x)
    size = max(1, x.shape[0])
    if whole and x.device.type == "cpu":
        size = max(1, _CACHE // (numerics.half.itemsize * max(1, x.shape[-2] * x.shape[-1])))
    for start in range(0, max(1, x.shape[0]), size):
        part = slice(start, start + size)
        y = torch.mul(x[part], scale[part], out=torch.empty_like(x[part], dtype=numerics.half))
        # What the dtype has no digits for is small, but not in comparison with the smallest singular values.
        rest = (x[part] * scale[part]).sub_(y).to(y.dtype) if numerics.split else None
        gram = spare = other = None
        for segment in range(len(numerics.segments())):
            gram = symmetric(y.mT, y, out=gram) if right else symmetric(y, y.mT, out=gram)
            root = yield Root(gram=gram, across=across, numerics=numerics, segment=segment, spare=spare)
            # The matrix before and the matrix after a restart change places.
            y, other = root.applied(y, right=right, out=other), y
            if rest is not None:
                y, rest = y.add_(root.applied(rest, right=right)), None
            spare = root.matrix if root.matrix.dtype == y.dtype else None
        result[part] = y
    return result


def scaled(u: Tensor, polar: Polar, *, alpha: float, scale: Scale) -> Generator[Any, Any, Tensor]:
    """Return `ν^alpha·u`, where ν is the nuclear norm or its ratio to the Frobenius norm, depending on `scale`."""
    if alpha == 0:
        return u
    nu = yield from polar.nu(scale)
    return nu.clamp_min(0).pow(alpha) * u


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
            on one Gram. "float16" forms a new Gram after every second step or every step, and "bfloat16" after every
            step, which is Muon's usual iteration on the matrix itself; norms and sums are in float32. "auto" (default)
            is what is fastest for this shape on this kind of device and no less exact than "bfloat16". `method` "exact"
            and damping above 1e-8 need "float32", and "auto" takes it then.

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
            on one Gram. "float16" forms a new Gram after every second step or every step, and "bfloat16" after every
            step, which is Muon's usual iteration on the matrix itself; norms and sums are in float32. "auto" (default)
            is what is fastest for this shape on this kind of device and no less exact than "bfloat16". `method` "exact"
            and damping above 1e-8 need "float32", and "auto" takes it then.

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
            on one Gram. "float16" forms a new Gram after every second step or every step, and "bfloat16" after every
            step, which is Muon's usual iteration on the matrix itself; norms and sums are in float32. "auto" (default)
            is what is fastest for this shape on this kind of device and no less exact than "bfloat16". `method` "exact"
            and damping above 1e-8 need "float32", and "auto" takes it then.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [linear.weight], "rule": "polar", "lr": 0.01, "alpha": 1.0}])
    """
    numerics = numerics_of(matrix, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision)
    return (yield from _spectral(matrix, side=side, centered=centered, alpha=alpha, scale=scale, numerics=numerics))
