"""ARO: a simple base map applied in a rotated frame of the residual stream, with the rotation computed from M."""

from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.rules.matrix import Matrix, largest_magnitude
from symdist.rules.registry import rule
from symdist.rules.requests import Asking, Orthonormal, StageSum, Sum

Base: TypeAlias = Literal["sinkhorn", "row_norm", "sign", "adam", "identity"]

_SINKHORN_STEPS = 5
_BETA2 = 0.95
# Elements of RᵀM smaller than this many rounding errors are set to zero. They are noise (rows beyond the rank of M,
# elements that are zero in exact arithmetic), which signs and row norms would magnify.
_NOISE = 100.0
_LIGHTEST, _HEAVIEST = 2.0**-100, 2.0**100


def _check(options: Mapping[str, Any]) -> None:
    if options["sinkhorn_steps"] and options["base"] != "sinkhorn":
        raise ValueError(
            f"sinkhorn_steps={options['sinkhorn_steps']} has no effect with base={options['base']!r}; "
            "remove it or use base='sinkhorn'"
        )
    if options["beta2"] is not None and options["base"] != "adam":
        raise ValueError(
            f"beta2={options['beta2']} has no effect with base={options['base']!r}; remove it or use base='adam'"
        )
    if not options["rms"] > 0:
        raise ValueError(f"rms={options['rms']!r} must be positive")


