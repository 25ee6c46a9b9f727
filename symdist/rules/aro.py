"""ARO: a simple base rule applied in a rotated frame of the residual stream, with the rotation computed from M."""

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
# Numbers of RᵀM below this many times its rounding error count as zero. They are noise (rows beyond the rank of M,
# entries that would be zero in exact arithmetic), which signs and row lengths would magnify.
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
    """ARO: `R_t = QR(M·f(R_{t−1}ᵀM)ᵀ)`, `U = R_t·f(R_tᵀM)`, rescaled to the root mean square `rms`; `R_0 = I`.

    f is the base map. Scaling M by a positive number changes nothing. Rows are the residual stream's side of the
    matrix: use view "residual" in a recipe. Of the rotation `[m, m]` only the first `k = min(m, n)` columns can matter;
    they are kept as state in the parameter's shape and layout.

    With `share = "residual_stage"` all matrices that write to a stage of the residual stream or read from it have one
    rotation: the QR of the sum `Σ M·f(RᵀM)ᵀ` over them, with each f (except "identity") scaled to root mean square 1.
    The matrices, except those of experts, store its columns in turn.

    Equivariant under rotations of the rows that also turn `R_{t−1}`, which is a common rotation of the residual stream;
    under permutations of the columns; with "row_norm" and "identity", under all rotations of the columns. "identity" is
    power iteration; at a fixed M "row_norm" converges to the polar factor.

    Under column blocks it moves `m·k` numbers three times (the rotation, and the product there and back) and `k`
    numbers per sum of row norms; with a shared rotation, `m·k` numbers four times per stage. It takes `6·m·n·k`
    operations and the QR of an `[m, k]`. Source: Gong et al., ARO, arXiv 2602.09006.

    Args:
        matrix: The stack of matrices, `[b, m, n]` where unsharded.
        base: The base map f: "sinkhorn" (default) divides rows and columns by their norms at once, `sinkhorn_steps`
            times; "row_norm" divides rows by their norms; "sign" takes signs; "adam" divides by the root of a running
            average of the rotated squares; "identity" changes nothing.
        share: "matrix" (default) gives each matrix its own rotation; "residual_stage" gives each stage one, and needs
            all matrices of a stage on the same ranks.
        sinkhorn_steps: How often "sinkhorn" divides; 0 (default) means 5. Only for that base.
        beta2: Decay of the average of squares of "adam"; None (default) means 0.95. Only for that base.
        rms: Root mean square of the update, greater than 0. The default 0.2 is about AdamW's, so its learning rates can
            be kept.

    Returns:
        The update U, shaped like `matrix.values`, and the new state: "rotation" and, with "adam", "rotated_rms".
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
    # Without momentum there is no new rotation to compute, so the previous one stays.
    rotation = torch.where(found.abs().amax((-2, -1), keepdim=True) > 0, found, previous)
    direction, more = yield from frame.directions(rotation, m, scale)
    squares = yield Sum(values=direction.square().sum((-2, -1), keepdim=True), across="columns")
    factor = rms * (matrix.rows * matrix.columns) ** 0.5 / torch.where(squares > 0, squares, 1).sqrt()
    return rotation @ (direction * factor), {"rotation": _own(matrix, rotation), **more}


def _parts(matrix: Matrix) -> list[tuple[slice, slice, slice]]:
    """List the rotation columns this rank stores, as slices of (the stack, the state, the rotation)."""
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
    """Gather the mean magnitude of M and the last step's rotation `[b, m, k]`, whose columns are spread over ranks."""
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
    """The columns of the rotation that this rank stores, in the shape of the matrix; the rest is zero."""
    own = torch.zeros_like(matrix.values)
    for which, here, there in _parts(matrix):
        own[which, :, here] = rotation[which, :, there]
    return own


class _Frame:
    """Applies the base map in rotated frames."""

    def __init__(self, matrix: Matrix, *, base: Base, sinkhorn_steps: int, beta2: float):
        self._matrix = matrix
        self._base = base
        self._sinkhorn_steps = sinkhorn_steps
        self._beta2 = beta2

    def directions(
        self, rotation: Tensor, m: Tensor, scale: Tensor
    ) -> Generator[Any, Any, tuple[Tensor, dict[str, Tensor]]]:
        """`f(RᵀM)`, `[b, k, columns here]`, up to a factor, and the new state of f; `m` is M divided by `scale`."""
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
        # The state keeps roots rather than squares, which leave float32's range long before the momentum does.
        before = self._matrix.state["rotated_rms"][..., :k, :]
        average = torch.hypot(before * self._beta2**0.5, x * scale * (1 - self._beta2) ** 0.5)
        direction = x * scale / torch.where(average > 0, average, 1)
        kept = torch.zeros_like(self._matrix.values)
        kept[..., :k, :] = average
        return direction, {"rotated_rms": kept}
