"""Scion: steepest descent under a norm that depends on the kind of layer."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch

from symdist.rules.linalg.inverse_root import Method
from symdist.rules.linalg.precision import Precision, check_precision
from symdist.rules.matrix import Matrix
from symdist.rules.polar_factor import Side, numerics_of, polar_factor
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking
from symdist.rules.row_norm import unit_rows
from symdist.rules.spectral import spectral_splits

Norm: TypeAlias = Literal["spectral", "sign", "row_rms", "row"]


def _splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    return spectral_splits(options, rows, columns) if options["norm"] == "spectral" else ("rows", "columns")


def _check(options: Mapping[str, Any]) -> None:
    check_precision(options)
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
    precision: Precision = "auto",
) -> Asking:
    """Scion: `U = ρ·lmo(M)`, the matrix of norm ρ with the largest inner product with M.

    The norm is chosen by the kind of layer. M is read as `[out, in]` = `[m, n]`:

    - "spectral", for hidden layers: √(m/n)·polar(M);
    - "sign", for a head: sign(M)/n;
    - "row_rms", for an embedding: rows of root mean square 1, √n·D(M)·M;
    - "row", also for a head: rows of length 1/√n.

    With `weight_decay = 1`, a step is `W ← (1−lr)·W − lr·U`, which keeps W in the ball of radius ρ. Without decay, it
    is the paper's unconstrained form. The paper's α is 1 − `momentum`.

    Equivariant under O(m) × O(n); "sign" under signed permutations of both sides; "row_rms" and "row" under row
    permutations and column rotations. "spectral" communicates as much as `polar`, "row_rms" and "row" as much as
    `row_norm`, "sign" nothing. Source: Pethick et al., arXiv 2502.07529.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        norm: One of the norms above; "spectral" by default.
        radius: The radius ρ of the ball, greater than 0; 1 by default. It scales the update.
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Where the rows are
            split over ranks, only "right" can run on the pieces; where the columns are split, only "left". Otherwise
            whole matrices are sent to owners.
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
        >>> SymDist([{"params": [head.weight], "rule": "scion", "lr": 0.01, "norm": "sign", "radius": 3000.0}])
    """
    m, n = matrix.rows, matrix.columns
    match norm:
        case "spectral":
            numerics = numerics_of(
                matrix, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision
            )
            polar = yield from polar_factor(matrix, matrix.values, side=side, numerics=numerics)
            return polar.factor * (radius * (m / n) ** 0.5)
        case "sign":
            # The sign of a denormal number is noise.
            is_normal = matrix.values.abs() >= torch.finfo(matrix.values.dtype).tiny
            return matrix.values.sign() * is_normal * (radius / n)
        case "row_rms":
            return (yield from unit_rows(matrix.values)) * (radius * n**0.5)
        case "row":
            return (yield from unit_rows(matrix.values)) * (radius / n**0.5)
