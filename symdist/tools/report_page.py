"""Makes the page of a report: one HTML file with its data, style and script, which loads nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from bokeh.document import Document
from bokeh.embed import components
from bokeh.resources import Resources

from symdist.tools.report_curves import COLORS, GROUPS, MOST_MEASURES, SHOWN_EVENTS, SMOOTHING, Panel, panels, time_unit
from symdist.tools.run import Run
from symdist.tools.run_format import RUN, assignments_of
from symdist.tools.tables import in_bytes, route_table

# Settings that differ between any two runs, and are left out of their comparison.
_ALWAYS_DIFFERENT = ("output", "started")

_CONTROLS = """
<form class="controls" name="controls" autocomplete="off">
<div class="legend" role="group" aria-label="Runs shown">{runs}</div>
<fieldset><legend>x axis</legend>
<label><input type="radio" name="axis" value="step" checked>step</label>
<label><input type="radio" name="axis" value="tokens"{no_tokens}>tokens</label>
<label><input type="radio" name="axis" value="time"{no_time}>training time ({unit})</label></fieldset>
<label><input type="checkbox" name="log"> log y</label>
<label>smooth loss <select name="smooth">{smoothing}</select></label>
<label{no_split}>roles <select name="split"><option value="run">a panel for each run</option>
<option value="part">a panel for each role</option></select></label>
<label{no_pause}><input type="checkbox" name="pause"> pause</label>
</form>
"""


def page(runs: Sequence[Run], *, live: bool, every: float, now: float) -> str:
    """Return the page of a report as HTML.

    Args:
        runs: The runs.
        live: Whether the page reloads itself.
        every: Seconds between two reloads.
        now: The current time, in seconds since the epoch.

    Returns:
        The text of the page.
    """
    names = ", ".join(run.name for run in runs)
    drawn, thinned = panels(runs)
    document = Document()
    # Bokeh would otherwise go through all models again for each plot.
    with document.models.freeze():
        for panel in drawn:
            document.add_root(panel.plot)
    plots_script, plot_divs = components([panel.plot for panel in drawn], wrap_script=False) if drawn else ("", [])
    places = [
        f'<div class="plot {panel.split}{" wide" if i == 0 else ""}" role="img" '
        f'aria-label="{escape(panel.plot.title.text)}">{div}'
        + "".join(f"<span>{_swatch(j)}{escape(part)}</span>" for j, part in enumerate(panel.parts))
        + "</div>"
        for i, (panel, div) in enumerate(zip(drawn, plot_divs, strict=True))
    ]
    grids = {
        group: "".join(place for panel, place in zip(drawn, places, strict=True) if panel.group == group)
        for group in GROUPS
    }
    body = [
        f"<header><h1>{escape(names if len(runs) < 4 else f'{len(runs)} runs')}</h1>"
        f"<p>{escape(_subtitle(runs))}</p></header>",
        _section("Runs", _summary(runs, now) + _notes(runs), key="runs"),
        _controls(runs, drawn, live),
        '<noscript><p class="note">The curves are drawn by a script, which this browser does not run.</p></noscript>',
        *(_section(group, f'<div class="grid">{grid}</div>' if grid else "", key="") for group, grid in grids.items()),
        _section("Events", _events(runs), key="events"),
        _section("Configuration", _configuration(runs), key="configuration"),
        _section("Routing", _routing(runs), key="routing"),
        _section("Plan of a step", _plans(runs), key="plan"),
    ]
    note = (
        "Every line of the logs is drawn. "
        if not thinned
        else (
            f"Long curves are thinned to the lowest and highest of each {thinned} lines or fewer: no extreme is lost. "
        )
    )
    reloads = f' data-every="{every}"' if live else ""
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; img-src data:\">",
            f'<link rel="icon" href="data:,"><title>{escape(names)}</title>',
            f"<style>\n{_asset('style.css')}</style>",
            Resources(mode="inline", components=["bokeh"]).render_js(),
            f"</head><body{reloads}><main>",
            *body,
            f"<footer>{note}Not-a-number and infinite values are gaps. Training time is what the logged throughput "
            f"comes to; validation and checkpoints are not in it. Written {_clock_time(now)}.</footer></main>",
            f"<script>\n{plots_script}\n{_asset('page.js')}</script></body></html>\n",
        ]
    )


def _controls(runs: Sequence[Run], drawn: Sequence[Panel], live: bool) -> str:
    return _CONTROLS.format(
        runs="".join(
            f'<label class="chip"><input type="checkbox" name="run" value="{i}" checked>{_swatch(i)}{escape(run.name)}'
            "</label>"
            for i, run in enumerate(runs)
        ),
        no_tokens="" if any(run.tokens_per_step for run in runs) else " disabled",
        no_time="" if any(run.clock[0] for run in runs) else " disabled",
        unit=time_unit(runs)[1],
        smoothing="".join(f"<option>{kept}</option>" for kept in SMOOTHING),
        no_split="" if any(panel.split == "part" for panel in drawn) else " hidden",
        no_pause="" if live else " hidden",
    )


def _clock_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


@dataclass(frozen=True)
class Column:
    """A column of the table of runs.

    Attributes:
        heading: The heading.
        cells: The text for each run, empty if unknown.
    """

    heading: str
    cells: tuple[str, ...]


def summary_columns(runs: Sequence[Run], now: float) -> list[Column]:
    """Return the columns of the table of runs. Columns without a value in any run are left out.

    Args:
        runs: The runs.
        now: The current time, in seconds since the epoch.

    Returns:
        The columns.
    """

    def figures(heading: str, form: str, measure: str, kind: str = "train") -> Column:
        values = [run.figure(measure, kind) for run in runs]
        return Column(heading, tuple("" if value is None else form.format(value) for value in values))

    columns = [
        Column("run", tuple(run.name for run in runs)),
        Column("state", tuple(run.state(now).text for run in runs)),
        Column("step", tuple(f"{run.last_step:,}" + (f" of {run.steps:,}" if run.steps else "") for run in runs)),
        figures("training loss", "{:.3f}", "loss"),
        figures("validation loss", "{:.3f}", "loss", "validation"),
        figures("router load CV", "{:.2f}", "router_load_cv", "validation"),
        figures("dead experts", "{:.0%}", "router_dead", "validation"),
        figures("tokens/s", "{:,.0f}", "tokens_per_second"),
        figures("optimizer share", "{:.1%}", "optimizer_share"),
        figures("MFU", "{:.1%}", "mfu"),
        figures("memory GB", "{:.1f}", "memory_gb"),
        figures("skipped", "{:.0f}", "skipped_steps"),
        figures("spikes", "{:.0f}", "spikes"),
    ]
    return [column for column in columns if any(column.cells)]


def model_line(runs: Sequence[Run]) -> str:
    """Return one line on what the runs have in common: model, parameters, tokens and ranks.

    Args:
        runs: The runs.

    Returns:
        The line, without what differs or is unknown.
    """

    def common(key: str) -> Any:
        values = [run.fact(key) for run in runs]
        return values[0] if all(value == values[0] for value in values) else None

    parts = [common("model") or "several models"]
    if parameters := common("parameters"):
        active = common("active_parameters")
        note = f" ({_si(active)} active)" if active and active != parameters else ""
        parts.append(f"{_si(parameters)} parameters{note}")
    steps, tokens = common("steps"), {run.tokens_per_step for run in runs}
    if steps and len(tokens) == 1 and (step_tokens := tokens.pop()):
        parts.append(f"{_si(steps * step_tokens)} tokens")
    if ranks := common("ranks"):
        parts.append("1 rank" if ranks == 1 else f"{ranks:,} ranks")
    return ", ".join(parts) if len(parts) > 1 or common("model") else ""


def _subtitle(runs: Sequence[Run]) -> str:
    launchers = sorted({run.facts["launcher"] for run in runs if run.facts.get("launcher")})
    return ", ".join(filter(None, [model_line(runs), *launchers]))


def _summary(runs: Sequence[Run], now: float) -> str:
    columns = summary_columns(runs, now)
    rows = []
    for i, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        state = runs[i].state(now).kind
        name, state_text, *others = map(escape, cells)
        rows.append([f"{_swatch(i)}{name}", f'<span class="state {state}">{state_text}</span>', *others])
    return _table([column.heading for column in columns], rows, numbers=2)


def _notes(runs: Sequence[Run]) -> str:
    """Return what is left out of the page."""
    notes = [f"{run.name}: {problem}." for run in runs for problem in run.problems]
    for run in runs:
        if (count := len(run.measures)) > MOST_MEASURES:
            notes.append(f"{run.name}: the first {MOST_MEASURES} of {count:,} measures are drawn.")
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _events(runs: Sequence[Run]) -> str:
    rows = []
    for i, run in enumerate(runs):
        for event in run.events[-SHOWN_EVENTS:]:
            kind = escape(str(event.get("event", "")))
            seconds = event.get("time")
            stamp = "" if seconds is None else _clock_time(seconds)
            cells = [stamp, f"{_swatch(i)}{escape(run.name)}", escape(str(event.get("step", "")))]
            rows.append(
                (
                    seconds or 0,
                    [*cells, f'<span class="event {kind}">{kind}</span>', escape(str(event.get("text", "")))],
                )
            )
    notes = []
    for run in runs:
        if len(run.events) > SHOWN_EVENTS:
            notes.append(f"{run.name}: the last {SHOWN_EVENTS} of {len(run.events):,} events are shown.")
    if not rows:
        return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    rows.sort(key=lambda row: row[0])
    text = _table(["time", "run", "step", "event", ""], [row for _, row in rows])
    if len(rows) > 12:
        text = _details(f"{len(rows)} events", text, key="all-events")
    return text + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _configuration(runs: Sequence[Run]) -> str:
    flat = [dict(_flat(_settings(run))) for run in runs]
    # Compare only runs with known settings; a run without any would differ in all of them.
    known = [i for i, run in enumerate(runs) if run.facts]
    keys = dict.fromkeys(key for i in known for key in flat[i] if key.rpartition(".")[2] not in _ALWAYS_DIFFERENT)
    differing = [key for key in keys if len({flat[i].get(key) for i in known}) > 1]
    text = ""
    if differing:
        heads = ["", *(f"{_swatch(i)}{escape(runs[i].name)}" for i in known)]
        rows = [[escape(key), *(escape(flat[i].get(key, "–")) for i in known)] for key in differing]
        text = "<h3>Where the runs differ</h3>" + _table(heads, rows, raw_heads=True)
    elif len(known) > 1:
        text = '<p class="note">The runs were given the same configuration.</p>'
    without = [run.name for run in runs if not run.facts]
    if without:
        text += f'<p class="note">No {RUN}: {escape(", ".join(without))}. Only what the summary says is known.</p>'
    for i, run in enumerate(runs):
        if flat[i]:
            rows = [[escape(key), escape(value)] for key, value in flat[i].items()]
            text += _details(
                f"{_swatch(i)}{escape(run.name)}", _table(["setting", "value"], rows), key=f"config-{i}", raw=True
            )
    return text


def _settings(run: Run) -> dict[str, Any]:
    if run.facts:
        config = run.facts.get("config") or {}
        # Jobs also write some settings of their configuration outside of it. Leave out these repetitions.
        return {key: value for key, value in run.facts.items() if config.get(key) != value}
    keys = ("model", "recipe", "steps", "ranks", "parameters", "active_parameters")
    return {key: value for key, value in run.summary.items() if key in keys} if run.summary else {}


def _flat(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(settings, dict) and settings:
        for name, value in settings.items():
            yield from _flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, settings if isinstance(settings, str) else json.dumps(settings)


def _routing(runs: Sequence[Run]) -> str:
    from symdist.tools.preview import Preview

    def routing_of(run: Run) -> str:
        if not run.routing:
            return ""
        # Use the table of `symdist route`, so that both look the same.
        routed = Preview(parameters=assignments_of(run.routing), groups=0, stacks=0, collectives=0, sent=0)
        table = route_table(routed, title="", fold=True)
        cells = zip(*([escape(str(cell)) for cell in column.cells] for column in table.columns), strict=True)
        return _table([str(column.header) for column in table.columns], [list(row) for row in cells])

    return _once_if_alike(runs, routing_of, key="route")


def _plans(runs: Sequence[Run]) -> str:
    def plan_of(run: Run) -> str:
        plan = run.plan
        if not plan:
            return ""
        kinds = [
            [escape(str(kind["kind"])), f"{kind['ranks']:,}", f"{kind['count']:,}", in_bytes(kind["sent"])]
            for kind in plan.get("kinds", [])
        ]
        roles = [
            [
                escape(role["role"]),
                escape(", ".join(role["rules"])),
                escape(", ".join(f"{strategy} {count}" for strategy, count in role["strategies"].items())),
                f"{role['parameters']:,}",
                f"{role['weights']:,}",
            ]
            for role in plan.get("roles", [])
        ]
        return (
            f"<p>A rank's step starts {plan['collectives']:,} collectives in {plan['waves']:,} waves and sends "
            f"{in_bytes(plan['sent'])}.</p>"
            + (_table(["collective", "ranks", "count", "sent by a rank"], kinds, numbers=1) if kinds else "")
            + (_table(["role", "rules", "strategy", "parameters", "weights"], roles, numbers=3) if roles else "")
        )

    return _once_if_alike(runs, plan_of, key="plan")


def _once_if_alike(runs: Sequence[Run], text_of: Callable[[Run], str], *, key: str) -> str:
    """Return the text on each run, written only once for runs whose text is the same.

    Ids of HTML elements begin with `key`.
    """
    runs_by_text: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        runs_by_text.setdefault(text_of(run), []).append(i)
    runs_by_text.pop("", None)
    return "".join(
        _details(
            " ".join(f"{_swatch(i)}{escape(runs[i].name)}" for i in alike), text, key=f"{key}-{alike[0]}", raw=True
        )
        for text, alike in runs_by_text.items()
    )


def _section(title: str, content: str, *, key: str) -> str:
    return f'<section id="{key}"><h2>{title}</h2>{content}</section>' if content else ""


def _details(summary: str, content: str, *, key: str, raw: bool = False) -> str:
    return f'<details id="{key}"><summary>{summary if raw else escape(summary)}</summary>{content}</details>'


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int | None = None, raw_heads: bool = False
) -> str:
    """Return a table of cells that are HTML already. Columns from index `numbers` on are aligned to the right."""

    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{' class=n' if numbers is not None and i >= numbers else ''}>{text}</{tag}>"

    head = "".join(cell("th", i, text if raw_heads else escape(text)) for i, text in enumerate(heads))
    body = "".join("<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _swatch(i: int) -> str:
    color = COLORS[i % len(COLORS)]
    return f'<i class="swatch" style="--run:{color}"{" data-second" if i >= len(COLORS) else ""}></i>'


def _si(count: float) -> str:
    for unit in ("", " k", " M", " B"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def _asset(name: str) -> str:
    return files("symdist.tools").joinpath("page", name).read_text(encoding="utf-8")
