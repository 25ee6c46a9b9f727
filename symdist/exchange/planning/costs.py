"""Costs of a rule, in FLOPs and in numbers sent, measured by running the rule on meta tensors."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from symdist.diagnostics.memory import TensorWatch
from symdist.exchange.collectives.grid_redistribution import canonical_shape
from symdist.exchange.collectives.triangles import packed_size
from symdist.exchange.execution.stack import Stack
from symdist.exchange.planning.operations import OperationCounter
from symdist.hardware import Hardware
from symdist.matrix_views import View
from symdist.rules import Asking, Factored, InverseRoot, Matrix, Orthonormal, Request, Root, Rule, StageSum
from symdist.rules.linalg.precision import describe
from symdist.rules.registry import MatrixAxis


@dataclass(frozen=True, kw_only=True)
class RuleCost:
    """The cost of a rule on one piece of a parameter.

    Operations are those in float32 that take the same time.

    Attributes:
        summed: By axis, how many numbers are summed over the ranks along it; a Gram counts as its triangle.
        flops: The operations without those of roots and QRs.
        root_flops: The operations of roots and QRs, which one rank does for all.
    """

    summed: Mapping[MatrixAxis, float]
    flops: float
    root_flops: float


@dataclass(frozen=True, kw_only=True)
class RuleMemory:
    """What a rule holds on one piece of a parameter, besides what it is given, in numbers.

    Attributes:
        peak: The most at a time; its result is among them. If it asks other ranks, roots and QRs take no memory here,
            since another rank may do them.
        waiting: What it holds when it first asks.
    """

    peak: float
    waiting: float


_WHOLE: Mapping[MatrixAxis, int] = {}


def shard_cost(
    stack: Stack, shape: tuple[int, ...], axes: Mapping[MatrixAxis, int] = _WHOLE, *, hardware: Hardware
) -> RuleCost:
    """Return the cost of a stack's rule on a stored piece.

    Args:
        stack: The stack whose rule is measured.
        shape: The shape of the stored piece.
        axes: The matrix axes along which other ranks hold the rest of the matrix, and the number of ranks along each;
            none by default.
        hardware: The speeds by which operations in other dtypes are converted.

    Returns:
        The cost.
    """
    return _cost(_Piece.of(stack, shape, axes), hardware)


def shard_memory(stack: Stack, shape: tuple[int, ...], axes: Mapping[MatrixAxis, int] = _WHOLE) -> RuleMemory:
    """Return what a stack's rule holds on a stored piece.

    Args:
        stack: The stack whose rule is measured.
        shape: The shape of the stored piece.
        axes: The matrix axes along which other ranks hold the rest of the matrix, and the number of ranks along each;
            none by default.

    Returns:
        The memory.
    """
    return _memory(_Piece.of(stack, shape, axes))


def unit_cost(stack: Stack, *, hardware: Hardware) -> RuleCost:
    """Return the cost of a stack's rule on one whole unit: an expert of a 3-D parameter, otherwise a whole parameter.

    Args:
        stack: The stack whose rule is measured.
        hardware: As for `shard_cost`.

    Returns:
        The cost.
    """
    return shard_cost(stack, unit_shape(stack), hardware=hardware)


def unit_shape(stack: Stack) -> tuple[int, ...]:
    """Return the stored shape of one whole unit."""
    shape = stack.layout.shape
    return (1, *shape[1:]) if len(shape) == 3 else shape


def unit_flops(stack: Stack, *, hardware: Hardware) -> float:
    """Return the FLOPs of a stack's rule on one whole unit, including roots and QRs.

    Args:
        stack: The stack whose rule is measured.
        hardware: As for `shard_cost`.

    Returns:
        The FLOPs, with one added per element.
    """
    cost = unit_cost(stack, hardware=hardware)
    # One FLOP per element is added, because even a rule without matrix products costs a pass over the elements.
    return cost.flops + cost.root_flops + math.prod(stack.layout.shape) / units_of(stack)


def units_of(stack: Stack) -> int:
    """Return how many units a parameter of the stack has: the number of experts if it is 3-D, otherwise 1."""
    return canonical_shape(stack.layout.shape)[0]


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """What a rule's cost on a stored piece depends on.

    The layout is no part of it, since caches must not keep process groups alive.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    view: View
    rows: int
    columns: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    hardware: Hardware
    parts: tuple[tuple[MatrixAxis, int], ...]

    @staticmethod
    def of(stack: Stack, shape: tuple[int, ...], axes: Mapping[MatrixAxis, int]) -> "_Piece":
        return _Piece(
            rule=stack.rule,
            options=stack.options,
            view=stack.view,
            rows=stack.rows,
            columns=stack.columns,
            dtype=stack.dtype,
            shape=shape,
            hardware=stack.hardware,
            parts=tuple(axes.items()),
        )

    def started(self) -> Asking:
        """Start the rule on a meta tensor."""
        options = dict(self.options)
        values = self.view.matrices(torch.empty((1, *self.shape), dtype=self.dtype, device="meta"))
        state = dict.fromkeys(self.rule.remembers(options), values)
        parts = dict(self.parts)
        matrix = Matrix(
            values=values, rows=self.rows, columns=self.columns, state=state, parts=parts, hardware=self.hardware
        )
        return self.rule.update(matrix, **options)


