"""Chooses where the rules of flat parameters run.

A rule runs where a matrix is whole (local), on completed rows (reduce) or at its owner (owner). Costs are those of the
busiest rank, as for other layouts. Parameters of one kind share jobs even if they are cut differently, since in a ZeRO
partition hardly any two are cut alike.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from symdist.exchange.collectives.balance import balance
from symdist.exchange.collectives.residual_sums import StagePlan
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.stack import Stack, Strategy, travels_as
from symdist.exchange.hardware import Hardware
from symdist.exchange.planning.costs import shard_cost, unit_cost, unit_flops, units_of
from symdist.layouts import Group
from symdist.layouts.flat import FlatLayout

Cut = list[tuple[int, FlatLayout]]

_EVEN = 1.02
"""`_lighten` stops when the load of the busiest rank is at most this many times the mean."""


@dataclass
class _Kind:
    """Parameters that differ only in how they are cut.

    Attributes:
        stack: What they have in common; its layout gives the ranks, but no cuts.
        name: The name of the first parameter, for error messages.
        column_blocks: The widths of the blocks of columns that are stored one after another; empty without such blocks.
        whole: The parameters that are whole on one rank and updated there.
        cut: The parameters that are cut over several ranks.
        sent: The parameters that are whole on one rank but run at an owner, to even out the load or for their stage.
        owners: The owners of `sent`, as group indices, by parameter index.
    """

    stack: Stack
    name: str
    column_blocks: tuple[int, ...]
    whole: Cut = field(default_factory=list)
    cut: Cut = field(default_factory=list)
    sent: Cut = field(default_factory=list)
    owners: dict[int, int] = field(default_factory=dict)

    @property
    def group(self) -> Group:
        """The ranks over which the parameters are sharded."""
        assert self.stack.layout.group is not None
        return self.stack.layout.group

    @property
    def multiple(self) -> int:
        """How many rows must stay together: those of a head, or of a block of gate and up rows; otherwise 1."""
        view = self.stack.view
        if len(view.stored) > 2:
            return 1
        return view.unit if view.kind == "heads_0" or (view.kind == "gate_up_stacked" and not view.single) else 1


def plan_flat(
    stacks: Mapping[Stack, Cut],
    *,
    names: Sequence[str],
    budget: float,
    communication_dtype: torch.dtype | None,
    hardware: Hardware,
    work: dict[Group, list[float]],
    stages: StagePlan,
) -> list[Job]:
    """Plan the stacks whose layouts are flat.

    All matrices of residual stages run at owners; a matrix that is whole on one rank is owned by that rank. Nothing is
    sent: every rank computes this for itself, with the same result for jobs that involve several ranks.

    Args:
        stacks: By stack, the indices and layouts of its parameters.
        names: The names of all parameters, by index.
        budget: How many bytes a job may hold on a rank.
        communication_dtype: The dtype in which matrices are sent; None for the stack's own.
        hardware: The speeds by which strategies are chosen.
        work: By group, the FLOPs that each rank already has; those of these stacks are added in place.
        stages: The residual stages and their waves.

    Returns:
        This rank's jobs. Jobs of matrices that are whole on this rank are known to this rank alone.

    Raises:
        ValueError: If a parameter's layout does not admit its group's `strategy`; the message names the parameter.
    """
    kinds: dict[tuple[Stack, tuple[int, ...]], _Kind] = {}
    for stack, members in stacks.items():
        for i, layout in members:
            blocks = layout.column_blocks
            kind = kinds.setdefault((stack, blocks), _Kind(stack=stack, name=names[i], column_blocks=blocks))
            (kind.whole if layout.sole_owner is not None and not blocks else kind.cut).append((i, layout))
    for kind in kinds.values():
        # In model order, so that the parameters of one wave are cut over many ranks and not all over the same few.
        kind.whole.sort(key=lambda item: item[0])
        kind.cut.sort(key=lambda item: item[0])
    coupled = [kind for kind in kinds.values() if kind.stack.coupled]
    for kind in coupled:
        kind.owners |= {i: layout.sole_owner for i, layout in kind.whole if layout.sole_owner is not None}
        kind.sent, kind.whole = kind.whole, []
    _lighten([kind for kind in kinds.values() if not kind.stack.coupled], work, hardware)
    chosen = [(kind, _choose(kind, communication_dtype, hardware)) for kind in kinds.values()]
    for kind, strategy in chosen:
        _add_work(kind, strategy, work.setdefault(kind.group, [0.0] * kind.group.size))
    owners = _owners([kind for kind, strategy in chosen if strategy == "owner"], work)
    jobs: list[Job] = []
    for kind, strategy in chosen:
        dtype = travels_as(kind.stack, communication_dtype)
        jobs += _whole_jobs(kind, budget)
        owned = [*kind.sent, *(kind.cut if strategy == "owner" else [])]
        for part in stages.parts(owned, lambda item: item[0]) if kind.stack.coupled else [owned]:
            part_jobs = _owner_jobs(
                kind.stack, part, owners | kind.owners, math.inf if kind.stack.coupled else budget, dtype
            )
            jobs += [
                dataclasses.replace(
                    job, stages=stages.of(job.everyone) if kind.stack.coupled else (), column_blocks=kind.column_blocks
                )
                for job in part_jobs
            ]
        if strategy == "reduce":
            jobs += _row_jobs(kind, budget, dtype)
    return jobs


def _work(stack: Stack) -> float:
    """Return the FLOPs of the rule on a whole parameter, including all its units."""
    return units_of(stack) * unit_flops(stack)


def _lighten(kinds: list[_Kind], work: Mapping[Group, Sequence[float]], hardware: Hardware) -> None:
    """Move whole matrices from the busiest ranks to the least loaded ones, if sending them costs less than their work.

    Partitions have equal numbers of elements but not equal work: a rank that holds only an embedding has almost none.
    """
    by_group: dict[Group, list[tuple[float, int, _Kind, FlatLayout]]] = {}
    for kind in kinds:
        sent = (
            2
            * _num_fields(kind.stack)
            * math.prod(kind.stack.layout.shape)
            * kind.stack.dtype.itemsize
            * hardware.flops_per_byte
        )
        cost = _work(kind.stack)
        movable = kind.stack.requested_strategy == "auto" and cost > 4 * sent
        by_group.setdefault(kind.group, []).extend((cost * movable, i, kind, layout) for i, layout in kind.whole)
    for group, units in by_group.items():
        loads = list(work.get(group, [0.0] * group.size))
        by_rank: dict[int, list[tuple[float, int, _Kind, FlatLayout]]] = {}
        for unit in units:
            _, _, kind, layout = unit
            assert layout.sole_owner is not None
            loads[layout.sole_owner] += _work(kind.stack)
            by_rank.setdefault(layout.sole_owner, []).append(unit)
        mean = sum(loads) / len(loads)
        # At most one move per matrix.
        for _ in units:
            busiest, idlest = loads.index(max(loads)), loads.index(min(loads))
            room = loads[busiest] - loads[idlest]
            fitting = [unit for unit in by_rank.get(busiest, []) if 0 < unit[0] < room]
            if loads[busiest] <= _EVEN * mean or not fitting:
                break
            # Take the matrix whose move brings the two loads closest to each other.
            moved = min(fitting, key=lambda unit: (abs(room - 2 * unit[0]), unit[1]))
            by_rank[busiest].remove(moved)
            cost, i, kind, layout = moved
            loads[busiest] -= cost
            loads[idlest] += cost
            kind.whole.remove((i, layout))
            kind.sent.append((i, layout))
            kind.owners[i] = idlest


def _choose(kind: _Kind, communication_dtype: torch.dtype | None, hardware: Hardware) -> Strategy:
    """Choose the strategy for the parameters that are cut; "local" if there are none."""
    requested = kind.stack.requested_strategy
    if not kind.cut:
        return "local"
    # For flat layouts, residual-stage sums run with owners only.
    admitted = not kind.stack.coupled and _admits_rows(kind)
    possible: list[Strategy] = ["owner", "reduce"] if admitted else ["owner"]
    if requested != "auto":
        if requested not in possible:
            raise ValueError(
                f"{kind.name}: rule {kind.stack.rule.name!r} cannot run with strategy {requested!r} on this layout; "
                f"set strategy to {', '.join(map(repr, possible))} or 'auto'"
            )
        return "owner" if requested == "owner" else "reduce"
    if not admitted:
        return "owner"
    if all(_alone(_rows_stack(kind, layout)) for _, layout in kind.cut):
        return "reduce"
    dtype = travels_as(kind.stack, communication_dtype)
    return "reduce" if _reduce_cost(kind, hardware) <= _owner_cost(kind, dtype, hardware) else "owner"


def _rows_stack(kind: _Kind, layout: FlatLayout) -> Stack:
    """Return the kind's stack with the layout that one parameter has after its rows are completed."""
    return dataclasses.replace(kind.stack, layout=layout.by_rows(multiple=kind.multiple))


