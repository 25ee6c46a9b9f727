"""Costs of a rule, in FLOPs and in numbers sent, measured by running the rule on meta tensors."""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from symdist.diagnostics.memory import TensorWatch
from symdist.exchange.collectives.grid_redistribution import canonical_shape
from symdist.exchange.collectives.triangles import packed_size
from symdist.exchange.execution.stack import Stack
from symdist.exchange.hardware import Hardware
from symdist.exchange.planning.operations import OperationCounter
from symdist.matrix_views import View
from symdist.rules import InverseRoot, Matrix, Orthonormal, Root, Rule, StageSum
from symdist.rules.registry import MatrixAxis


@dataclass(frozen=True, kw_only=True)
class RuleCost:
    """The cost of a rule on one piece of a parameter.

    Operations are those in float32 that take the same time.

    Attributes:
        summed: By axis, how many numbers are summed over the ranks along it; a Gram counts as its triangle.
        flops: The operations without those of roots and QRs.
        root_flops: The operations of roots and QRs, which one rank does for all.
        peak: How many numbers the rule holds at most at a time, besides what it is given; its result is among them.
            If axes are given, roots and QRs take no memory here, since another rank may do them.
        waiting: How many numbers it holds when it first asks other ranks.
    """

    summed: Mapping[MatrixAxis, float]
    flops: float
    root_flops: float
    peak: float
    waiting: float


def shard_cost(
    stack: Stack, shape: tuple[int, ...], axes: Collection[MatrixAxis] = (), *, hardware: Hardware
) -> RuleCost:
    """Return the cost of a stack's rule on a stored piece.

    Args:
        stack: The stack whose rule is measured.
        shape: The shape of the stored piece.
        axes: The matrix axes along which other ranks hold the rest of the matrix; none by default.
        hardware: The speeds by which operations in other dtypes are converted.

    Returns:
        The cost.
    """
    # The layout is not passed on, since the cache must not keep process groups alive.
    counts = stack.rows, stack.columns
    return _measure(stack.rule, stack.options, stack.view, counts, stack.dtype, shape, frozenset(axes), hardware)


def unit_cost(stack: Stack, *, hardware: Hardware) -> RuleCost:
    """Return the cost of a stack's rule on one whole unit: an expert of a 3-D parameter, otherwise a whole parameter.

    Args:
        stack: The stack whose rule is measured.
        hardware: As for `shard_cost`.

    Returns:
        The cost.
    """
    shape = stack.layout.shape
    return shard_cost(stack, (1, *shape[1:]) if len(shape) == 3 else shape, hardware=hardware)


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


@functools.lru_cache(maxsize=4096)
def _measure(
    rule: Rule,
    options: tuple[tuple[str, Any], ...],
    view: View,
    counts: tuple[int, int],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    axes: frozenset[MatrixAxis],
    hardware: Hardware,
) -> RuleCost:
    """Run a rule on a meta tensor of the given stored shape, and count what it computes and sums."""
    values = view.matrices(torch.empty((1, *shape), dtype=dtype, device="meta"))
    state = dict.fromkeys(rule.remembers(dict(options)), values)
    matrix = Matrix(values=values, rows=counts[0], columns=counts[1], state=state)
    running = rule.update(matrix, **dict(options))
    summed: dict[MatrixAxis, float] = dict.fromkeys(axes, 0.0)
    root_flops = counted = waiting = 0.0

    def run_rule() -> object:
        nonlocal root_flops, counted, waiting
        answer: Any = None
        while True:
            try:
                request = running.send(answer)
            except StopIteration as stop:
                return stop.value
            before = counter.seconds
            numbers = request.values.nbytes / dtype.itemsize if not isinstance(request, Root) else 0.0
            if isinstance(request, Root):
                b, d = request.gram.shape[:2]
                root_flops += b * request.numerics.operations(d)
                numbers = b * packed_size(d)
            elif isinstance(request, Orthonormal):
                root_flops += request.values.shape[0] * request.operations()
            if axes and isinstance(request, Root):
                norm = request.gram.new_empty(b, 1, 1)
                answer = InverseRoot(request.gram, norms=(norm, norm)).of_larger(request.unit)
            else:
                answer = request.values if axes else request.answer_locally()
            counted += counter.seconds - before
            # A residual-stage sum is shared by many matrices, so it is not counted for a single one.
            across = None if isinstance(request, StageSum) else request.across
            for axis in axes:
                summed[axis] += numbers if across in (axis, "all") else 0
            waiting = waiting or watch.alive

    with OperationCounter(hardware) as counter, TensorWatch("meta") as watch:
        run_rule()
    return RuleCost(
        summed=summed,
        flops=(counter.seconds - counted) * hardware.flops,
        root_flops=root_flops,
        peak=watch.peak / dtype.itemsize,
        waiting=waiting / dtype.itemsize,
    )
