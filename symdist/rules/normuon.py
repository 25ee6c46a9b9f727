"""NorMuon: Muon whose rows, the neurons, are each divided by how large their updates have been."""

import torch

from symdist.rules.linalg.inverse_root import Method
from symdist.rules.matrix import Matrix
from symdist.rules.muon import AdjustLr, Precision, check_precision, lr_adjustment, muon_polar, muon_splits
from symdist.rules.registry import rule
from symdist.rules.requests import Asking, Sum
from symdist.rules.spectral import Side


@rule("normuon", splits=muon_splits, accumulator="heavy_ball", check=check_precision, state=("row_sq",))
def normuon(
    matrix: Matrix,
    *,
    beta2: float = 0.95,
    eps: float = 1e-10,
    side: Side = "auto",
    adjust_lr: AdjustLr = "spectral",
    method: Method = "polar_express",
    ns_steps: int = 0,
    damping: float = 0.0,
    precision: Precision = "float32",
) -> Asking:
    """`Q = polar(M)`, `v_i ← β₂·v_i + (1−β₂)·‖Q_i‖²/n`, `X_i = Q_i/(√v_i + eps)`, `U = s·X·‖Q‖_F/‖X‖_F`.

    Rows i are neurons; both norms are of the whole matrix, so the update does not hang on how it is sharded. s and the
    options of the polar factor are Muon's. v is kept in every column of a state like the weight, as all state is: one
    number a weight, where `m` would do, is the price of checkpoints that every engine can cut anew.
    Equivariant under row permutations and column rotations. Moves what Muon does, and two numbers a matrix under row
    blocks, m numbers under column blocks.
    Source: Li et al., NorMuon, arXiv 2510.05491.
    """
    q = yield from muon_polar(
        matrix, matrix.values, side=side, method=method, ns_steps=ns_steps, damping=damping, precision=precision
    )
    squares = yield Sum(values=q.square().sum(-1, keepdim=True), across="columns")
    held = matrix.state["row_sq"]
    average = held.lerp((squares / matrix.columns).expand_as(held), 1 - beta2)
    # One column says it all; where this rank holds none, it has nothing to scale either.
    factor = 1 / (average[..., :1].sqrt() + eps)
    norms = torch.cat([squares.expand_as(factor), squares * factor.square()], dim=-1)
    norms = yield Sum(values=norms.sum(-2, keepdim=True), across="rows")
    before, after = norms.tensor_split(2, dim=-1)
    ratio = (before / torch.where(after > 0, after, 1)).sqrt()
    return q * (factor * ratio * lr_adjustment(matrix, adjust_lr)), {"row_sq": average}
