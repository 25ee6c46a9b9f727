"""Which weights score experts, and which biases belong to these."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.param_names import class_name
from symdist.routing.facts import is_linear
from symdist.routing.param_site import Evidence
from symdist.routing.weight import Weight

_NAMES = ("router", "gate", "classifier", "wg")
_CLASS = re.compile(r"(Router|RouterMLP|Gating)$")


def router_evidence(weight: Weight) -> Evidence | None:
    """Return what tells that a weight scores experts.

    Args:
        weight: The weight.

    Returns:
        The class of a router around it, the number of experts beside it, or its name; None if it scores none.
    """
    if len(weight.shape) != 2 or weight.shape[0] == 1 or weight.leaf != "weight":
        return None
    counts = weight.facts.expert_counts(weight.chain)
    for _, module in weight.chain[-3:]:
        if _CLASS.search(class_name(module)):
            # One matrix scores experts; others, if any, lead up to it, or scale noise.
            named = [(name, whole_shape(p)) for name, p in module.named_parameters() if "noise" not in name]
            shapes = [shape for _, shape in named if len(shape) == 2 and shape[0] > 1]
            scores = [shape for shape in shapes if shape[0] in counts] or shapes
            is_score = weight.shape == scores[-1] if scores else False
            return "class" if is_score and "noise" not in weight.attribute else None
    if not weight.linear:
        return None
    # Where the layer is all that a gate holds, its place is that of the gate.
    name, holder = (weight.attribute, weight.parent) if not weight.held else (weight.word, weight.holder)
    own = _experts_in(holder)
    experts = None if own is None else _count_experts(own)
    if experts is not None and not _has_router(holder) and weight.shape[0] == experts:
        return "config"
    if name not in _NAMES:
        return None
    if experts is not None and weight.shape[0] != experts:
        # A shared expert's gate may lie beside, too.
        others: list[Any] = [m for m in holder.children() if is_linear(m) and m is not weight.module]
        return "name" if all(whole_shape(other.weight)[0] != experts for other in others) else None
    if weight.shape[0] in counts:
        return "config"
    beside = any(_experts_in(module) is not None for _, module in weight.chain[-3:-1])
    few = name == "router" and weight.width is not None and weight.shape[0] < weight.width
    return "name" if beside or few else None


def is_router_bias(weight: Weight) -> bool:
    """Return whether a bias is one of scores of experts.

    Args:
        weight: The bias.

    Returns:
        Whether its layer's weight, or the module that holds it, scores experts.
    """
    if sum(size > 1 for size in weight.shape) != 1:
        return False
    own = getattr(weight.module, "weight", None)
    if isinstance(own, Tensor):
        return router_evidence(Weight("weight", whole_shape(own), weight.chain, weight.facts)) is not None
    in_router = any(_CLASS.search(class_name(module)) for _, module in weight.chain[-3:])
    routes = in_router or hasattr(weight.module, "experts")
    return routes and (
        max(weight.shape) in weight.facts.expert_counts(weight.chain) or "correction" in weight.leaf or in_router
    )


def _has_router(module: nn.Module) -> bool:
    """Return whether a module holds what its name or class calls a router."""
    children = module.named_children()
    return any(name in _NAMES or _CLASS.search(class_name(child)) for name, child in children)


def _experts_in(module: nn.Module) -> nn.Module | None:
    for name, child in module.named_children():
        if "experts" in name and "shared" not in name and not is_linear(child):
            return child
    return None


def _count_experts(experts: nn.Module) -> int | None:
    """Return the number of experts in a list of them, or in a module that stacks their weights."""
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    shapes = (whole_shape(parameter) for parameter in experts.parameters())
    return next((shape[0] for shape in shapes if len(shape) == 3), None)
