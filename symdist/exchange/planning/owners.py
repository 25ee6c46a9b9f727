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

_FALL = 0.9
"""Teams are formed if they bring the time of the busiest rank to this share or less."""


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


def form_teams(kinds: Sequence[Kind], work: Work) -> None:
    """Let teams of ranks own units where there are fewer units than ranks and one unit takes most of the time.

    A team cuts a unit into blocks, and runs the rule on them by sums, as with strategy "reduce". Teams are formed if
    the time of the busiest rank falls by a tenth or more.

    Args:
        kinds: The parameters, with their strategies; `team` is filled in.
        work: The work of the ranks so far.
    """
    by_group: dict[Group, list[Kind]] = {}
    for kind in kinds:
        if kind.strategy == "owner" and kind.group is not None:
            by_group.setdefault(kind.group, []).append(kind)
    for group, owned in by_group.items():
        most = group.size // sum(layout.units for kind in owned for _, layout in [*kind.cut, *kind.sent])
        sizes = [size for size in (2**i for i in range(1, most.bit_length())) if group.size % size == 0]
        alone = {id(kind): kind.time_at_owner(None) for kind in owned}
        best: dict[int, tuple[float, Layout | None]] = {id(kind): (alone[id(kind)], None) for kind in owned}
        for kind in owned:
            for team in kind.possible_teams(sizes):
                best[id(kind)] = min(best[id(kind)], (kind.time_at_owner(team), team), key=lambda timed: timed[0])
        fixed = max(work[group]) / owned[0].hardware.flops + _sent(kinds, group)
        before, after = (fixed + max(times) for times in (alone.values(), [time for time, _ in best.values()]))
        if after > _FALL * before:
            continue
        for kind in owned:
            # Only those that a single rank would be slower at than the busiest rank now is.
            if fixed + alone[id(kind)] > after:
                kind.team = best[id(kind)][1]


def _sent(kinds: Sequence[Kind], group: Group) -> float:
    """Return the seconds that a rank sends sums, and its pieces to owners."""
    seconds = 0.0
    for kind in kinds:
        if kind.group == group:
            # Of blocks, the busiest rank holds the largest; ranges even out over all parameters.
            held = sum(layout.loads[0] if layout.completed else kind.stack.numel / group.size for _, layout in kind.cut)
            pieces = kind.fields * held * kind.dtype.itemsize
            sent = pieces if kind.strategy == "owner" else kind.summed_bytes if kind.strategy == "reduce" else 0.0
            seconds += sent / kind.hardware.bandwidth
    return seconds


def choose_owners(kinds: Sequence[Kind], work: Work) -> None:
    """Choose the owner of every unit of the parameters that run at owners.

    The costliest units come first, and go to the least loaded of the ranks that may own them. Units of the same cost
    are thus assigned to ranks in turn, so that each wave is balanced about as well as the whole step.

    Args:
        kinds: The parameters, with their strategies and teams; their `owners` are filled in.
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
            _, kind, i, layout = unit
            size = kind.team_size
            if size == 1 and 2 * len(layout.candidates) > group.size:
                anywhere.append(unit)
                continue
            candidates = layout.candidates if size == 1 else range(group.size // size)
            owner = min(candidates, key=lambda owner: (max(loads[owner * size : (owner + 1) * size]), owner))
            _add_unit(kind, layout, loads, range(owner * size, (owner + 1) * size))
            kind.owners[i] = (*kind.owners.get(i, ()), owner)
        # Roots of sums go to the least loaded ranks during the step, so room is left for them.
        roots = [root for kind in kinds if kind.group == group for root in _roots(kind)]
        parts = balance([*(cost for cost, *_ in anywhere), *roots], parts=group.size, loads=loads)
        for (_, kind, i, _), part in zip(anywhere, parts, strict=False):
            kind.owners[i] = (*kind.owners.get(i, ()), part)
        for root, part in zip(roots, parts[len(anywhere) :], strict=True):
            loads[part] -= root


def _add_unit(kind: Kind, layout: Layout | FlatLayout, loads: list[float], ranks: range) -> None:
    """Add a unit to the loads of its owner; of a team, only one rank takes the root of each matrix."""
    cost = unit_cost(kind.stack, hardware=kind.hardware)
    share = units_of(kind.stack) / layout.units
    matrices = len(ranks) if kind.team is None or not kind.in_team.cut else kind.stack.view.count // layout.units
    roots = share * cost.root_flops
    for rank in ranks:
        loads[rank] += (_work(kind) / layout.units - roots) / len(ranks)
    for _ in range(matrices):
        loads[min(ranks, key=loads.__getitem__)] += roots / matrices


def _roots(kind: Kind) -> list[float]:
    """Return the FLOPs of every root that the ranks of the group take for all, each on one of them."""
    if kind.strategy != "reduce":
        return []
    roots = []
    for layout, count in Counter(layout for _, layout in kind.cut).items():
        rows = kind.in_place(layout)
        if kind.group in rows.cut.values():
            matrices = count * kind.stack.view.count
            roots += [count * kind.cost_of(rows).root_flops / matrices] * matrices
    return [root for root in roots if root]


def _work(kind: Kind) -> float:
    """Return the FLOPs of the rule on a whole parameter, including all its units."""
    return units_of(kind.stack) * unit_flops(kind.stack, hardware=kind.hardware)
