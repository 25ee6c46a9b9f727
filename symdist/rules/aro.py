"""ARO: a plain rule in a rotated frame of the residual stream, the rotation chosen by the rule itself."""

from collections.abc import Generator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.rules.matrix import Matrix
from symdist.rules.registry import rule
from symdist.rules.requests import Asking, Orthonormal, Sum

Base: TypeAlias = Literal["sinkhorn", "row_norm", "sign", "adam", "identity"]

_ROUNDS = 5
_BETA2 = 0.95
# Rows of the rotated momentum below this many roundings of its norm are noise: what R spans beyond the rank of M.
_NOISE = 10.0


def _check(options: Mapping[str, Any]) -> None:
    if options["rounds"] and options["base"] != "sinkhorn":
        raise ValueError(f"rounds={options['rounds']} has no effect with base={options['base']!r}; drop it")
    if options["beta2"] is not None:
        if options["base"] != "adam":
            raise ValueError(f"beta2={options['beta2']} has no effect with base={options['base']!r}; drop it")
        if not 0 <= options["beta2"] < 1:
            raise ValueError(f"beta2={options['beta2']!r} must be in [0, 1)")
    if not options["rms"] > 0:
        raise ValueError(f"rms={options['rms']!r} must be positive")


def _state(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("rotation", "rotated_sq") if options["base"] == "adam" else ("rotation",)


@rule("aro", splits=("columns",), check=_check, state=_state, ordered=True)
def aro(
    matrix: Matrix,
    *,
    base: Base = "sinkhorn",
    rounds: int = 0,
    beta2: float | None = None,
    rms: float = 0.2,
) -> Asking:
    """`R_t = QR(M·f(R_{t−1}ᵀM)ᵀ)`, `U = R_t·f(R_tᵀM)`, rescaled to the root mean square `rms`; `R_0 = I`.

    `f`, the base map, is "sinkhorn" (rows and columns divided by their norms at once, `rounds` times, 5 unless given),
    "row_norm", "sign", "adam" (over the root of an average of the rotated squares with `beta2`, 0.95 unless given) or
    "identity". A factor of M changes nothing. Rows are the residual stream's side of the matrix: view "residual"
    in a recipe. Of the rotation `[m, m]` only the first `k = min(m, n)` columns can matter, and are kept, as state of
    the parameter's shape and layout.

    Equivariant under rotations of the rows with `R_{t−1}` turned along: a common rotation of the residual stream; under
    permutations of the columns; with "row_norm" and "identity", under all rotations of them. "identity" is power
    iteration; at a fixed M "row_norm" converges to the polar factor.
    Under column blocks it moves `m·k` numbers three times (the rotation, and the product there and back) and `k` a
    round. It takes `6·m·n·k` operations and the QR of an `[m, k]`.
    Source: Gong et al., ARO, arXiv 2602.09006.
    """
    scale, previous = yield from _remembered(matrix)
    m = matrix.values / torch.where(scale > 0, scale, 1)
    frame = _Frame(matrix, base=base, rounds=rounds or _ROUNDS, beta2=_BETA2 if beta2 is None else beta2)
    ahead, _ = yield from frame.directions(previous, m, scale)
    found = yield Orthonormal(values=m @ ahead.mT, across="columns")
    # Without any momentum there is nothing to turn to.
    rotation = torch.where(found.abs().amax((-2, -1), keepdim=True) > 0, found, previous)
    direction, more = yield from frame.directions(rotation, m, scale)
    squares = yield Sum(values=direction.square().sum((-2, -1), keepdim=True), across="columns")
    factor = rms * (matrix.rows * matrix.columns) ** 0.5 / torch.where(squares > 0, squares, 1).sqrt()
    return rotation @ (direction * factor), {"rotation": _own(matrix, rotation), **more}


def _held(matrix: Matrix) -> range:
    """Which of the rotation's columns lie here."""
    k = min(matrix.rows, matrix.columns)
    stop = min(matrix.first_column + matrix.values.shape[-1], k)
    return range(min(matrix.first_column, stop), stop)


def _remembered(matrix: Matrix) -> Generator[Any, Any, tuple[Tensor, Tensor]]:
    """The mean magnitude of M, and the rotation of the step before, `[b, m, k]`: each rank has some of its columns."""
    b, m, _ = matrix.values.shape
    k, held = min(matrix.rows, matrix.columns), _held(matrix)
    whole = matrix.values.new_zeros(b, m, k)
    whole[..., held.start : held.stop] = matrix.state["rotation"][..., : len(held)]
    magnitude = matrix.values.abs().sum((-2, -1)) / (matrix.rows * matrix.columns)
    total = yield Sum(values=torch.cat([whole.flatten(1), magnitude[:, None]], dim=1), across="columns")
    whole = total[:, :-1].view(b, m, k)
    start = torch.eye(m, k, dtype=whole.dtype, device=whole.device)
    return total[:, -1, None, None], torch.where(whole.abs().amax((-2, -1), keepdim=True) > 0, whole, start)


def _own(matrix: Matrix, rotation: Tensor) -> Tensor:
    """The columns of the rotation that are kept here, in the shape of the matrix; the rest is zero."""
    held = _held(matrix)
    own = torch.zeros_like(matrix.values)
    own[..., : len(held)] = rotation[..., held.start : held.stop]
    return own


class _Frame:
    """The base map in rotated frames."""

    def __init__(self, matrix: Matrix, *, base: Base, rounds: int, beta2: float):
        self._matrix = matrix
        self._base = base
        self._rounds = rounds
        self._beta2 = beta2

    def directions(
        self, rotation: Tensor, m: Tensor, scale: Tensor
    ) -> Generator[Any, Any, tuple[Tensor, dict[str, Tensor]]]:
        """`f(RᵀM)`, `[b, k, n here]`, up to a factor, and the state it leaves; `m` is M over `scale`."""
        x = rotation.mT @ m
        squares = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
        floor = (_NOISE * torch.finfo(x.dtype).eps) ** 2 * squares.sum(-2, keepdim=True)
        kept = squares > floor
        x = torch.where(kept, x, 0)
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
        for i in range(self._rounds):
            if i:
                rows = yield Sum(values=x.square().sum(-1, keepdim=True), across="columns")
            columns = x.square().sum(-2, keepdim=True)
            x = x / torch.where(rows > 0, rows, 1).sqrt() / torch.where(columns > 0, columns, 1).sqrt()
        return x

    def _adam(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        k = x.shape[-2]
        average = self._matrix.state["rotated_sq"][..., :k, :].lerp((x * scale).square(), 1 - self._beta2)
        direction = x * scale / torch.where(average > 0, average, 1).sqrt()
        kept = torch.zeros_like(self._matrix.values)
        kept[..., :k, :] = average
        return direction, {"rotated_sq": kept}
