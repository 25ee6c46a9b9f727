"""Inverse square roots of Gram matrices, which are the only dense linear algebra that the spectral rules need.

A polar factor is `M·(MᵀM)^{-1/2}`. Every iterative polar method that multiplies `M` by odd polynomials of itself equals
a polynomial in the Gram, applied to `M`. Therefore all such methods run here, on the smaller dimension, whatever the
layout of `M`.

The Gram squares the condition number. Float32 has the digits for all steps on one Gram; float16 and bfloat16 have not,
so there the polynomial so far is applied to `M` every few steps, and a new Gram is formed: a restart.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from symdist.rules.linalg.products import product, symmetric

Method: TypeAlias = Literal["polar_express", "newton_schulz", "exact"]
Arithmetic: TypeAlias = Literal["float32", "float16", "bfloat16"]
Quintic: TypeAlias = tuple[float, float, float]

_SAFETY = 1.05
_POLAR_EXPRESS: tuple[Quintic, ...] = (
    *(
        (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)
# The first five steps already contain a safety factor of 1.02. They belong to the normalisation by ‖M‖_F.
_MUON: tuple[Quintic, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    (1.875, -1.25, 0.375),
)
_CUBIC: tuple[Quintic, ...] = ((1.5, -0.5, 0.0),)
_DEFAULT_STEPS = {"polar_express": 5, "newton_schulz": 15, "exact": 0}


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How an inverse root, or Muon's polar factor, is computed.

    Attributes:
        method: "polar_express" (default, quintic), "newton_schulz" (cubic) or "exact" (eigendecomposition).
        steps: The number of polynomial steps. 0 (default) means the method's own number: 5 for "polar_express", 15 for
            "newton_schulz". "exact" has no steps.
        damping: The number added to the diagonal of the Gram C, relative to `‖C‖_F`; 1e-8 by default.
        normalise: The bound on the spectrum that the Gram is divided by before the iteration: "gram" (default) for
            `‖C‖_F`, or "matrix" for `tr C = ‖M‖²_F`, which belongs to Muon's coefficients.
        arithmetic: The dtype of the products: "float32" (default) means that of the Gram if it is wider; "float16" or
            "bfloat16" have no damping and are not available for "exact".
        restarts: The numbers of steps after which a new Gram is formed; none by default. Those beyond the last step
            have no effect.
        split: Whether the matrix is split into two numbers of the dtype before the first root is applied, so that its
            rounding, which takes most digits from ill-conditioned matrices, is lost no more. False by default.
        speed: How many times as fast as in float32 the products are; 1 by default. Only costs depend on it and on
            `triangle`.
        triangle: The share of a symmetric product that is computed; 1 by default.
    """

    method: Method = "polar_express"
    steps: int = 0
    damping: float = 1e-8
    normalise: Literal["gram", "matrix"] = "gram"
    arithmetic: Arithmetic = "float32"
    restarts: tuple[int, ...] = ()
    split: bool = False
    speed: float = 1.0
    triangle: float = 1.0

    @property
    def half(self) -> torch.dtype | None:
        """The dtype of the products if it is narrower than float32; otherwise None."""
        return None if self.arithmetic == "float32" else getattr(torch, self.arithmetic)

    def segments(self) -> list[list[Quintic]]:
        """Return the coefficients of the steps on each Gram in turn; one list if there are no restarts."""
        steps = self.coefficients()
        cuts = [0, *(restart for restart in self.restarts if restart < len(steps)), len(steps)]
        return [steps[start:stop] for start, stop in itertools.pairwise(cuts)]

    def coefficients(self) -> list[Quintic]:
        """Return the coefficients of the polynomial steps.

        Returns:
            One `(a, b, c)` per step. The step maps a singular value x to `a·x + b·x³ + c·x⁵`.
        """
        steps = self.steps or _DEFAULT_STEPS[self.method]
        if self.method == "newton_schulz":
            table = _CUBIC
        else:
            table = _POLAR_EXPRESS if self.normalise == "gram" else _MUON
        return [table[min(i, len(table) - 1)] for i in range(steps)]

    def operations(self, d: int, segment: int = 0) -> float:
        """Return how many operations in float32 take as long as one root, to leading order.

        Args:
            d: The root is of a `[d, d]` matrix.
            segment: Of which of `segments`; the first by default.

        Returns:
            The number of operations.
        """
        if self.method == "exact":
            return 25.0 * d**3
        # Four products per step, except the products with the identity in the first step and the unused update of the
        # Gram in the last one; both are one step if there is only one.
        products = max(1, 4 * len(self.segments()[segment]) - 3)
        return products * self.triangle * 2.0 * d**3 / self.speed


