"""Where each rule runs: local, reduce or owner, decided from shapes and groups alone.

What counts is the busiest rank: everyone waits for it. Costs are found by running the rule on meta tensors and noting
what it asks, so they follow from the rule and need no second description of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from symdist.exchange.balance import balance
from symdist.exchange.jobs import Job, Placement, Stack
from symdist.layouts import Group, Split
from symdist.rules import InverseRoot, Matrix, Root, Rule
from symdist.views import View

# How many operations a rank does in the time it sends one byte: the order of an H100 in fp32 on 50 GB/s links, and of
# a CPU core on a fast loopback. Only the choice between reduce and owner hangs on it, and that seldom is close.
FLOPS_PER_BYTE = 1000.0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a rule asks for one stack member: numbers it sums, numbers in its Grams, and operations, roots apart."""

    summed: float
    grams: float
    flops: float
    root_flops: float


def ask(stack: Stack, piece: tuple[int, ...], axis: Literal["rows", "columns"] | None) -> Asked:
    """Run the rule of a stack on a meta tensor of shape `piece` and note what it asks across `axis`."""
    # Without its layout: a cache must not keep process groups alive.
    return _ask(stack.rule, stack.options, stack.view, stack.padding_rows, stack.dtype, piece, axis)


@functools.lru_cache(maxsize=1024)
def _ask(
    rule: Rule,
    options: tuple[tuple[str, Any], ...],
    view: View,
    padding_rows: int,
    dtype: torch.dtype,
    piece: tuple[int, ...],
    axis: Literal["rows", "columns"] | None,
) -> Asked:
    values = view.matrices(torch.empty((1, *piece), dtype=dtype, device="meta"))
    matrix = Matrix(values=values, rows=view.rows - padding_rows, columns=view.columns)
    asking = rule.update(matrix, **dict(options))
    summed = grams = root_flops = 0.0
    answer: Any = None
    with FlopCounterMode(display=False) as counter:
        while True:
            try:
                request = asking.send(answer)
            except StopIteration:
                break
            remote = axis is not None and request.across in (axis, "all")
            if isinstance(request, Root):
                b, d = request.gram.shape[:2]
                norm = request.gram.new_empty(b, 1, 1)
                answer = InverseRoot(request.gram, norms=(norm, norm))
                root_flops += b * request.numerics.operations(d)
                grams += request.gram.numel() if remote else 0
            else:
                answer = request.values
                summed += request.values.numel() if remote else 0
    return Asked(summed=summed, grams=grams, flops=counter.get_total_flops(), root_flops=root_flops)


