"""Runs the tasks of a step wave by wave.

Requests of one wave share collectives, and the communication of neighbouring waves overlaps with computation.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from symdist.exchange.collectives.all_to_all import answer_gathers, answer_scatters
from symdist.exchange.collectives.gather_scatter import Gather, Scatter
from symdist.exchange.collectives.progress import ExchangeError, PendingCollective, StepProgress
from symdist.exchange.collectives.reduce import answer_shared, answer_sums
from symdist.exchange.collectives.residual_sums import StageRequest, answer_stages
from symdist.exchange.collectives.transport import Handle, Transport
from symdist.layouts import Group
from symdist.rules import Factored, Orthonormal, Root, Sum
from symdist.rules.registry import MatrixAxis

_ANSWERS: dict[type, Any] = {
    Gather: answer_gathers,
    Sum: answer_sums,
    Root: answer_shared,
    Orthonormal: answer_shared,
    StageRequest: answer_stages,
    Scatter: answer_scatters,
}

Timing: TypeAlias = Callable[[str], AbstractContextManager[Any]]
"""Makes the context manager that is opened around a kind of work: a strategy, or "exchange" for packing and waiting."""


class Task:
    """A running job: its generator, the request it waits for, and the ranks that answer this request.

    Args:
        asking: The generator; it yields requests and is sent their answers.
        along: For each axis ("rows" or "columns") along which the matrices are split, the ranks that hold the other
            parts. Requests along other axes are answered on this rank. None (default) if the matrices are not split.
        home: All ranks that hold the matrices; they answer Gather, Scatter and residual-stage sums. None by default.
        strategy: Where the matrices are computed; "local" by default.

    Attributes:
        names: The names of the job's parameters, for error messages.
        pending: The request that other ranks must answer; None after the generator has ended.
        group: The ranks that answer the pending request.
    """

    names: Sequence[str] = ()

    def __init__(
        self,
        asking: Generator[Any, Any, Any],
        *,
        along: Mapping[MatrixAxis, Group] | None = None,
        home: Group | None = None,
        strategy: str = "local",
    ):
        self.asking = asking
        self.along = dict(along or {})
        self.home = home
        self.strategy = strategy
        self.pending: Any = None
        self.group: Group | None = None
        self._then: list[Group | None] = []

    def advance(self, answer: Any = None) -> None:
        """Run to the next request that other ranks must answer, or to the end of the job.

        The request is left in `pending`, and its ranks in `group`.

        Args:
            answer: The answer to the pending request; None to start.
        """
        if self._then:
            # A sum across both axes: it was taken over one group, and is now taken over the other.
            self.pending, self.group = Sum(values=answer, across="all"), self._then.pop()
            return
        self.pending = None
        try:
            request = self.asking.send(answer)
            while not (groups := self._answering_groups(request)):
                request = self.asking.send(request.answer_locally())
        except StopIteration:
            return
        assert len(groups) == 1 or isinstance(request, Sum), "only a Sum may be answered by more than one group"
        self.pending, self.group, self._then = request, groups[0], groups[1:]

    def _answering_groups(self, request: Any) -> list[Group | None]:
        """Return the groups that must answer a request, one after another; empty if this rank can answer it alone."""
        if isinstance(request, StageRequest):
            # Even without other ranks, since other tasks of this rank contribute to the sum.
            return [self.home]
        if isinstance(request, Gather | Scatter):
            assert self.home is not None
            return [self.home]
        if isinstance(request, Factored):
            return []
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
    """Run all tasks of all waves to their end.

    The first collectives of a wave start before the previous wave is computed, and its updates are sent back while the
    next wave is computed. Thus up to three waves hold buffers, but only one is computed at a time.

    All ranks of a wave's groups must pass the same wave. Ranks may take part in different waves, but each rank must
    pass its waves in an order that agrees with one order of all waves, in which waves of the same home are adjacent.
    The order of collectives follows from the tasks and their shapes alone, and a rank waits for a wave only after it
    has started all collectives of earlier waves, so ranks cannot deadlock.

    Args:
        waves: The tasks of each wave.
        transport: Runs the collectives.
        meanwhile: Called once, while the first collectives are under way; does nothing by default.
        work: By group, the FLOPs that each rank already has; roots and QRs go to the least loaded ranks. None by
            default.
        progress: Records what is under way, for reports on a hung step; None (default) for a new record.
        timing: Makes the context manager that is opened around each piece of work; does nothing by default.

    Returns:
        By group, the FLOPs of each rank: those of `work`, and those of roots and QRs.

    Raises:
        ExchangeError: If a collective fails.

    Example:
        >>> tasks = [job.task(read_inputs, write_outputs) for job in wave]
        >>> run([tasks], transport=TorchTransport())
    """
    loads = {group: list(of_ranks) for group, of_ranks in (work or {}).items()}
    progress = progress or StepProgress()
    progress.begin(len(waves))
    wave_runs = [
        _WaveRun(wave, _WaveContext(transport=transport, loads=loads, progress=progress, timing=timing, wave=i + 1))
        for i, wave in enumerate(waves)
    ]
    if wave_runs:
        wave_runs[0].start()
    meanwhile()
    for i, wave_run in enumerate(wave_runs):
        progress.wave = i + 1
        following = wave_runs[i + 1] if i + 1 < len(wave_runs) else None
        early = following is not None and _may_overlap(waves[i], waves[i + 1])
        if following is not None and early:
            following.start()
        wave_run.advance()
        if following is not None and not early:
            following.start()
        if i:
            wave_runs[i - 1].finish()
    if wave_runs:
        wave_runs[-1].finish()
    progress.end()
    return loads


def _may_overlap(wave: Sequence[Task], following: Sequence[Task]) -> bool:
    """Return whether a wave's first collectives may start before the previous wave is computed.

    They may if both waves have one and the same home. Such waves are adjacent on all ranks of the home, so all ranks
    interleave them in the same way. Between two waves of different homes, however, some ranks may have a third wave,
    and these ranks finish the first wave before they start the second. Since collectives on a shared process group must
    start in the same order on every rank, all ranks must then do so.
    """
    return len({task.home for task in (*wave, *following)}) == 1


@dataclass(frozen=True, kw_only=True)
class _WaveContext:
    """What all buckets of a wave share; `wave` is the number of the wave, from 1."""

    transport: Transport
    loads: dict[Group, list[float]]
    progress: StepProgress
    timing: Timing
    wave: int

    def advance(self, task: Task, answer: Any = None) -> None:
        """Run a task to its next request, timed under its strategy."""
        with self.timing(task.strategy):
            task.advance(answer)


class _WaveRun:
    """A wave under way: its tasks, the buckets being answered, and the buckets of updates being sent back."""

    def __init__(self, tasks: Sequence[Task], context: _WaveContext):
        self._tasks = list(tasks)
        self._context = context
        self._in_progress: list[_Bucket] = []
        self._returning: list[_Bucket] = []

    def start(self) -> None:
        """Run all tasks to their first requests, and start the collectives that answer these."""
        for task in self._tasks:
            self._context.advance(task)
        self._start()

    def advance(self) -> None:
        """Answer requests until nothing but updates being sent back is under way."""
        while self._in_progress:
            while any(bucket.handle is not None for bucket in self._in_progress):
                for bucket in self._in_progress:
                    bucket.step()
            for bucket in self._in_progress:
                bucket.hand_out()
            self._start()

    def finish(self) -> None:
        """Wait for the updates that are being sent back, and hand them to the tasks."""
        for bucket in self._returning:
            while bucket.handle is not None:
                bucket.step()
            bucket.hand_out()
        self._returning = []

    def _start(self) -> None:
        """Group the pending requests into buckets, and start their first collectives."""
        waiting = [task for task in self._tasks if task.pending is not None]
        # Scatter is a task's last request, so no task needs its answer yet and the wave does not wait for it here.
        scatters = [task for task in waiting if isinstance(task.pending, Scatter)]
        others = [task for task in waiting if not isinstance(task.pending, Scatter)]
        # Roots and QRs are delayed while other tasks still have requests of other kinds, so that all roots and QRs
        # share one reduce-scatter.
        sooner = [task for task in others if not isinstance(task.pending, Root | Orthonormal | StageRequest)]
        # A residual-stage sum is delayed until all tasks that contribute to it have reached it.
        sooner = sooner or [task for task in others if not isinstance(task.pending, StageRequest)]
        self._returning += [_Bucket(tasks, self._context) for tasks in _buckets(scatters)]
        self._in_progress = [_Bucket(tasks, self._context) for tasks in _buckets(sooner or others)]
        under_way = {id(task) for task in scatters}
        self._tasks = [task for task in waiting if id(task) not in under_way]


def _buckets(tasks: list[Task]) -> list[list[Task]]:
    """Group tasks whose pending requests can be answered together."""
    buckets: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        key: tuple[Any, ...] = (list(_ANSWERS).index(type(task.pending)), task.group, *_kind(task.pending))
        if isinstance(task.pending, StageRequest):
            key = (*key, task.pending.stage_sum.values.shape[1:], task.pending.stage_sum.orthonormal)
        buckets.setdefault(key, []).append(task)
    return list(buckets.values())


def _kind(request: Any) -> tuple[torch.dtype, torch.device]:
    """Return the dtype and device of a request's data."""
    match request:
        case Gather() | Scatter():
            return request.dtype, request.like.device
        case Root():
            # A sum of Grams in half precision would lose their last digits.
            return torch.promote_types(request.gram.dtype, torch.float32), request.gram.device
        case StageRequest():
            return request.stage_sum.values.dtype, request.stage_sum.values.device
    return request.values.dtype, request.values.device


