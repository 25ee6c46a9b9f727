"""Aurora: polar updates of tall matrices whose rows all have nearly the same length."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from symdist.rules.linalg.inverse_root import Method
from symdist.rules.linalg.precision import check_precision
from symdist.rules.matrix import Matrix
from symdist.rules.muon import AdjustLr, MuonPrecision, muon_polar, muon_splits, scaled_lr
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking, Sum
from symdist.rules.row_norm import unit_rows

_LARGEST = 2.0**40
"""The largest factor of a row, whose Gram is still in range."""


def _check(options: Mapping[str, Any]) -> None:
    check_precision(options)
    if options["iterations"] < 1:
        raise ValueError(f"iterations={options['iterations']} must be at least 1")
    if not 0 < options["beta"] <= 1:
        raise ValueError(f"beta={options['beta']} must be in (0, 1]")


def _splits(options: Mapping[str, Any], rows: int, columns: int) -> tuple[MatrixAxis, ...]:
    return muon_splits({**options, "side": "auto"}, rows, columns)


@rule("aurora", splits=_splits, accumulator="heavy_ball", check=_check)
def aurora(
    matrix: Matrix,
    *,
    iterations: int = 2,
    beta: float = 0.5,
    adjust_lr: AdjustLr = "spectral",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 0.0,
    precision: MuonPrecision = "auto",
) -> Asking:
    """Aurora, for tall matrices: `U = s·polar(D·M)`, with D chosen so that all rows of U have nearly the same length.

    D starts as `D_i = 1/‖M_i‖`, then `D_i ← D_i·(n/m / ‖U_i‖²)^β` is applied `iterations` − 1 times. The rows of U
    approach √(n/m), the only length that all rows of a polar factor can have. A square or wide matrix gets Muon's
    update, whose rows already have length 1. M and s are the same as for Muon.

    Equivariant under row permutations and column rotations. It computes `iterations` Gram roots and, if the matrix is
    split, communicates as many Grams.
    Source: Dewulf et al., Aurora, arXiv 2606.27715.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        iterations: The number of polar factors computed; 2 by default, at least 1. Each further one brings the row
            lengths closer together and costs one Gram and its root. 1 is Muon on rows scaled to length one.
        beta: The power β of each correction, in (0, 1]; 0.5 by default. Smaller values change D less per iteration.
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
        >>> SymDist([{"params": [mlp.up.weight], "rule": "aurora", "lr": 0.02}])
    """
    polar = partial(
        muon_polar, matrix, side="auto", method=method, ns_steps=ns_steps, damping=damping, precision=precision
    )
    # Squared row lengths of a polar factor below this are rounding errors and must not be scaled up.
    smallest = (torch.finfo(matrix.values.dtype).eps ** 2) * matrix.columns / matrix.rows
    if matrix.rows <= matrix.columns:
        u = yield from polar(matrix.values)
        return scaled_lr(matrix, u, adjust_lr)
    x = yield from unit_rows(matrix.values)
    u = yield from polar(x, unit_scale=True)
    d: Tensor | float = 1.0
    for _ in range(iterations - 1):
        squares = yield Sum(values=u.square().sum(-1, keepdim=True), across="columns")
        ratio = matrix.columns / matrix.rows / torch.where(squares > smallest, squares, matrix.columns / matrix.rows)
        # Large powers and many iterations let D swing ever further.
        d = (d * ratio**beta).clamp_max(_LARGEST)
        u = yield from polar(x * d, unit_scale=True)
    return scaled_lr(matrix, u, adjust_lr)