def place(stacks: Mapping[Stack, Sequence[int]], *, names: Sequence[str], wave_bytes: int) -> list[list[Job]]:
    """The waves of a step: each a list of jobs whose buffers together stay near `wave_bytes`.

    `stacks` maps a stack to the indices of its parameters, in an order that is the same on all ranks; `names` are all
    parameters' names. A single parameter larger than the budget makes a wave of its own. Raises ValueError, naming
    the parameter, where a placement was asked for that its layout does not admit.
    """
    jobs: list[Job] = []
    for stack, members in stacks.items():
        placement, axis = _choose(stack, len(members), name=names[members[0]])
        step = max(1, wave_bytes // max(1, _flight_bytes(stack)))
        for start in range(0, len(members), step):
            jobs.append(Job(stack=stack, members=tuple(members[start : start + step]), placement=placement, axis=axis))
    waves = _waves(jobs, wave_bytes)
    return [_with_owners(wave) for wave in waves]


def _choose(stack: Stack, count: int, *, name: str) -> tuple[Placement, Literal["rows", "columns"] | None]:
    split = stack.layout.split
    if split is None:
        return _asked(stack, {"local": lambda: 0.0}, name=name), None
    seen = stack.view.seen(stack.layout)
    axis: Literal["rows", "columns"] | None = seen if seen in ("rows", "columns") else None
    costs: dict[Placement, Callable[[], float]] = {"owner": lambda: _owner_cost(stack, split, count)}
    if seen == "batch":
        costs["local"] = lambda: 0.0
    elif axis in stack.rule.splits_of(dict(stack.options), stack.view.rows, stack.view.columns):
        costs["reduce"] = lambda: _reduce_cost(stack, split, count, axis)
    chosen = _asked(stack, costs, name=name)
    return chosen, axis if chosen == "reduce" else None


def _asked(stack: Stack, costs: Mapping[Placement, Callable[[], float]], *, name: str) -> Placement:
    if stack.asked == "auto":
        return min(costs, key=lambda placement: costs[placement]()) if len(costs) > 1 else next(iter(costs))
    if stack.asked not in costs:
        raise ValueError(
            f"{name}: rule {stack.rule.name!r} cannot run with placement {stack.asked!r} on this layout; "
            f"it can with {', '.join(map(repr, costs))} or 'auto'"
        )
    return stack.asked  # type: ignore[return-value]


def _owner_cost(stack: Stack, split: Split, count: int) -> float:
    """Seconds of the busiest rank, in units of a byte sent: all its pieces there, its share of updates back."""
    size = split.group.size
    share = -(-count // size)
    whole = stack.layout.numel_on(0) * size
    sent = (count * stack.layout.numel_on(0) + share * whole) * (size - 1) / size * stack.dtype.itemsize
    asked = ask(stack, stack.layout.shape, None)
    return sent + share * (asked.flops + asked.root_flops) / FLOPS_PER_BYTE


def _reduce_cost(stack: Stack, split: Split, count: int, axis: Literal["rows", "columns"] | None) -> float:
    size = split.group.size
    asked = ask(stack, stack.layout.shape_on(0), axis)
    sent = 2 * count * (asked.summed + asked.grams) * (size - 1) / size * stack.dtype.itemsize
    roots = -(-count * stack.view.count // size) / stack.view.count
    return sent + (count * asked.flops + roots * asked.root_flops) / FLOPS_PER_BYTE


def _waves(jobs: list[Job], wave_bytes: int) -> list[list[Job]]:
    waves: list[list[Job]] = []
    room = 0
    for job in jobs:
        size = len(job.members) * _flight_bytes(job.stack)
        if not waves or size > room:
            waves.append([])
            room = wave_bytes
        waves[-1].append(job)
        room -= size
    return waves


def _flight_bytes(stack: Stack) -> int:
    """What one parameter holds while under way: direction, its copy in the stack, update, and a buffer's worth.

    Counted from the first rank's piece, the largest, not from this rank's: all ranks must cut alike.
    """
    return 4 * stack.layout.numel_on(0) * stack.dtype.itemsize


def _with_owners(wave: list[Job]) -> list[Job]:
    """Every job with its owners: balanced by operations over all jobs of the wave that share a group."""
    by_group: dict[Group, list[Job]] = {}
    for job in wave:
        if job.placement == "owner" and job.stack.layout.split is not None:
            by_group.setdefault(job.stack.layout.split.group, []).append(job)
    owners: dict[int, tuple[int, ...]] = {}
    for group, jobs in by_group.items():
        costs = [_work(job.stack) for job in jobs for _ in job.members]
        parts = iter(balance(costs, parts=group.size))
        for job in jobs:
            owners[id(job)] = tuple(next(parts) for _ in job.members)
    return [dataclasses.replace(job, owners=owners.get(id(job), ())) for job in wave]


def _work(stack: Stack) -> float:
    asked = ask(stack, stack.layout.shape, None)
    # A rule without products still costs a pass over its numbers.
    return asked.flops + asked.root_flops + math.prod(stack.layout.shape)


def describe(waves: Sequence[Sequence[Job]]) -> dict[int, Placement]:
    """The placement of every parameter, by its index."""
    return {member: job.placement for wave in waves for job in wave for member in job.members}