class _Bucket:
    """Requests of one kind, group and dtype that are answered together; `handle` is the collective under way."""

    def __init__(self, tasks: list[Task], context: _WaveContext):
        self._tasks = tasks
        self._context = context
        self._answers: list[Any] = []
        self._names = [name for task in tasks for name in task.names]
        self._collective: PendingCollective | None = None
        requests = [task.pending for task in tasks]
        self._kind, self._device = type(requests[0]).__name__.lower(), _kind(requests[0])[1]
        for task in tasks:
            # Drop the request now, so that its tensors are freed once they are copied to the send buffer.
            task.pending = None
        group = tasks[0].group
        self._group = group
        keywords = {}
        if group is not None and isinstance(requests[0], Root | Orthonormal | StageRequest):
            keywords["loads"] = context.loads.setdefault(group, [0.0] * group.size)
        self._answering = _ANSWERS[type(requests[0])](requests, group=group, transport=context.transport, **keywords)
        self.handle: Handle | None = None
        with context.timing("exchange"):
            self._next()

    def step(self) -> None:
        """Wait for the collective under way, and start the next one if there is one."""
        if self.handle is not None:
            with self._context.timing("exchange"):
                try:
                    self.handle.wait()
                except RuntimeError as error:
                    raise ExchangeError(
                        f"{self._collective.text if self._collective else ''} failed: {error}"
                    ) from error
                if self._collective is not None:
                    self._context.progress.waited(self._collective, self._device)
                self._next()

    def hand_out(self) -> None:
        """Advance every task with its answer."""
        answers, self._answers = self._answers, []
        for task in self._tasks:
            self._context.advance(task, answers.pop(0))

    def _next(self) -> None:
        """Start the next collective, or store the answers if there is none left."""
        try:
            self.handle = next(self._answering)
        except StopIteration as finished:
            self.handle = self._collective = None
            self._answers = finished.value
        else:
            assert self._group is not None
            self._collective = self._context.progress.started(
                self._context.wave, self._kind, self._group, self._names, self.handle
            )
