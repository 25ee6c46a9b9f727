"""Shows training runs side by side in a table, a web page and a picture, once or while the runs go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from symdist.tools.output import check_output, check_picture, drawing, write_whole
from symdist.tools.report_page import model_line, page, summary_columns
from symdist.tools.run import Run, in_time
from symdist.tools.run_log import readers
from symdist.tools.tables import PlainTable, plain_console

# Seconds between calls of `stop` while waiting for the next reading.
_ATTENTION = 0.1
_LONGEST = 1_000_000


def report(folders: Sequence[Path], *, output: Path, picture: Path | None = None) -> list[Any]:
    """Write a page on training runs, and a picture if requested.

    Args:
        folders: The folders of the runs, finished or not.
        output: The HTML file to write.
        picture: The image file to write. None (default) for no picture.

    Returns:
        What to print on the terminal: a table, and lines of text.

    Raises:
        ValueError: If no folder is given, a folder is not that of a run, or a file cannot be written.

    Example:
        >>> for line in report([Path("runs/muon"), Path("runs/adamw")], output=Path("report.html")):
        ...     plain_console().print(line)
    """
    _check_outputs(output, picture)
    return _result([reader.read() for reader in readers(folders)], output, picture, every=0)


def follow(
    folders: Sequence[Path],
    *,
    output: Path,
    picture: Path | None = None,
    every: float = 5.0,
    stop: Callable[[], bool] = lambda: False,
    console: Console | None = None,
) -> list[Any]:
    """Show a table and write the page again and again while the runs go on.

    It ends when all runs are finished, `stop` returns True, or the user presses Ctrl-C. The page reloads itself until
    then. Only what was added to the logs is read each time.

    Args:
        folders: The folders of the runs.
        output: The HTML file to write.
        picture: The image file to write at the end. None (default) for no picture.
        every: Seconds between two readings; 5 by default.
        stop: Returns whether to stop. By default, never.
        console: The terminal to show the table on; the standard output by default.

    Returns:
        What to print on the terminal at the end: a table, and lines of text.

    Raises:
        ValueError: As `report`, and if `every` is not positive.
    """
    if not 0 < every < _LONGEST:
        raise ValueError(f"every={every} must be positive, and less than {_LONGEST:,} seconds")
    _check_outputs(output, picture)
    followed = readers(folders)
    runs = [reader.read() for reader in followed]
    shown_states: list[Any] = []
    try:
        with Live(console=console or plain_console(), auto_refresh=False, transient=True) as live:
            while True:
                now = time.time()
                going = not all(run.finished for run in runs)
                states = [(run, run.state(now).kind) for run in runs]
                if states != shown_states:
                    write_page(runs, output, live=going, every=every, now=now)
                    shown_states = states
                live.update(live_table(runs, now), refresh=True)
                if not going or _stopped(stop, every):
                    break
                runs = [reader.read() for reader in followed]
    except KeyboardInterrupt:
        # The usual way to stop. The final page is written below.
        pass
    return _result(runs, output, picture, every=every)


def _check_outputs(output: Path, picture: Path | None) -> None:
    check_output(output, option="--output")
    check_picture(picture, option="--picture")


def _result(runs: Sequence[Run], output: Path, picture: Path | None, *, every: float) -> list[Any]:
    """Write the page and the picture; return what to print."""
    now = time.time()
    write_page(runs, output, live=False, every=every, now=now)
    lines: list[Any] = [run_table(runs, now), *(f"{run.name}: {problem}" for run in runs for problem in run.problems)]
    lines.append(f"page: {output}")
    if picture is not None:
        draw(runs, picture)
        lines.append(f"picture: {picture}")
    return lines


def _stopped(stop: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not stop():
        remaining = end - time.monotonic()
        if remaining <= 0:
            return False
        time.sleep(min(remaining, _ATTENTION))
    return True


def run_table(runs: Sequence[Run], now: float) -> Table:
    """Return a table with one row per run. Columns without a value in any run are left out.

    Args:
        runs: The runs.
        now: The current time, in seconds since the epoch.

    Returns:
        The table.
    """
    table = PlainTable(model_line(runs))
    columns = summary_columns(runs, now)
    for i, column in enumerate(columns):
        table.add_column(column.heading, justify="left" if i < 2 else "right", overflow="fold")
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(cell or "–" for cell in cells))
    return table


def live_table(runs: Sequence[Run], now: float) -> Table:
    """Return a table with one row per run: progress, speed, remaining time and last event.

    Args:
        runs: The runs.
        now: The current time, in seconds since the epoch.

    Returns:
        The table.
    """
    table = PlainTable(model_line(runs))
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
    """Write the page by replacing the file at once, so that a browser never loads an incomplete page.

    Args:
        runs: The runs.
        path: The HTML file to write.
        live: Whether the page reloads itself.
        every: Seconds between two reloads.
        now: The current time, in seconds since the epoch.
    """
    write_whole(path, page(runs, live=live, every=every, now=now))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw losses and, for mixtures of experts, the load of the routers, against the tokens seen.

    Args:
        runs: The runs.
        path: The image file to write.
    """
    from matplotlib.ticker import EngFormatter

    panels = [("loss", "next-token loss (nats)")]
    if any(run.curve("train", "router_load_cv")[0] for run in runs):
        panels += [("router_load_cv", "router load CV, mean over layers"), ("router_dead", "share of dead experts")]
    width = 13 if len(panels) > 1 else 6
    with drawing(path, dpi=130, figsize=(width, 4), ncols=len(panels)) as (axes,):
        for axis, (measure, label) in zip(axes, panels, strict=True):
            for i, run in enumerate(runs):
                axis.plot(*run.curve("train", measure), color=f"C{i}", alpha=0.35 if measure == "loss" else 1, lw=1.2)
                if measure == "loss":
                    axis.plot(*run.curve("validation", measure), color=f"C{i}", marker="o", ms=3)
                axis.plot([], [], color=f"C{i}", label=run.name)
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.set_xlabel("tokens" if all(run.tokens_per_step for run in runs) else "steps")
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0].set_title("faint: training, dots: validation", fontsize=9)
        axes[0].legend()


def _form(form: str, value: float | None) -> str:
    return "–" if value is None else form.format(value)
