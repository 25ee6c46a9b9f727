"""Draws the curves of a report's page with Bokeh: assigns measures to panels, and thins out long curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from bokeh.models import (
    BoxZoomTool,
    ColumnDataSource,
    DataRange1d,
    HoverTool,
    Line,
    NumeralTickFormatter,
    ResetTool,
    SaveTool,
    Scatter,
    VSpan,
)
from bokeh.plotting import figure

from symdist.tools.run import Run, at_step

# Colors of runs, and of the parts of a measure. They can be told apart on a light and on a dark page.
COLORS = ("#2b8fd6", "#e8742c", "#1fa97c", "#c877b0", "#c9930f", "#58b7ea", "#878f97", "#a3a024")
# Names of the x axes, which are columns of each curve's data.
AXES = ("step", "tokens", "time")
# How much of a smoothed loss stays after a stretch of steps, of which the longest run has `_STRETCHES`. They are names
# of columns: "0" has the values themselves.
SMOOTHING = ("0", "0.5", "0.8", "0.9", "0.95", "0.98", "0.99")
_STRETCHES = 500
# The page shows only so many events of a run, the last ones.
SHOWN_EVENTS = 400
# And so many measures of a run, the first ones; jobs write about a hundred.
MOST_MEASURES = 400
_BAD_EVENTS = ("spike", "nonfinite", "rollback", "save_failed", "timeout", "fallback")
_BAD_COLOR = "#e0503a"

# The most points of all curves together, which come to some megabytes, and the range of the limit for one curve, whose
# upper end is more than a screen has pixels.
_POINTS = 100_000
_POINTS_A_CURVE = (160, 2400)
GROUPS = ("Loss", "Optimizer", "Roles", "Routers", "Logits", "Throughput and memory", "Other")
# Group and title of the measures that jobs write. Other measures are sorted by how their name begins, see _BEGINNINGS.
_MEASURES = {
    "loss": ("Loss", "Loss, nats a token"),
    "gradient_norm": ("Loss", "Gradient norm"),
    "spikes": ("Loss", "Spikes so far"),
    "skipped_steps": ("Loss", "Skipped steps so far"),
    "optimizer_share": ("Optimizer", "Optimizer's share of a step"),
    "optimizer_ms": ("Optimizer", "Optimizer, ms a step"),
    "sent_mb": ("Optimizer", "Sent by a rank, MB a step"),
    "update_rms": ("Roles", "RMS of updates"),
    "weight_rms": ("Roles", "RMS of weights"),
    "nu": ("Roles", "ν"),
    "router_load_cv": ("Routers", "Load CV, mean over layers"),
    "router_load_entropy": ("Routers", "Load entropy"),
    "router_dead": ("Routers", "Share of dead experts"),
    "router_top_load": ("Routers", "Load of the busiest expert"),
    "router_top_expert": ("Routers", "Busiest expert"),
    "router_z": ("Routers", "z-loss"),
    "router_balance": ("Routers", "Balance loss"),
    "logit_rms": ("Logits", "RMS of logits"),
    "logit_max": ("Logits", "Largest logit"),
    "tokens_per_second": ("Throughput and memory", "Tokens a second"),
    "mfu": ("Throughput and memory", "Model flop utilization"),
    "memory_gb": ("Throughput and memory", "Peak memory, GB"),
}
_BEGINNINGS = {
    "loss": "Loss",
    "optimizer": "Optimizer",
    "router": "Routers",
    "logit": "Logits",
    "memory": "Throughput and memory",
    "tokens": "Throughput and memory",
}


@dataclass(frozen=True)
class Panel:
    """A plot of the page.

    Attributes:
        group: The heading that it is under, of `GROUPS`.
        plot: The figure of Bokeh. The tags of a glyph are the index of its run, and "smooth" if it can be smoothed.
        split: Which of its two sets of panels a measure of parts, such as roles, has this one in: a panel for each
            "run" or for each "part". Empty for measures without parts.
        parts: The names of the lines, in the order of their colors, if these are not the runs.
    """

    group: str
    plot: Any
    split: Literal["", "run", "part"] = ""
    parts: Sequence[str] = ()


class _Line(NamedTuple):
    run: int
    kind: str
    part: str
    points: ColumnDataSource


def panels(runs: Sequence[Run]) -> tuple[list[Panel], int]:
    """Draw all curves of the page.

    Args:
        runs: The runs.

    Returns:
        The panels, in order, and the number of lines of a log that were reduced to two points in the most thinned
        curve; 0 if every line is drawn.
    """
    count = sum(min(len(run.measures), MOST_MEASURES) for run in runs)
    limit = min(max(_POINTS // max(count, 1), _POINTS_A_CURVE[0]), _POINTS_A_CURVE[1])
    stretch = max(1, *(run.last_step for run in runs)) / _STRETCHES
    seconds_a_unit = time_unit(runs)[0]
    thinned = 0
    lines: dict[str, list[_Line]] = {}
    for i, run in enumerate(runs):
        for (kind, measure), (steps, values) in islice(run.measures.items(), MOST_MEASURES):
            key, _, part = measure.partition("/")
            width = -(-2 * len(steps) // limit) if len(steps) > limit else 0
            thinned = max(thinned, width)
            smooth = stretch if (kind, measure) == ("train", "loss") else None
            data = _columns(run, *_with_breaks(steps, values), width, seconds_a_unit, smooth)
            # A measure and its parts, such as optimizer_ms and optimizer_ms/local, go into separate panels.
            lines.setdefault(key + "/" * bool(part), []).append(_Line(i, kind, part, ColumnDataSource(data)))
    # One range for all plots, so that zooming into one zooms into all.
    x_range = DataRange1d(only_visible=True)
    order = {key: i for i, key in enumerate(_MEASURES)}
    places = {key: _place(key.rstrip("/")) for key in lines}
    drawn = []
    for key in sorted(lines, key=lambda key: (GROUPS.index(places[key][0]), order.get(key.rstrip("/"), len(order)))):
        group, title = places[key]
        of_key = lines[key]
        if not key.endswith("/"):
            plot = _plot(title, x_range, of_key, runs)
            drawn.append(Panel(group, plot))
            if key == "loss":
                plot.height = 320
                for i, run in enumerate(runs):
                    _mark_events(plot, i, run, seconds_a_unit)
                if validation := [line for line in of_key if line.kind == "validation"]:
                    drawn.append(Panel(group, _plot("Validation loss", x_range, validation, runs)))
            continue
        parts = list(dict.fromkeys(line.part for line in of_key))
        for i, run in enumerate(runs):
            if of_run := [line for line in of_key if line.run == i]:
                name = f"{title}: {run.name}" if len(runs) > 1 else title
                drawn.append(Panel(group, _plot(name, x_range, of_run, runs, parts), "run", parts))
        for part in parts if len(runs) > 1 else ():
            of_part = [line for line in of_key if line.part == part]
            drawn.append(Panel(group, _plot(f"{title}: {part}", x_range, of_part, runs), "part"))
    # The page hides some of the split panels, which would hold the range back as it changes.
    x_range.renderers = [line for panel in drawn if not panel.split for line in panel.plot.renderers]
    return drawn, thinned


def time_unit(runs: Sequence[Run]) -> tuple[int, str]:
    """Return the unit of the axis of training time.

    Args:
        runs: The runs.

    Returns:
        The seconds of one unit, and its name.
    """
    longest = max((run.clock[1][-1] for run in runs if run.clock[1]), default=0)
    return (1, "s") if longest < 300 else (60, "min") if longest < 10800 else (3600, "h")


def thin(values: np.ndarray, width: int) -> np.ndarray:
    """Thin out a curve without losing extremes.

    Of each `width` points, the lowest, the highest and one that is not finite are kept, and of the whole curve the
    ends.

    Args:
        values: The values of the curve, of shape (points,).
        width: The number of points to thin at a time; below 2, all points are kept.

    Returns:
        The indices of the points that are kept, in order.
    """
    if width < 2:
        return np.arange(len(values))
    rows = np.pad(values, (0, -len(values) % width), mode="edge").reshape(-1, width)
    finite = np.isfinite(rows)
    lowest = np.where(finite, rows, np.inf).argmin(1)
    highest = np.where(finite, rows, -np.inf).argmax(1)
    gaps = np.where(finite.all(1), lowest, finite.argmin(1))
    kept = np.concatenate([np.arange(0, rows.size, width) + column for column in (lowest, highest, gaps)])
    return np.unique(np.minimum([0, *kept, len(values)], len(values) - 1))


def smoothed(steps: np.ndarray, values: np.ndarray, kept: float, stretch: float) -> np.ndarray:
    """Return the exponential moving average of a curve.

    Args:
        steps: The step of each point, of shape (points,).
        values: The value of each point, of shape (points,). What is not finite is left as it is.
        kept: How much of the average stays after a stretch of steps, from 0 to below 1.
        stretch: The number of steps in a stretch, so that runs logged more or less often are smoothed alike.

    Returns:
        The averages, of shape (points,).
    """
    averages = values.copy()
    total = weight = 0.0
    before = -math.inf
    for i in np.flatnonzero(np.isfinite(values)):
        # A run that went back begins anew.
        share = kept ** ((steps[i] - before) / stretch) if kept and steps[i] > before else 0.0
        before = steps[i]
        # The sum of weights corrects the beginning, which would otherwise lean towards zero.
        total = share * total + (1 - share) * values[i]
        weight = share * weight + (1 - share)
        averages[i] = total / weight
    return averages


def _with_breaks(steps: Sequence[int], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values as arrays, with a gap where a run went back to an earlier step."""
    x, y = np.array(steps), np.array(values)
    back = np.flatnonzero(np.diff(x) < 0) + 1
    return np.insert(x, back, x[back]), np.insert(y, back, math.nan)