def _state(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("rotation", "rotated_rms") if options["base"] == "adam" else ("rotation",)


def _coupled(options: Mapping[str, Any]) -> bool:
    return bool(options["share"] == "residual_stage")


@rule("aro", splits=("columns",), check=_check, state=_state, couples=_coupled, ordered=True)
def aro(
    matrix: Matrix,
    *,
    base: Base = "sinkhorn",
    share: Literal["matrix", "residual_stage"] = "matrix",
    sinkhorn_steps: int = 0,
    beta2: float | None = None,
    rms: float = 0.2,
) -> Asking:
    """ARO: `R_t = QR(M·f(R_{t−1}ᵀM)ᵀ)`, `U = R_t·f(R_tᵀM)`, rescaled to the root mean square `rms`; `R_0 = I`.

    f is the base map. Multiplying M by a positive number does not change U. The rows must be the dimension of the
    residual stream: use view "residual" in a recipe. Only the first `k = min(m, n)` columns of the rotation `[m, m]`
    affect the update; they are the state, in the parameter's shape and layout.

    With `share = "residual_stage"`, all matrices that write to a stage of the residual stream or read from it share one
    rotation: the Q of the sum `Σ M·f(RᵀM)ᵀ` over these matrices, with each f (except "identity") scaled to root mean
    square 1. Each of these matrices, except those of experts, stores some of the rotation's columns.

    Equivariant under rotations of the rows that are also applied to `R_{t−1}`, such as a rotation of the residual
    stream; under permutations of the columns; with "row_norm" and "identity", under all rotations of the columns.
    "identity" is power iteration; for a constant M, "row_norm" converges to the polar factor.

    If the columns are split over ranks, it communicates `m·k` numbers three times (the rotation, then the product and
    its Q) and `k` numbers per sum of row norms; with a shared rotation, `m·k` numbers four times per stage. It takes
    `6·m·n·k` operations and the QR of an `[m, k]` matrix. Source: Gong et al., ARO, arXiv 2602.09006.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        base: The base map f: "sinkhorn" (default) divides by the norms of rows and columns at the same time,
            `sinkhorn_steps` times; "row_norm" divides rows by their norms; "sign" takes signs; "adam" divides by the
            root of a running average of squares in the rotated frame; "identity" changes nothing.
        share: "matrix" (default) gives each matrix its own rotation; "residual_stage" gives each stage one, which
            requires all matrices of a stage to be on the same ranks.
        sinkhorn_steps: The number of divisions of base "sinkhorn", the only base that takes it; 0 (default) means 5.
        beta2: The decay of the running average of base "adam", the only base that takes it; None (default) means 0.95.
        rms: The root mean square of the update, greater than 0. The default 0.2 is about that of AdamW's updates, so
            AdamW's learning rates can be reused.

    Returns:
        The update U, in the shape of `matrix.values`, and the new state: "rotation" and, with "adam", "rotated_rms".

    Example:
        >>> SymDist([{"params": [linear.weight], "rule": "aro", "lr": 3e-4, "base": "row_norm"}])
    """
    coupled = share == "residual_stage"
    scale, previous = yield from _previous_rotation(matrix, coupled=coupled)
    # What contains only denormal numbers has no significant digits and becomes zero.
    m = matrix.values / torch.where(scale >= torch.finfo(scale.dtype).tiny, scale, torch.inf)
    frame = _Frame(
        matrix, base=base, sinkhorn_steps=sinkhorn_steps or _SINKHORN_STEPS, beta2=_BETA2 if beta2 is None else beta2
    )
    base_image, _ = yield from frame.directions(previous, m, scale)
    if coupled:
        weight = scale.square()
        if base != "identity":
            base_squares = yield Sum(values=base_image.square().sum((-2, -1), keepdim=True), across="columns")
            count = base_image.shape[-2] * matrix.columns
            weight = scale * (count / torch.where(base_squares > 0, base_squares, 1)).sqrt()
        # Between these bounds, the products and their sum stay in range.
        weight = weight.clamp(_LIGHTEST, _HEAVIEST)
        q = yield StageSum(values=(m * weight) @ base_image.mT, orthonormal=True)
    else:
        q = yield Orthonormal(values=m @ base_image.mT, across="columns")
    # If the momentum is zero, so is Q, and the previous rotation stays.
    rotation = torch.where(q.abs().amax((-2, -1), keepdim=True) > 0, q, previous)
    direction, base_state = yield from frame.directions(rotation, m, scale)
    squares = yield Sum(values=direction.square().sum((-2, -1), keepdim=True), across="columns")
    factor = rms * (matrix.rows * matrix.columns) ** 0.5 / torch.where(squares > 0, squares, 1).sqrt()
    return rotation @ (direction * factor), {"rotation": _stored_columns(matrix, rotation), **base_state}


def _parts(matrix: Matrix) -> list[tuple[slice, slice, slice]]:
    """List the columns of the rotations that this rank stores.

    Returns:
        Slices of the stack of matrices, of the columns of the state, and of the columns of the rotation.
    """
    width, firsts = min(matrix.rows, matrix.columns), [(slice(None), 0)]
    if matrix.places is not None:
        width = matrix.places.width
        firsts = [(slice(i, i + 1), first) for i, first in enumerate(matrix.places.firsts)]
    parts = []
    for members, first in firsts:
        num_stored = min(matrix.columns, width - first) if first >= 0 else 0
        start, stop = matrix.first_column, min(matrix.first_column + matrix.values.shape[-1], num_stored)
        if start < stop:
            parts.append((members, slice(0, stop - start), slice(first + start, first + stop)))
    return parts


def _previous_rotation(matrix: Matrix, *, coupled: bool) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """Assemble the rotation of the last step, whose columns are stored on different ranks and matrices.

    Returns:
        The largest magnitude in M or, if its columns are split, the sum over the parts of the largest in each, `[b, 1,
        1]`, and the rotation, `[b, m, k]`. The first rotation is the identity.
    """
    b, m, _ = matrix.values.shape
    k = min(m, matrix.columns) if matrix.places is None else matrix.places.width
    whole = matrix.values.new_zeros(b, m, k)
    for members, state_columns, rotation_columns in _parts(matrix):
        whole[members, :, rotation_columns] = matrix.state["rotation"][members, :, state_columns]
    magnitude = largest_magnitude(matrix.values, (-2, -1))
    if coupled:
        scale = yield Sum(values=magnitude, across="columns")
        whole = yield StageSum(values=whole)
    else:
        total = yield Sum(values=torch.cat([whole.flatten(1), magnitude.flatten(1)], dim=1), across="columns")
        scale, whole = total[:, -1, None, None], total[:, :-1].view(b, m, k)
    start = torch.eye(m, k, dtype=whole.dtype, device=whole.device)
    return scale, torch.where(whole.abs().amax((-2, -1), keepdim=True) > 0, whole, start)


def _stored_columns(matrix: Matrix, rotation: Tensor) -> Tensor:
    """Return the columns of the rotation that this rank stores, in the shape of the matrix; other columns are zero."""
    stored = torch.zeros_like(matrix.values)
    for members, state_columns, rotation_columns in _parts(matrix):
        stored[members, :, state_columns] = rotation[members, :, rotation_columns]
    return stored


class _Frame:
    """The base map f, applied in rotated frames."""

    def __init__(self, matrix: Matrix, *, base: Base, sinkhorn_steps: int, beta2: float):
        self._matrix = matrix
        self._base = base
        self._sinkhorn_steps = sinkhorn_steps
        self._beta2 = beta2

    def directions(
        self, rotation: Tensor, m: Tensor, scale: Tensor
    ) -> Generator[Any, Any, tuple[Tensor, dict[str, Tensor]]]:
        """Compute `f(RᵀM)`, up to a positive factor.

        Args:
            rotation: R, `[b, m, k]`.
            m: M divided by `scale`.
            scale: `[b, 1, 1]`.

        Returns:
            `f(RᵀM)`, `[b, k, columns here]`, and the new state of f.
        """
        x = rotation.mT @ m
        squares = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
        mean = squares.sum(-2, keepdim=True) / (x.shape[-2] * self._matrix.columns)
        noise = (_NOISE * torch.finfo(x.dtype).eps) ** 2 * self._matrix.rows * mean
        significant = squares > noise * self._matrix.columns
        x = torch.where(significant & (x.square() > noise), x, 0)
        match self._base:
            case "identity":
                return x, {}
            case "sign":
                return x.sign(), {}
            case "row_norm":
                return x / torch.where(significant, squares, 1).sqrt(), {}
            case "adam":
                return self._adam(x, scale)
            case "sinkhorn":
                return (yield from self._sinkhorn(x, torch.where(significant, squares, 0))), {}

    def _sinkhorn(self, x: Tensor, rows: Tensor) -> Generator[Any, Any, Tensor]:
        for i in range(self._sinkhorn_steps):
            if i:
                rows = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
            columns = x.square().sum(-2, keepdim=True)
            x = x / torch.where(rows > 0, rows, 1).sqrt() / torch.where(columns > 0, columns, 1).sqrt()
        return x

    def _adam(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        k = x.shape[-2]
        # The state stores roots, because squares leave the range of float32 long before the momentum does.
        previous = self._matrix.state["rotated_rms"][..., :k, :]
        average = torch.hypot(previous * self._beta2**0.5, x * scale * (1 - self._beta2) ** 0.5)
        direction = x * scale / torch.where(average > 0, average, 1)
        state = torch.zeros_like(self._matrix.values)
        state[..., :k, :] = average
        return direction, {"rotated_rms": state}
