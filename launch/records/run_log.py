"""Writes a run's record: measures and events to JSON lines, TensorBoard and the terminal, and files that describe it.

`symdist.tools.run_format` says what the files hold.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from symdist.tools.run_format import (
    EVENTS,
    LOG,
    SUMMARY,
    Event,
    EventKind,
    LineKind,
    LogLine,
    event_line,
    log_line,
    parse_event_line,
    parse_log_line,
    split_lines,
)
from symdist.tools.texts import printable

_SHOWN = (
    *("loss", "gradient_norm", "tokens_per_second", "mfu", "optimizer_share", "memory_gb"),
    *("router_load_cv", "router_dead", "skipped_steps", "spikes"),
)


class RunLog:
    """The log of a run, written by rank 0; on other ranks every method does nothing.

    A run that continues from step s keeps the lines of `log.jsonl` up to s and drops the later ones, since it will
    write them again. `events.jsonl` only grows.

    Args:
        folder: The run's output folder.
        steps: Number of steps of the run, for the progress bar.
        write: Whether this rank writes the log.

    Example:
        >>> log = RunLog(Path("runs/muon"), steps=300, write=rank == 0)
        >>> log.begin(None)
        >>> log.step(10, "train", {"loss": 3.5})
        >>> log.finish({"steps": 300})
    """

    def __init__(self, folder: Path, *, steps: int, write: bool):
        self.write = write
        self._folder = folder
        self._steps = steps
        self._progress: Progress | None = None
        self._board: SummaryWriter | None = None
        self._unwritten: list[str] = []

    def begin(self, step: int | None) -> None:
        """Open the log; call it again after a rollback.

        Args:
            step: The step to continue from, up to which lines are kept; None to start an empty log.
        """
        if not self.write:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / LOG
        self._unwritten.clear()
        try:
            kept = [] if step is None else [text for text, line in self._lines() if line["step"] <= step]
            _replace(path, b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept))
        except OSError as error:
            self.say(
                f"cannot write {path} ({error.strerror}): lines after step {step or 0} could not be removed, so steps "
                "that are repeated will be in it twice"
            )
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        threading.excepthook = self._tell_of_thread
        try:
            self._board = SummaryWriter(str(self._folder), purge_step=None if step is None else step + 1)
        except OSError as error:
            self._board = None
            self.say(f"cannot write TensorBoard's files ({error.strerror}); the run goes on without them")
        if self._progress is None and sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("training", total=self._steps)
            self._progress.start()
        self.advance(step or 0)

    def _tell_of_thread(self, ended: threading.ExceptHookArgs) -> None:
        """Say in one line that TensorBoard's writer has ended, as it does when the disk is full."""
        if isinstance(ended.exc_value, OSError) and type(ended.thread).__module__.startswith("tensorboard."):
            self.say(f"cannot write TensorBoard's files ({ended.exc_value.strerror}); the run goes on without them")
        else:
            threading.__excepthook__(ended)

    def _lines(self) -> list[tuple[bytes, LogLine]]:
        """Return the lines of the log; what is no line of a log is said and passed over."""
        path = self._folder / LOG
        if os.path.lexists(path) and not path.is_file():
            self.say(f"{path} is no file and is passed over")
        lines = split_lines(_content(path))[0] if path.is_file() else []
        parsed = [(text, line) for text in lines if (line := parse_log_line(text)) is not None]
        if len(parsed) < len(lines):
            self.say(f"{len(lines) - len(parsed)} lines of {path} cannot be read and are passed over")
        return parsed

    def saved_before(self, *, every: int) -> str | None:
        """Return what the record says of checkpoints that the run had before; None if it says of none.

        Args:
            every: Steps between the run's checkpoints; 0 if it saves only when it ends.
        """
        if not self.write:
            return None
        events: list[Event | None] = []
        with contextlib.suppress(OSError):
            events = [parse_event_line(line) for line in split_lines(_content(self._folder / EVENTS))[0]]
        for event in reversed(events):
            if event is not None and event.get("event") in ("save", "fallback"):
                return f"{self._folder / EVENTS} says: {event.get('text')}"
        last = 0
        with contextlib.suppress(OSError):
            last = max((line["step"] for _, line in self._lines()), default=0)
        # By then the first checkpoint was written, or it had failed; before, a run that is lost may have none.
        return f"{self._folder / LOG} comes to step {last}" if every and last >= 2 * every else None

    def step(self, step: int, kind: LineKind, values: dict[str, float]) -> None:
        """Log the measures of a step; the terminal shows the most important ones.

        Args:
            step: The step's number.
            kind: "train" or "validation".
            values: The measures by name; `symdist.tools.run_format.LogLine` lists them with their units.
        """
        if not self.write:
            return
        self._unwritten.append(log_line(step, kind, values))
        if _append(self._folder / LOG, "".join(self._unwritten)):
            self._unwritten.clear()
        elif len(self._unwritten) == 1:
            self.say(f"cannot write {self._folder / LOG}; its lines are kept in memory until there is space")
        if self._board is not None:
            with contextlib.suppress(OSError):
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        shortened = "  ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        self.say(f"step {step:>6}  {kind:<10}  {shortened}")

    def event(self, step: int, event: EventKind, text: str) -> None:
        """Log an event.

        Args:
            step: The step at which it happened.
            event: Its kind, for programs to read.
            text: A sentence for people, also printed.
        """
        if not self.write:
            return
        self.say(text)
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        _append(self._folder / EVENTS, event_line(step, event, text, time=time.time()))

    def describe(self, files: dict[str, Any]) -> None:
        """Write the files that describe the run.

        Args:
            files: Their JSON-serializable contents by file name, from `launch.records.run_metadata.describe`.
        """
        if self.write:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                try:
                    _replace(self._folder / name, f"{json.dumps(content, indent=1, default=str)}\n".encode())
                except OSError as error:
                    self.say(f"cannot write {self._folder / name} ({error.strerror})")

    def advance(self, step: int) -> None:
        """Move the progress bar to `step`."""
        if self.write and self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Print a line to the terminal (stderr)."""
        if not self.write:
            return
        # Paths and error messages hold what users and files say, which may not reach rich's markup or the terminal.
        lines = "\n".join(map(printable, text.split("\n")))
        if self._progress is not None:
            self._progress.console.print(lines, highlight=False, markup=False, emoji=False)
        else:
            print(lines, file=sys.stderr, flush=True)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Close the log.

        Args:
            summary: The contents of the summary file, whose keys are those of `symdist.tools.run_format.Summary`. None
                if the run is not finished; then no file is written.
        """
        if not self.write:
            return
        if summary is not None:
            _replace(self._folder / SUMMARY, f"{json.dumps(summary, indent=2)}\n".encode())
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def already_finished(folder: Path, *, steps: int) -> bool:
    """Return whether a folder holds a finished run.

    Args:
        folder: The run's output folder.
        steps: The least number of steps that the run must have done.

    Returns:
        Whether its summary says so.
    """
    try:
        return bool(json.loads(_content(folder / SUMMARY))["steps"] >= steps)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        # There is no summary, or it is damaged.
        return False


