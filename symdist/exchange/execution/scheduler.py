"""Advance all rules of a wave together, answer what they ask in few collectives, and let one wave follow another."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from symdist.exchange.collectives.all_to_all import answer_returns, answer_ships
from symdist.exchange.collectives.progress import ExchangeError, PendingCollective, StepProgress
from symdist.exchange.collectives.redistribution import Gather, Scatter
from symdist.exchange.collectives.reduce import answer_shared, answer_sums
from symdist.exchange.collectives.residual_sums import StageRequest, answer_stages
from symdist.exchange.collectives.transport import Handle, Transport
from symdist.layouts import Group
from symdist.rules import Orthonormal, Root, Sum

_ANSWERS: dict[type, Any] = {
    Gather: answer_ships,
    Sum: answer_sums,
    Root: answer_shared,
    Orthonormal: answer_shared,
    StageRequest: answer_stages,
    Scatter: answer_returns,
}

Timing: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Opened around work, by what kind it is: a strategy, or "exchange" for packing, sending and waiting."""


class Task:
    """A running generator and where its requests go.

    `along` maps "rows" and "columns", as far as the matrices are split so, to the ranks that hold the other rows or
    columns; a request across another axis answers itself. `home` are all ranks that hold the matrices: what an owner
    asks goes to them. `strategy` says where the matrices are computed, `names` of which parameters they are.
    """

    names: Sequence[str] = ()

    def __init__(
        self,
        asking: Generator[Any, Any, Any],
        *,
        along: Mapping[str, Group] | None = None,
        home: Group | None = None,
        strategy: str = "local",
    ):
        self.asking = asking
        self.along = dict(along or {})
        self.home = home
        self.strategy = strategy
        self.pending: Any = None
        self.group: Group | None = None
        """The ranks that the pending request goes to."""
        self._then: list[Group | None] = []

    def advance(self, answer: Any = None) -> None:
        """Run to the next request that other ranks must answer, left in `pending`, or to the end."""
        if self._then:
            # Summed over the ranks with other rows; now over those with other columns.
            self.pending, self.group = Sum(values=answer, across="all"), self._then.pop()
            return
        self.pending = None
        try:
            request = self.asking.send(answer)
            while not (groups := self._asked(request)):
                request = self.asking.send(request.answer_locally())
        except StopIteration:
            return
        assert len(groups) == 1 or isinstance(request, Sum), "what one rank works on is a sum over one axis"
        self.pending, self.group, self._then = request, groups[0], groups[1:]

    def _asked(self, request: Any) -> list[Group | None]:
        if isinstance(request, StageRequest):
            # To this rank's other tasks, also where there is no other rank.
            return [self.home]
        if isinstance(request, Gather | Scatter):
            assert self.home is not None
            return [self.home]
        return [group for axis, group in self.along.items() if request.across in (axis, "all")]


def run(
    waves: Sequence[Sequence[Task]],
    *,
    transport: Transport,
    meanwhile: Callable[[], None] = lambda: None,
    work: Mapping[Group, Sequence[float]] | None = None,
    progress: StepProgress | None = None,
    timing: Timing = nullcontext,
) -> dict[Group, list[float]]:
    """Run every task of every wave to its end, and `meanwhile` once, while the first collectives are under way.

    `work` has, by group, the FLOPs each rank already has; roots and QRs go to the least loaded. Returns the loads
    including them. `progress` is told what is under way. Raises ExchangeError where a collective fails.

    A wave's first collectives start before the wave before it is computed, and its updates travel home while the next
    one is: up to three waves hold buffers, but only one is computed.

    The order of collectives follows from the tasks and their shapes alone. All ranks of a wave's groups must pass the
    same wave, and all waves in an order that agrees with one order of all waves of all ranks, with those of one home
    next to each other. A rank waits for a wave only when it has started all there is to start of those before: so no
    ring of ranks, each waiting for another, can close, even where ranks take part in different waves.
    """
    loads = {group: list(of_ranks) for group, of_ranks in (work or {}).items()}
    progress = progress or StepProgress()
    progress.begin(len(waves))
    flights = [
        _WaveRun(wave, _WaveContext(transport=transport, loads=loads, progress=progress, timing=timing, wave=i + 1))
        for i, wave in enumerate(waves)
    ]
    if flights:
        flights[0].start()
    meanwhile()
    for i, flight in enumerate(flights):
        progress.wave = i + 1
        following = flights[i + 1] if i + 1 < len(flights) else None
        early = following is not None and _may_overlap(waves[i], waves[i + 1])
        if following is not None and early:
            following.start()
        flight.advance()
        if following is not None and not early:
            following.start()
        if i:
            flights[i - 1].finish()
    if flights:
        flights[-1].finish()
    progress.end()
    return loads


def _may_overlap(wave: Sequence[Task], following: Sequence[Task]) -> bool:
    """Whether a wave's first collectives may start before the wave before it is computed.

    Waves of one home follow each other on all its ranks, so they interleave alike there. Of two others, some ranks may
    have a third in between, and start all of the one before any of the other: where they share a process group, on
    which collectives must start in one order, so must everyone.
    """
    return len({task.home for task in (*wave, *following)}) == 1


