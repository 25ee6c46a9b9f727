"""A summary of how the optimizer treats a parameter (role, rule, view, strategy), for reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from symdist.exchange import Strategy
from symdist.param_groups import COMMON
from symdist.param_specs import ParamSpec
from symdist.rules import get_rule
from symdist.rules.registry import ACCUMULATOR_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """How the optimizer treats one parameter, or one section of a parameter.

    Attributes:
        name: The parameter's name; of a section, with its number.
        shape: The shape of the whole tensor, not of this rank's piece.
        role: What the parameter is used for, as its param group says; may be empty.
        rule: The name of its rule.
        options: The options whose values differ from their defaults. These are options of the rule and of its momentum,
            and `weight_decay`, `cautious_weight_decay`, `skip_zero_grad_rows` and `padding_rows`.
        lr: The current learning rate.
        view: How the tensor is read as matrices.
        strategy: Where its rule runs: "local", "reduce" or "owner".
        precision: In which precision its rule computes roots, such as "float16, restarts after 2"; empty if it
            computes none.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    options: dict[str, Any]
    lr: float
    view: Any
    strategy: Strategy
    precision: str = ""


def assignment(spec: ParamSpec, group: Mapping[str, Any], strategy: Strategy, precision: str) -> Assignment:
    """Summarize how the optimizer treats a parameter.

    Args:
        spec: The parameter, or a section of one.
        group: Its param group.
        strategy: Where its rule runs.
        precision: In which precision its rule computes roots.

    Returns:
        The summary.
    """
    defaults = {
        **{key: value for key, value in COMMON.items() if key not in ("view", "strategy", "role", "rounding_step")},
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
        view=spec.view,
        strategy=strategy,
        precision=precision,
    )
