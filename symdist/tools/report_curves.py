"""Prepares the curves of a report's page: assigns measures to panels, and thins out long curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from symdist.tools.run import Run, at_step

# The most points of all curves together, which come to some megabytes, and the range of the limit for one curve, whose
# upper end is more than a screen has pixels.
_POINTS = 200_000
_POINTS_A_CURVE = (160, 2400)
_CLOCK_POINTS = 200
_GROUPS = ("Loss", "Optimizer", "Roles", "Routers", "Logits", "Throughput and memory", "Other")
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


def curves(runs: Sequence[Run]) -> tuple[dict[str, Any], int]:
    """Return the data of all curves for the page's script.

    Args:
        runs: The runs.

    Returns:
        The data, and the number of lines of a log that were reduced to two points in the most thinned curve; 0 if every
        line is drawn.
    """
    count = sum(len(run.measures) for run in runs)
    limit = min(max(_POINTS // max(count, 1), _POINTS_A_CURVE[0]), _POINTS_A_CURVE[1])
    thinned = 0
    panels: dict[str, dict[str, Any]] = {}
    for i, run in enumerate(runs):
        for (kind, measure), (steps, values) in run.measures.items():
            key, _, part = measure.partition("/")
            # A measure and its parts, such as optimizer_ms and optimizer_ms/local, go into separate panels.
            group, title = _place(key)
            panel = panels.setdefault(
                key + "/" * bool(part), {"key": key, "group": group, "title": title, "parts": [], "curves": []}
            )
            if part and part not in panel["parts"]:
                panel["parts"].append(part)
            width = max(1, -(-2 * len(steps) // limit)) if len(steps) > limit else 1
            thinned = max(thinned, width if width > 1 else 0)
            curve = {"run": i, "kind": kind, "part": part, **_encoded(*thin(steps, values, width))}
            if width > 1 and (kind, measure) == ("train", "loss"):
                curve["mean"] = _encoded(*means(steps, values, width))
            panel["curves"].append(curve)
    order = {key: i for i, key in enumerate(_MEASURES)}
    ordered = sorted(
        panels.values(),
        key=lambda panel: (_GROUPS.index(panel["group"]), order.get(panel["key"], len(order)), panel["title"]),
    )
    if any(curve["kind"] != "train" for curve in panels.get("loss", {"curves": []})["curves"]):
        validation_curves = [curve for curve in panels["loss"]["curves"] if curve["kind"] == "validation"]
        index = ordered.index(panels["loss"]) + 1
        ordered.insert(
            index, {**panels["loss"], "key": "validation", "title": "Validation loss", "curves": validation_curves}
        )
    data = {
        "groups": _GROUPS,
        "panels": ordered,
        "runs": [
            {"name": run.name, "tokens": run.tokens_per_step, "clock": _clock(run), "last": run.last_step}
            for run in runs
        ],
    }
    return data, thinned


def thin(steps: Sequence[int], values: Sequence[float], width: int) -> tuple[list[int], list[float]]:
    """Thin out a curve without losing extremes.

    Of each `width` points, the lowest, the highest and one that is not finite are kept, and of the whole curve the
    ends.

    Args:
        steps: The steps.
        values: The value at each step.
        width: The number of points to thin at a time; below 2, all points are kept.

    Returns:
        The steps and values that are kept, in order.
    """
    if width < 2:
        return list(steps), list(values)
    kept = {0, len(steps) - 1}
    for start in range(0, len(steps), width):
        bucket = range(start, min(start + width, len(steps)))
        finite = [i for i in bucket if math.isfinite(values[i])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(bucket):
            kept.add(next(i for i in bucket if not math.isfinite(values[i])))
    indices = sorted(kept)
    return [steps[i] for i in indices], [values[i] for i in indices]


def means(steps: Sequence[int], values: Sequence[float], width: int) -> tuple[list[int], list[float]]:
    """Average a curve over each `width` points.

    Args:
        steps: The steps.
        values: The value at each step. Values that are not finite are ignored.
        width: The number of points to average.

    Returns:
        The last step of each `width` points, and their mean.
    """
    averaged: tuple[list[int], list[float]] = ([], [])
    for start in range(0, len(steps), width):
        finite = [value for value in values[start : start + width] if math.isfinite(value)]
        averaged[0].append(steps[min(start + width, len(steps)) - 1])
        averaged[1].append(sum(finite) / len(finite) if finite else math.nan)
    return averaged


def _encoded(steps: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
    # Store differences of steps, since they are short numbers and steps make up much of a page with many curves.
    jumps = [step - previous for step, previous in zip(steps, [0, *steps], strict=False)]
    return {"steps": jumps, "values": [_short(value) for value in values]}


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) and abs(value) < 1e15 else float(f"{value:.5g}")


def _clock(run: Run) -> dict[str, Any] | None:
    steps, seconds = run.clock
    if not steps:
        return None
    # The last line may belong to a validation, after the last line with a throughput.
    end = max(run.last_step, steps[-1])
    marks = sorted({round(end * i / _CLOCK_POINTS) for i in range(_CLOCK_POINTS + 1)})
    return {"steps": marks, "seconds": [_short(at_step(steps, seconds, step)) for step in marks]}


def _place(measure: str) -> tuple[str, str]:
    if measure in _MEASURES:
        return _MEASURES[measure]
    words = measure.replace("_", " ")
    title = words[:1].upper() + words[1:]
    return next((group for start, group in _BEGINNINGS.items() if measure.startswith(start)), "Other"), title
