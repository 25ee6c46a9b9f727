"""Scion: steepest descent under a norm chosen by what a layer does."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch

from symdist.rules.linalg.inverse_root import Method, Numerics
from symdist.rules.matrix import Matrix
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking
from symdist.rules.row_norm import unit_rows
from symdist.rules.spectral import Side, polar_factor, spectral_splits

Norm: TypeAlias = Literal["spectral", "sign", "row_rms", "row"]


def _splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    return spectral_splits(options, rows, columns) if options["norm"] == "spectral" else ("rows", "columns")


def _check(options: Mapping[str, Any]) -> None:
    if not options["radius"] > 0:
        raise ValueError(f"radius={options['radius']!r} must be positive")


@rule("scion", splits=_splits, check=_check)
def scion(
    matrix: Matrix,
    *,
    norm: Norm = "spectral",
    radius: float = 1.0,
    side: Side = "auto",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 1e-8,
) -> Asking:
    """Scion: `U = ρ·lmo(M)`, the matrix of norm ρ that goes furthest along M.

    The norm follows from the layer, for M seen as `[out, in]` = `[m, n]`:

    - "spectral", for hidden layers: √(m/n)·polar(M);
    - "sign", for a head: sign(M)/n;
    - "row_rms", for an embedding: rows of root mean square 1, √n·D(M)·M;
    - "row", also for a head: rows of length 1/√n.

    With `weight_decay = 1` a step is `W ← (1−lr)·W − lr·U`, which stays in the ball of radius ρ; without decay it is
    the unconstrained form. What the paper calls α is 1 − `momentum`.

    Equivariant under O(m) × O(n); "sign" under signed permutations of both sides; "row_rms" and "row" under row
    permutations and column rotations. "spectral" moves what `polar` moves, "sign" nothing, the others what `row_norm`
    moves. Source: Pethick et al., arXiv 2502.07529.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        norm: One of the norms above; "spectral" by default.
        radius: The radius ρ of the ball, greater than 0; 1 by default. It scales the update.
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Naming one fixes
            which split of the matrix can be handled by sums: row blocks for "right", column blocks for "left".
        method: How the inverse root is computed: "polar_express" (default), "newton_schulz" (cubic, more steps), or
            "exact", an eigendecomposition in float64, for tests and small matrices.
        ns_steps: Number of polynomial steps; 0 (default) means the method's own, 5 for "polar_express" and 15 for
            "newton_schulz". More steps bring smaller singular values to one.
        damping: Added to the diagonal of the Gram, relative to the Gram's Frobenius norm; 1e-8 by default. Raise it
            for matrices of low rank whose noise should not be amplified.

    Returns:
        The update U, shaped like `matrix.values`.
    """
    m, n = matrix.rows, matrix.columns
    match norm:
        case "spectral":
            numerics = Numerics(method=method, steps=ns_steps, damping=damping)
            u, _ = yield from polar_factor(matrix, matrix.values, side=side, numerics=numerics)
            return u * (radius * (m / n) ** 0.5)
        case "sign":
            # The sign of a denormal number is noise.
            kept = matrix.values.abs() >= torch.finfo(matrix.values.dtype).tiny
            return matrix.values.sign() * kept * (radius / n)
        case "row_rms":
            return (yield from unit_rows(matrix.values)) * (radius * n**0.5)
        case "row":
            return (yield from unit_rows(matrix.values)) * (radius / n**0.5)
