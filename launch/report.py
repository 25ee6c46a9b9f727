"""Set finished runs side by side: a table on the terminal and a picture of losses and router balance."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run as a script, Python looks for `launch` beside this file instead of around it.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.runlog import LOG, SUMMARY


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: its folder's name, its summary, and its log lines by kind."""

    name: str
    summary: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]

    def curve(self, kind: str, measure: str) -> tuple[list[float], list[float]]:
        """Tokens seen and a measure of the lines of a kind."""
        tokens = self.summary["tokens"] / self.summary["steps"]
        lines = [line for line in self.lines.get(kind, []) if measure in line]
        return [line["step"] * tokens for line in lines], [line[measure] for line in lines]


def read_run(folder: Path) -> Run:
    """A run from its folder; ValueError where it is missing or did not come to its end."""
    for name in (LOG, SUMMARY):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}: it is no run, or one that did not come to its end")
    lines: dict[str, list[dict[str, Any]]] = {}
    for text in (folder / LOG).read_text().splitlines():
        line = json.loads(text)
        lines.setdefault(line["kind"], []).append(line)
    return Run(name=folder.name, summary=json.loads((folder / SUMMARY).read_text()), lines=lines)


def print_table(runs: list[Run]) -> None:
    """The table; router columns are empty for dense models."""
    from rich.console import Console
    from rich.table import Table

    first = runs[0].summary
    table = Table(
        title=f"{first['model']}, {first['parameters'] / 1e6:.1f} M parameters, {first['tokens'] / 1e3:.0f} k tokens, "
        f"{first['ranks']} ranks"
    )
    for column in ("stack", "validation loss", "router load CV", "dead experts", "tokens/s", "optimizer share"):
        table.add_column(column, justify="left" if column == "stack" else "right")
    for run in runs:
        s = run.summary
        cv, dead = s.get("validation_router_load_cv"), s.get("validation_router_dead")
        table.add_row(
            run.name,
            f"{s['validation_loss']:.3f}",
            "–" if cv is None else f"{cv:.2f}",
            "–" if dead is None else f"{dead:.0%}",
            f"{s['tokens_per_second']:,.0f}",
            f"{s['optimizer_share']:.1%}",
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def draw(runs: list[Run], path: Path) -> None:
    """Validation and training loss, and the routers' load over the experts, against tokens seen; written to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    routed = any(run.curve("train", "router_load_cv")[0] for run in runs)
    figure, axes = pyplot.subplots(1, 3 if routed else 1, figsize=(13 if routed else 6, 4), squeeze=False)
    panels = [("loss", "next-token loss (nats)")]
    if routed:
        panels += [("router_load_cv", "router load CV, mean over layers"), ("router_dead", "share of dead experts")]
    for axis, (measure, label) in zip(axes[0], panels, strict=True):
        for i, run in enumerate(runs):
            axis.plot(*run.curve("train", measure), color=f"C{i}", alpha=0.35 if measure == "loss" else 1, lw=1.2)
            if measure == "loss":
                axis.plot(*run.curve("validation", measure), color=f"C{i}", marker="o", ms=3)
            axis.plot([], [], color=f"C{i}", label=run.name)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel("tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0][0].set_title("faint: training, dots: validation", fontsize=9)
    axes[0][0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def report(runs: list[Path], picture: Path) -> None:
    """Read the runs, print their table, and write their picture."""
    read = [read_run(folder) for folder in runs]
    print_table(read)
    draw(read, picture)
    print(f"picture: {picture}")


def main() -> int:
    """The command line: the run folders, and where the picture goes."""
    import tyro
    from tyro.conf import Positional

    def command(runs: Positional[tuple[Path, ...]], picture: Path = Path("runs/report.png")) -> None:
        report(list(runs), picture)

    try:
        tyro.cli(command, description=__doc__)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
