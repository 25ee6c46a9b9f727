"""Logs a run's metrics and events to JSON lines, TensorBoard, and the terminal."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from symdist.tools.run_log import EVENTS, LOG, SUMMARY

_SHOWN = (
    *("loss", "gradient_norm", "tokens_per_second", "mfu", "optimizer_share", "memory_gb"),
    *("router_load_cv", "router_dead", "skipped_steps", "spikes"),
)


class RunLog:
    """The log of a run, written by rank 0; on other ranks every method does nothing.

    `log.jsonl` has the metrics. A run that continues from step s keeps the lines up to s and drops the later ones,
    since it will write them again. `events.jsonl` has the events, such as restarts and rollbacks, and only grows.

    Args:
        folder: The run's output folder.
        steps: Number of steps of the run, for the progress bar.
        write: Whether this rank writes the log.
    """

    def __init__(self, folder: Path, *, steps: int, write: bool):
        self.write = write
        self._folder = folder
        self._steps = steps
        self._progress: Progress | None = None
        self._board: SummaryWriter | None = None
        self._unwritten: list[str] = []

    def begin(self, step: int | None) -> None:
        """Open the log, keeping the lines up to `step`, or none if None; call it again after a rollback to `step`."""
        if not self.write:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / LOG
        kept = [] if step is None else [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        self._unwritten.clear()
        writing = path.with_name(f"{LOG}.writing")
        try:
            writing.write_text("".join(line + "\n" for line in kept))
            # Replaced in one go, so that no lines are lost if the process dies here.
            os.replace(writing, path)
        except OSError as error:
            self.say(f"cannot write {path} ({error.strerror}): lines that are written again stay beside the first ones")
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()
        self._board = SummaryWriter(str(self._folder), purge_step=None if step is None else step + 1)
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

    def step(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Log the metrics of a step; the terminal shows the most important ones.

        Args:
            step: The step's number.
            kind: "train" or "validation".
            values: The metrics by name.
        """
        if not self.write:
            return
        assert self._board is not None
        self._unwritten.append(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if _append(self._folder / LOG, "".join(self._unwritten)):
            self._unwritten.clear()
        elif len(self._unwritten) == 1:
            self.say(f"cannot write {self._folder / LOG}; its lines are kept until there is room")
        with contextlib.suppress(OSError):
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {values[name]:.4g}" for name in _SHOWN if name in values)
        self.say(f"step {step:>6}  {kind:<10}  {shown}")

    def event(self, step: int, event: str, text: str) -> None:
        """Log an event.

        Args:
            step: The step at which it happened.
            event: Its kind, for programs to read.
            text: A sentence for people, also printed.
        """
        if not self.write:
            return
        self.say(text)
        line = json.dumps({"time": time.time(), "step": step, "event": event, "text": text}) + "\n"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        _append(self._folder / EVENTS, line)

    def describe(self, files: dict[str, Any]) -> None:
        """Write files that describe the run; `files` has their JSON-serializable contents by file name."""
        if self.write:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                try:
                    (self._folder / name).write_text(json.dumps(content, indent=1, default=str) + "\n")
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
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Close the log, and write the summary file; `summary` is None if the run is not finished."""
        if not self.write:
            return
        if summary is not None:
            writing = self._folder / f"{SUMMARY}.writing"
            writing.write_text(json.dumps(summary, indent=2) + "\n")
            os.replace(writing, self._folder / SUMMARY)
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def already_finished(folder: Path, *, steps: int) -> bool:
    """Return whether `folder` holds a finished run of at least `steps` steps."""
    try:
        return bool(json.loads((folder / SUMMARY).read_text())["steps"] >= steps)
    except (OSError, ValueError):
        # There is no summary, or a crash of the machine left it empty.
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


def _append(path: Path, text: str) -> bool:
    """Append to a file or leave it unchanged, and return whether it worked; a full disk must not end a run."""
    try:
        with open(path, "ab", buffering=0) as stream:
            before = stream.tell()
            whole = text.encode()
            try:
                written = stream.write(whole)
            except OSError:
                written = 0
            if written == len(whole):
                return True
            stream.truncate(before)
    except OSError:
        pass
    return False


def _whole_lines(path: Path) -> list[str]:
    """Return the lines of a log, without a last line that a killed process left incomplete."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
