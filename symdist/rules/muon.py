"""Muon: the polar factor of the Nesterov momentum, by the polynomial of the original on the Gram."""

from collections.abc import Mapping
from typing import Any, Literal

from symdist.rules.matrix import Matrix
from symdist.rules.registry import Split, rule
from symdist.rules.requests import Asking
from symdist.rules.roots import Method, Numerics, polar_in_bfloat16
from symdist.rules.spectral import Side, polar_factor, spectral_splits


def _splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[Split, ...]:
    """bfloat16 keeps too few digits to square singular values in a Gram, so it needs the matrix itself."""
    return () if options["precision"] == "bfloat16" else spectral_splits(options, rows, columns)


def _check(options: Mapping[str, Any]) -> None:
    if options["precision"] == "bfloat16" and (options["method"] == "exact" or options["damping"]):
        raise ValueError("precision='bfloat16' iterates on the matrix itself: it has no exact method and no damping")


@rule("muon", splits=_splits, accumulator="heavy_ball", check=_check)
def muon(
    matrix: Matrix,
    *,
    side: Side = "auto",
    scale: Literal["spectral", "match_rms", "none"] = "spectral",
    method: Method = "polar_express",
    steps: int = 0,
    damping: float = 0.0,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Asking:
    """`U = s·polar(M)`, s = √max(1, m/n) ("spectral"), 0.2·√max(m, n) ("match_rms", AdamW's RMS) or 1 ("none").

    m, n count the matrix the view shows, so head by head where it is split by heads. The five quintic steps on M
    are a polynomial in its Gram; taking it there gives the same matrix with two products as large as M instead of
    ten, and lets a split matrix run by its Gram. `precision="bfloat16"` takes the steps on M itself, as Muon is
    usually run on accelerators; its matrices then always go to an owner. "float32" is float64 for float64 weights.
    Equivariant under O(m) × O(n).
    Source: Jordan et al. 2024 (Muon); Liu et al., arXiv 2502.16982 (match_rms).
    """
    numerics = Numerics(method=method, steps=steps, damping=damping, normalise="matrix")
    if precision == "bfloat16":
        u = polar_in_bfloat16(matrix.values, numerics)
    else:
        u, _ = yield from polar_factor(matrix, matrix.values, side=side, numerics=numerics)
    if scale == "spectral":
        return u * max(1.0, matrix.rows / matrix.columns) ** 0.5
    if scale == "match_rms":
        return u * (0.2 * max(matrix.rows, matrix.columns) ** 0.5)
    return u