def _admits_rows(kind: _Kind) -> bool:
    """Return whether the kind's rule and view can run on completed rows."""
    if kind.column_blocks:
        return False
    # Checking the first parameter is enough: whether rows suit the view does not depend on where they are cut.
    split_kinds = set(_rows_stack(kind, kind.cut[0][1]).splits)
    return "unaligned" not in split_kinds and split_kinds <= {"batch", *kind.stack.admitted}


def _alone(rows: Stack) -> bool:
    """Return whether the rule needs nothing beyond whole rows."""
    axes = [axis for axis in rows.splits if axis in ("rows", "columns")]
    if not axes:
        return True
    if rows.skip_zero_grad_rows and "columns" in axes:
        return False
    summed = shard_cost(rows, rows.layout.largest_shape, axes).summed
    return not any(summed.values())


def _reduce_cost(kind: _Kind, hardware: Hardware) -> float:
    """Return the cost of any rank in bytes: every sum runs over all ranks, whether or not they hold the matrix."""
    total = 0.0
    ranks = kind.group.size
    for layout, count in Counter(layout for _, layout in kind.cut).items():
        rows = _rows_stack(kind, layout)
        axes = [axis for axis in rows.splits if axis in ("rows", "columns")]
        rule_cost = shard_cost(rows, rows.layout.largest_shape, axes)
        sent = 2 * count * sum(rule_cost.summed.values()) * (ranks - 1) / ranks * kind.stack.dtype.itemsize
        roots = rule_cost.root_flops * -(-count // ranks)
        total += sent + (count * rule_cost.flops + roots) / hardware.flops_per_byte
    return total


def _owner_cost(kind: _Kind, dtype: torch.dtype, hardware: Hardware) -> float:
    """Return the cost of the busiest rank in bytes.

    It adds up its ranges that are sent to owners, the updates it sends back for what it owns, and its FLOPs converted
    to bytes.
    """
    size = _num_fields(kind.stack) * math.prod(kind.stack.layout.shape)
    rule_cost = unit_cost(kind.stack)
    work = units_of(kind.stack) * (rule_cost.flops + rule_cost.root_flops) / hardware.flops_per_byte
    costs = [0.0] * kind.group.size
    for layout, count in Counter(layout for _, layout in kind.cut).items():
        candidates = _candidates(layout)
        per_owner = -(-count // len(candidates))
        for rank, start, stop in layout.runs:
            costs[rank] += count * _num_fields(kind.stack) * (stop - start) * dtype.itemsize
        # If there are fewer matrices than candidates, only the first few candidates own one.
        for rank in candidates[:count]:
            costs[rank] += per_owner * (
                (size - 2 * _num_fields(kind.stack) * layout.size_at(rank)) * dtype.itemsize + work
            )
    return max(costs)


def _num_fields(stack: Stack) -> int:
    """Return how many tensors per matrix are sent to its owner and back: the direction, and what the rule remembers."""
    return 1 + len(stack.state_names)


def _candidates(layout: FlatLayout) -> list[int]:
    """Return the ranks that hold at least half as much of a matrix as any other; as owners they receive the least."""
    most = max(stop - start for _, start, stop in layout.runs)
    return [rank for rank, start, stop in layout.runs if 2 * (stop - start) >= most]


def _add_work(kind: _Kind, strategy: Strategy, loads: list[float]) -> None:
    """Add to `loads` every rank's FLOPs on matrices for which the rank is already known."""
    unit = _work(kind.stack)
    for _, layout in kind.whole:
        assert layout.sole_owner is not None
        loads[layout.sole_owner] += unit
    for rank in kind.owners.values():
        loads[rank] += unit
    if strategy == "reduce":
        size = math.prod(kind.stack.layout.shape)
        flops = units_of(kind.stack) * unit_cost(kind.stack).flops
        for layout, count in Counter(layout for _, layout in kind.cut).items():
            for rank, start, stop in layout.runs:
                loads[rank] += count * flops * (stop - start) / size


def _owners(kinds: list[_Kind], work: dict[Group, list[float]]) -> dict[int, int]:
    """Choose the owner of each cut parameter, by parameter index.

    The costliest parameters come first. The owner is the least loaded of the ranks that hold most of the parameter.
    """
    owners: dict[int, int] = {}
    by_group: dict[Group, list[tuple[float, int, FlatLayout]]] = {}
    for kind in kinds:
        by_group.setdefault(kind.group, []).extend((_work(kind.stack), i, layout) for i, layout in kind.cut)
    for group, units in by_group.items():
        loads = work[group]
        unrestricted = []
        for cost, i, layout in sorted(units, key=lambda unit: (-unit[0], unit[1])):
            candidates = _candidates(layout)
            if 2 * len(candidates) > group.size:
                unrestricted.append((cost, i))
                continue
            owners[i] = min(candidates, key=lambda rank: (loads[rank], rank))
            loads[owners[i]] += cost
        parts = balance([cost for cost, _ in unrestricted], parts=group.size, loads=loads)
        owners.update((i, part) for (_, i), part in zip(unrestricted, parts, strict=True))
    return owners


def _whole_jobs(kind: _Kind, budget: float) -> list[Job]:
    """Return the jobs of the matrices that are whole on this rank; other ranks need not know of them."""
    local = [(i, layout) for i, layout in kind.whole if layout.sole_owner == kind.group.index]
    size = 4.0 * _num_fields(kind.stack) * math.prod(kind.stack.layout.shape) * kind.stack.dtype.itemsize
    step = max(1, int(budget // max(1.0, size)))
    return [_job(kind.stack, local[i : i + step], "local") for i in range(0, len(local), step)]


def _owner_jobs(
    stack: Stack, parameters: Cut, owners: Mapping[int, int], budget: float, dtype: torch.dtype
) -> list[Job]:
    """Return the jobs of parameters that run at owners, within the budget."""
    size = _num_fields(stack) * math.prod(stack.layout.shape)
    assert stack.layout.group is not None
    this_rank = stack.layout.group.index
    jobs = []
    for cut, flight in _cut_in_waves(stack, parameters, budget, {i: {owners[i]: 7.0 * size} for i, _ in parameters}):
        members = [(i, layout) for i, layout in cut if _held_here(layout) or owners[i] == this_rank]
        job = _job(stack, members, "owner", everyone=cut, flight=flight, dtype=dtype)
        jobs.append(dataclasses.replace(job, owners=tuple(owners[i] for i, _ in members)))
    return jobs


def _row_jobs(kind: _Kind, budget: float, dtype: torch.dtype) -> list[Job]:
    """Return the jobs of parameters that run on completed rows, within the budget."""
    multiple = kind.multiple
    alone: Cut = []
    by_layout: dict[FlatLayout, Cut] = {}
    for i, layout in kind.cut:
        if _alone(_rows_stack(kind, layout)):
            alone.append((i, layout))
        else:
            by_layout.setdefault(layout, []).append((i, layout))
    jobs = []
    for cut, flight in _cut_in_waves(kind.stack, alone, budget, {}):
        members = [(i, layout) for i, layout in cut if _held_here(layout) or _rows_here(layout, multiple)]
        jobs.append(_job(kind.stack, members, "reduce", everyone=cut, flight=flight, dtype=dtype, multiple=multiple))
    for layout, cut in by_layout.items():
        stack = _rows_stack(kind, layout)
        summed = {i: dict.fromkeys(range(kind.group.size), 6.0 * _summed(stack)) for i, _ in cut}
        for part, flight in _cut_in_waves(stack, cut, budget, summed):
            job = _job(stack, part, "reduce", flight=flight, dtype=dtype, multiple=multiple)
            jobs.append(dataclasses.replace(job, alone=False))
    return jobs


def _summed(rows: Stack) -> float:
    """Return how many numbers are summed over the ranks for one parameter."""
    axes = [axis for axis in rows.splits if axis in ("rows", "columns")]
    return sum(shard_cost(rows, rows.layout.largest_shape, axes).summed.values())


def _cut_in_waves(
    stack: Stack, parameters: Cut, budget: float, extra: Mapping[int, Mapping[int, float]]
) -> list[tuple[Cut, float]]:
    """Split parameters, in order, into parts that fit the busiest rank's budget.

    Each part comes with the bytes that the busiest rank holds for it. A piece takes 6 times its size, as it is held,
    copied, updated and copied again. `extra` is, by parameter and rank, how many further numbers a rank holds.
    """
    waves: list[Cut] = []
    flights: list[float] = []
    loads: dict[int, float] = {}
    for i, layout in parameters:
        needed = {rank: 6.0 * _num_fields(stack) * (stop - start) for rank, start, stop in layout.runs}
        for rank, numbers in extra.get(i, {}).items():
            needed[rank] = needed.get(rank, 0.0) + numbers
        needed = {rank: numbers * stack.dtype.itemsize for rank, numbers in needed.items()}
        if not waves or any(loads.get(rank, 0.0) + size > budget for rank, size in needed.items()):
            waves.append([])
            flights.append(0.0)
            loads = {}
        waves[-1].append((i, layout))
        for rank, size in needed.items():
            loads[rank] = loads.get(rank, 0.0) + size
            flights[-1] = max(flights[-1], loads[rank])
    return list(zip(waves, flights, strict=True))


def _held_here(layout: FlatLayout) -> bool:
    """Return whether this rank holds any element of the parameter."""
    return layout.size_at(layout.group.index) > 0


def _rows_here(layout: FlatLayout, multiple: int) -> bool:
    """Return whether this rank holds any row once the rows are completed."""
    return layout.by_rows(multiple=multiple).local_shape[0] > 0


def _job(
    stack: Stack,
    members: Cut,
    strategy: Strategy,
    *,
    everyone: Cut | None = None,
    flight: float = 0.0,
    dtype: torch.dtype = torch.float32,
    multiple: int = 1,
) -> Job:
    """Make a job of parameters, and work out whether any rank has something to send."""
    everyone = members if everyone is None else everyone
    travels = strategy == "owner" or any(
        bound % (layout.width * multiple) for _, layout in everyone for bound in layout.bounds
    )
    return Job(
        stack=stack,
        members=tuple(i for i, _ in members),
        everyone=tuple(i for i, _ in everyone),
        layouts=tuple(layout for _, layout in members),
        strategy=strategy,
        alone=True,
        multiple=multiple,
        travels=travels,
        flight_bytes=flight,
        communication_dtype=dtype,
    )
