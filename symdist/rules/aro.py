"""ARO: a plain rule in a rotated frame of the residual stream, the rotation chosen by the rule itself."""

from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.rules.matrix import Matrix
from symdist.rules.registry import rule
from symdist.rules.requests import Asking, Orthonormal, StageSum, Sum

Base: TypeAlias = Literal["sinkhorn", "row_norm", "sign", "adam", "identity"]

_SINKHORN_STEPS = 5
_BETA2 = 0.95
# What is smaller than this many roundings of a product as long as M has rows is noise, which signs and lengths would
# magnify: rows of the rotated M beyond its rank, and numbers that are zero but for rounding.
_NOISE = 100.0


def _check(options: Mapping[str, Any]) -> None:
    if options["sinkhorn_steps"] and options["base"] != "sinkhorn":
        raise ValueError(
            f"sinkhorn_steps={options['sinkhorn_steps']} has no effect with base={options['base']!r}; drop it"
        )
    if options["beta2"] is not None and options["base"] != "adam":
        raise ValueError(f"beta2={options['beta2']} has no effect with base={options['base']!r}; drop it")
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
    """`R_t = QR(M·f(R_{t−1}ᵀM)ᵀ)`, `U = R_t·f(R_tᵀM)`, rescaled to the root mean square `rms`; `R_0 = I`.

    `f`, the base map, is "sinkhorn" (rows and columns divided by their norms at once, `sinkhorn_steps` times, 5 unless
    given), "row_norm", "sign", "adam" (over the root of an average of the rotated squares with `beta2`, 0.95 unless
    given) or "identity". A factor of M changes nothing. Rows are the residual stream's side of the matrix: view
    "residual" in a recipe. Of the rotation `[m, m]` only the first `k = min(m, n)` columns can matter, and are kept, as
    state of the parameter's shape and layout.

    With `share = "residual_stage"` the matrices that write to a stage of the residual stream, and those that read from
    it, have one rotation, of the sum `Σ M·f(RᵀM)ᵀ` over them, with each f at root mean square 1, "identity" as it is.
    Its columns are kept by the matrices in turn, those of experts apart.

    Equivariant under rotations of the rows with `R_{t−1}` turned along: a common rotation of the residual stream; under
    permutations of the columns; with "row_norm" and "identity", under all rotations of them. "identity" is power
    iteration; at a fixed M "row_norm" converges to the polar factor.
    Under column blocks it moves `m·k` numbers three times (the rotation, and the product there and back) and `k` a
    round; sharing, `m·k` numbers four times a stage. It takes `6·m·n·k` operations and the QR of an `[m, k]`.

    Args:
        matrix: The stack of matrices; its values are `[b, m, n]` where they are unsharded.
        base: The base map f.
        share: "matrix" for a rotation a matrix, "residual_stage" for one a stage of the residual stream; the latter
            needs all matrices of a stage on the same ranks.
        sinkhorn_steps: How often rows and columns are divided by their norms; 0 is 5. For the base "sinkhorn" alone.
        beta2: Decay of the average of squares, 0.95 unless given. For the base "adam" alone.
        rms: Root mean square of the update. 0.2 is about AdamW's, so its learning rates carry over.

    Source: Gong et al., ARO, arXiv 2602.09006.
    """
    coupled = share == "residual_stage"
    scale, previous = yield from _remembered(matrix, coupled=coupled)
    m = matrix.values / torch.where(scale > 0, scale, 1)
    frame = _Frame(
        matrix, base=base, sinkhorn_steps=sinkhorn_steps or _SINKHORN_STEPS, beta2=_BETA2 if beta2 is None else beta2
    )
    ahead, _ = yield from frame.directions(previous, m, scale)
    if coupled:
        weight = scale.square()
        if base != "identity":
            ahead_norm = yield Sum(values=ahead.square().sum((-2, -1), keepdim=True), across="columns")
            numbers = ahead.shape[-2] * matrix.columns
            weight = scale * (numbers / torch.where(ahead_norm > 0, ahead_norm, 1)).sqrt()
        found = yield StageSum(values=(m * weight) @ ahead.mT, orthonormal=True)
    else:
        found = yield Orthonormal(values=m @ ahead.mT, across="columns")
    # Without any momentum there is nothing to turn to.
    rotation = torch.where(found.abs().amax((-2, -1), keepdim=True) > 0, found, previous)
    direction, more = yield from frame.directions(rotation, m, scale)
    squares = yield Sum(values=direction.square().sum((-2, -1), keepdim=True), across="columns")
    factor = rms * (matrix.rows * matrix.columns) ** 0.5 / torch.where(squares > 0, squares, 1).sqrt()
    return rotation @ (direction * factor), {"rotation": _own(matrix, rotation), **more}