@dataclass(frozen=True, kw_only=True)
class _WaveContext:
    """What a wave needs to travel, and which one it is."""

    transport: Transport
    loads: dict[Group, list[float]]
    progress: StepProgress
    timing: Timing
    wave: int

    def advance(self, task: Task, answer: Any = None) -> None:
        with self.timing(task.strategy):
            task.advance(answer)


class _WaveRun:
    """A wave on its way."""

    def __init__(self, tasks: Sequence[Task], way: _WaveContext):
        self._tasks = list(tasks)
        self._way = way
        self._up: list[_Bucket] = []
        self._landing: list[_Bucket] = []

    def start(self) -> None:
        """Start the first collectives."""
        for task in self._tasks:
            self._way.advance(task)
        self._start()

    def advance(self) -> None:
        """Answer until nothing is left to start: all that is still under way are updates going home."""
        while self._up:
            while any(bucket.handle is not None for bucket in self._up):
                for bucket in self._up:
                    bucket.step()
            for bucket in self._up:
                bucket.hand_out()
            self._start()

    def finish(self) -> None:
        """Wait for what is still under way."""
        for bucket in self._landing:
            while bucket.handle is not None:
                bucket.step()
            bucket.hand_out()
        self._landing = []

    def _start(self) -> None:
        waiting = [task for task in self._tasks if task.pending is not None]
        # Nothing follows what an owner sends home, so that need not hold up the others.
        last = [task for task in waiting if isinstance(task.pending, Scatter)]
        asking = [task for task in waiting if not isinstance(task.pending, Scatter)]
        # Roots and QRs wait for those still summing, so that all of them share one reduce-scatter.
        sooner = [task for task in asking if not isinstance(task.pending, Root | Orthonormal | StageRequest)]
        # A stage's sum waits for all that have a part in it.
        sooner = sooner or [task for task in asking if not isinstance(task.pending, StageRequest)]
        self._landing += [_Bucket(tasks, self._way) for tasks in _buckets(last)]
        self._up = [_Bucket(tasks, self._way) for tasks in _buckets(sooner or asking)]
        under_way = {id(task) for task in last}
        self._tasks = [task for task in waiting if id(task) not in under_way]


def _buckets(tasks: list[Task]) -> list[list[Task]]:
    buckets: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        key: tuple[Any, ...] = (list(_ANSWERS).index(type(task.pending)), task.group, *_kind(task.pending))
        if isinstance(task.pending, StageRequest):
            key = (*key, task.pending.asked.values.shape[1:], task.pending.asked.orthonormal)
        buckets.setdefault(key, []).append(task)
    return list(buckets.values())


def _kind(request: Any) -> tuple[torch.dtype, torch.device]:
    match request:
        case Gather() | Scatter():
            return request.dtype, request.like.device
        case Root():
            return request.gram.dtype, request.gram.device
        case StageRequest():
            return request.asked.values.dtype, request.asked.values.device
    return request.values.dtype, request.values.device


class _Bucket:
    """Requests of one kind, group and dtype on their way: a generator that yields the handle it waits for."""

    def __init__(self, tasks: list[Task], way: _WaveContext):
        self._tasks = tasks
        self._way = way
        self._answers: list[Any] = []
        self._names = [name for task in tasks for name in task.names]
        self._mark: PendingCollective | None = None
        requests = [task.pending for task in tasks]
        self._kind, self._device = type(requests[0]).__name__.lower(), _kind(requests[0])[1]
        for task in tasks:
            # What was sent is the buffer's now; the request need not keep it.
            task.pending = None
        group = tasks[0].group
        self._group = group
        more = {}
        if group is not None and isinstance(requests[0], Root | Orthonormal | StageRequest):
            more["loads"] = way.loads.setdefault(group, [0.0] * group.size)
        self._answering = _ANSWERS[type(requests[0])](requests, group=group, transport=way.transport, **more)
        self.handle: Handle | None = None
        with way.timing("exchange"):
            self._next()

    def step(self) -> None:
        """Wait for the collective under way and start the next, if there is one."""
        if self.handle is not None:
            with self._way.timing("exchange"):
                try:
                    self.handle.wait()
                except RuntimeError as error:
                    raise ExchangeError(f"{self._mark.text if self._mark else ''} failed: {error}") from error
                if self._mark is not None:
                    self._way.progress.waited(self._mark, self._device)
                self._next()

    def hand_out(self) -> None:
        """Let every task go on with its answer."""
        answers, self._answers = self._answers, []
        for task in self._tasks:
            self._way.advance(task, answers.pop(0))

    def _next(self) -> None:
        try:
            self.handle = next(self._answering)
        except StopIteration as finished:
            self.handle = self._mark = None
            self._answers = finished.value
        else:
            assert self._group is not None
            self._mark = self._way.progress.started(self._way.wave, self._kind, self._group, self._names, self.handle)
