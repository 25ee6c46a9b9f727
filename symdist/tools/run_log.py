"""Reads the folders of training runs, which the first rank of a job writes, once or while they are being written."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

LOG = "log.jsonl"
SUMMARY = "summary.json"
RUN = "run.json"
ROUTING = "routing.json"
PLAN = "plan.json"
EVENTS = "events.jsonl"

# A run counts as stopped if it has written no line for `_SILENT_SECONDS`, or for `_SILENT_LINES` times the usual time
# between lines if that is longer.
_SILENT_SECONDS = 300.0
_SILENT_LINES = 20
# The time allowed before the first line, for loading the model and the data and for compiling.
_STARTING_SECONDS = 1800.0
# A file that cannot be read counts as still being written for this long after its last change.
_WRITING_SECONDS = 10.0
_REMEMBERED = 512


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
        torn_events: The number of incomplete events, left by a killed process.
        noted: When the last event was written, in seconds since the epoch.
    """

    name: str
    folder: Path
    lines: dict[str, list[dict[str, Any]]]
    written: float
    summary: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    routing: list[dict[str, Any]] | None = None
    plan: dict[str, Any] | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    torn_events: int = 0
    noted: float = 0.0

    def fact(self, key: str) -> Any:
        """Return a value of run.json, or else of the summary.

        Args:
            key: The key of the value.

        Returns:
            The value, or None if neither has it.
        """
        found = self.facts.get(key)
        return (self.summary or {}).get(key) if found is None else found

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
        given = self.facts.get("tokens_per_step")
        if given is None and self.summary and self.summary.get("steps") and self.summary.get("tokens"):
            given = self.summary["tokens"] / self.summary["steps"]
        return given

    @cached_property
    def measures(self) -> dict[tuple[str, str], tuple[list[int], list[float]]]:
        """Steps and values of every numeric measure, by kind of line and name. Values may be infinite or NaN."""
        found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        for kind, lines in self.lines.items():
            for line in lines:
                step = line["step"]
                for measure, value in line.items():
                    if measure == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                        continue
                    steps, values = found.setdefault((kind, measure), ([], []))
                    steps.append(step)
                    values.append(float(value))
        return found

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
        found = self.summary.get(key) if self.summary and self.finished else None
        return self.last(kind, measure) if found is None else found

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
            if rate > 0 and math.isfinite(rate) and step > ticks[-1]:
                seconds.append(seconds[-1] + (step - ticks[-1]) * tokens / rate)
                ticks.append(step)
        return (ticks, seconds) if len(ticks) > 1 else ([], [])

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the remaining steps take at the last throughput, or None if unknown."""
        rate = self.last("train", "tokens_per_second")
        if not rate or not math.isfinite(rate) or self.tokens_per_step is None or self.steps is None:
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
        silent = max(0.0, now - max(self.written, self.noted))
        turns = [event for event in self.events if event.get("event") in ("start", "resume", "stop", "timeout")]
        if turns and turns[-1]["event"] in ("stop", "timeout"):
            ended = float(turns[-1].get("time") or 0)
            if self.written <= ended + _WRITING_SECONDS:
                reason = "told to" if turns[-1]["event"] == "stop" else "timeout"
                return State(kind="stopped", seconds=max(0.0, now - ended), reason=reason)
        if not self.lines:
            return State(kind="starting" if silent < _STARTING_SECONDS else "stopped", seconds=silent)
        return State(kind="running" if silent <= self._patience else "stopped", seconds=silent)

    @cached_property
    def _patience(self) -> float:
        waits = [after - before for before, after in pairwise(self.clock[1][-50:])]
        return max(_SILENT_SECONDS, _SILENT_LINES * statistics.median(waits)) if waits else _STARTING_SECONDS


class Reader:
    """Reads the folder of a run repeatedly; each `read` takes in only what was added since the one before.

    A log that was replaced is read again as a whole.

    Args:
        folder: The folder.
        name: The name to show; the name of the folder by default.
    """

    def __init__(self, folder: Path, *, name: str | None = None):
        self.folder = folder
        self.name = name or folder.resolve().name
        self._log = _Tail(folder / LOG)
        self._noted = _Tail(folder / EVENTS, strict=False)
        self._whole: dict[str, tuple[Any, Any]] = {}
        self._run: Run | None = None

    def read(self) -> Run:
        """Return the run as it is now.

        Returns:
            The run; the same object as before if nothing changed.

        Raises:
            ValueError: If the folder holds no log, or a file in it cannot be read.
        """
        if not (self.folder / LOG).exists() and self._run is None:
            raise ValueError(f"{self.folder} has no {LOG}: it is not the folder of a run, or of one that has not begun")
        changed = [tail.read() for tail in (self._log, self._noted)]
        for name in (SUMMARY, RUN, ROUTING, PLAN):
            changed.append(self._changed(name))
        if self._run is not None and not any(changed):
            return self._run
        lines: dict[str, list[dict[str, Any]]] = {}
        for line in self._log.lines:
            lines.setdefault(line["kind"], []).append(line)
        whole = {name: content for name, (_, content) in self._whole.items()}
        self._run = Run(
            name=self.name,
            folder=self.folder,
            lines=lines,
            written=self._log.written,
            summary=whole[SUMMARY],
            facts=whole[RUN] or {},
            routing=whole[ROUTING],
            plan=whole[PLAN],
            events=list(self._noted.lines),
            torn_events=self._noted.torn,
            noted=self._noted.written,
        )
        return self._run

    def _changed(self, name: str) -> bool:
        before = self._whole.get(name, (None, None))
        path = self.folder / name
        try:
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if stamp == before[0]:
                return False
            content = json.loads(path.read_text())
            if not isinstance(content, list if name == ROUTING else dict):
                raise ValueError("not of the form expected")
        except FileNotFoundError:
            stamp, content = None, None
        except ValueError as error:
            if time.time() - stat.st_mtime > _WRITING_SECONDS:
                raise ValueError(f"{path} cannot be read: {error}") from None
            # Keep the old content, and read the file again next time.
            stamp, content = None, before[1]
        self._whole[name] = (stamp, content)
        return content != before[1]


def read_run(folder: Path, *, name: str | None = None) -> Run:
    """Read a run from its folder.

    Args:
        folder: The folder.
        name: The name to show; the name of the folder by default.

    Returns:
        The run.

    Raises:
        ValueError: If the folder holds no log, or a file in it cannot be read. The message names the file and line.
    """
    return Reader(folder, name=name).read()


def readers(folders: Iterable[Path]) -> list[Reader]:
    """Return a reader for each folder, with names that distinguish them.

    Args:
        folders: The folders of the runs.

    Returns:
        The readers, in the same order.

    Raises:
        ValueError: If no folder is given.
    """
    folders = list(folders)
    if not folders:
        raise ValueError("no run given; name the folders of one or more runs")
    names: list[str] = []
    parts = [folder.resolve().parts for folder in folders]
    for i, own in enumerate(parts):
        others = {other for other in parts if other != own}
        depth = 1
        while depth < len(own) and any(other[-depth:] == own[-depth:] for other in others):
            depth += 1
        again = parts[:i].count(own)
        names.append("/".join(own[-depth:]) + (f" ({again + 1})" if again else ""))
    return [Reader(folder, name=name) for folder, name in zip(folders, names, strict=True)]


def at_step(steps: list[int], values: list[float], step: float) -> float:
    """Interpolate a value linearly between steps, and extrapolate it beyond them.

    Args:
        steps: Two or more steps, ascending.
        values: The value at each step.
        step: The step to find the value at.

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
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    units = (("min", 60, "s", 1), ("h", 3600, "min", 60), ("d", 86400, "h", 3600))
    unit, size, lesser, part = next(row for row in reversed(units) if whole >= row[1])
    rest = whole % size // part
    return f"{whole // size} {unit}" + (f" {rest} {lesser}" if rest else "")


