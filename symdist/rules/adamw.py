"""AdamW, for what has no matrix symmetry: norms, biases, sinks; and for the baselines."""

from symdist.rules.matrix import Matrix, center_rows
from symdist.rules.registry import rule
from symdist.rules.requests import Asking


@rule("adamw", splits=("rows", "columns"), accumulator="adam", matrices=False)
def adamw(matrix: Matrix, *, centered: bool = False) -> Asking:
    """The bias-corrected Adam direction, which the accumulator has already formed; centred, `Π` of it.

    Centring is for a router's bias: adding one number to every logit leaves the routing unchanged, so the update
    should not move along it.

    Args:
        matrix: The stack of matrices, or of vectors as `[b, m, 1]`.
        centered: Whether the mean row is taken out. For the biases of routers.

    Source: Loshchilov & Hutter, arXiv 1711.05101.
    """
    if centered:
        return (yield from center_rows(matrix, matrix.values))
    return matrix.values
