"""How the weights of experts are stored, and how gates and ups share one: by the stream, the module and its code."""

from __future__ import annotations

import functools
import inspect
import re
from typing import Any

from torch import nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.routing import words
from symdist.routing.param_site import Evidence, Fusion, ParamSite, Stream
from symdist.routing.weight import Weight


def stacked_experts(weight: Weight, word: str) -> ParamSite:
    """Return the site of a weight that stacks the matrices of all experts.

    Args:
        weight: The weight, of three dimensions.
        word: Its name, one of those of parts of an MLP.

    Returns:
        The site, with role None if nothing tells which of its sides is the output.
    """
    part = words.MLP[word]
    stored = _outputs_first(weight, part)
    role = f"expert_{part}"
    if stored is None:
        return ParamSite(
            role=None,
            likely=(role, "experts", "other"),
            doubt="both of its sides are as wide as the residual stream, or neither, and its module does not say "
            "which is the output",
        )
    fused = fusion(weight, weight.module) if part == "gate_up" else None
    stream: Stream = "output" if part == "down" else "input"
    evidence: Evidence = "residual stream" if weight.outputs_first is None else "class"
    return ParamSite(role=role, transposed=not stored, fused=fused, stream=stream, evidence=evidence)


def fusion(weight: Weight, module: nn.Module) -> Fusion:
    """Return how the output of a weight is cut into gates and ups, by what a module declares or by its code.

    Args:
        weight: The weight.
        module: The module that cuts it: its own, whose code and that of the module around it are read, or its block.

    Returns:
        The way, or "unknown".
    """
    declared = getattr(module, "is_concatenated", None)
    if isinstance(declared, bool):
        return "stacked" if declared else "interleaved"
    kinds: list[Any] = [type(module), *([type(weight.parent)] if module is weight.module else [])]
    code = "".join(map(_code, kinds))
    if "::2" in code:
        return "interleaved"
    return "stacked" if re.search(r"(chunk|split)\(", code) else "unknown"


def _outputs_first(weight: Weight, part: str) -> bool | None:
    """Return whether stacked experts are stored `[expert, out, in]`, by the side that is the residual stream."""
    declared = isinstance(getattr(weight.module, "is_transposed", None), bool)
    found = None if declared else _told_by(weight, part, weight.shape)
    found = weight.outputs_first if found is None else found
    if found is not None:
        return found
    # Both sides are as wide as the stream. The other weights of the module are stored alike.
    for name, parameter in weight.module.named_parameters(recurse=False):
        shape = whole_shape(parameter)
        other = words.MLP.get(name.lower().removesuffix("_weight"))
        if len(shape) == 3 and other is not None and (found := _told_by(weight, other, shape)) is not None:
            return found
    return None


def _told_by(weight: Weight, part: str, shape: tuple[int, ...]) -> bool | None:
    sides = weight.sides(*shape[-2:])
    return None if len(sides) != 1 else (sides == {"p"}) == (part == "down")


@functools.cache
def _code(module_class: Any) -> str:
    """Return the code of a module's methods and of the functions that they call; empty if it cannot be read."""
    # fully_shard makes a class of its own, on top of the module's.
    kinds = [kind for kind in module_class.__mro__ if not kind.__module__.startswith("torch.")]
    methods = [method for kind in kinds for method in vars(kind).values() if inspect.isfunction(method)]
    called = [method.__globals__.get(name) for method in methods for name in method.__code__.co_names]
    return "\n".join(map(_source, (*methods, *filter(inspect.isfunction, called))))


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