class _Tail:
    """Reads the lines of a JSON-lines file that may grow, be shortened and written anew, or not exist yet.

    With `strict`, every line must be one of a log, and another is an error. Otherwise, bad lines are counted in `torn`.
    """

    def __init__(self, path: Path, *, strict: bool = True):
        self.path, self.strict = path, strict
        self.written = 0.0
        self._forget()

    def _forget(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.torn = 0
        self._number = self._offset = self._inode = 0
        self._end = b""

    def read(self) -> bool:
        """Read what is new, and return whether there was anything."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            # While a file is being replaced it may be missing for a moment. Keep what was read before.
            return False
        with file:
            stat = os.fstat(file.fileno())
            moved = stat.st_mtime != self.written
            self.written = stat.st_mtime
            # A log that was cut short may have grown beyond its old length again, so compare the last bytes read.
            file.seek(max(0, self._offset - len(self._end)))
            anew = self._offset > 0 and (stat.st_ino != self._inode or file.read(len(self._end)) != self._end)
            if anew:
                self._forget()
            self._inode = stat.st_ino
            file.seek(self._offset)
            added = file.read()
        whole, newline, rest = added.rpartition(b"\n")
        if rest.strip() and _object(rest) is not None:
            # A complete JSON object cannot grow any more; only its newline is missing.
            whole, newline, rest = added, b"", b""
        taken = len(added) - len(rest)
        if taken:
            self._offset += taken
            self._end = (self._end + added[:taken])[-_REMEMBERED:]
            for text in (whole + newline).splitlines(keepends=True):
                self._take(text)
        return anew or moved or taken > 0

    def _take(self, text: bytes) -> None:
        self._number += text.endswith(b"\n")
        if not text.strip():
            return
        line = _object(text)
        if self.strict and (line is None or type(line.get("step")) is not int or type(line.get("kind")) is not str):
            number = self._number + (not text.endswith(b"\n"))
            raise ValueError(
                f"{self.path}, line {number}: not a JSON object with a step and a kind: "
                f"{text[:80].decode(errors='replace').strip()!r}"
            )
        if line is None:
            self.torn += 1
        else:
            self.lines.append(line)


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
