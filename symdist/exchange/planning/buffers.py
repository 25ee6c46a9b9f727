"""The buffers that a step holds on a rank: which there are, when, why, and how large."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from symdist.exchange.execution.stack import Stack, Strategy
from symdist.exchange.planning.costs import shard_memory, unit_shape
from symdist.exchange.planning.kinds import Kind
from symdist.layouts import FlatLayout, Layout

Phase: TypeAlias = Literal["out", "joined", "updated", "rule", "back", "home"]
PHASES: tuple[Phase, ...] = ("out", "joined", "updated", "rule", "back", "home")
"""When a buffer is held: while pieces are sent out, while matrices are joined from them, while the jobs of a wave run,
only while the rule of the job itself runs, while updates are sent back, and while they become pieces again."""

Size: TypeAlias = Literal["piece", "whole", "copies", "rule", "waiting", "summed"]


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A buffer of a job.

    Attributes:
        name: Its name.
        why: Why it is there.
        phases: When it is there.
        of: What it is as large as: this rank's "piece" of each matrix; the "whole" matrices or rows that this rank
            updates; these for all "copies" of the weight; what the "rule" holds at most besides what it is given, or
            when it is first "waiting" for other ranks; or what is "summed" over ranks.
        times: How many times as large; 1 by default.
        travels: Whether it has the dtype in which matrices are sent; False (default) for that of the state.
    """

    name: str
    why: str
    phases: tuple[Phase, ...]
    of: Size
    times: float = 1.0
    travels: bool = False


def _send(name: str, phase: Phase, of: Size) -> Buffer:
    why = "a copy to send, so that what it is a copy of can be freed"
    # Sums have the dtype of the state.
    return Buffer(name=name, why=why, phases=(phase,), of=of, travels=of != "summed")


MOVED = (
    _send("send", "out", "piece"),
    Buffer(name="receive", why="this rank's matrices in parts", phases=("out", "joined"), of="whole", travels=True),
    Buffer(name="matrices", why="what the rule is given", phases=("joined", "updated"), of="whole"),
    Buffer(name="rule", why="the update, and what the rule makes on the way to it", phases=("rule",), of="rule"),
    _send("send back", "back", "copies"),
    Buffer(name="receive back", why="this rank's updates in parts", phases=("back", "home"), of="piece", travels=True),
    Buffer(name="updates", why="what is subtracted from the weights", phases=("home",), of="piece"),
)
"""The buffers of matrices that are put together from pieces."""

ROWS = (
    Buffer(name="directions", why="whole rows in them are not sent", phases=("out", "joined"), of="piece"),
    Buffer(name="rows", why="what the rule is given", phases=("joined", "updated"), of="whole"),
    Buffer(name="rule", why="the update, and what the rule makes on the way to it", phases=("rule",), of="rule"),
    Buffer(name="updates", why="whole rows in them are not sent", phases=("back", "home"), of="whole"),
)
"""The buffers of matrices in ranges of elements, of which only rows that are cut are put together."""

_SUMS = (
    _send("sums", "out", "summed"),
    Buffer(name="answers", why="sums arrived, by matrix, and unpacked", phases=("updated",), of="summed", times=4),
)
IN_PLACE = (
    Buffer(name="stack", why="the pieces of all parameters as one batch", phases=("out", "updated"), of="piece"),
    Buffer(name="waiting rule", why="what the rule needs once it gets sums", phases=("out",), of="waiting"),
    Buffer(name="rule", why="the update, and what the rule makes on the way to it", phases=("rule",), of="rule"),
    *_SUMS,
)
"""The buffers of matrices that are updated where they are stored."""


Held: TypeAlias = Mapping[str, float]
"""The bytes that a rank holds in each of `PHASES`."""


