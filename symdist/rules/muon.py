"""Muon: the polar factor of the Nesterov momentum, by the polynomial of the original on the Gram."""

from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from symdist.rules.linalg.inverse_root import Method, Numerics, polar_in_bfloat16
from symdist.rules.matrix import Matrix
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking
from symdist.rules.spectral import Side, polar_factor, spectral_splits

AdjustLr: TypeAlias = Literal["spectral", "match_rms_adamw", "none"]
Precision: TypeAlias = Literal["float32", "bfloat16"]


def muon_splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    """bfloat16 keeps too few digits to square singular values in a Gram, so it needs the matrix itself."""
    return () if options["precision"] == "bfloat16" else spectral_splits(options, rows, columns)


def check_precision(options: Mapping[str, Any]) -> None:
    """Check that precision="bfloat16" is not combined with method="exact" or damping; ValueError where it is."""
    if options["precision"] == "bfloat16" and (options["method"] == "exact" or options["damping"]):
        raise ValueError("precision='bfloat16' iterates on the matrix itself: it has no exact method and no damping")


def muon_polar(
    matrix: Matrix,
    x: Tensor,
    *,
    side: Side,
    method: Method,
    ns_steps: int,
    damping: float,
    precision: Precision,
    unit_scale: bool = False,
) -> Generator[Any, Any, Tensor]:
    """`polar(x)` as Muon takes it, `x` in the layout of `matrix`; see `muon` and `polar_factor` for the options."""
    numerics = Numerics(method=method, steps=ns_steps, damping=damping, normalise="matrix")
    if precision == "bfloat16":
        return polar_in_bfloat16(x, numerics)
    u, _ = yield from polar_factor(matrix, x, side=side, numerics=numerics, unit_scale=unit_scale)
    return u


def lr_adjustment(matrix: Matrix, adjust_lr: AdjustLr) -> float:
    """The factor of a polar update of a matrix."""
    if adjust_lr == "spectral":
        return max(1.0, matrix.rows / matrix.columns) ** 0.5
    return 0.2 * max(matrix.rows, matrix.columns) ** 0.5 if adjust_lr == "match_rms_adamw" else 1.0


@rule("muon", splits=muon_splits, accumulator="heavy_ball", check=check_precision)
def muon(
    matrix: Matrix,
    *,
    side: Side = "auto",
    adjust_lr: AdjustLr = "spectral",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 0.0,
    precision: Precision = "float32",
) -> Asking:
    """`U = s·polar(M)`, s = √max(1, m/n) ("spectral"), 0.2·√max(m, n) ("match_rms_adamw", AdamW's RMS) or 1 ("none").

    m, n count the matrix the view shows, so head by head where it is split by heads. The five quintic steps on M
    are a polynomial in its Gram; taking it there gives the same matrix with two products as large as M instead of
    ten, and lets a split matrix run by its Gram. "float32" is float64 for float64 weights.
    Equivariant under O(m) × O(n).

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        side: The Gram to take: "right" `MᵀM`, "left" `MMᵀ`, or "auto" for the smaller. Name one to fix which split of
            the matrix runs by sums.
        adjust_lr: The factor s: "spectral" √max(1, m/n), "match_rms_adamw" 0.2·√max(m, n), with which AdamW's learning
            rates can be kept, or "none".
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.
        precision: "float32" iterates on the Gram. "bfloat16" iterates on the matrix itself, as Muon is usually run on
            accelerators; its matrices then always go to an owner, and there is neither "exact" nor damping.

    Source: Jordan et al. 2024 (Muon); Liu et al., arXiv 2502.16982 (match_rms_adamw).
    """
    u = yield from muon_polar(
        matrix, matrix.values, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision
    )
    return u * lr_adjustment(matrix, adjust_lr)
