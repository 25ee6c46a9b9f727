"""Where a run writes what it measures and what happens to it: JSON lines, TensorBoard, and the terminal."""

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
    """The log of a run's first rank; on other ranks every method does nothing.

    `log.jsonl` has the measures of the run as it stands: one that goes on from step s keeps the lines up to s and drops
    those after it, which it is about to write again. `events.jsonl` has what happened to it, restarts and roll-backs
    included, and only grows.
    """

    def __init__(self, folder: Path, *, steps: int, write: bool):
        self.write = write
        self._folder = folder
        self._steps = steps
        self._progress: Progress | None = None
        self._board: SummaryWriter | None = None
        self._unwritten: list[str] = []

    def begin(self, step: int | None) -> None:
        """Begin with the lines up to `step`, or with none; to be called again where the run goes back to a step."""
        if not self.write:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / LOG
        kept = [] if step is None else [line for line in _whole_lines(path) if json.loads(line)["step"] <= step]
        self._unwritten.clear()
        writing = path.with_name(f"{LOG}.writing")
        try:
            writing.write_text("".join(line + "\n" for line in kept))
            # At no moment is there less than was kept.
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
        """One line: `kind` is "train" or "validation". The terminal shows the most telling measures."""
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
        """Something happened: a kind for programs, a sentence for people."""
        if not self.write:
            return
        self.say(text)
        line = json.dumps({"time": time.time(), "step": step, "event": event, "text": text}) + "\n"
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        _append(self._folder / EVENTS, line)

    def describe(self, files: dict[str, Any]) -> None:
        """Write JSON files of what the run is."""
        if self.write:
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                try:
                    (self._folder / name).write_text(json.dumps(content, indent=1, default=str) + "\n")
                except OSError as error:
                    self.say(f"cannot write {self._folder / name} ({error.strerror})")

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.write and self._progress is not None:
            self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line for the reader."""
        if not self.write:
            return
        if self._progress is not None:
            self._progress.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def finish(self, summary: dict[str, Any] | None) -> None:
        """Close; `summary`, of a run that came to its end, goes to a file of its own."""
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
    """Whether the folder holds a run that came to its end, with as many steps."""
    try:
        return bool(json.loads((folder / SUMMARY).read_text())["steps"] >= steps)
    except (OSError, ValueError):
        # None, or one that a lost machine left empty.
        return False


def check_folder(folder: Path, *, resume: str | None) -> None:
    """ValueError where the folder already holds a run that is not being resumed."""
    if resume is None and (folder / LOG).exists():
        raise ValueError(f"{folder} already holds a run; pass --resume auto to continue it, or another --output")


def _append(path: Path, text: str) -> bool:
    """Add to a file, or leave it as it was: a full disk is no reason to lose a run."""
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
    """The lines of a log, without one that a killed process left half-written."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
