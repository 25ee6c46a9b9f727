"""NorMuon: Muon, with every row (a neuron) divided by the running root mean square of its updates."""

import torch

from symdist.rules.linalg.inverse_root import Method
from symdist.rules.linalg.precision import check_precision
from symdist.rules.matrix import Matrix
from symdist.rules.muon import AdjustLr, MuonPrecision, lr_adjustment, muon_polar, muon_splits
from symdist.rules.polar_factor import Side
from symdist.rules.registry import rule
from symdist.rules.requests import Asking, Sum


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
    precision: MuonPrecision = "auto",
) -> Asking:
    """NorMuon: `Q = polar(M)`, `v_i ← β₂·v_i + (1−β₂)·‖Q_i‖²/n`, `X_i = Q_i/(√v_i + eps)`, `U = s·X·‖Q‖_F/‖X‖_F`.

    Rows i are neurons. Both norms are of the whole matrix, so the update does not depend on the sharding. M, s and the
    options of the polar factor are the same as for Muon. The state v takes one number per weight, although one per row
    would be enough: all state has the layout of its weight, so that every engine can reshard checkpoints.

    Equivariant under row permutations and column rotations. It communicates as much as Muon, and in addition two
    numbers per matrix if the rows are split over ranks, or m numbers if the columns are split.
    Source: Li et al., NorMuon, arXiv 2510.05491.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        beta2: The decay of v, the running average of each row's mean square; 0.95 by default. Increase it to average
            over more steps.
        eps: The number added to √v; 1e-10 by default. Increase it to limit how much rows with small updates are scaled
            up.
        side: Which Gram to use: "right" `MᵀM`, "left" `MMᵀ`, or "auto" (default), the smaller one. Where the rows are
            split over ranks, only "right" can run on the pieces; where the columns are split, only "left". Otherwise
            whole matrices are sent to owners.
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
        The update U, in the shape of `matrix.values`, and the new state "row_sq" (v).

    Example:
        >>> SymDist([{"params": [linear.weight], "rule": "normuon", "lr": 0.02, "beta2": 0.95}])
    """
    q = yield from muon_polar(
        matrix,
        matrix.values,
        side=side,
        method=method,
        ns_steps=ns_steps,
        damping=damping,
        precision=precision,
        rows_scaled=True,
    )
    squares = yield Sum(values=q.square().sum(-1, keepdim=True), across="columns")
    previous = matrix.state["row_sq"]
    average = previous.lerp((squares / matrix.columns).expand_as(previous), 1 - beta2)
    # All columns of v are equal, so the first is enough. On a rank that holds no column, the factor is empty.
    # The bound keeps its square finite, should eps be 0: a row without a direction has a factor, too.
    factor = 1 / (average[..., :1].sqrt() + eps).clamp_min(torch.finfo(q.dtype).tiny ** 0.5)
    norms = torch.cat([squares.expand_as(factor), squares * factor.square()], dim=-1)
    norms = yield Sum(values=norms.sum(-2, keepdim=True), across="rows")
    before, after = norms.tensor_split(2, dim=-1)
    ratio = (before / torch.where(after > 0, after, 1)).sqrt()
    return q * (factor * ratio * lr_adjustment(matrix, adjust_lr)), {"row_sq": average}
