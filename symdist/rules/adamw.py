"""AdamW, for parameters without a matrix symmetry (norms, biases, attention sinks) and for baselines."""

from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.registry import rule
from symdist.rules.requests import Asking


@rule("adamw", splits=("rows", "columns"), accumulator="adam", matrices=False)
def adamw(matrix: Matrix, *, centered: bool = False) -> Asking:
    """AdamW's update: the bias-corrected Adam direction.

    The accumulator (options `betas` (0.9, 0.95) and `eps` 1e-8) has already formed that direction; the rule only
    centres it where asked. Not equivariant under rotations: Adam works coordinate by coordinate. Moves nothing;
    centred, one row of sums where the rows are split. Source: Loshchilov & Hutter, arXiv 1711.05101.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded; vectors come as `[b, m, 1]`.
        centered: Whether to subtract the mean row; False by default. Turn it on for a router's bias: adding one number
            to every logit leaves the routing unchanged, so the update should not move along that direction.

    Returns:
        The update U, shaped like `matrix.values`.
    """
    if centered:
        return (yield from center_rows(matrix, matrix.values))
    return matrix.values