def _columns(
    run: Run, steps: np.ndarray, values: np.ndarray, width: int, seconds_a_unit: int, stretch: float | None
) -> dict[str, np.ndarray]:
    """Return a column for each x axis, and one for each smoothing: the values themselves alone if `stretch` is None."""
    indices = thin(values, width)
    # The page stores values in 32 bits.
    values = np.where(np.abs(values) < np.finfo(np.float32).max, values, math.nan)
    curves = {"0": values}
    if stretch is not None:
        curves |= {kept: smoothed(steps, values, float(kept), stretch) for kept in SMOOTHING[1:]}
    columns = {name: curve[indices].astype(np.float32) for name, curve in curves.items()}
    return {**_along(run, steps[indices], seconds_a_unit), **columns}


def _along(run: Run, steps: np.ndarray, seconds_a_unit: int) -> dict[str, np.ndarray]:
    """Return where steps lie on each x axis; NaN if unknown."""
    unknown = np.full(len(steps), math.nan)
    tokens = unknown if run.tokens_per_step is None else steps * run.tokens_per_step
    seconds = np.array([at_step(*run.clock, step) for step in steps]) if run.clock[0] else unknown
    return {
        "step": steps.astype(np.int32),
        "tokens": tokens.astype(np.float32),
        "time": (seconds / seconds_a_unit).astype(np.float32),
    }


