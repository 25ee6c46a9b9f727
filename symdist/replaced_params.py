"""Parameters that were replaced after the optimizer was built: new descriptions, and the transfer of their state.

Some trainers shard the model after they build the optimizer. Some, such as accelerate, put the new parameters into the
param groups. Others leave that to the optimizer, as when `fully_shard` is called after `build_optimizer`.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from symdist.layouts import FlatLayout, Layout, local
from symdist.layouts.fsdp1 import fsdp1_layout, is_flattened, read_units, whole_shape
from symdist.param_names import plain_name
from symdist.param_specs import ParamSpec, describe_param, signature_of
from symdist.step_plan import StepPlanner, plan_params

_RESUME = (
    "save the state before with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, build the optimizer "
    "anew, and load it with set_optimizer_state_dict"
)


def replacements(
    specs: list[ParamSpec], groups: Sequence[Mapping[str, Any]], model: nn.Module | None
) -> list[Tensor] | None:
    """Find out whether parameters were replaced since they were described.

    Args:
        specs: The descriptions of the parameters.
        groups: The optimizer's param groups as they are now.
        model: A model to look for replacements in as well; None to go by the groups alone.

    Returns:
        All parameters as they are now, in the order of the groups; None if none was replaced.

    Raises:
        ValueError: See `in_model`.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if len(parameters) != len(specs):
        return parameters
    if model is not None:
        parameters = in_model(model, specs, parameters)
    return parameters if any(map(changed, specs, parameters)) else None


def changed(spec: ParamSpec, parameter: Tensor) -> bool:
    """Return whether a parameter is a new object, or has changed its dtype, device or shape since it was described."""
    return parameter is not spec.parameter or spec.signature != signature_of(parameter)


def in_model(model: nn.Module, specs: list[ParamSpec], parameters: list[Tensor]) -> list[Tensor]:
    """Look up the parameters that a model has now, by the names of the described parameters.

    A DTensor is never replaced by a plain tensor: while FSDP2 has gathered its weights, the model shows the gathered
    tensors instead of the shards that must be stepped. A parameter is also never replaced by one on the meta device.

    Every rank must call it if the model has FSDP1 units, because it reads them again (see `read_units`).

    Args:
        model: The model.
        specs: The descriptions of the parameters.
        parameters: The parameters in the param groups, in the same order.

    Returns:
        For each of them, the model's parameter, or the group's where the model has no replacement.

    Raises:
        ValueError: If `read_units` rejects an FSDP1 unit.
    """
    read_units(model)
    by_name = dict(model.named_parameters(remove_duplicate=False))
    by_plain_name = {plain_name(name): weight for name, weight in by_name.items()}
    current = []
    for spec, parameter in zip(specs, parameters, strict=True):
        # Without what wrappers add, names might be equal.
        weight = by_name.get(spec.name, by_plain_name.get(plain_name(spec.name), parameter))
        gathered = isinstance(parameter, DTensor) and not isinstance(weight, DTensor)
        current.append(parameter if gathered or weight.is_meta else weight)
    return current


def taken_over(
    specs: list[ParamSpec],
    parameters: list[Tensor],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    *,
    new_state: Callable[[ParamSpec], dict[str, Tensor]] | None,
    planner: StepPlanner,
) -> tuple[list[ParamSpec], list[Mapping[str, Tensor]]]:
    """Describe the parameters that have replaced others, and carry over their state.

    All ranks that train the model must call it.

    Args:
        specs: The descriptions of the old parameters.
        parameters: The parameters that are in the groups or the model now, in the same order.
        groups: The optimizer's param groups.
        state: The optimizer's state, by old parameter.
        new_state: A function that makes fresh state, if no step has been taken; None if one has.
        planner: The optimizer's planner, which knows the ranks that must step together.

    Returns:
        The new descriptions, and the state of each parameter.

    Raises:
        ValueError: If the new parameters cannot be the old ones in another layout, or a rank cannot carry over state.
            In the latter case all ranks raise. Nothing has been changed then.
    """
    check_shapes(specs, parameters)
    new_specs: list[ParamSpec] = []
    states: list[Mapping[str, Tensor]] = []
    problem = None
    for old, parameter in zip(specs, parameters, strict=True):
        if not changed(old, parameter):
            new_specs.append(old)
            states.append(state[old.parameter])
            continue
        new = describe_param(
            parameter, name=old.name, index=old.group, group=groups[old.group], replicas=planner.replicate_group
        )
        new_specs.append(new)
        try:
            states.append(carried(old, new, state[old.parameter]) if new_state is None else new_state(new))
        except ValueError as error:
            states.append({})
            problem = problem or error
    plan_params(new_specs, exchange=planner.exchange)
    # Each rank only knows whether it could carry over its own state, but all ranks must raise together.
    failed = torch.tensor([float(problem is not None)], device=parameters[0].device)
    peers = planner.peers_of(new_specs)
    if peers is not None and peers.size > 1:
        planner.transport.prepare({peers})
        planner.transport.all_reduce(failed, group=peers).wait()
    if problem is not None:
        raise problem
    if bool(failed):
        raise ValueError("another rank could not carry over the state of its parameters; its own error says why")
    return new_specs, states


