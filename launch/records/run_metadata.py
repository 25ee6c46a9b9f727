"""Describes a run for later readers of its folder: configuration, versions, routing and plan."""

import dataclasses
import math
import platform
import time
from collections import Counter as Tally
from importlib import metadata
from typing import Any

import torch

from symdist import SymDist
from symdist.tools.run_log import PLAN, ROUTING, RUN

_PACKAGES = ("torch", "symdist", "transformers", "deepspeed", "megatron-core")


def describe(
    config: Any, *, launcher: str, mesh: dict[str, int], numbers: dict[str, Any], optimizer: SymDist | None
) -> dict[str, Any]:
    """Return the contents of the files that describe a run.

    Args:
        config: The run's configuration, a dataclass.
        launcher: Name of the engine.
        mesh: Sizes of the parallel dimensions by name.
        numbers: More values for the run's own file, such as the parameter count.
        optimizer: The SymDist optimizer, whose routing and plan are described; None if the run uses another one.

    Returns:
        Contents by file name, for `RunLog.describe`.
    """
    values = dataclasses.asdict(config)
    files: dict[str, Any] = {
        RUN: {
            "model": config.model,
            "recipe": config.recipe,
            "steps": config.steps,
            "tokens_per_step": config.batch * config.sequence,
            "launcher": launcher,
            "mesh": mesh,
            **numbers,
            "started": time.time(),
            "versions": {"python": platform.python_version(), **_versions()},
            "config": values,
        }
    }
    if optimizer is not None:
        routing = optimizer.assignments()
        files[ROUTING] = [dataclasses.asdict(each) for each in routing]
        files[PLAN] = _plan(optimizer, files[ROUTING])
    return files


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}
    for name in _PACKAGES[1:]:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _plan(optimizer: SymDist, routing: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what this rank sends per step, by kind of collective, and how each role is stepped."""
    counted = optimizer.trace_collectives()
    kinds: dict[tuple[str, int], list[float]] = {}
    for moved in counted.log:
        kinds.setdefault((moved.kind, moved.size), []).append(moved.sent)
    roles: dict[str, list[dict[str, Any]]] = {}
    for each in routing:
        roles.setdefault(each["role"], []).append(each)
    return {
        "collectives": counted.collectives,
        "sent": counted.sent,
        "waves": len(optimizer.plan().waves),
        "kinds": [
            {"kind": kind, "ranks": ranks, "count": len(sent), "sent": sum(sent)}
            for (kind, ranks), sent in kinds.items()
        ],
        "roles": [
            {
                "role": role,
                "rules": sorted({each["rule"] for each in members}),
                "parameters": len(members),
                "weights": sum(math.prod(each["shape"]) for each in members),
                "strategies": dict(Tally(each["strategy"] for each in members)),
            }
            for role, members in roles.items()
        ],
    }
