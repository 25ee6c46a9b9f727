"""Scion: steepest descent under a norm that is chosen by what a layer does."""

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
    """`U = ρ·lmo(M)`, the matrix of norm `radius` ρ that goes furthest along M, seen as `[out, in]` = `[m, n]`.

    "spectral", for hidden layers: √(m/n)·polar(M). "sign", for a head: sign(M)/n. "row_rms", for an embedding: rows of
    root mean square 1, √n·D(M)·M. "row", for a head as well: rows of length 1/√n. With `weight_decay = 1` a step is
    `W ← (1−lr)·W − lr·U`, which stays in the ball of radius ρ; without, it is the unconstrained form. What Scion calls
    α is 1 − `momentum`.
    Equivariant under O(m) × O(n); "sign" under signed permutations of both sides; "row_rms" and "row" under row
    permutations and column rotations. Moves what `polar`, nothing, and what `row_norm` moves.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        norm: The norm, by what the layer does, as above.
        radius: The radius ρ of the ball.
        side: The Gram to take: "right" `MᵀM`, "left" `MMᵀ`, or "auto" for the smaller. Name one to fix which split of
            the matrix runs by sums.
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.

    Source: Pethick et al., arXiv 2502.07529.
    """
    m, n = matrix.rows, matrix.columns
    match norm:
        case "spectral":
            numerics = Numerics(method=method, steps=ns_steps, damping=damping)
            u, _ = yield from polar_factor(matrix, matrix.values, side=side, numerics=numerics)
            return u * (radius * (m / n) ** 0.5)
        case "sign":
            # Of what is denormal a sign is noise.
            kept = matrix.values.abs() >= torch.finfo(matrix.values.dtype).tiny
            return matrix.values.sign() * kept * (radius / n)
        case "row_rms":
            return (yield from unit_rows(matrix.values)) * (radius * n**0.5)
        case "row":
            return (yield from unit_rows(matrix.values)) * (radius / n**0.5)
