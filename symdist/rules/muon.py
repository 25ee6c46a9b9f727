"""Muon: the polar factor of the Nesterov momentum, by Muon's polynomial evaluated on the Gram."""

from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from symdist.rules.linalg.inverse_root import Method, Numerics, polar_as_published
from symdist.rules.linalg.precision import check_precision
from symdist.rules.matrix import Matrix
from symdist.rules.polar_factor import Side, numerics_of, polar_factor
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking
from symdist.rules.spectral import spectral_splits

AdjustLr: TypeAlias = Literal["spectral", "match_rms_adamw", "none"]
MuonPrecision: TypeAlias = Literal["auto", "float32", "float16", "bfloat16", "published"]


def muon_splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    """Return the splits under which Muon runs on the pieces; none as published, with whole matrices."""
    return () if options["precision"] == "published" else spectral_splits(options, rows, columns)


def muon_polar(
    matrix: Matrix,
    x: Tensor,
    *,
    side: Side,
    method: Method,
    ns_steps: int,
    damping: float,
    precision: MuonPrecision,
    unit_scale: bool = False,
    rows_scaled: bool = False,
) -> Generator[Any, Any, Tensor]:
    """Compute `polar(x)` with Muon's coefficients.

    Args:
        matrix: The stack that `x` comes from.
        x: `[b, rows here, columns here]`, in the layout of `matrix`.
        side: Which Gram to use, see `muon`.
        method: How the polar factor is computed, see `muon`.
        ns_steps: The number of polynomial steps; 0 means the method's own number.
        damping: The damping of the Gram, relative to its Frobenius norm.
        precision: In which dtype products are computed, see `muon`.
        unit_scale: Whether the magnitudes in `x` do not exceed about one, see `polar_factor`; False by default.
        rows_scaled: Whether the rule scales up short rows of the result, see `numerics_of`; False by default.

    Returns:
        The polar factor, in the shape of `x`.
    """
    if precision == "published":
        return polar_as_published(x, Numerics(method=method, steps=ns_steps, damping=damping, normalise="matrix"))
    numerics = numerics_of(
        matrix,
        side=side,
        method=method,
        ns_steps=ns_steps,
        damping=damping,
        precision=precision,
        normalise="matrix",
        rows_scaled=rows_scaled,
    )
    polar = yield from polar_factor(matrix, x, side=side, numerics=numerics, unit_scale=unit_scale)
    return polar.factor


def lr_adjustment(matrix: Matrix, adjust_lr: AdjustLr) -> float:
    """Return the factor s by which Muon scales a polar factor, from the size of the whole matrix; see `muon`."""
    if adjust_lr == "spectral":
        return max(1.0, matrix.rows / matrix.columns) ** 0.5
    return 0.2 * max(matrix.rows, matrix.columns) ** 0.5 if adjust_lr == "match_rms_adamw" else 1.0


def scaled_lr(matrix: Matrix, u: Tensor, adjust_lr: AdjustLr) -> Tensor:
    """Multiply a polar factor by `lr_adjustment`, in place."""
    factor = lr_adjustment(matrix, adjust_lr)
    return u if factor == 1 else u.mul_(factor)


@rule("muon", splits=muon_splits, accumulator="heavy_ball", check=check_precision)
def muon(
    matrix: Matrix,
    *,
    side: Side = "auto",
    adjust_lr: AdjustLr = "spectral",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 0.0,
    precision: MuonPrecision = "auto",
) -> Asking:
    """Muon: `U = s·polar(M)`, with the scale s set by `adjust_lr`.

    M is the heavy-ball momentum (options `momentum` 0.95 and `nesterov` True). m and n are the numbers of rows and
    columns of one matrix of the view; if the view splits by heads, each head is a matrix. Muon's five quintic steps on
    M equal a polynomial in the Gram of M, applied to M. Evaluating the polynomial on the Gram needs two products of the
    size of M instead of ten, or six in float16, and it needs only sums of Grams if the matrix is split over ranks.

    Equivariant under O(m) × O(n). If the matrix is split, it communicates the Gram that `side` selects.
    Source: Jordan et al. 2024 (Muon); Liu et al., arXiv 2502.16982 (match_rms_adamw).

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Where the rows are
            split over ranks, only "right" can run on the pieces; where the columns are split, only "left". Otherwise
            whole matrices are sent to owners.
        adjust_lr: The factor s: "spectral" (default) √max(1, m/n); "match_rms_adamw" 0.2·√max(m, n), which gives
            updates about the root mean square of AdamW's, so that AdamW's learning rates can be reused; or "none", 1.
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: The number of polynomial steps. 0 (default) means the method's own number: 5 for "polar_express", 15
            for "newton_schulz". More steps bring smaller singular values closer to one.
        damping: The number added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 0 by default.
            Increase it for matrices of low rank, so that their noise is not amplified.
        precision: In which dtype products are computed. "float32" (that of the weights if it is wider) takes all steps
            on one Gram. "float16" forms a new Gram after every second step, and splits the matrix into two numbers for
            the first, so that no rank or condition number costs it digits. "bfloat16" forms one after every step, which
            is Muon's usual iteration on the matrix itself. Norms and sums are in float32. "auto" (default) is what is
            fastest for this shape on this kind of device and no less exact than "bfloat16": one of these, or float16
            with other restarts and unsplit. `method` "exact" and damping above 1e-8 need "float32", and "auto" takes it
            then.
            "published" is bfloat16 with every product rounded separately, for comparison with published runs; split
            matrices are then always sent to owners.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [linear.weight], "rule": "muon", "lr": 0.02, "adjust_lr": "match_rms_adamw"}])
    """
    u = yield from muon_polar(
        matrix, matrix.values, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision
    )
    return scaled_lr(matrix, u, adjust_lr)