def check_folder(folder: Path, *, resume: str | None) -> None:
    """Check that a run can use `folder`.

    Args:
        folder: The run's output folder.
        resume: The value of `--resume`, or None.

    Raises:
        ValueError: If the folder already holds a run and `resume` is None.
    """
    if resume is None and (folder / LOG).exists():
        raise ValueError(f"{folder} already holds a run; pass --resume auto to continue it, or another --output")


def _content(path: Path) -> bytes:
    """Return what a file holds; reading what is none, such as a pipe, could wait for ever."""
    if not path.is_file():
        raise FileNotFoundError(path)
    return path.read_bytes()


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one go, so that nothing is lost or half-written if the process dies meanwhile."""
    writing = path.with_name(f"{path.name}.writing")
    writing.write_bytes(content)
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"{path.name}.damaged"))
    os.replace(writing, path)


def _append(path: Path, text: str) -> bool:
    """Append to a file or leave it unchanged, and return whether it worked; a full disk must not end a run."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        with open(os.open(path, flags, 0o666), "ab", buffering=0) as stream:
            length = stream.tell()
            content = text.encode()
            try:
                written = stream.write(content)
            except OSError:
                written = 0
            if written == len(content):
                return True
            stream.truncate(length)
    except OSError:
        pass
    return False