def check_shapes(specs: list[ParamSpec], parameters: list[Tensor]) -> None:
    """Check that new parameters can be the old ones in another layout.

    Args:
        specs: The descriptions of the old parameters.
        parameters: The parameters now.

    Raises:
        ValueError: If their number or a shape differs, a parameter is on the meta device, or a parameter belongs to an
            FSDP1 unit whose layouts are not known.
    """
    pairs = list(zip(specs, parameters, strict=False))
    for spec, parameter in pairs:
        if parameter.is_meta:
            raise ValueError(f"{spec.name} has moved to the meta device; materialize it (to_empty) first")
        if is_flattened(parameter):
            fsdp1_layout(parameter, name=spec.name)
    misfit = next(((spec, tensor) for spec, tensor in pairs if whole_shape(tensor) != spec.layout.shape), None)
    if misfit is not None:
        spec, tensor = misfit
        difference = f"{spec.name}, of shape {spec.layout.shape}, has become one of shape {tuple(tensor.shape)}"
    elif len(parameters) != len(specs):
        difference = f"there were {len(specs)} of them, now there are {len(parameters)}"
    else:
        return
    message = f"the parameters in param_groups are not those that the optimizer was built with: {difference}. "
    # That DeepSpeed is imported proves little, because transformers imports it. Therefore the shapes are checked too.
    if "deepspeed" in sys.modules and all(parameter.dim() == 1 for parameter in parameters):
        message += (
            "DeepSpeed has replaced them by its partitions, which do not show the matrices; let DeepSpeed make the "
            "optimizer itself: call symdist_deepspeed.register(), pass no optimizer object, and write in its config "
            '"optimizer": {"type": "SymDist", "params": {"recipe": "…"}}'
        )
    else:
        message += "Build the optimizer after whatever replaces them, with symdist.build_optimizer(model, recipe)"
    raise ValueError(message)


def carried(old: ParamSpec, new: ParamSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of a parameter in the layout of the parameter that replaces it, after steps have been taken.

    This works only if the layout is unchanged or this rank held the whole parameter, so that the new piece can be cut
    from it. In addition, the new parameter must have the values of the old one.

    Args:
        old: The description of the old parameter.
        new: The description of the new parameter.
        state: The state of the old parameter.

    Returns:
        The state of the new parameter.

    Raises:
        ValueError: Naming the parameter and the remedy, if the state cannot be carried over.
    """
    if not _cut_from(old.layout, new.layout):
        raise ValueError(
            f"{old.name} was sharded in another way after the first step, and this rank does not have the state of its "
            f"new piece; {_RESUME}"
        )
    if new.parameter is not old.parameter:
        weights = local(old.parameter.detach())
        freed = weights.untyped_storage().size() == 0 and weights.numel() > 0
        piece = None if freed else _piece(weights, old.layout, new.layout).to(new.parameter)
        if piece is None or not torch.equal(piece, local(new.parameter.detach())):
            raise ValueError(
                f"{old.name} was replaced after the first step by a parameter with other values, to which its state "
                f"may not belong; {_RESUME}"
            )
    new_state = {}
    for key, value in state.items():
        if key == "step":
            new_state[key] = value.to(new.parameter.device)
            continue
        new_state[key] = new.zeros(key)
        local(new_state[key]).copy_(_piece(local(value), old.layout, new.layout))
    return new_state


def _cut_from(old: Layout | FlatLayout, new: Layout | FlatLayout) -> bool:
    return old == new or old.shard_group is None


def _piece(whole: Tensor, old: Layout | FlatLayout, new: Layout | FlatLayout) -> Tensor:
    """Cut this rank's new piece from its old one, which is the whole parameter unless the layouts are equal."""
    return whole if old == new else new.piece(whole)