class InverseRoot:
    """The inverse square root `C^{-1/2}` of the Gram `C` of `M`, and the norms of `M`, which are computed on access.

    Args:
        matrix: `C^{-1/2}`, `[b, d, d]`.
        gram: C, `[b, d, d]`, from which the norms are computed. None (default) if `norms` are given.
        norms: The nuclear norm and the Frobenius norm, `[b, 1, 1]` each, given where the Gram stayed on another rank;
            None by default.
        shift: What the diagonal of `matrix` lacks, in narrow arithmetic: added to a product in float32, it is rounded
            less than as part of the matrix. 0 by default.
        factor: `[b, 1, 1]`, a factor that the matrix and the shift lack; None (default) for 1.
    """

    def __init__(
        self,
        matrix: Tensor,
        *,
        gram: Tensor | None = None,
        norms: tuple[Tensor, Tensor] | None = None,
        shift: float = 0.0,
        factor: Tensor | None = None,
    ):
        self.matrix = matrix
        self._shift = shift
        self._factor = factor
        self._gram = gram
        self._norms = norms
        self._unit: Tensor | float = 1.0

    def of_larger(self, unit: Tensor | None) -> "InverseRoot":
        """Make the norms those of `unit·M`, where M is a matrix that was divided by `unit` beforehand.

        Args:
            unit: `[b, 1, 1]`; None if the matrix was not divided.

        Returns:
            This root, modified in place.
        """
        self._unit = 1.0 if unit is None else unit
        return self

    def applied(self, y: Tensor, *, right: bool, out: Tensor | None = None) -> Tensor:
        """Multiply a matrix by the root.

        Args:
            y: `[b, m, n]`.
            right: Whether the root is on the right.
            out: A tensor like `y`, where to write the result; None (default) for a new one.

        Returns:
            The product, in the shape and dtype of `y`.
        """
        root = self.matrix.to(y.dtype)
        c = y if self._shift else None
        y = product(y, root, c, beta=self._shift, out=out) if right else product(root, y, c, beta=self._shift, out=out)
        return y if self._factor is None else y.mul_(self._factor)

    def dense(self) -> Tensor:
        """Return the whole root, `[b, d, d]`, in float32 or wider."""
        root = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32), copy=bool(self._shift))
        if self._shift:
            root.diagonal(dim1=-2, dim2=-1).add_(self._shift)
        return root if self._factor is None else root * self._factor

    @property
    def nuclear(self) -> Tensor:
        """`‖M‖_* = tr(C·C^{-1/2})`, `[b, 1, 1]`; inf if it leaves the range of the dtype."""
        return self._divided_nuclear() * self._unit

    @property
    def frobenius(self) -> Tensor:
        """`‖M‖_F = √tr C`, `[b, 1, 1]`; inf if it leaves the range of the dtype."""
        return self._divided_frobenius() * self._unit

    @property
    def nuclear_over_frobenius(self) -> Tensor:
        """`‖M‖_* / ‖M‖_F`, `[b, 1, 1]`, also where the norms leave the range; 0 for a zero matrix."""
        nuclear = self._divided_nuclear()
        return nuclear / self._divided_frobenius().clamp_min(torch.finfo(nuclear.dtype).tiny)

    def _divided_nuclear(self) -> Tensor:
        if self._norms is not None:
            return self._norms[0]
        assert self._gram is not None
        return (self._gram * self.matrix).sum((-2, -1), keepdim=True)

    def _divided_frobenius(self) -> Tensor:
        if self._norms is not None:
            return self._norms[1]
        assert self._gram is not None
        return _trace(self._gram).clamp_min(0).sqrt()


