"""Routes parameters to rules and param groups before ZeRO flattens them, while names and modules are known."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.sharded_moe import TopKGate
from torch import nn

import symdist
from symdist.param_groups import with_defaults
from symdist.routing.recipes import Recipe
from symdist_deepspeed.options import Options
from symdist_deepspeed.tensor_parallel import cut_of, tensor_parallel_group

_DEEPSPEEDS = ("name", "moe", "lr")
"""Keys of a user's param group that are not options of a rule."""


@dataclass(frozen=True, kw_only=True)
class EngineAssignment:
    """A parameter with the options of its rule.

    Attributes:
        name: The parameter's name.
        shape: Its full shape, on all ranks.
        options: The options of its rule. Parameters with equal options share one dict.
        lr_ratio: Its learning rate, as a multiple of that of its param group.
    """

    name: str
    shape: tuple[int, ...]
    options: Mapping[str, Any]
    lr_ratio: float


def route_engine(
    engine: Any, model_parameters: Any, options: Options
) -> tuple[list[dict[str, Any]], dict[int, EngineAssignment]]:
    """Route the parameters of a DeepSpeed engine's model to rules and param groups.

    DeepSpeed flattens each group by itself, and works best with few large ones. So parameters from the same group of
    `model_parameters` share a group if their rules have the same number of state tensors and the recipe gives them the
    same `schedule`. A group's `lr` is the learning rate of the recipe's matrices, which DeepSpeed's schedulers set. Its
    `rules` maps the roles in it to their rules.

    Args:
        engine: The DeepSpeed engine, before ZeRO has flattened its parameters.
        model_parameters: What was passed to `deepspeed.initialize`: parameters, param groups, or None for all of the
            model's. `lr`, `weight_decay` and options of the rules in a group apply to the parameters of that group.
        options: The options from the DeepSpeed config.

    Returns:
        The param groups for DeepSpeed, and by `id` of a parameter what it was assigned.

    Raises:
        ValueError: For anything that `symdist.route` refuses, a parameter that is not the model's, or a model without
            trainable parameters.
    """
    model = engine.module
    recipe, base = options.scaled()
    handle = tensor_parallel_group(engine)
    with _full_shapes(model, 1 if handle is None else dist.get_world_size(handle)):
        routed_groups = symdist.route(model, _with_gates(recipe, model))
        shapes = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    routed_to = {
        id(parameter): (name, group)
        for group in routed_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    groups: list[dict[str, Any]] = []
    assignments: dict[int, EngineAssignment] = {}
    for user_options, parameters in _user_groups(model_parameters, model):
        rule_options = {key: value for key, value in user_options.items() if key not in _DEEPSPEEDS}
        new_groups: dict[tuple[int, str | None], dict[str, Any]] = {}
        completed: dict[int, dict[str, Any]] = {}
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if id(parameter) not in routed_to:
                raise ValueError(
                    f"model_parameters has a parameter of shape {tuple(parameter.shape)} that is not in the model: "
                    "pass parameters of the model that deepspeed.initialize() gets"
                )
            name, group = routed_to[id(parameter)]
            if id(group) not in completed:
                completed[id(group)] = _completed(group, rule_options)
            kind = recipe.kind_of(group["role"], group["rule"])
            target = new_groups.setdefault(
                kind,
                {
                    **user_options,
                    "params": [],
                    "lr": float(user_options.get("lr", base)),
                    "rules": {},
                    "schedule": kind[1],
                },
            )
            target["params"].append(parameter)
            target["rules"][group["role"]] = group["rule"]
            assignments[id(parameter)] = EngineAssignment(
                name=name,
                shape=shapes[id(parameter)],
                options=completed[id(group)],
                lr_ratio=float(group["lr"]) / base,
            )
        groups += new_groups.values()
    if not groups:
        raise ValueError(
            "there is nothing to optimize: no parameter of the model, or of model_parameters if passed, has "
            "requires_grad=True"
        )
    return groups, assignments


def _completed(group: Mapping[str, Any], rule_options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a group, checked while the names of its parameters are known."""
    full = with_defaults({**group, **rule_options})
    return {key: value for key, value in full.items() if key not in ("params", "param_names", "lr")}


def _user_groups(model_parameters: Any, model: nn.Module) -> list[tuple[dict[str, Any], list[nn.Parameter]]]:
    """Return each of the user's param groups as its options and its parameters."""
    items: list[Any] = list(model.parameters()) if model_parameters is None else list(model_parameters)
    if items and isinstance(items[0], Mapping):
        return [
            ({key: value for key, value in group.items() if key != "params"}, _listed(group["params"]))
            for group in items
        ]
    return [({}, _listed(items))]


def _listed(parameters: Any) -> list[nn.Parameter]:
    if isinstance(parameters, torch.Tensor):
        return [parameters]  # type: ignore[list-item]
    return [item[1] if isinstance(item, tuple) else item for item in parameters]


def _with_gates(recipe: Recipe, model: nn.Module) -> Recipe:
    """Give the gates of DeepSpeed's MoE layers the role "router", unless the recipe's patterns match them."""
    names = [f"{name}.wg.weight" for name, module in model.named_modules() if isinstance(module, TopKGate)]
    recipe_matches = [pattern["match"] for pattern in recipe.patterns]
    patterns = [
        {"match": name, "role": "router"}
        for name in names
        if not any(fnmatchcase(name, match) for match in recipe_matches)
    ]
    return replace(recipe, patterns=(*recipe.patterns, *patterns))


@contextmanager
def _full_shapes(model: nn.Module, tensor_parallel: int) -> Iterator[None]:
    """Show parameters that `zero.Init` or tensor parallelism has cut in full shape, without taking memory.

    The linear layers of AutoTP, which are no `nn.Linear`, show what they are, too.
    """
    originals: list[tuple[Any, torch.Tensor]] = []
    layers: list[Any] = [
        module
        for module in model.modules()
        if type(module).__module__.startswith("deepspeed.module_inject")
        and "Linear" in type(module).__name__
        and not hasattr(module, "out_features")
    ]
    try:
        for name, parameter in model.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            cut = cut_of(parameter, ranks=tensor_parallel, name=name) if tensor_parallel > 1 else None
            shape = shape if cut is None else cut.shape
            if tuple(parameter.shape) != tuple(shape):
                originals.append((parameter, parameter.data))
                parameter.data = parameter.data.new_empty(()).expand(shape)
        for layer in layers:
            layer.out_features, layer.in_features = layer.weight.shape
        yield
    finally:
        for layer in layers:
            for name in ("out_features", "in_features"):
                vars(layer).pop(name, None)
        for parameter, data in originals:
            parameter.data = data
