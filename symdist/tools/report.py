"""Runs side by side: a table for the terminal, a page of curves, a picture; once, or for as long as the runs go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table

from symdist.tools.report_page import model_line, page, summary_columns
from symdist.tools.run_log import Run, in_time, readers

# How long a call to stop may go unheard while waiting for the next reading.
_ATTENTION = 0.1


def report(folders: Sequence[Path], *, output: Path, picture: Path | None = None) -> list[Any]:
    """Read runs and write their page, and their picture where one is asked for; what to show on the terminal.

    Raises ValueError where a folder is no run's, or a file in it cannot be read.
    """
    runs = [reader.read() for reader in readers(folders)]
    now = time.time()
    write_page(runs, output, live=False, every=0, now=now)
    lines: list[Any] = [run_table(runs, now), f"page: {output}"]
    if picture is not None:
        draw(runs, picture)
        lines.append(f"picture: {picture}")
    return lines


def follow(
    folders: Sequence[Path],
    *,
    output: Path,
    picture: Path | None = None,
    every: float = 5.0,
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> list[Any]:
    """As `report`, over and over until all runs are finished, `stop` says so, or Ctrl-C; a table shows where they are.

    The page reloads itself while this goes on. What was read once is not read again, except of a log that a resumed run
    wrote anew. Raises ValueError as `report` does, and for a waiting time that is not positive.
    """
    if not every > 0:
        raise ValueError(f"every={every} must be positive")
    followed = readers(folders)
    runs = [reader.read() for reader in followed]
    shown: list[Any] = []
    try:
        with Live(console=console or Console(), auto_refresh=False, transient=True) as live:
            while True:
                now = time.time()
                going = not all(run.finished for run in runs)
                seen = [(run, run.state(now).kind) for run in runs]
                if seen != shown:
                    write_page(runs, output, live=going, every=every, now=now)
                    shown = seen
                live.update(live_table(runs, now), refresh=True)
                if not going or _stopped(stop, every):
                    break
                runs = [reader.read() for reader in followed]
    except KeyboardInterrupt:
        # How one leaves; the page below is the last.
        pass
    now = time.time()
    write_page(runs, output, live=False, every=every, now=now)
    lines: list[Any] = [run_table(runs, now), f"page: {output}"]
    if picture is not None:
        draw(runs, picture)
        lines.append(f"picture: {picture}")
    return lines


def _stopped(stop: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not stop():
        rest = end - time.monotonic()
        if rest <= 0:
            return False
        time.sleep(min(rest, _ATTENTION))
    return True


def run_table(runs: Sequence[Run], now: float) -> Table:
    """A row a run; columns that no run has a figure for are left out, as a router's are of dense models."""
    table = Table(title=model_line(runs), title_justify="left", box=SIMPLE)
    columns = summary_columns(runs, now)
    for i, column in enumerate(columns):
        table.add_column(column.heading, justify="left" if i < 2 else "right", overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(cell or "–" for cell in cells))
    return table


def live_table(runs: Sequence[Run], now: float) -> Table:
    """A row a run: where it is, how fast it goes, when it will be done, and what happened last."""
    table = Table(title=model_line(runs), title_justify="left", box=SIMPLE)
    for heading in ("run", "state", "step", "loss", "tokens/s", "time left", "router CV", "last event"):
        left = heading in ("run", "state", "last event")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for run in runs:
        state = run.state(now)
        left_over = run.seconds_left if state.kind == "running" else None
        event = run.events[-1] if run.events else {}
        table.add_row(
            run.name,
            state.text,
            f"{run.last_step:,}" + (f" of {run.steps:,}" if run.steps else ""),
            _form("{:.3f}", run.last("train", "loss")),
            _form("{:,.0f}", run.last("train", "tokens_per_second")),
            "–" if left_over is None else in_time(left_over),
            _form("{:.2f}", run.last("train", "router_load_cv")),
            ": ".join(str(event[key]) for key in ("event", "text") if event.get(key)),
        )
    return table


def write_page(runs: Sequence[Run], path: Path, *, live: bool, every: float, now: float) -> None:
    """Write the page whole or not at all, so that a browser never loads half of one."""
    text = page(runs, live=live, every=every, now=now)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not a temporary file of Python's, which others on the machine could not read.
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        written.write_text(text, encoding="utf-8")
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Validation and training loss, and the routers' load over the experts, against tokens seen; written to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    panels = [("loss", "next-token loss (nats)")]
    if any(run.curve("train", "router_load_cv")[0] for run in runs):
        panels += [("router_load_cv", "router load CV, mean over layers"), ("router_dead", "share of dead experts")]
    width = 13 if len(panels) > 1 else 6
    figure, axes = pyplot.subplots(1, len(panels), figsize=(width, 4), squeeze=False, layout="constrained")
    for axis, (measure, label) in zip(axes[0], panels, strict=True):
        for i, run in enumerate(runs):
            axis.plot(*run.curve("train", measure), color=f"C{i}", alpha=0.35 if measure == "loss" else 1, lw=1.2)
            if measure == "loss":
                axis.plot(*run.curve("validation", measure), color=f"C{i}", marker="o", ms=3)
            axis.plot([], [], color=f"C{i}", label=run.name)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel("tokens" if all(run.tokens_per_step for run in runs) else "steps")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].set_title("faint: training, dots: validation", fontsize=9)
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _form(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)