def inverse_root(gram: Tensor, numerics: Numerics, segment: int = 0, *, spare: Tensor | None = None) -> InverseRoot:
    """Compute the damped inverse square roots of a stack of symmetric positive semi-definite matrices.

    With restarts, it computes the part of the root that belongs to one segment of steps.

    Source: Lau & Su, arXiv 2605.18106 (coupled polynomial iteration); the Polar Express, arXiv 2505.16932.

    Args:
        gram: `[b, d, d]`; not written to. In narrow arithmetic, the first Gram is that of a matrix of Frobenius norm
            `HEADROOM`.
        numerics: The method, its steps and the damping. "exact" computes in float64.
        segment: Which of `numerics.segments()` to compute; the first by default.
        spare: A tensor like `gram` that may be overwritten, for the result; None by default.

    Returns:
        The roots, in the dtype of `gram`, or in float32 if that dtype is narrower; or in narrow arithmetic, in its
        dtype. The root of a zero matrix is finite.

    Example:
        >>> m = torch.randn(1, 6, 4)
        >>> polar = m @ inverse_root(m.mT @ m, Numerics(method="exact")).matrix
    """
    if numerics.half is not None:
        return _narrow(gram, numerics, segment, spare)
    c = gram.to(torch.promote_types(gram.dtype, torch.float32))
    # Scale by the trace. It stays in float32's range as long as the Gram itself does, unlike the squares in a norm. A
    # denormal trace has too few significant digits, so such a matrix is treated as zero.
    trace = _trace(c)
    limits = torch.finfo(c.dtype)
    nonzero = trace > limits.tiny / limits.eps
    trace = torch.where(nonzero, trace, 1)
    unit = torch.where(nonzero, c / trace, 0)
    solve = _exact if numerics.method == "exact" else _polynomial
    return InverseRoot(solve(unit, numerics) * trace.rsqrt(), gram=c)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def polar_as_published(m: Tensor, numerics: Numerics) -> Tensor:
    """Compute the polar factor by quintic steps on the matrix, in bfloat16, rounded as Muon's published code does.

    The rounding error, a few percent of a singular value, is part of the published method.

    Args:
        m: `[b, m, n]`, in float32 or float64.
        numerics: The coefficients; `numerics.method` must be iterative.

    Returns:
        The polar factor, in the shape and dtype of `m`.
    """
    # The division by a power of two rounds nothing. Without it, the squares of the momentum of a long-unused expert
    # would vanish. What contains only denormal numbers has no significant digits and becomes zero.
    tiny = torch.finfo(m.dtype).tiny
    size, lowest = m.abs().amax((-2, -1), keepdim=True), math.frexp(tiny)[1]
    exponent = torch.frexp(size).exponent.clamp(lowest, 1 - lowest)
    x = torch.where(size >= tiny, torch.ldexp(m, -exponent), 0).bfloat16()
    tall = m.shape[-2] > m.shape[-1]
    x = x.mT if tall else x
    x = x / (1.02 * torch.linalg.matrix_norm(x, keepdim=True)).clamp_min(torch.finfo(x.dtype).tiny)
    for a, b, c in numerics.coefficients():
        gram = x @ x.mT
        # Each product is rounded to bfloat16 separately. A fused form would round less, but its updates would differ
        # from the published ones by as much as those differ from the exact polynomial.
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)


HEADROOM = 16.0
"""The Frobenius norm of a matrix whose first Gram is formed in narrow arithmetic.

At norm 1, many elements of the Gram would be denormal numbers of float16. At this norm, none exceeds 256.
"""


