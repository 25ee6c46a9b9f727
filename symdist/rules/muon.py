"""Muon: the polar factor of the Nesterov momentum, by Muon's polynomial evaluated on the Gram."""

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
    """Name the splits Muon can run under: none in bfloat16, whose few digits do not allow squaring in a Gram."""
    return () if options["precision"] == "bfloat16" else spectral_splits(options, rows, columns)


def check_precision(options: Mapping[str, Any]) -> None:
    """Check that `precision` fits the other options.

    Raises:
        ValueError: If `precision` is "bfloat16" together with `method` "exact" or with damping.
    """
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
    """Compute `polar(x)` with Muon's coefficients.

    Args:
        matrix: The stack that `x` comes from.
        x: `[b, rows here, columns here]`, in the layout of `matrix`.
        side: See `muon`, as for the next four.
        method: How the polar factor is computed.
        ns_steps: Number of polynomial steps.
        damping: Relative damping of the Gram.
        precision: "float32" or "bfloat16".
        unit_scale: See `polar_factor`.

    Returns:
        The polar factor, shaped like `x`.
    """
    numerics = Numerics(method=method, steps=ns_steps, damping=damping, normalise="matrix")
    if precision == "bfloat16":
        return polar_in_bfloat16(x, numerics)
    u, _ = yield from polar_factor(matrix, x, side=side, numerics=numerics, unit_scale=unit_scale)
    return u


def lr_adjustment(matrix: Matrix, adjust_lr: AdjustLr) -> float:
    """Return the factor s of a polar update, from the size of the whole matrix; see `muon`."""
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
    """Muon: `U = s·polar(M)`, with the scale s set by `adjust_lr`.

    M is the heavy-ball momentum (options `momentum` 0.95 and `nesterov` True). m and n are the sizes of the matrix that
    the view shows, so each head counts by itself where the view splits by heads. Muon's five quintic steps on M are a
    polynomial in its Gram. Evaluating it on the Gram gives the same matrix with two products as large as M instead of
    ten, and lets a split matrix run by sums of its Gram.

    Equivariant under O(m) × O(n). Moves the Gram of its side.
    Source: Jordan et al. 2024 (Muon); Liu et al., arXiv 2502.16982 (match_rms_adamw).

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Naming one fixes
            which split of the matrix can be handled by sums: row blocks for "right", column blocks for "left".
        adjust_lr: The factor s: "spectral" (default) √max(1, m/n); "match_rms_adamw" 0.2·√max(m, n), which gives
            updates of AdamW's size, so that its learning rates can be kept; or "none", 1.
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: Number of polynomial steps; 0 (default) means the method's own, 5 for "polar_express" and 15 for
            "newton_schulz". More steps bring smaller singular values to one.
        damping: Added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 0 by default. Raise it for
            matrices of low rank whose noise should not be amplified.
        precision: "float32" (default) iterates on the Gram, in float64 for float64 weights. "bfloat16" iterates on the
            matrix itself, as Muon is usually run on accelerators; a matrix that is split then always goes to an owner,
            and neither "exact" nor damping is available.

    Returns:
        The update U, shaped like `matrix.values`.
    """
    u = yield from muon_polar(
        matrix, matrix.values, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision
    )
    return u * lr_adjustment(matrix, adjust_lr)
