"""Aurora: polar updates of tall matrices whose rows are all of one length."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from symdist.rules.linalg.inverse_root import Method
from symdist.rules.matrix import Matrix
from symdist.rules.muon import AdjustLr, Precision, check_precision, lr_adjustment, muon_polar, muon_splits
from symdist.rules.registry import MatrixAxis, rule
from symdist.rules.requests import Asking, Sum
from symdist.rules.row_norm import unit_rows


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
    precision: Precision = "float32",
) -> Asking:
    """`U = s·polar(D·M)` of a tall matrix: `D_i = 1/‖M_i‖`, and `iterations` − 1 times `D_i ← D_i·(n/m / ‖U_i‖²)^β`.

    The rows of U come close to the one length √(n/m) that they can all have, while U stays a polar factor; a square or
    wide matrix has Muon's update, as its rows are of length 1 by themselves. s is Muon's.
    Equivariant under row permutations and column rotations. Moves, and takes the root of, `iterations` Grams.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        iterations: Polar factors taken in all; 1 is Muon of rows scaled to one length.
        beta: The power β, between 0 and 1, of each correction.
        adjust_lr: The factor s: "spectral" √max(1, m/n), "match_rms_adamw" 0.2·√max(m, n), with which AdamW's learning
            rates can be kept, or "none".
        method: How the polar factor is taken: "polar_express", "newton_schulz" (cubic, more steps), or "exact" by an
            eigendecomposition, for tests and small matrices.
        ns_steps: Polynomial steps; 0 is the method's own, 5 or 15. More of them reach smaller singular values.
        damping: Added to the Gram, relative to its norm. Raise it where a matrix is of low rank and its noise should
            not be scaled up.
        precision: "float32" iterates on the Gram. "bfloat16" iterates on the matrix itself, as Muon is usually run on
            accelerators; its matrices then always go to an owner, and there is neither "exact" nor damping.

    Source: Dewulf et al., Aurora, arXiv 2606.27715.
    """
    polar = partial(
        muon_polar, matrix, side="auto", method=method, ns_steps=ns_steps, damping=damping, precision=precision
    )
    # Rows that are shorter than this in a polar factor are noise, and no factor makes them longer.
    least = (torch.finfo(matrix.values.dtype).eps ** 2) * matrix.columns / matrix.rows
    if matrix.rows <= matrix.columns:
        u = yield from polar(matrix.values)
        return u * lr_adjustment(matrix, adjust_lr)
    x = yield from unit_rows(matrix.values)
    u = yield from polar(x, unit_scale=True)
    for _ in range(iterations - 1):
        squares = yield Sum(values=u.square().sum(-1, keepdim=True), across="columns")
        wanted = matrix.columns / matrix.rows / torch.where(squares > least, squares, matrix.columns / matrix.rows)
        x = x * wanted**beta
        u = yield from polar(x, unit_scale=True)
    return u * lr_adjustment(matrix, adjust_lr)