def _plot(
    title: str, x_range: DataRange1d, lines: Sequence[_Line], runs: Sequence[Run], parts: Sequence[str] = ()
) -> Any:
    """Draw lines in the colors of their runs, or of their parts if these are given."""
    largest = max(float(np.abs(np.nan_to_num(line.points.data["0"])).max()) for line in lines)
    plot: Any = figure(
        title=title,
        height=240,
        sizing_mode="stretch_width",
        toolbar_location="above",
        x_range=x_range,
        y_range=DataRange1d(only_visible=True, default_span=largest / 5 or 1),
        # Fit the y axis to what the x axis shows.
        window_axis="x",
        tools=[BoxZoomTool(dimensions="width"), ResetTool(), SaveTool()],
    )
    plot.toolbar.update(logo=None, autohide=True)
    plot.xaxis.formatter = NumeralTickFormatter(format="0.[000]a")
    renderers = []
    # The methods of a figure, such as `line`, make four more models a line, which takes seconds on a page of many.
    for run, kind, part, points in lines:
        i = parts.index(part) if parts else run
        color, name = COLORS[i % len(COLORS)], part if parts else runs[run].name
        looks: dict[str, Any] = {"line_color": color, "line_dash": "solid" if i < len(COLORS) else "dashed"}
        smooth = len(points.data) > len(AXES) + 1
        line = Line(x="step", y="0", line_alpha=0.3 if smooth else 1, tags=[run], **looks)
        renderers.append(plot.add_glyph(points, line, name=name if kind == "train" else f"{name}, {kind}"))
        if smooth:
            plot.add_glyph(points, Line(x="step", y="0", line_width=1.6, tags=[run, "smooth"], **looks))
        if kind != "train" or len(points.data["step"]) == 1:
            dots = Scatter(x="step", y="0", size=5, line_color=color, fill_color=color, tags=[run])
            plot.add_glyph(points, dots)
    tooltips = [("", "$name: @0{%.5g}"), ("step", "@step{0,0}")]
    # Several tools, so that what they show lies around the lines and not in one heap.
    for k, side in enumerate(("above", "below", "left", "right")[: len(renderers)]):
        hover = HoverTool(renderers=renderers[k::4], tooltips=tooltips, formatters={"@0": "printf"}, mode="vline")
        hover.update(attachment=side, visible=False)
        plot.add_tools(hover)
    return plot


def _mark_events(plot: Any, i: int, run: Run, seconds_a_unit: int) -> None:
    """Draw a run's events as vertical lines: red if bad, faint for checkpoints, and otherwise dashed."""
    events = [e for e in run.events[-SHOWN_EVENTS:] if e.get("step") is not None and e.get("event")]
    if not events:
        return
    kinds = [str(event["event"]) for event in events]
    points = ColumnDataSource(
        {
            **_along(run, np.array([event["step"] for event in events]), seconds_a_unit),
            "event": kinds,
            "text": [str(event.get("text", "")) for event in events],
            "color": [_BAD_COLOR if kind in _BAD_EVENTS else COLORS[i % len(COLORS)] for kind in kinds],
            "dash": ["solid" if kind in _BAD_EVENTS else "dashed" for kind in kinds],
            "alpha": [0.3 if kind == "save" else 0.8 for kind in kinds],
        }
    )
    span = VSpan(x="step", line_color="color", line_dash="dash", line_alpha="alpha", tags=[i])
    marks = plot.add_glyph(points, span, name=run.name)
    tooltips = [("$name", "@event at step @step{0,0}. @text")]
    plot.add_tools(HoverTool(renderers=[marks], tooltips=tooltips, visible=False))


def _place(measure: str) -> tuple[str, str]:
    if measure in _MEASURES:
        return _MEASURES[measure]
    words = measure.replace("_", " ")
    title = words[:1].upper() + words[1:]
    return next((group for start, group in _BEGINNINGS.items() if measure.startswith(start)), "Other"), title