def _narrow(gram: Tensor, numerics: Numerics, segment: int, spare: Tensor | None) -> InverseRoot:
    """Compute one segment of the polynomial in float16 or bfloat16, on a Gram that was formed for it."""
    assert numerics.half is not None
    steps = numerics.segments()[segment]
    r = gram.to(numerics.half)
    if segment:
        return _steps_on_gram(r, steps, spare=spare)
    square = HEADROOM**2
    if numerics.normalise == "matrix":
        return _steps_on_gram(r, steps, unit=1.02**2 * square, out=1 / (1.02 * HEADROOM), spare=spare)
    slack = 1.0 if numerics.method == "newton_schulz" else 1.02
    bound = slack * torch.linalg.matrix_norm(gram.float(), keepdim=True)
    bound = torch.where(bound > 0, bound, 1)
    r = (gram * (square / bound)).to(numerics.half)
    return _steps_on_gram(r, steps, unit=square, spare=spare, factor=bound.rsqrt())


def _steps_on_gram(
    r: Tensor,
    steps: Sequence[Quintic],
    *,
    unit: float = 1.0,
    out: float = 1.0,
    spare: Tensor | None = None,
    factor: Tensor | None = None,
) -> InverseRoot:
    """Evaluate `out·factor·Π(a + b·R + c·R²)`, where R is the Gram before each step.

    All factors are polynomials in one matrix, so all products are symmetric.

    Args:
        r: `unit·R`, `[b, d, d]`.
        steps: The coefficients `(a, b, c)`, one to three.
        unit: The factor in `r`; 1 by default.
        out: The factor of the result; 1 by default.
        spare: A tensor like `r` that may be overwritten; None by default.
        factor: `[b, 1, 1]`, a further factor of the result; None (default) for 1.

    Returns:
        The result, in the dtype of `r`.
    """
    if len(steps) == 1:
        ((a, b, c),) = steps
        z = symmetric(r, r, r, alpha=out * c / unit**2, beta=out * b / unit, out=spare)
        return InverseRoot(z, shift=out * a, factor=factor)
    q: Tensor | None = None
    for i, (a, b, c) in enumerate(steps):
        last = i + 1 == len(steps)
        z = symmetric(r, r, r, alpha=c / unit**2, beta=b / unit)
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = symmetric(q, z, q, alpha=out if last else 1.0, beta=a * (out if last else 1.0), out=spare)
        if not last:
            rz = symmetric(r, z, r, alpha=1 / unit, beta=a / unit)
            r = symmetric(z, rz, rz, beta=a)
            unit = 1.0
    assert q is not None
    return InverseRoot(q, factor=factor)


def _exact(unit: Tensor, numerics: Numerics) -> Tensor:
    values, vectors = torch.linalg.eigh(unit.double())
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    # Rounding turns the zero eigenvalues of a singular Gram into values of about ±eps of its dtype. Without a lower
    # bound, their roots would be noise.
    values = values.clamp_min(torch.finfo(unit.dtype).eps) + numerics.damping * norm
    return ((vectors * values.rsqrt()[..., None, :]) @ vectors.mT).to(unit.dtype)


def _polynomial(unit: Tensor, numerics: Numerics) -> Tensor:
    """Run the coupled iteration, in which y tends to `A^{1/2}` and z to `A^{-1/2}`.

    All factors are polynomials in the same matrix `A`. Their products are computed whole: from mirrored triangles, the
    rounding errors of y and z would not cancel, and the error at condition number 1e3 would be ten times as large.
    """
    eye = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device)
    y = unit
    if numerics.damping:
        y = y + numerics.damping * torch.linalg.matrix_norm(unit, keepdim=True) * eye
    if numerics.normalise == "matrix":
        bound = 1.02**2 * _trace(y)
    else:
        bound = torch.linalg.matrix_norm(y, keepdim=True) * (1.0 if numerics.method == "newton_schulz" else 1.02)
    bound = torch.where(bound > 0, bound, 1)
    y = y / bound
    z: Tensor | None = None
    coefficients = numerics.coefficients()
    for i, (a, b, c) in enumerate(coefficients):
        r = eye - y if z is None else torch.baddbmm(eye, z, y, alpha=-1)
        p = torch.baddbmm(r, r, r, beta=-b - 2 * c, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a + b + c)
        z = p if z is None else p @ z
        if i + 1 < len(coefficients):
            y = y @ p
    assert z is not None
    return (z + z.mT) / 2 * bound.rsqrt()