@functools.lru_cache(maxsize=4096)
def _cost(piece: _Piece, hardware: Hardware) -> RuleCost:
    """Run a rule on a meta tensor, and count what it computes and sums."""
    axes = [axis for axis, _ in piece.parts]
    summed: dict[MatrixAxis, float] = dict.fromkeys(axes, 0.0)
    root_flops = 0.0

    def answered(request: Request) -> Any:
        nonlocal root_flops
        if isinstance(request, Factored):
            return None
        if isinstance(request, Root):
            b, d = request.gram.shape[:2]
            root_flops += b * request.operations
            numbers = float(b * packed_size(d))
        else:
            numbers = request.values.nbytes / piece.dtype.itemsize
        if isinstance(request, Orthonormal):
            root_flops += request.values.shape[0] * request.operations()
        # A residual-stage sum is shared by many matrices, so it is not counted for a single one.
        across = None if isinstance(request, StageSum) else request.across
        for axis in axes:
            summed[axis] += numbers if across in (axis, "all") else 0
        return _given(request)

    running = piece.started()
    with OperationCounter(hardware) as counter:
        _run(running, answered)
    return RuleCost(summed=summed, flops=counter.seconds * hardware.flops, root_flops=root_flops)


def precision_of(stack: Stack, axes: Mapping[MatrixAxis, int] = _WHOLE) -> str:
    """Return in which precision a stack's rule computes roots, in a few words; empty if it computes none.

    Args:
        stack: The stack.
        axes: As for `shard_cost`.

    Returns:
        The words.
    """
    options = dict(stack.options)
    return (
        "published"
        if options.get("precision") == "published"
        else _precision(_Piece.of(stack, unit_shape(stack), axes))
    )


@functools.lru_cache(maxsize=4096)
def _precision(piece: _Piece) -> str:
    found: list[str] = []

    def answered(request: Request) -> Any:
        if isinstance(request, Root):
            found.append(describe(request.numerics))
        return None if isinstance(request, Factored) else _given(request)

    _run(piece.started(), answered)
    return found[0] if found else ""


@functools.lru_cache(maxsize=4096)
def _memory(piece: _Piece) -> RuleMemory:
    """Run a rule on a meta tensor, and watch what it holds."""
    waiting: list[int] = []

    def answered(request: Request) -> Any:
        if isinstance(request, Factored):
            return None
        waiting.append(watch.alive)
        return _given(request) if piece.parts else request.answer_locally()

    running = piece.started()
    with TensorWatch("meta") as watch:
        _run(running, answered)
    return RuleMemory(peak=watch.peak / piece.dtype.itemsize, waiting=(waiting or [0])[0] / piece.dtype.itemsize)


def _given(request: Request) -> Any:
    """Return an answer of the right shape that nothing is computed for."""
    if isinstance(request, Root):
        norm = request.gram.new_empty(request.gram.shape[0], 1, 1)
        return InverseRoot(request.gram, norms=(norm, norm)).of_larger(request.unit)
    return request.values


def _run(running: Asking, answered: Callable[[Request], Any]) -> object:
    """Run a rule to its end; `answered` answers its requests."""
    answer: Any = None
    while True:
        try:
            request = running.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = answered(request)
