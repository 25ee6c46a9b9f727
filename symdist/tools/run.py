"""What the record of a training run shows: measures, curves, throughput, and whether the run is still going on."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

from symdist.tools.run_format import Event, LogLine, PlanFacts, RoutingEntry, RunFacts, Summary

# A run counts as stopped if it has written no line for `_SILENT_SECONDS`, or for `_SILENT_LINES` times the usual time
# between lines if that is longer.
_SILENT_SECONDS = 300.0
_SILENT_LINES = 20
# The time allowed before the first line, for loading the model and the data and for compiling.
_STARTING_SECONDS = 1800.0
# A stop counts only if the log was not written later than this after it, that is, if the run was not resumed since.
_STOPPING_SECONDS = 10.0
# Tokens a second below which a rate says nothing about times.
_SLOWEST = 1e-6


@dataclass(frozen=True, kw_only=True)
class State:
    """Whether a run is still going on.

    Attributes:
        kind: "starting", "running", "finished" or "stopped".
        seconds: Seconds since the last line or event; None if the run is finished.
        reason: Why it was stopped, if known.
    """

    kind: Literal["starting", "running", "finished", "stopped"]
    seconds: float | None = None
    reason: str = ""

    @property
    def text(self) -> str:
        """The state in words."""
        if self.seconds is None:
            return self.kind
        if self.reason:
            return f"{self.kind} {in_time(self.seconds)} ago ({self.reason})"
        if self.kind == "starting":
            return f"starting, for {in_time(self.seconds)}"
        return f"{self.kind}, last line {in_time(self.seconds)} ago"


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A training run, as read from its folder. What the folder does not hold is None or empty.

    `symdist.tools.run_format` says which keys the files have, and their units.

    Attributes:
        name: The name to show.
        folder: The folder.
        lines: The lines of the log by kind, such as "train" or "validation", in the order written.
        written: When the log was last written, in seconds since the epoch.
        summary: The contents of summary.json, which is written at the end of a run.
        facts: The contents of run.json, which is written at the start.
        routing: The contents of routing.json: how each parameter is stepped.
        plan: The contents of plan.json: what a step sends.
        events: Events such as starts, stops and checkpoints.
        problems: What in the folder is not as it should be and is left out: a sentence for each file.
        events_written: When the last event was written, in seconds since the epoch.
    """

    name: str
    folder: Path
    lines: dict[str, list[LogLine]]
    written: float
    summary: Summary | None = None
    facts: RunFacts = field(default_factory=lambda: RunFacts())
    routing: list[RoutingEntry] | None = None
    plan: PlanFacts | None = None
    events: list[Event] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    events_written: float = 0.0

    def fact(self, key: str) -> Any:
        """Return a value of run.json, or else of the summary.

        Args:
            key: The key of the value.

        Returns:
            The value, or None if neither has it.
        """
        facts, summary = (cast(Mapping[str, Any], content or {}) for content in (self.facts, self.summary))
        value = facts.get(key)
        return summary.get(key) if value is None else value

    @property
    def steps(self) -> int | None:
        """The number of steps that the run is to make, or None if unknown."""
        return self.fact("steps")

    @cached_property
    def last_step(self) -> int:
        """The step of the last line; 0 if there is none yet."""
        return max((lines[-1]["step"] for lines in self.lines.values()), default=0)

    @cached_property
    def tokens_per_step(self) -> float | None:
        """Tokens per step over all ranks, or None if unknown."""
        tokens: float | None = self.facts.get("tokens_per_step")
        if tokens is None and self.summary and self.summary.get("steps") and self.summary.get("tokens"):
            tokens = self.summary["tokens"] / self.summary["steps"]
        return tokens

    @cached_property
    def measures(self) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
        """Steps and values of every numeric measure, by kind of line and name. Values may be infinite or NaN."""
        measures: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        for kind, lines in self.lines.items():
            for line in lines:
                step = line["step"]
                for measure, value in line.items():
                    if measure == "step" or not isinstance(value, int | float):
                        continue
                    steps, values = measures.setdefault((kind, measure), ([], []))
                    steps.append(step)
                    values.append(float(value))
        return measures

    def last(self, kind: str, measure: str) -> float | None:
        """Return the last value of a measure.

        Args:
            kind: The kind of line, such as "train".
            measure: The name of the measure.

        Returns:
            The value, or None if there is none.
        """
        values = self.measures.get((kind, measure), ([], []))[1]
        return values[-1] if values else None

    def figure(self, measure: str, kind: str = "train") -> float | None:
        """Return the final value of a measure: that of the summary if the run is finished, or else the last in the log.

        Args:
            measure: The name of the measure.
            kind: The kind of line; "train" by default.

        Returns:
            The value, or None if there is none.
        """
        key = measure if kind == "train" else f"{kind}_{measure}"
        value = cast(Mapping[str, Any], self.summary).get(key) if self.summary and self.finished else None
        return value if isinstance(value, int | float) else self.last(kind, measure)

    def curve(self, kind: str, measure: str) -> tuple[list[float], list[float]]:
        """Return the curve of a measure.

        Args:
            kind: The kind of line, such as "train".
            measure: The name of the measure.

        Returns:
            The tokens seen (or the steps, if the tokens per step are unknown), and the values.
        """
        steps, values = self.measures.get((kind, measure), ([], []))
        tokens = self.tokens_per_step or 1
        return [step * tokens for step in steps], values

    @cached_property
    def clock(self) -> tuple[list[int], list[float]]:
        """Steps, and seconds of training up to each of them by the logged throughput; empty if unknown."""
        steps, rates = self.measures.get(("train", "tokens_per_second"), ([], []))
        tokens = self.tokens_per_step
        if tokens is None:
            return [], []
        ticks, seconds = [0], [0.0]
        for step, rate in sorted(dict(zip(steps, rates, strict=True)).items()):
            if rate > _SLOWEST and math.isfinite(rate) and step > ticks[-1]:
                seconds.append(seconds[-1] + (step - ticks[-1]) * tokens / rate)
                ticks.append(step)
        return (ticks, seconds) if len(ticks) > 1 else ([], [])

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining steps take at the last throughput, or None if unknown."""
        rate = self.last("train", "tokens_per_second")
        if rate is None or not _SLOWEST < rate < math.inf or self.tokens_per_step is None or self.steps is None:
            return None
        return max(0, self.steps - self.last_step) * self.tokens_per_step / rate

    @cached_property
    def finished(self) -> bool:
        """Whether the run reached its end and has not been resumed for more steps since."""
        if self.summary is None:
            return False
        end = self.summary.get("steps", self.last_step)
        return self.last_step <= end and (self.facts.get("steps") or 0) <= end

    def state(self, now: float) -> State:
        """Return whether the run is finished, goes on, or was stopped, as far as its folder shows.

        Args:
            now: The current time, in seconds since the epoch.

        Returns:
            The state.
        """
        if self.finished:
            return State(kind="finished")
        silent = max(0.0, now - max(self.written, self.events_written))
        changes = [event for event in self.events if event.get("event") in ("start", "resume", "stop", "timeout")]
        if changes and changes[-1]["event"] in ("stop", "timeout"):
            ended = float(changes[-1].get("time") or 0)
            if self.written <= ended + _STOPPING_SECONDS:
                reason = "by a signal" if changes[-1]["event"] == "stop" else "timeout"
                return State(kind="stopped", seconds=max(0.0, now - ended), reason=reason)
        if not self.lines:
            return State(kind="starting" if silent < _STARTING_SECONDS else "stopped", seconds=silent)
        return State(kind="running" if silent <= self._patience else "stopped", seconds=silent)

    @cached_property
    def _patience(self) -> float:
        intervals = [after - before for before, after in pairwise(self.clock[1][-50:])]
        return max(_SILENT_SECONDS, _SILENT_LINES * statistics.median(intervals)) if intervals else _STARTING_SECONDS


def at_step(steps: list[int], values: list[float], step: float) -> float:
    """Interpolate a value linearly between steps, and extrapolate it beyond them.

    Args:
        steps: Two or more steps, ascending.
        values: The value at each step.
        step: The step to compute the value at.

    Returns:
        The value.
    """
    i = min(max(bisect_left(steps, step), 1), len(steps) - 1)
    slope = (values[i] - values[i - 1]) / (steps[i] - steps[i - 1])
    return values[i - 1] + (step - steps[i - 1]) * slope


def in_time(seconds: float) -> str:
    """Format a duration in its two largest units.

    Args:
        seconds: The duration.

    Returns:
        The text, such as "1 h 5 min".

    Example:
        >>> in_time(3900)
        '1 h 5 min'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600))
    unit, size, lesser, part = next(row for row in reversed(units) if whole >= row[1])
    remainder = whole % size // part
    return f"{whole // size} {unit}" + (f" {remainder} {lesser}" if remainder else "")
