"""Reports the results of a study so far: tables on the terminal and in Markdown, all numbers in JSON, and a plot."""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symdist.tools.output import drawing, write_whole
from symdist.tools.run_log import read_run
from symdist.tools.texts import printable

JSON = "study.json"
MARKDOWN = "study.md"
PICTURE = "study.png"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a finished run.

    Attributes:
        multiplier: Factor of all learning rates.
        seed: The run's seed.
        loss: Final validation loss in nats.
        load_cv: Coefficient of variation of the routers' load; None for a model without routers.
        dead: Fraction of dead experts; None for a model without routers.
        seconds: Training time.
    """

    multiplier: float
    seed: int
    loss: float
    load_cv: float | None
    dead: float | None
    seconds: float

    @property
    def diverged(self) -> bool:
        """Whether the validation loss is inf or NaN."""
        return not math.isfinite(self.loss)


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """The results of an arm so far.

    Attributes:
        model: The model's name.
        name: The arm's name.
        label: The arm's name in tables and plot.
        grid: The learning-rate multipliers of the sweep.
        seeds: The further seeds.
        sweep: Results of the sweep's finished runs, in the order of the grid.
        further: Results of the finished runs with further seeds.
    """

    model: str
    name: str
    label: str
    grid: tuple[float, ...]
    seeds: tuple[int, ...]
    sweep: tuple[Outcome, ...]
    further: tuple[Outcome, ...]

    @property
    def best(self) -> float | None:
        """The multiplier with the smallest loss, where a diverged run counts as worst; None until the sweep is done."""
        if len(self.sweep) < len(self.grid):
            return None
        return min(
            self.sweep, key=lambda run: (run.diverged, run.loss if not run.diverged else run.multiplier)
        ).multiplier

    @property
    def note(self) -> str:
        """Caveats about the numbers, such as missing or diverged runs; empty if there are none."""
        notes = []
        if self.best is None:
            notes.append(f"{len(self.sweep)} of {len(self.grid)} runs of the sweep done")
        else:
            if all(run.diverged for run in self.sweep):
                notes.append("diverged at every rate")
            elif len(self.grid) > 1 and self.best in (min(self.grid), max(self.grid)):
                edge = "lower" if self.best == min(self.grid) else "upper"
                notes.append(f"best at the {edge} edge of the grid")
            if len(self.further) < len(self.seeds):
                notes.append(f"{len(self.further)} of {len(self.seeds)} seeds done")
        if diverged := sum(run.diverged for run in self.further):
            notes.append(f"{diverged} of {len(self.further)} seeds diverged")
        return "; ".join(notes)

    def values(self, measure: str) -> list[float]:
        """Return a measure (a field of `Outcome`) of all runs with further seeds, without None."""
        return [value for run in self.further if (value := getattr(run, measure)) is not None]


def read_outcome(folder: Path, *, multiplier: float, seed: int) -> Outcome:
    """Read the result of a finished run.

    Args:
        folder: The run's folder.
        multiplier: The run's learning-rate multiplier.
        seed: The run's seed.

    Raises:
        ValueError: If the run is not finished, or its summary cannot be read.
    """
    summary = read_run(folder).summary
    if summary is None or not {"validation_loss", "training_seconds"} <= set(summary):
        raise ValueError(f"the run in {folder} is not finished; start the study again to continue it")
    return Outcome(
        multiplier=multiplier,
        seed=seed,
        loss=summary["validation_loss"],
        load_cv=summary.get("validation_router_load_cv"),
        dead=summary.get("validation_router_dead"),
        seconds=summary["training_seconds"],
    )


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation.

    Returns:
        Both are None if there are no values or any is not finite; the deviation is also None for a single value.
    """
    if not values or not all(map(math.isfinite, values)):
        return None, None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def write(arms: Sequence[ArmOutcome], folder: Path, *, settings: dict[str, Any]) -> None:
    """Print the tables, and write `study.json`, `study.md` and `study.png`.

    Args:
        arms: The results of all arms.
        folder: The study's folder; created if missing.
        settings: The study's configuration, which goes into `study.json`.
    """
    print_tables(arms)
    numbers = _plain(_numbers(arms, settings))
    write_whole(folder / JSON, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    write_whole(folder / MARKDOWN, markdown(arms))
    draw(arms, folder / PICTURE)
    print(printable(f"written: {folder / JSON}, {folder / MARKDOWN}, {folder / PICTURE}"))


def print_tables(arms: Sequence[ArmOutcome]) -> None:
    """Print one table per model."""
    from symdist.tools.tables import PlainTable, plain_console

    console = plain_console(width=None if sys.stdout.isatty() else 140)
    for model, group in _by_model(arms).items():
        header, rows = _cells(group)
        table = PlainTable(f"{model}: mean ± sample standard deviation over seeds {_listed(group[0].seeds)}")
        for i, column in enumerate(header):
            table.add_column(column, justify="left" if i in (0, len(header) - 1) else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(arms: Sequence[ArmOutcome]) -> str:
    """Return the tables, one per model, as Markdown."""
    parts = []
    for model, group in _by_model(arms).items():
        header, rows = _cells(group)
        lines = [header, ["---", *("---:" for _ in header[1:-1]), "---"], *rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        parts.append(
            f"{model}; mean ± sample standard deviation over seeds {_listed(group[0].seeds)}; all learning rates of a "
            f"stack × {_listed(f'{m:g}' for m in group[0].grid)} by another seed:\n\n{table}\n"
        )
    return "\n".join(parts)


def draw(arms: Sequence[ArmOutcome], path: Path) -> None:
    """Draw one row of plots per model: losses of the seeds, the sweep, and router load if any model has routers."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    models = _by_model(arms)
    routed = any(arm.values("load_cv") for arm in arms)
    heights = [1.5 + 0.4 * len(group) for group in models.values()]
    size = (15 if routed else 11, 0.9 + sum(heights))
    columns = 3 if routed else 2
    with drawing(path, dpi=130, figsize=size, nrows=len(models), ncols=columns, height_ratios=heights) as axes:
        for row, (model, group) in zip(axes, models.items(), strict=True):
            _draw_seeds(row[0], group, "loss")
            row[0].set(title=model, xlabel="final validation loss (nats); bar: mean of the seeds")
            row[0].set_yticks(range(len(group)), [printable(arm.label) for arm in group])
            for i, arm in enumerate(group):
                losses = [(run.multiplier, run.loss) for run in sorted(arm.sweep, key=lambda run: run.multiplier)]
                finite = [(multiplier, loss) for multiplier, loss in losses if math.isfinite(loss)]
                row[1].plot(*zip(*finite, strict=True) if finite else ([], []), color=f"C{i}", marker="o", ms=4)
            row[1].set_xscale("log", base=2)
            row[1].xaxis.set(major_locator=FixedLocator(sorted(group[0].grid)), minor_locator=NullLocator())
            row[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"× {value:g}"))
            row[1].set(title="sweep", xlabel="all learning rates of the stack", ylabel="final validation loss (nats)")
            if routed and any(arm.values("load_cv") for arm in group):
                _draw_seeds(row[2], group, "load_cv")
                row[2].set(title="balance", xlabel="router load CV, mean over layers; bar: mean of the seeds")
                row[2].set_yticks(range(len(group)), [])
            elif routed:
                row[2].set_axis_off()
            for axis in row:
                axis.grid(alpha=0.3)


def _draw_seeds(axis: Any, group: Sequence[ArmOutcome], measure: str) -> None:
    for i, arm in enumerate(group):
        values = [value for value in arm.values(measure) if math.isfinite(value)]
        axis.plot(values, [i] * len(values), "o", color=f"C{i}", ms=5, alpha=0.6)
        if values:
            axis.plot([statistics.mean(values)], [i], "|", color=f"C{i}", ms=18, mew=2)
    axis.set_ylim(len(group) - 0.5, -0.5)


def _cells(group: Sequence[ArmOutcome]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of a model's table, as text."""
    columns: list[tuple[str, Callable[[ArmOutcome], str]]] = [
        ("stack", lambda arm: printable(arm.label)),
        ("validation loss", lambda arm: _spread(arm.values("loss"), lambda value: f"{value:.3f}")),
    ]
    if any(run.load_cv is not None for arm in group for run in (*arm.sweep, *arm.further)):
        columns += [
            ("router load CV", lambda arm: _spread(arm.values("load_cv"), lambda value: f"{value:.2f}")),
            ("dead experts", lambda arm: _spread([100 * v for v in arm.values("dead")], lambda v: f"{v:.0f}", " %")),
        ]
    columns += [
        ("rates", lambda arm: "–" if arm.best is None else f"× {arm.best:g}"),
        (f"loss at × {' · '.join(f'{m:g}' for m in group[0].grid)}", _swept),
        ("note", lambda arm: arm.note),
    ]
    return [name for name, _ in columns], [[text(arm) for _, text in columns] for arm in group]


def _swept(arm: ArmOutcome) -> str:
    by_multiplier = {run.multiplier: "diverged" if run.diverged else f"{run.loss:.3f}" for run in arm.sweep}
    return " · ".join(by_multiplier.get(multiplier, "–") for multiplier in arm.grid)


def _spread(values: Sequence[float], text: Callable[[float], str], unit: str = "") -> str:
    mean, spread = mean_and_spread(values)
    if mean is None:
        return "diverged" if values else "–"
    return (text(mean) if spread is None else f"{text(mean)} ± {text(spread)}") + unit


def _numbers(arms: Iterable[ArmOutcome], settings: dict[str, Any]) -> dict[str, Any]:
    entries = []
    for arm in arms:
        numbers = asdict(arm) | {"best": arm.best, "note": arm.note}
        for measure in ("loss", "load_cv", "dead"):
            mean, spread = mean_and_spread(arm.values(measure))
            numbers[measure] = {"mean": mean, "standard_deviation": spread}
        entries.append(numbers)
    return {"settings": settings, "arms": entries}


def _plain(value: Any) -> Any:
    """Return a JSON-serializable copy: inf and NaN become None, paths become text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _by_model(arms: Iterable[ArmOutcome]) -> dict[str, list[ArmOutcome]]:
    models: dict[str, list[ArmOutcome]] = {}
    for arm in arms:
        models.setdefault(arm.model, []).append(arm)
    return models


def _listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))
