"""Reads the folders of training runs, once or while they are being written; `run_format` describes the files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from symdist.toml_file import open_regular
from symdist.tools.run import Run
from symdist.tools.run_format import (
    EVENTS,
    LOG,
    PLAN,
    ROUTING,
    RUN,
    SUMMARY,
    Event,
    LogLine,
    PlanFacts,
    RoutingEntry,
    RunFacts,
    Summary,
    parse_event_line,
    parse_log_line,
    split_lines,
)
from symdist.tools.texts import printable
from symdist.tools.untrusted import fitting, parse_json

Line = TypeVar("Line")

_FORMS: dict[str, Any] = {SUMMARY: Summary, RUN: RunFacts, ROUTING: list[RoutingEntry], PLAN: PlanFacts}

# A file that cannot be read counts as still being written for this long after its last change.
_WRITING_SECONDS = 10.0
# How many of the last bytes read are compared to notice that a log was replaced by another.
_REMEMBERED = 512
# How many bytes of a log are taken into memory at once, and the largest of the other files.
_CHUNK = 2**26
# How much of what cannot be read is shown.
_SHOWN = 80


class Reader:
    """Reads the folder of a run repeatedly; each `read` takes in only what was added since the one before.

    A log that was replaced is read again as a whole.

    Args:
        folder: The folder.
        name: The name to show; the name of the folder by default.

    Example:
        >>> reader = Reader(Path("runs/muon"))
        >>> while not (run := reader.read()).finished:
        ...     print(run.last_step, run.last("train", "loss"))
        ...     time.sleep(5)
    """

    def __init__(self, folder: Path, *, name: str | None = None):
        self.folder = folder
        self.name = printable(name or os.path.basename(os.path.realpath(folder)))
        self._log: _Tail[LogLine] = _Tail(folder / LOG, parse_log_line)
        self._events: _Tail[Event] = _Tail(folder / EVENTS, parse_event_line)
        # By file name: what identifies the version that was read, its content, and what is wrong with it.
        self._files: dict[str, tuple[Any, Any, str]] = dict.fromkeys(_FORMS, (None, None, ""))
        self._run: Run | None = None

    def read(self) -> Run:
        """Return the run as it is now.

        Returns:
            The run; the same object as before if nothing changed. What is not of the form that `run_format` describes
            is left out of it, and named in its `problems`.

        Raises:
            ValueError: If the folder holds no log that can be read.
        """
        if self._run is None and not os.path.lexists(self.folder / LOG):
            raise ValueError(
                f"{self.folder} has no {LOG}: it is not the folder of a training run, or the run has not begun yet; "
                "give the folder that was the run's --output"
            )
        changes = [tail.read() for tail in (self._log, self._events)]
        if self._run is None and self._log.unreadable:
            raise ValueError(f"{self.folder / LOG} {self._log.unreadable}; give the folder of a training run")
        changes += [self._changed(name, form) for name, form in _FORMS.items()]
        if self._run is not None and not any(changes):
            return self._run
        lines: dict[str, list[LogLine]] = {}
        for line in self._log.lines:
            lines.setdefault(line["kind"], []).append(line)
        contents = {name: content for name, (_, content, _) in self._files.items()}
        problems = {
            LOG: self._log.problem,
            EVENTS: self._events.problem,
            **{name: problem for name, (_, _, problem) in self._files.items()},
        }
        self._run = Run(
            name=self.name,
            folder=self.folder,
            lines=lines,
            written=self._log.written,
            summary=contents[SUMMARY],
            facts=contents[RUN] or RunFacts(),
            routing=contents[ROUTING],
            plan=contents[PLAN],
            events=list(self._events.lines),
            problems=[f"{name} {problem}" for name, problem in problems.items() if problem],
            events_written=self._events.written,
        )
        return self._run

    def _changed(self, name: str, form: Any) -> bool:
        """Read a file if it is not the version that was read before; return whether its content is another."""
        before = self._files[name]
        try:
            with open_regular(self.folder / name) as file:
                stat = os.fstat(file.fileno())
                version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
                if version == before[0]:
                    return False
                text = file.read(_CHUNK)
                content, left_out = fitting(form, parse_json(text))
            problem = f"has wrong values, which are left out: {', '.join(left_out)}" if left_out else ""
        except FileNotFoundError:
            version, content, problem = None, None, ""
        except OSError as error:
            version, content, problem = None, None, f"cannot be read: {error.strerror}; it is left out"
        except ValueError as error:
            if time.time() - stat.st_mtime > _WRITING_SECONDS:
                content, problem = None, f"cannot be read: {printable(error)[:_SHOWN]}; it is left out"
            else:
                # Keep the old content, and read the file again next time.
                version, content, problem = None, *before[1:]
        self._files[name] = (version, content, problem)
        return (content, problem) != before[1:]


def read_run(folder: Path, *, name: str | None = None) -> Run:
    """Read a run from its folder.

    Args:
        folder: The folder.
        name: The name to show; the name of the folder by default.

    Returns:
        The run.

    Raises:
        ValueError: If the folder holds no log that can be read.

    Example:
        >>> run = read_run(Path("runs/muon"))
        >>> tokens, losses = run.curve("validation", "loss")
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
    # Unlike Path.resolve, this takes links that lead to themselves.
    paths = [Path(os.path.realpath(folder)).parts for folder in folders]
    for i, path in enumerate(paths):
        others = {other for other in paths if other != path}
        depth = 1
        while depth < len(path) and any(other[-depth:] == path[-depth:] for other in others):
            depth += 1
        repeats = paths[:i].count(path)
        names.append("/".join(path[-depth:]) + (f" ({repeats + 1})" if repeats else ""))
    return [Reader(folder, name=name) for folder, name in zip(folders, names, strict=True)]