def _parts(matrix: Matrix) -> list[tuple[slice, slice, slice]]:
    """Of which matrices of the stack which columns of the rotation lie here: in the state, in it."""
    width, firsts = min(matrix.rows, matrix.columns), [(slice(None), 0)]
    if matrix.places is not None:
        width = matrix.places.width
        firsts = [(slice(i, i + 1), first) for i, first in enumerate(matrix.places.firsts)]
    parts = []
    for which, first in firsts:
        kept = min(matrix.columns, width - first) if first >= 0 else 0
        start, stop = matrix.first_column, min(matrix.first_column + matrix.values.shape[-1], kept)
        if start < stop:
            parts.append((which, slice(0, stop - start), slice(first + start, first + stop)))
    return parts


def _remembered(matrix: Matrix, *, coupled: bool) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """The mean magnitude of M, and the rotation of the step before, `[b, m, k]`: each rank has some of its columns."""
    b, m, _ = matrix.values.shape
    k = min(m, matrix.columns) if matrix.places is None else matrix.places.width
    whole = matrix.values.new_zeros(b, m, k)
    for which, here, there in _parts(matrix):
        whole[which, :, there] = matrix.state["rotation"][which, :, here]
    magnitude = matrix.values.abs().sum((-2, -1)) / (matrix.rows * matrix.columns)
    if coupled:
        scale = yield Sum(values=magnitude[:, None, None], across="columns")
        whole = yield StageSum(values=whole)
    else:
        total = yield Sum(values=torch.cat([whole.flatten(1), magnitude[:, None]], dim=1), across="columns")
        scale, whole = total[:, -1, None, None], total[:, :-1].view(b, m, k)
    start = torch.eye(m, k, dtype=whole.dtype, device=whole.device)
    return scale, torch.where(whole.abs().amax((-2, -1), keepdim=True) > 0, whole, start)


def _own(matrix: Matrix, rotation: Tensor) -> Tensor:
    """The columns of the rotation that are kept here, in the shape of the matrix; the rest is zero."""
    own = torch.zeros_like(matrix.values)
    for which, here, there in _parts(matrix):
        own[which, :, here] = rotation[which, :, there]
    return own


class _Frame:
    """The base map in rotated frames."""

    def __init__(self, matrix: Matrix, *, base: Base, sinkhorn_steps: int, beta2: float):
        self._matrix = matrix
        self._base = base
        self._sinkhorn_steps = sinkhorn_steps
        self._beta2 = beta2

    def directions(
        self, rotation: Tensor, m: Tensor, scale: Tensor
    ) -> Generator[Any, Any, tuple[Tensor, dict[str, Tensor]]]:
        """`f(RᵀM)`, `[b, k, n here]`, up to a factor, and the state it leaves; `m` is M over `scale`."""
        x = rotation.mT @ m
        squares = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
        mean = squares.sum(-2, keepdim=True) / (x.shape[-2] * self._matrix.columns)
        noise = (_NOISE * torch.finfo(x.dtype).eps) ** 2 * self._matrix.rows * mean
        kept = squares > noise * self._matrix.columns
        x = torch.where(kept & (x.square() > noise), x, 0)
        match self._base:
            case "identity":
                return x, {}
            case "sign":
                return x.sign(), {}
            case "row_norm":
                return x / torch.where(kept, squares, 1).sqrt(), {}
            case "adam":
                return self._adam(x, scale)
            case "sinkhorn":
                return (yield from self._sinkhorn(x, torch.where(kept, squares, 0))), {}

    def _sinkhorn(self, x: Tensor, rows: Tensor) -> Generator[Any, Any, Tensor]:
        for i in range(self._sinkhorn_steps):
            if i:
                rows = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
            columns = x.square().sum(-2, keepdim=True)
            x = x / torch.where(rows > 0, rows, 1).sqrt() / torch.where(columns > 0, columns, 1).sqrt()
        return x

    def _adam(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        k = x.shape[-2]
        # By roots, not squares, which leave float32's range long before the momentum does.
        before = self._matrix.state["rotated_rms"][..., :k, :]
        average = torch.hypot(before * self._beta2**0.5, x * scale * (1 - self._beta2) ** 0.5)
        direction = x * scale / torch.where(average > 0, average, 1)
        kept = torch.zeros_like(self._matrix.values)
        kept[..., :k, :] = average
        return direction, {"rotated_rms": kept}
