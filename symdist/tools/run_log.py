"""Reads the folders of training runs, once or while they are being written; `run_format` describes the files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

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
    RunFacts,
    parse_event_line,
    parse_log_line,
    split_lines,
)

Line = TypeVar("Line")

# A file that cannot be read counts as still being written for this long after its last change.
_WRITING_SECONDS = 10.0
# How many of the last bytes read are compared to notice that a log was replaced by another.
_REMEMBERED = 512


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
        self.name = name or folder.resolve().name
        self._log: _Tail[LogLine] = _Tail(folder / LOG, parse_log_line)
        self._events: _Tail[Event] = _Tail(folder / EVENTS, parse_event_line, lenient=True)
        # By file name: what identifies the version that was read, and its content.
        self._files: dict[str, tuple[Any, Any]] = {}
        self._run: Run | None = None

    def read(self) -> Run:
        """Return the run as it is now.

        Returns:
            The run; the same object as before if nothing changed.

        Raises:
            ValueError: If the folder holds no log, or a file in it cannot be read.
        """
        if not (self.folder / LOG).exists() and self._run is None:
            raise ValueError(
                f"{self.folder} has no {LOG}: it is not the folder of a training run, or the run has not begun yet; "
                "give the folder that was the run's --output"
            )
        changes = [tail.read() for tail in (self._log, self._events)]
        for name in (SUMMARY, RUN, ROUTING, PLAN):
            changes.append(self._changed(name))
        if self._run is not None and not any(changes):
            return self._run
        lines: dict[str, list[LogLine]] = {}
        for line in self._log.lines:
            lines.setdefault(line["kind"], []).append(line)
        contents = {name: content for name, (_, content) in self._files.items()}
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
            incomplete_events=self._events.skipped,
            events_written=self._events.written,
        )
        return self._run

    def _changed(self, name: str) -> bool:
        """Read a file if it is not the version that was read before; return whether its content is another."""
        before = self._files.get(name, (None, None))
        path = self.folder / name
        try:
            stat = path.stat()
            version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if version == before[0]:
                return False
            content = json.loads(path.read_text())
            if not isinstance(content, list if name == ROUTING else dict):
                raise ValueError(f"it holds no JSON {'list' if name == ROUTING else 'object'}")
        except FileNotFoundError:
            version, content = None, None
        except ValueError as error:
            if time.time() - stat.st_mtime > _WRITING_SECONDS:
                raise ValueError(f"{path} cannot be read: {error}; remove the file to see the run without it") from None
            # Keep the old content, and read the file again next time.
            version, content = None, before[1]
        self._files[name] = (version, content)
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
    paths = [folder.resolve().parts for folder in folders]
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
        parse: Returns the content of a line, or None for a line that is not of the right form.
        lenient: Whether to count such lines in `skipped`; otherwise, one is an error.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], Line | None], *, lenient: bool = False):
        self.path, self.lenient = path, lenient
        self._parse = parse
        self.written = 0.0
        self._forget()

    def _forget(self) -> None:
        self.lines: list[Line] = []
        self.skipped = 0
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
            touched = stat.st_mtime != self.written
            self.written = stat.st_mtime
            # A log that was cut short may have grown beyond its old length again, so compare the last bytes read.
            file.seek(max(0, self._offset - len(self._end)))
            replaced = self._offset > 0 and (stat.st_ino != self._inode or file.read(len(self._end)) != self._end)
            if replaced:
                self._forget()
            self._inode = stat.st_ino
            file.seek(self._offset)
            added = file.read()
        lines, incomplete = split_lines(added)
        length = len(added) - len(incomplete)
        if length:
            self._offset += length
            self._end = (self._end + added[:length])[-_REMEMBERED:]
            for line in lines:
                self._add(line)
        return replaced or touched or length > 0

    def _add(self, text: bytes) -> None:
        self._number += text.endswith(b"\n")
        if not text.strip():
            return
        line = self._parse(text)
        if line is not None:
            self.lines.append(line)
        elif self.lenient:
            self.skipped += 1
        else:
            number = self._number + (not text.endswith(b"\n"))
            raise ValueError(
                f"{self.path}, line {number}: not a JSON object with a step and a kind: "
                f"{text[:80].decode(errors='replace').strip()!r}; remove the line to see the run without it"
            )
