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

from symdist.exchange import ExchangeOptions, Transport
from symdist.layouts import FlatLayout, Group, Layout, local
from symdist.layouts.fsdp1 import fsdp1_layout, is_flattened, read_units, whole_shape
from symdist.param_groups import ParamSpec, describe_param, plan_params
from symdist.param_names import plain_name

_RESUME = (
    "save the state before with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, build the optimizer "
    "anew, and load it with set_optimizer_state_dict"
)


def changed(member: ParamSpec, parameter: Tensor) -> bool:
    """Return whether a parameter is a new object, or has changed its dtype, device or shape since it was described.

    Args:
        member: The description of the parameter.
        parameter: The parameter that is in its param group now.

    Returns:
        True if it has changed.
    """
    return parameter is not member.parameter or member.found_as != found_as(parameter)


def found_as(parameter: Tensor) -> tuple[object, ...]:
    """Return what can change while a parameter stays the same object: its dtype, device and shape."""
    return parameter.dtype, parameter.device, parameter.shape


def in_model(model: nn.Module, members: list[ParamSpec], given: list[Tensor]) -> list[Tensor]:
    """Look up the parameters that a model has now, by the names of the described parameters.

    A DTensor is never replaced by a plain tensor: while FSDP2 has gathered its weights, the model shows the gathered
    tensors instead of the shards that must be stepped. A parameter is also never replaced by one on the meta device.

    Every rank must call it if the model has FSDP1 units, because it reads them again (see `read_units`).

    Args:
        model: The model.
        members: The descriptions of the parameters.
        given: The parameters in the param groups, in the same order.

    Returns:
        For each member, the model's parameter, or the given one where the model has no replacement.

    Raises:
        ValueError: If `read_units` rejects an FSDP1 unit.
    """
    read_units(model)
    now = {plain_name(name): each for name, each in model.named_parameters(remove_duplicate=False)}
    found = []
    for member, parameter in zip(members, given, strict=True):
        other = now.get(plain_name(member.name), parameter)
        gathered = isinstance(parameter, DTensor) and not isinstance(other, DTensor)
        found.append(parameter if gathered or other.is_meta else other)
    return found


def taken_over(
    specs: list[ParamSpec],
    given: list[Tensor],
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    *,
    new_state: Callable[[ParamSpec], dict[str, Tensor]] | None,
    replicas: Group | None,
    exchange: ExchangeOptions,
    peers_of: Callable[[list[ParamSpec]], Group | None],
    transport: Transport,
) -> tuple[list[ParamSpec], list[Mapping[str, Tensor]]]:
    """Describe the parameters that have replaced others, and carry over their state.

    All ranks that train the model must call it.

    Args:
        specs: The descriptions of the old parameters.
        given: The parameters that are in the groups or the model now, in the same order.
        groups: The optimizer's param groups.
        state: The optimizer's state, by old parameter.
        new_state: A function that makes fresh state, if no step has been taken; None if one has.
        replicas: The ranks that hold identical plain tensors; None if not known.
        exchange: The settings of the communication.
        peers_of: A function that returns the ranks that must step the given parameters together.
        transport: The transport that informs the other ranks if this rank fails.

    Returns:
        The new descriptions, and the state of each parameter.

    Raises:
        ValueError: If the new parameters cannot be the old ones in another layout, or a rank cannot carry over state.
            In the latter case all ranks raise. Nothing has been changed then.
    """
    check_shapes(specs, given)
    found: list[ParamSpec] = []
    states: list[Mapping[str, Tensor]] = []
    problem = None
    for old, parameter in zip(specs, given, strict=True):
        if not changed(old, parameter):
            found.append(old)
            states.append(state[old.parameter])
            continue
        new = describe_param(parameter, name=old.name, index=old.group, group=groups[old.group], replicas=replicas)
        found.append(new)
        try:
            states.append(carried(old, new, state[old.parameter]) if new_state is None else new_state(new))
        except ValueError as error:
            states.append({})
            problem = problem or error
    plan_params(found, exchange=exchange)
    # Each rank only knows whether it could carry over its own state, but all ranks must raise together.
    failed = torch.tensor([float(problem is not None)], device=given[0].device)
    peers = peers_of(found)
    if peers is not None and peers.size > 1:
        transport.prepare({peers})
        transport.all_reduce(failed, group=peers).wait()
    if problem is not None:
        raise problem
    if bool(failed):
        raise ValueError("another rank could not take over its parameters, and says why")
    return found, states


def check_shapes(members: list[ParamSpec], given: list[Tensor]) -> None:
    """Check that new parameters can be the old ones in another layout.

    Args:
        members: The descriptions of the old parameters.
        given: The parameters now.

    Raises:
        ValueError: If their number or a shape differs, a parameter is on the meta device, or a parameter belongs to an
            FSDP1 unit whose layouts are not known.
    """
    for member, parameter in zip(members, given, strict=False):
        if parameter.is_meta:
            raise ValueError(f"{member.name} has moved to the meta device; materialise it (to_empty) before going on")
        if is_flattened(parameter):
            fsdp1_layout(parameter, name=member.name)
    other = next((m for m, p in zip(members, given, strict=False) if whole_shape(p) != m.layout.shape), None)
    if len(given) == len(members) and other is None:
        return
    what = (
        f"{other.name}, of shape {other.layout.shape}, has become one of shape "
        f"{next(tuple(p.shape) for m, p in zip(members, given, strict=False) if m is other)}"
        if other is not None
        else f"there were {len(members)} of them, now there are {len(given)}"
    )
    message = f"the parameters in param_groups are others than those the optimizer was built of: {what}. "
    # That DeepSpeed is imported proves little, because transformers imports it. Therefore the shapes are checked too.
    if "deepspeed" in sys.modules and all(parameter.dim() == 1 for parameter in given):
        message += (
            "DeepSpeed has put its partitions in their place, which do not tell of matrices; it must make the "
            "optimizer itself. After symdist_deepspeed.register() give it no optimizer object but, in its config, "
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
    same = new.parameter is old.parameter
    if not _cut_from(old.layout, new.layout):
        raise ValueError(
            f"{old.name} was laid out anew after steps were taken, in pieces that this rank's state does not have; "
            f"{_RESUME}"
        )
    before = old.parameter.detach()
    if not same:
        freed = local(before).untyped_storage().size() == 0 and local(before).numel() > 0
        was = None if freed else _piece(local(before), old.layout, new.layout).to(new.parameter)
        if was is None or not torch.equal(was, local(new.parameter.detach())):
            raise ValueError(
                f"{old.name} was replaced, after steps were taken, by a parameter of other values, and its state may "
                f"not be that one's; {_RESUME}"
            )
    found = {}
    for key, value in state.items():
        if key == "step":
            found[key] = value.to(new.parameter.device)
            continue
        found[key] = torch.zeros_like(new.parameter, dtype=new.dtype, requires_grad=False)
        local(found[key]).copy_(_piece(local(value), old.layout, new.layout))
    return found


def _cut_from(old: Layout | FlatLayout, new: Layout | FlatLayout) -> bool:
    return old == new or (isinstance(old, Layout) and not old.splits)


def _piece(whole: Tensor, old: Layout | FlatLayout, new: Layout | FlatLayout) -> Tensor:
    """Cut this rank's new piece from its old one, which is the whole parameter unless the layouts are equal."""
    if old == new:
        return whole
    if isinstance(new, Layout):
        return new.piece(whole)
    start, stop = new.mine
    return new.elements(whole.unsqueeze(0))[0, start:stop]
