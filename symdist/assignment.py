"""What became of a parameter: its role and rule, how it is seen, and where it is stepped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from symdist.exchange import Strategy
from symdist.param_groups import COMMON, ParamSpec
from symdist.rules import get_rule
from symdist.rules.registry import ACCUMULATOR_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One parameter: what it is, and how and where it is stepped.

    `shape` is that of the whole tensor. `options` are those of its rule, and the decay, rows skipped and padding rows,
    that are not at their defaults.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    options: dict[str, Any]
    lr: float
    view: Any
    strategy: Strategy


def assignment(spec: ParamSpec, group: Mapping[str, Any], strategy: Strategy) -> Assignment:
    """A member of a param group as its reader sees it."""
    defaults = {
        **{key: value for key, value in COMMON.items() if key not in ("view", "strategy", "role")},
        **ACCUMULATOR_OPTIONS[spec.rule.accumulator],
        **get_rule(group["rule"]).defaults,
    }
    return Assignment(
        name=spec.name,
        shape=spec.layout.shape,
        role=group["role"],
        rule=group["rule"],
        options={key: group[key] for key, value in defaults.items() if group[key] != value},
        lr=float(group["lr"]),
        view=group["view"],
        strategy=strategy,
    )
