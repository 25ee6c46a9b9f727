"""Where a run writes what it measures: JSON lines, TensorBoard, and the terminal."""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"
SUMMARY = "summary.json"


class RunLog:
    """The log of a run's first rank; on other ranks every method does nothing.

    A run that resumes at step s keeps the lines up to s and drops those after it, which it is about to write again.
    Raises ValueError where the folder holds the log of another run and `resumed_at` is None.
    """

    def __init__(self, folder: Path, *, steps: int, write: bool, resumed_at: int | None):
        self.write = write
        if not write:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG
        kept = []
        if resumed_at is not None and path.exists():
            kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= resumed_at]
        self._folder = folder
        self._lines = path.open("w")
        self._lines.writelines(line + "\n" for line in kept)
        self._board = SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
        self._progress: Progress | None = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task("training", total=steps, completed=resumed_at or 0)
            self._progress.start()

    def step(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line: `kind` is "train" or "validation"."""
        if not self.write:
            return
        self._lines.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self.say(f"step {step:>6}  {kind:<10}  {shown}")

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
            (self._folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
        if self._progress is not None:
            self._progress.stop()
        self._board.close()
        self._lines.close()


def already_finished(folder: Path, *, steps: int) -> bool:
    """Whether the folder holds a run that came to its end, with as many steps."""
    summary = folder / SUMMARY
    return summary.exists() and json.loads(summary.read_text())["steps"] >= steps


def check_folder(folder: Path, *, resume: str | None) -> None:
    """ValueError where the folder already holds a run that is not being resumed."""
    if resume is None and (folder / LOG).exists():
        raise ValueError(f"{folder} already holds a run; pass --resume auto to continue it, or another --output")