def held_for(
    kind: Kind, layout: Layout | FlatLayout, strategy: Strategy, stack: Stack, owners: Sequence[int]
) -> dict[int, Held]:
    """Return what ranks hold for one parameter.

    Args:
        kind: What the parameter has in common with others.
        layout: How it is stored.
        strategy: Where its rule runs.
        stack: Its stack, with the layout in which the rule runs.
        owners: The owners of its units; empty if it has none.

    Returns:
        The bytes, under the keys of `layout.loads`.
    """
    whole = strategy == "owner" or (strategy == "local" and not layout.completed)
    in_place = strategy != "owner" and (strategy == "local" or layout.completed)
    rows = stack if whole else kind.in_place(layout)
    shape = unit_shape(stack) if whole else rows.layout.largest_shape
    memory = shard_memory(rows, shape, {} if whole else rows.parts)
    summed = 0.0 if whole else sum(kind.cost_of(rows).summed.values())
    elements = math.prod(shape)
    updated: Mapping[int, float] = layout.loads_of(owners) if strategy == "owner" else layout.loads
    if kind.team is not None and strategy == "owner" and not layout.completed:
        ranks = kind.team_size
        updated = {owner * ranks + i: share / ranks for owner, share in updated.items() for i in range(ranks)}
    numbers: dict[int, dict[Size, float]] = {}
    for key in {**layout.loads, **updated}:
        held, size = layout.loads.get(key, 0), updated.get(key, 0.0)
        numbers[key] = {
            "piece": kind.fields * held,
            "whole": kind.fields * size,
            "copies": (kind.fields + stack.masked) * size * layout.num_replicas,
            "rule": memory.peak / elements * size,
            "waiting": memory.waiting / elements * size,
            "summed": summed if held else 0.0,
        }
    table = MOVED if strategy == "owner" else IN_PLACE if in_place else (*ROWS, *_SUMS)
    return {key: _bytes(sizes, table, kind, stack) for key, sizes in numbers.items()}


def _bytes(sizes: Mapping[Size, float], table: Sequence[Buffer], kind: Kind, stack: Stack) -> Held:
    held: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    for buffer in table:
        dtype = kind.dtype if buffer.travels else stack.dtype
        for phase in buffer.phases:
            held[phase] += buffer.times * sizes[buffer.of] * dtype.itemsize
    return held


def share_of_budget(held: Held) -> float:
    """Return how much of the budget of a wave is taken.

    While one wave is updated, the next one is sent out and the previous one is sent back. The wave itself gets half of
    the bound for all, which is the budget; the other two a quarter each.

    Args:
        held: What is held for some parameters.

    Returns:
        The bytes; those of several parameters add up.
    """
    return max(held["updated"] + held["rule"], held["joined"], 2 * held["out"], 2 * held["back"], 2 * held["home"])


def total(parts: Iterable[Held]) -> Held:
    """Return what is held for several parameters at once."""
    parts = list(parts)
    return {phase: sum(held.get(phase, 0.0) for held in parts) for phase in PHASES}


def peak_of(waves: Sequence[Sequence[Held]], local: Sequence[Held]) -> float:
    """Return an estimate of the most that the busiest rank holds at a time in a step.

    Args:
        waves: What is held for each job, by wave.
        local: What is held for each job that is part of no wave; they run one after another, during the first wave.

    Returns:
        The bytes.
    """
    added = [total(wave) for wave in waves]
    rules = [max(held["rule"] for held in wave) for wave in waves]
    nothing = total([])
    peaks = [(added[0]["out"] if added else 0.0) + max((held["updated"] + held["rule"] for held in local), default=0.0)]
    for before, wave, after, rule in zip([nothing, *added], added, [*added[1:], nothing], rules, strict=False):
        peaks.append(after["out"] + before["back"] + max(wave["joined"], wave["updated"] + rule, wave["back"]))
        peaks.append(after["out"] + before["home"] + wave["back"])
    return max(peaks)


def coupled_bytes(stack: Stack) -> float:
    """Return about how many bytes a parameter of a residual stage holds on a rank while it is under way.

    They are its share of the weight, and of what its stage sends out and gets back.

    Args:
        stack: The parameter's stack.

    Returns:
        The bytes.
    """
    ranks = 1 if stack.layout.group is None else stack.layout.group.size
    share = 8.0 * (1 + len(stack.state_names)) * stack.numel / ranks
    return (share + 4.0 * stack.rows * min(stack.rows, stack.columns)) * stack.dtype.itemsize
