"""Describes a run for later readers of its folder: configuration, versions, routing and plan."""

import dataclasses
import math
import platform
import time
from collections import Counter
from importlib import metadata
from typing import Any

import torch

from symdist import SymDist
from symdist.tools.run_format import (
    PLAN,
    ROUTING,
    RUN,
    PlanFacts,
    RoutingEntry,
    RunFacts,
    routing_entries,
)

_PACKAGES = ("torch", "symdist", "transformers", "deepspeed", "megatron-core")


def describe(
    config: Any,
    *,
    launcher: str,
    mesh: dict[str, int],
    ranks: int,
    device: str,
    parameters: int,
    active_parameters: int,
    optimizer: SymDist | None,
) -> dict[str, Any]:
    """Return the contents of the files that describe a run.

    Args:
        config: The run's configuration, a dataclass.
        launcher: Name of the engine.
        mesh: Sizes of the parallel dimensions by name.
        ranks: Number of ranks.
        device: Name of the GPU, or "cpu".
        parameters: Number of the model's weights.
        active_parameters: Number of weights that a token uses.
        optimizer: The SymDist optimizer, whose routing and plan are described; None if the run uses another one.

    Returns:
        Contents by file name, for `RunLog.describe`; `symdist.tools.run_format` says what they hold.
    """
    facts: RunFacts = {
        "model": config.model,
        "recipe": config.recipe,
        "steps": config.steps,
        "tokens_per_step": config.batch * config.sequence,
        "launcher": launcher,
        "mesh": mesh,
        "ranks": ranks,
        "device": device,
        "parameters": parameters,
        "active_parameters": active_parameters,
        "started": time.time(),
        "versions": {"python": platform.python_version(), **_versions()},
        "config": dataclasses.asdict(config),
    }
    files: dict[str, Any] = {RUN: facts}
    if optimizer is not None:
        files[ROUTING] = routing = routing_entries(optimizer.assignments())
        files[PLAN] = _plan(optimizer, routing)
    return files


def _versions() -> dict[str, str]:
    versions = {"torch": str(torch.__version__)}
    for name in _PACKAGES[1:]:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _plan(optimizer: SymDist, routing: list[RoutingEntry]) -> PlanFacts:
    """Return what this rank sends per step, by kind of collective, and how each role is stepped."""
    counting = optimizer.trace_collectives()
    kinds: dict[tuple[str, int], list[float]] = {}
    for record in counting.log:
        kinds.setdefault((record.kind, record.size), []).append(record.sent)
    roles: dict[str, list[RoutingEntry]] = {}
    for entry in routing:
        roles.setdefault(entry["role"], []).append(entry)
    return {
        "collectives": counting.collectives,
        "sent": counting.sent,
        "waves": len(optimizer.plan().waves),
        "kinds": [
            {"kind": kind, "ranks": ranks, "count": len(sent), "sent": sum(sent)}
            for (kind, ranks), sent in kinds.items()
        ],
        "roles": [
            {
                "role": role,
                "rules": sorted({entry["rule"] for entry in entries}),
                "parameters": len(entries),
                "weights": sum(math.prod(entry["shape"]) for entry in entries),
                "strategies": dict(Counter(entry["strategy"] for entry in entries)),
            }
            for role, entries in roles.items()
        ],
    }
