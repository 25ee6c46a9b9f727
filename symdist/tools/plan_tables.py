"""Shows plans as tables for the terminal, and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from symdist.tools.output import drawing
from symdist.tools.plan import Costs, StepPlan
from symdist.tools.tables import PlainTable, in_bytes
from symdist.tools.texts import printable

_HEADINGS = ("sent\na rank", "collectives", "operations\na rank", "peak extra\na rank")


def plan_table(plan: StepPlan) -> Table:
    """Return a table with one row per role and one for the whole step.

    Args:
        plan: The plan.

    Returns:
        The table.
    """
    mesh = " × ".join(f"{name} {size}" for name, size in plan.mesh.items())
    table = PlainTable(f"{plan.model}, recipe {plan.recipe}, {mesh}")
    table.add_column("role", no_wrap=True)
    for heading in ("rule", "strategy", "precision"):
        table.add_column(heading, overflow="fold")
    for heading in ("parameters", "weights", *_HEADINGS):
        table.add_column(heading, justify="right")
    for role in plan.roles:
        strategies = ", ".join(f"{strategy} {count}" for strategy, count in role.strategies.items())
        weights = f"{role.weights:,}"
        precisions = "; ".join(role.precisions)
        table.add_row(
            role.role,
            ", ".join(role.rules),
            strategies,
            precisions,
            str(role.parameters),
            weights,
            *_cells(role.costs),
        )
    parameters, weights = (sum(getattr(role, key) for role in plan.roles) for key in ("parameters", "weights"))
    table.add_section()
    table.add_row("step", "", "", "", str(parameters), f"{weights:,}", *_cells(plan.busiest))
    return table


def summary(plan: StepPlan) -> list[str]:
    """Return lines of text on what the table does not show: balance of work, and estimated times.

    Args:
        plan: The plan.

    Returns:
        The lines.
    """
    hardware = plan.hardware
    ranks = "all ranks" if plan.looked_at == plan.ranks else f"{plan.looked_at} of {plan.ranks:,} ranks looked at"
    stage = ", for what its pipeline stage has" if plan.mesh.get("pp", 1) > 1 else ""
    milliseconds = [
        f"{seconds * 1e3:,.2f} ms" for seconds in (plan.communication_seconds, plan.compute_seconds, plan.model_seconds)
    ]
    return [
        f"The step's row is the most of {ranks}; they send {in_bytes(plan.mean_sent)} on average. A role's row is that "
        f"role alone, on the rank that sends most{stage}; roles share collectives.",
        f"{plan.waves} waves. Work of the busiest rank over the mean: {plan.balance:.3f}; if single ranks own all "
        f"matrices, it cannot go below {max(1.0, plan.indivisible):.3f}.",
        f"At {hardware.bandwidth / 1e9:g} GB/s and {hardware.latency * 1e6:g} µs a collective, "
        f"{hardware.flops / 1e12:g} Tflop/s (float32 products; "
        f"{hardware.speed(torch.float16) / 1e12:g} in float16, {hardware.speed(torch.bfloat16) / 1e12:g} in bfloat16, "
        f"one triangle of symmetric ones) and "
        f"{hardware.model_flops / 1e12:g} Tflop/s achieved on {plan.tokens:,} tokens a data-parallel rank: "
        f"communication {milliseconds[0]}, compute {milliseconds[1]}, forward and backward {milliseconds[2]}; "
        f"the optimizer takes {plan.share:.1%} of a step if nothing overlaps, {plan.overlapped_share:.1%} if its "
        "communication and products overlap.",
    ]


def alternatives_table(plan: StepPlan) -> Table:
    """Return a table that compares the plan with other ways of stepping the same matrices.

    Args:
        plan: A plan made with `alternatives=True`.

    Returns:
        The table.
    """
    table = PlainTable("The same matrices by other ways, a rank and step")
    table.add_column("way")
    for heading in ("sent", "collectives", "operations"):
        table.add_column(heading, justify="right")
    for way in plan.alternatives:
        table.add_row(way.name, in_bytes(way.sent), str(way.collectives), _operations(way.flops))
    return table


def draw(plans: Sequence[StepPlan], path: Path) -> None:
    """Draw a bar chart of the bytes a rank sends per step, stacked by role, over the number of ranks.

    Args:
        plans: Plans of the same model and recipe, one per bar. The rank is the one that sends most.
        path: The image file to write.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter

    roles = [role.role for role in plans[-1].roles]
    bottom = [0.0] * len(plans)
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
    with drawing(path, dpi=150, figsize=(8, 4.5)) as ((axes,),):
        for i, name in enumerate(roles):
            sent = [sum(role.costs.sent for role in plan.roles if role.role == name) for plan in plans]
            if any(sent):
                axes.bar(range(len(plans)), sent, bottom=bottom, label=name, color=colours[i % len(colours)])
                bottom = [below + more for below, more in zip(bottom, sent, strict=True)]
        axes.set_xticks(range(len(plans)), [f"{plan.ranks:,}" for plan in plans])
        axes.set_xlabel("ranks")
        axes.set_ylabel("sent by a rank in a step")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(value)))
        axes.set_title(printable(f"{plans[-1].model}, recipe {plans[-1].recipe}"), loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        if any(bottom):
            axes.legend(frameon=False, ncols=2, fontsize="small")


def _cells(costs: Costs) -> tuple[str, ...]:
    return in_bytes(costs.sent), str(costs.collectives), _operations(costs.flops), in_bytes(costs.peak_bytes)


def _operations(count: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if count < 1000:
            return f"{count:.3g} {unit}flop"
        count /= 1000
    return f"{count:.3g} Pflop"
