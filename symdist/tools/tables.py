"""Shows previews and comparisons as tables for the terminal."""

import math
import re
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from symdist.assignment import Assignment
from symdist.tools.compare import Comparison
from symdist.tools.preview import Preview
from symdist.tools.texts import printable

_FILE_WIDTH = 240


class PlainTable(Table):
    """A table of texts that are shown as they are: nothing in them is markup, or acts on the terminal.

    Args:
        title: The title.
    """

    def __init__(self, title: str):
        super().__init__(title=_plain(title, style="table.title"), title_justify="left", box=SIMPLE)

    def add_row(self, *cells: str) -> None:  # type: ignore[override]
        """Add a row of texts."""
        super().add_row(*map(_plain, cells))


def plain_console(**options: Any) -> Console:
    """Return a console that shows texts as they are, without markup.

    Args:
        **options: Options of rich's Console.

    Returns:
        The console.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


def show(*lines: Any) -> None:
    """Print lines and tables; in a file or pipe, the rows of a table are not wrapped.

    Args:
        *lines: Texts, of which only visible characters reach the terminal, or what rich can print.
    """
    console = plain_console(width=None if plain_console().is_terminal else _FILE_WIDTH)
    for line in lines:
        if isinstance(line, str):
            console.print(printable(line), soft_wrap=True)
        else:
            console.print(line)


def _plain(text: str, style: str = "") -> Text:
    return Text(printable(text), style=style)


def route_table(preview: Preview, *, title: str, fold: bool) -> Table:
    """Return a table with one row per parameter.

    Args:
        preview: The parameters.
        title: The title of the table.
        fold: Whether to join parameters into one row if they differ only in the numbers in their names.

    Returns:
        The table. A column says what told each role, if the preview knows it.
    """
    rows: dict[tuple[str, ...], int] = {}
    for parameter in preview.parameters:
        row = _route_row(parameter, preview.evidence.get(parameter.name), fold=fold)
        rows[row] = rows.get(row, 0) + 1
    table = PlainTable(title)
    table.add_column("parameter", overflow="fold", min_width=12)
    if fold:
        table.add_column("count", justify="right", no_wrap=True)
    told = ["known by"] if preview.evidence else []
    # In a narrow terminal, wrap the columns whose cells have spaces, but not the names of roles and strategies.
    for heading in ("shape", "role", *told, "rule", "lr", "view", "strategy", "precision"):
        wraps = heading in ("shape", "known by", "rule", "view", "precision")
        table.add_column(heading, justify="right" if heading == "lr" else "left", no_wrap=not wraps)
    for (name, *cells), count in rows.items():
        table.add_row(name, *([str(count)] if fold else []), *cells)
    return table


def totals(preview: Preview) -> str:
    """Return one line with the totals of a preview.

    Args:
        preview: The preview.

    Returns:
        The line.
    """
    weights = sum(math.prod(parameter.shape) for parameter in preview.parameters)
    return (
        f"{weights:,} weights in {len(preview.parameters)} parameters, {preview.groups} groups, "
        f"{preview.stacks} stacks; a rank's step starts {preview.collectives} collectives "
        f"and sends {in_bytes(preview.sent)}"
    )


def compare_table(comparison: Comparison) -> Table:
    """Return a table with one row per optimizer that was compared.

    Args:
        comparison: The results on one number of ranks.

    Returns:
        The table.
    """
    run = comparison
    ranks = "1 rank" if run.ranks == 1 else f"{run.ranks} ranks"
    table = PlainTable(
        f"{run.model}, {ranks} ({run.backend}, {run.device}, threads a rank: {run.threads}), "
        f"{run.batch} × {run.sequence} tokens a rank, median of {run.steps} steps"
    )
    table.add_column("optimizer", overflow="fold")
    for heading in (
        "step\nms",
        "step\n× AdamW",
        "optimizer\nms",
        "optimizer\n× AdamW",
        "share of\nstep",
        "collectives\na step",
        "sent\na rank",
        "state\na rank",
        "peak extra\na rank",
    ):
        table.add_column(heading, justify="right")
    for arm in run.arms:
        table.add_row(
            arm.name,
            f"{arm.step_seconds * 1e3:.1f}",
            f"{arm.step_ratio:.2f}",
            f"{arm.optimizer_seconds * 1e3:.2f}",
            f"{arm.optimizer_ratio:.2f}",
            f"{arm.share:.1%}",
            str(arm.collectives),
            in_bytes(arm.sent_bytes),
            in_bytes(arm.state_bytes),
            in_bytes(arm.peak_bytes),
        )
    for name in run.refused:
        table.add_row(name, *["—"] * 9)
    return table


def compare_notes(comparison: Comparison) -> list[str]:
    """Return one line per optimizer: which parameters it steps and how, or why it was not run.

    Args:
        comparison: The results on one number of ranks.

    Returns:
        The lines.
    """
    return [
        *(f"{arm.name}: {arm.note}" for arm in comparison.arms),
        *(f"{name}: {reason}" for name, reason in comparison.refused.items()),
    ]


def in_bytes(count: float) -> str:
    """Format a number of bytes with a unit, in powers of 1000.

    Args:
        count: The number of bytes.

    Returns:
        The text, such as "1.5 MB".
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _route_row(parameter: Assignment, evidence: str | None, *, fold: bool) -> tuple[str, ...]:
    name = re.sub(r"(?<=\.)\d+(?=\.)", "*", parameter.name) if fold else parameter.name
    return (
        name,
        " × ".join(map(str, parameter.shape)),
        parameter.role,
        *([] if evidence is None else [evidence]),
        " ".join([parameter.rule, *(_option(key, value) for key, value in parameter.options.items())]),
        f"{parameter.lr:g}",
        _view(parameter.view),
        parameter.strategy,
        parameter.precision,
    )


def _option(key: str, value: Any) -> str:
    return key if value is True else f"{key}={value}"


def _view(view: Any) -> str:
    if not isinstance(view, Mapping):
        return str(view)
    counts = {key: " + ".join(map(str, value)) if isinstance(value, list) else value for key, value in view.items()}
    return ", ".join(
        key if value is True else f"dim {value}" if key == "dim" else f"{value} {key}" for key, value in counts.items()
    )
