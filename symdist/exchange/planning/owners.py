"""Chooses which rank updates which whole matrices, so that all ranks have about the same work."""

from collections import Counter
from collections.abc import Sequence

from symdist.exchange.collectives.balance import balance
from symdist.exchange.planning.costs import unit_cost, unit_flops, units_of
from symdist.exchange.planning.kinds import Kind
from symdist.layouts import FlatLayout, Group, Layout

Work = dict[Group, list[float]]
"""By group, the FLOPs of every rank in a step."""

_EVEN = 1.02
"""`lighten` stops when the load of the busiest rank is at most this many times the mean."""


def work_in_place(kinds: Sequence[Kind]) -> Work:
    """Return the work of the ranks on all matrices for which the rank is known before owners are chosen.

    Args:
        kinds: The parameters, with their strategies.

    Returns:
        The work; of every group of the kinds, even if it has none.
    """
    work: Work = {}
    for kind in kinds:
        if kind.group is None:
            continue
        loads = work.setdefault(kind.group, [0.0] * kind.group.size)
        unit = _work(kind)
        for _, layout in kind.whole:
            assert layout.sole_owner is not None
            loads[layout.sole_owner] += unit
        for owners in kind.owners.values():
            for rank in owners:
                loads[rank] += unit
        if kind.strategy == "owner":
            continue
        cost = unit_cost(kind.stack, hardware=kind.hardware)
        roots = cost.root_flops if kind.strategy == "local" else 0.0
        flops = units_of(kind.stack) * (cost.flops + roots) / kind.stack.numel
        for layout, count in Counter(layout for _, layout in kind.cut).items():
            for rank, size in layout.held.items():
                loads[rank] += count * flops * size
    return work


def lighten(kinds: Sequence[Kind], work: Work) -> None:
    """Move whole matrices from the busiest ranks to the least loaded ones, if sending them costs less than their work.

    Partitions have equal numbers of elements but not equal work: a rank that holds only an embedding has almost none.

    Args:
        kinds: The parameters; what is moved goes from `whole` to `sent`, with its new owner in `owners`.
        work: The work of the ranks, updated in place.
    """
    by_group: dict[Group, dict[int, list[_Movable]]] = {}
    for kind in kinds:
        sent = 2 * kind.fields * kind.stack.numel * kind.stack.dtype.itemsize * kind.hardware.flops_per_byte
        if kind.group is None or kind.stack.requested_strategy != "auto" or _work(kind) <= 4 * sent:
            continue
        for i, layout in kind.whole:
            assert layout.sole_owner is not None
            by_group.setdefault(kind.group, {}).setdefault(layout.sole_owner, []).append((_work(kind), i, kind, layout))
    for group, by_rank in by_group.items():
        loads = work[group]
        mean = sum(loads) / len(loads)
        # At most one move per matrix.
        for _ in range(sum(map(len, by_rank.values()))):
            busiest, idlest = loads.index(max(loads)), loads.index(min(loads))
            room = loads[busiest] - loads[idlest]
            fitting = [unit for unit in by_rank.get(busiest, []) if unit[0] < room]
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
            kind.owners[i] = (idlest,)


_Movable = tuple[float, int, Kind, Layout | FlatLayout]


def choose_owners(kinds: Sequence[Kind], work: Work) -> None:
    """Choose the owner of every unit of the parameters that run at owners.

    The costliest units come first, and go to the least loaded of the ranks that may own them. Units of the same cost
    are thus assigned to ranks in turn, so that each wave is balanced about as well as the whole step.

    Args:
        kinds: The parameters, with their strategies; their `owners` are filled in.
        work: The work of the ranks, updated in place.
    """
    by_group: dict[Group, list[tuple[float, Kind, int, Layout | FlatLayout]]] = {}
    for kind in kinds:
        if kind.strategy != "owner" or kind.group is None:
            continue
        units = by_group.setdefault(kind.group, [])
        for i, layout in kind.cut:
            units += [(_work(kind) / layout.units, kind, i, layout)] * layout.units
    for group, units in by_group.items():
        loads = work[group]
        anywhere: list[tuple[float, Kind, int, Layout | FlatLayout]] = []
        for unit in sorted(units, key=lambda unit: -unit[0]):
            cost, kind, i, layout = unit
            if 2 * len(layout.candidates) > group.size:
                anywhere.append(unit)
                continue
            owner = min(layout.candidates, key=lambda rank: (loads[rank], rank))
            loads[owner] += cost
            kind.owners[i] = (*kind.owners.get(i, ()), owner)
        parts = balance([cost for cost, *_ in anywhere], parts=group.size, loads=loads)
        for (_, kind, i, _), part in zip(anywhere, parts, strict=True):
            kind.owners[i] = (*kind.owners.get(i, ()), part)


def _work(kind: Kind) -> float:
    """Return the FLOPs of the rule on a whole parameter, including all its units."""
    return units_of(kind.stack) * unit_flops(kind.stack, hardware=kind.hardware)
