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

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        beta2: Decay of the average v of each row's mean square.
        eps: Added to √v.
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
