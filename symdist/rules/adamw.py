"""AdamW, for parameters without a matrix symmetry (norms, biases, attention sinks) and for baselines."""

from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.registry import rule
from symdist.rules.requests import Asking


@rule("adamw", splits=("rows", "columns"), accumulator="adam", matrices=False)
def adamw(matrix: Matrix, *, centered: bool = False) -> Asking:
    """AdamW's update: the bias-corrected Adam direction.

    The accumulator (options `betas` (0.9, 0.95) and `eps` 1e-8, which counts as 1e-19 below that) computes that
    direction; the rule only centres it if `centered` is set. Not equivariant under rotations, because Adam treats every
    coordinate separately. It communicates nothing, or with `centered` one row of sums if the rows are split over ranks.
    Source: Loshchilov & Hutter, arXiv 1711.05101.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded; vectors are `[b, m, 1]`.
        centered: Whether to subtract the mean row; False by default. Set it for a router's bias: adding one number to
            every logit does not change the routing, so the update should have no component in that direction.

    Returns:
        The update U, in the shape of `matrix.values`.

    Example:
        >>> SymDist([{"params": [norm.weight], "rule": "adamw", "lr": 3e-4, "betas": (0.9, 0.95)}])
    """
    if centered:
        return (yield from center_rows(matrix, matrix.values))
    return matrix.values
