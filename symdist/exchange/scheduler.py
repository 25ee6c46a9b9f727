"""Advance all rules together and answer what they ask in as few collectives as rounds allow."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from symdist.exchange.reducing import answer_roots, answer_sums
from symdist.exchange.requests import Return, Ship
from symdist.exchange.shipping import answer_returns, answer_ships
from symdist.exchange.transport import Handle, Transport
from symdist.layouts import Group
from symdist.rules import Root, Sum

_ANSWERS: dict[type, Any] = {
    Ship: answer_ships,
    Sum: answer_sums,
    Root: answer_roots,
    Return: answer_returns,
}


class Task:
    """A running generator and where its requests go.

    `axis` says along what the ranks of `group` split the matrices ("rows", "columns"), or is None where each rank
    has whole ones. A request across another axis answers itself.
    """

    def __init__(self, asking: Generator[Any, Any, Any], *, axis: str | None = None, group: Group | None = None):
        self.asking = asking
        self.axis = axis
        self.group = group
        self.pending: Any = None

    def advance(self, answer: Any = None) -> None:
        """Run to the next request that other ranks must answer, left in `pending`, or to the end."""
        self.pending = None
        try:
            request = self.asking.send(answer)
            while not self._remote(request):
                request = self.asking.send(request.alone())
        except StopIteration:
            return
        self.pending = request

    def _remote(self, request: Any) -> bool:
        if isinstance(request, Ship | Return):
            return True
        return self.axis is not None and request.across in (self.axis, "all")


def run(tasks: Sequence[Task], *, transport: Transport, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Run every task to its end, and `meanwhile` once, while the first collectives are under way.

    The order of collectives follows from the tasks and their shapes alone: every rank of a group must pass the same
    tasks in the same order. Tasks without a group run at that moment too.
    """
    alone = [task for task in tasks if task.group is None]
    waiting = [task for task in tasks if task.group is not None]
    for task in waiting:
        task.advance()
    waiting = [task for task in waiting if task.pending is not None]
    started = False
    while waiting or not started:
        asked = _together(waiting)
        under_way = [_Bucket(bucket, transport) for bucket in _buckets(asked)]
        if not started:
            started = True
            meanwhile()
            for task in alone:
                task.advance()
        while any(bucket.handle is not None for bucket in under_way):
            for bucket in under_way:
                bucket.step()
        for bucket in under_way:
            for task, answer in zip(bucket.tasks, bucket.answers, strict=True):
                task.advance(answer)
        waiting = [task for task in waiting if task.pending is not None]


def _together(waiting: list[Task]) -> list[Task]:
    """Roots wait for those still summing, so that all of them share one reduce-scatter."""
    sooner = [task for task in waiting if not isinstance(task.pending, Root)]
    return sooner or waiting


def _buckets(tasks: list[Task]) -> list[list[Task]]:
    buckets: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        buckets.setdefault((list(_ANSWERS).index(type(task.pending)), task.group, *_kind(task.pending)), []).append(
            task
        )
    return list(buckets.values())


def _kind(request: Any) -> tuple[Any, ...]:
    match request:
        case Ship():
            tensor = request.pieces[0]
        case Return():
            tensor = request.like
        case Root():
            tensor = request.gram
        case _:
            tensor = request.values
    return tensor.dtype, tensor.device


class _Bucket:
    """Requests of one kind, group and dtype on their way: a generator that yields the handle it waits for."""

    def __init__(self, tasks: list[Task], transport: Transport):
        self.tasks = tasks
        self.answers: list[Any] = []
        requests = [task.pending for task in tasks]
        self._answering = _ANSWERS[type(requests[0])](requests, group=tasks[0].group, transport=transport)
        self.handle: Handle | None = None
        self._next()

    def step(self) -> None:
        """Wait for the collective under way and start the next, if there is one."""
        if self.handle is not None:
            self.handle.wait()
            self._next()

    def _next(self) -> None:
        try:
            self.handle = next(self._answering)
        except StopIteration as finished:
            self.handle = None
            self.answers = finished.value
