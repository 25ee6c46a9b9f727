"""Waves overlap, and no rank waits for a later wave while it has something to start in an earlier one."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from symdist.exchange import Task, run
from symdist.exchange.collectives.gather_scatter import Gather, Scatter
from symdist.exchange.collectives.grid_redistribution import GridRedistribution
from symdist.layouts import Group, cut_along
from symdist.rules import Sum

LAYOUT = cut_along((4, 3), dim=0, sizes=(2, 2), ranks=(0, 1), index=0)


@dataclass
class Handle:
    events: list[str]
    name: str

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")


@dataclass
class Recording:
    """A transport that moves nothing and writes down when what starts and is waited for."""

    events: list[str] = field(default_factory=list)
    started: int = 0

    def _start(self, kind: str) -> Handle:
        self.started += 1
        self.events.append(f"start {kind} {self.started}")
        return Handle(self.events, f"{kind} {self.started}")

    def prepare(self, groups: Any) -> None: ...

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        return self._start("sum")

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        return self._start("scatter")

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        return self._start("gather")

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: Any, sent: Any, group: Group) -> Handle:
        return self._start("move")

    def broadcast(self, buffer: Tensor, *, group: Group) -> Handle:
        return self._start("broadcast")


def owned(events: list[str], name: str) -> Task:
    """What an owner's job does: pieces there, a computation, the update back."""

    def asking() -> Generator[Any, Any, None]:
        route = GridRedistribution(LAYOUT, count=1, owners=(0,))
        (whole,) = yield Gather(fields=[[torch.ones(2, 3)]], route=route, dtype=torch.float32, like=torch.empty(0))
        events.append(f"compute {name}")
        yield Scatter(fields=[whole], route=route, dtype=torch.float32, like=torch.empty(0))
        events.append(f"move {name}")

    return Task(asking(), home=LAYOUT.group)


def summing(events: list[str], name: str, times: int) -> Task:
    """A job in place that needs several sums."""

    def asking() -> Generator[Any, Any, None]:
        for _ in range(times):
            yield Sum(values=torch.ones(1, 3), across="rows")
        events.append(f"move {name}")

    assert LAYOUT.group is not None
    return Task(asking(), along={"rows": LAYOUT.group}, home=LAYOUT.group)


def test_a_wave_travels_while_another_is_computed() -> None:
    transport = Recording()
    events = transport.events
    run([[owned(events, name)] for name in "abc"], transport=transport, meanwhile=lambda: events.append("meanwhile"))
    assert events == [
        "start move 1",
        "meanwhile",
        "start move 2",
        "wait move 1",
        "compute a",
        "start move 3",
        "start move 4",
        "wait move 2",
        "compute b",
        "start move 5",
        "wait move 3",
        "move a",
        "wait move 4",
        "compute c",
        "start move 6",
        "wait move 5",
        "move b",
        "wait move 6",
        "move c",
    ]


def test_nothing_later_is_waited_for_before_all_earlier_is_started() -> None:
    transport = Recording()
    events = transport.events
    waves = [[summing(events, "a", 3), owned(events, "b")], [summing(events, "c", 2)], [owned(events, "d")]]
    run(waves, transport=transport)
    assert events[:4] == ["start sum 1", "start move 2", "start sum 3", "wait sum 1"]
    assert transport.started == (3 + 2) + 2 + 2
    # All sums of the first wave, and its way home, have started when the second wave's first is waited for.
    assert events.index("wait sum 3") > max(events.index(f"start {name}") for name in ("sum 5", "move 4", "sum 6"))
    assert [event for event in events if event.startswith("move")] == [f"move {name}" for name in "acbd"]


def test_without_waves_what_is_local_still_runs() -> None:
    ran: list[bool] = []
    assert run([], transport=Recording(), meanwhile=lambda: ran.append(True)) == {}
    assert ran == [True]
