"""The polar factor of a stack of matrices: the matrices times the inverse roots of one of their Grams."""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.hardware import hardware_of
from symdist.rules.linalg.inverse_root import HEADROOM, InverseRoot, Method, Numerics
from symdist.rules.linalg.precision import Precision, with_precision
from symdist.rules.linalg.products import symmetric
from symdist.rules.matrix import Matrix, at_unit_scale, largest
from symdist.rules.registry import MatrixAxis
from symdist.rules.requests import Factored, Root, Sum

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


@dataclass(frozen=True, eq=False, kw_only=True)
class Polar:
    """A polar factor, and what the norms of its matrix are found from.

    Attributes:
        factor: The polar factor, in the shape and dtype of `values`.
        values: The matrices that it belongs to, `[b, rows here, columns here]`, divided by `unit`.
        unit: `[b, 1, 1]`, the factors that the matrices were divided by; None if they were not divided.
        across: The axis along which other ranks hold parts of the matrices, if any do.
        root: The inverse root that the factor was computed with; None if the iteration was restarted.
        scale: `[b, 1, 1]`, what brings `values` to the Frobenius norm `HEADROOM` if the iteration was restarted; 0 for
            those of hardly any size. None if it was not.
    """

    factor: Tensor
    values: Tensor
    unit: Tensor | None
    across: MatrixAxis
    root: InverseRoot | None
    scale: Tensor | None

    def nu(self, scale: Scale) -> Generator[Any, Any, Tensor]:
        """Compute ν, `[b, 1, 1]`: the nuclear norm of the matrix or its ratio to the Frobenius norm.

        The nuclear norm may leave the range and be inf; the ratio does not. With restarts, it yields one `Sum`: the
        nuclear norm is then `⟨M, polar(M)⟩`, and no Gram of M is at hand.
        """
        over_frobenius = scale == "nuclear_over_frobenius"
        if self.root is not None:
            return self.root.nuclear_over_frobenius if over_frobenius else self.root.nuclear
        assert self.scale is not None
        here = (self.values * self.scale * self.factor).sum((-2, -1), keepdim=True)
        nuclear = yield Sum(values=here, across=self.across)
        return nuclear / HEADROOM if over_frobenius else nuclear / torch.where(self.scale > 0, self.scale, 1)


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
    root = unit = scale = None
    if numerics.half is not None:
        whole = across not in matrix.parts
        u, scale = yield from _restarted(x, right=right, across=across, numerics=numerics, whole=whole)
    else:
        if not unit_scale:
            x, unit = yield from at_unit_scale(x)
        gram = symmetric(x.mT, x) if right else symmetric(x, x.mT)
        root = yield Root(gram=gram, across=across, numerics=numerics, unit=unit)
        del gram
        u = root.applied(x, right=right)
    yield Factored(values=x, polar=u, unit=unit, parts=matrix.parts.get(across, 1))
    return Polar(factor=u, values=x, unit=unit, across=across, root=root, scale=scale)


def _scale(norm: Tensor, peak: Tensor | float = 1.0) -> Tensor:
    """Return the factor that brings matrices to the Frobenius norm `HEADROOM`; 0 for those of hardly any size.

    Args:
        norm: The Frobenius norms of the matrices divided by `peak`.
        peak: What they were divided by; 1 by default.

    Returns:
        The factors.
    """
    return torch.where(norm * peak > _ZERO, HEADROOM / norm / peak, 0)


def _scale_on_cpu(x: Tensor) -> Tensor:
    """Return the factor of `_scale` for whole matrices, without float64, in which a CPU takes ten times as long."""
    peak = torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True)).clamp_min(_ZERO)
    return _scale(torch.linalg.vector_norm(x / peak, dim=(-2, -1), keepdim=True), peak)


def _restarted(
    x: Tensor, *, right: bool, across: MatrixAxis, numerics: Numerics, whole: bool
) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """Compute polar factors in half precision, forming a new Gram after each segment of steps.

    Args:
        x: As for `polar_factor`.
        right: Whether the Gram is `xᵀx`.
        across: The axis over which it is a sum.
        numerics: How the roots are computed.
        whole: Whether matrices are whole on this rank.

    Returns:
        The polar factors, in the shape and dtype of `x`, and the factors that brought `x` to the norm `HEADROOM`.
    """
    assert numerics.half is not None
    size, scales = max(1, x.shape[0]), None
    if whole and x.device.type == "cpu":
        size = max(1, _CACHE // (numerics.half.itemsize * max(1, x.shape[-2] * x.shape[-1])))
    else:
        # In float64 no square overflows or vanishes.
        norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64)
        norm = (yield Sum(values=norm.square(), across=across)).sqrt()
        scales = _scale(norm).to(x.dtype)
    result, used = torch.empty_like(x), []
    for start in range(0, max(1, x.shape[0]), size):
        part = slice(start, start + size)
        scale = _scale_on_cpu(x[part]) if scales is None else scales[part]
        used.append(scale)
        y = torch.mul(x[part], scale, out=torch.empty_like(x[part], dtype=numerics.half))
        # What the dtype has no digits for is small, but not in comparison with the smallest singular values.
        rest = (x[part] * scale).sub_(y).to(y.dtype) if numerics.split else None
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
    return result, torch.cat(used)


def scaled(u: Tensor, polar: Polar, *, alpha: float, scale: Scale) -> Generator[Any, Any, Tensor]:
    """Return `ν^alpha·u`, where ν is the nuclear norm or its ratio to the Frobenius norm, depending on `scale`.

    A factor above the largest magnitude of a gradient is replaced by that: a weight that is no number trains no more.
    """
    if alpha == 0:
        return u
    nu = yield from polar.nu(scale)
    return nu.clamp_min(0).pow(alpha).clamp_max(largest(u.dtype)) * u