class _Tail(Generic[Line]):
    """Reads the lines of a JSON-lines file that may grow, be replaced by a shorter one, or not exist yet.

    Args:
        path: The file.
        parse: Returns the content of a line, or None for a line that is not of the right form, which is left out.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Line | None]):
        self.path, self._parse = path, parse
        self.written = 0.0
        self.unreadable = ""
        self._forget()

    def _forget(self) -> None:
        self.lines: list[Line] = []
        self._number = self._offset = self._inode = 0
        self._end = b""
        self._left_out = 0
        self._first = ""

    @property
    def problem(self) -> str:
        """What is wrong with the file, as the end of a sentence that begins with its name; empty if nothing is."""
        if self.unreadable or not self._left_out:
            return self.unreadable
        lines = "1 line that is" if self._left_out == 1 else f"{self._left_out:,} lines that are"
        return f"has {lines} not of its form and left out, the first of them {self._first}"

    def read(self) -> bool:
        """Read what is new, and return whether there was anything."""
        before = self.unreadable
        self.unreadable = ""
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            # While a file is being replaced it may be missing for a moment. Keep what was read before.
            return bool(before)
        except OSError as error:
            self.unreadable = f"cannot be read: {error.strerror}"
            return self.unreadable != before
        with file:
            stat = os.fstat(file.fileno())
            touched = stat.st_mtime != self.written
            self.written = stat.st_mtime
            # A log that was cut short may have grown beyond its old length again, so compare the last bytes read.
            file.seek(max(0, self._offset - len(self._end)))
            replaced = self._offset > 0 and (stat.st_ino != self._inode or file.read(len(self._end)) != self._end)
            if replaced:
                self._forget()
            self._inode = stat.st_ino
            length = 0
            while read := self._read_lines(file):
                length += read
        return bool(replaced or touched or length or before)

    def _read_lines(self, file: BinaryIO) -> int:
        """Read the complete lines of the next chunk, and return their length."""
        file.seek(self._offset)
        added = file.read(_CHUNK)
        lines, incomplete = split_lines(added)
        if len(incomplete) == _CHUNK:
            # What goes on for so long is no line, wherever it ends.
            lines, incomplete = [added], b""
        length = len(added) - len(incomplete)
        self._offset += length
        self._end = (self._end + added[:length])[-_REMEMBERED:]
        for line in lines:
            self._add(line)
        return length

    def _add(self, text: bytes) -> None:
        self._number += text.endswith(b"\n")
        if not text.strip():
            return
        line = self._parse(text)
        if line is not None:
            self.lines.append(line)
            return
        self._left_out += 1
        shown = text[:_SHOWN].decode(errors="replace").strip()
        number = self._number + (not text.endswith(b"\n"))
        self._first = self._first or f"line {number}: {printable(shown)}"
