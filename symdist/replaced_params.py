"""Parameters that were replaced after the optimizer was built: described anew, with their state carried over.

Some trainers shard the model after building the optimizer. They put the new parameters into the param groups, as
accelerate does, or leave that to the optimizer, as with `fully_shard` after `build_optimizer`.
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
from symdist.param_groups import ParamSpec, describe_member, plan_params
from symdist.param_names import plain_name

_RESUME = (
    "save the state before with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, build the optimizer "
    "anew, and load it with set_optimizer_state_dict"
)


def changed(member: ParamSpec, parameter: Tensor) -> bool:
    """Return whether a parameter is a new object, or has changed its dtype, device or shape since it was described.

    Args:
        member: The parameter as it was described.
        parameter: The one in its param group now.
    """
    return parameter is not member.parameter or member.found_as != found_as(parameter)


def found_as(parameter: Tensor) -> tuple[object, ...]:
    """Return what can change while a parameter stays the same object: its dtype, device and shape."""
    return parameter.dtype, parameter.device, parameter.shape


def in_model(model: nn.Module, members: list[ParamSpec], given: list[Tensor]) -> list[Tensor]:
    """Look up the parameters that a model has now under the members' names.

    A DTensor is never replaced by a plain tensor: while FSDP2 has gathered its weights, the model shows those instead
    of the shards to be stepped. Nor is any parameter replaced by one on the meta device.

    Args:
        model: The model.
        members: The parameters as they were described.
        given: The parameters in the param groups, in the same order; they stay where the model has no replacement.
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
        specs: The parameters as they were described.
        given: The parameters in the groups or the model now, in the same order.
        groups: The optimizer's param groups.
        state: Its state, by old parameter.
        new_state: Makes fresh state, if no step has been taken; None if one has.
        replicas: The ranks that hold identical plain tensors, if known.
        exchange: Settings of the communication.
        peers_of: Returns the ranks that must step the given parameters together.
        transport: Tells the other ranks if this one fails.

    Returns:
        The new descriptions, and the state of each.

    Raises:
        ValueError: Before anything changes, if the parameters cannot be the old ones, laid out anew. If state cannot be
            carried over on one rank, all ranks raise.
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
        new = describe_member(parameter, name=old.name, index=old.group, group=groups[old.group], replicas=replicas)
        found.append(new)
        try:
            states.append(carried(old, new, state[old.parameter]) if new_state is None else new_state(new))
        except ValueError as error:
            states.append({})
            problem = problem or error
    plan_params(found, exchange=exchange)
    # Each rank sees only whether its own values were kept, but all must raise together.
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
    """Raise ValueError if the new parameters cannot be the old ones laid out anew, or are on the meta device.

    Args:
        members: The parameters as they were described.
        given: The parameters now.
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
    # DeepSpeed in sys.modules alone proves little, as transformers imports it: so the shapes are looked at, too.
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
    """Return the state of a parameter that has been stepped, laid out like the new parameter.

    This works if the layout is unchanged, or if this rank had the whole parameter, to cut the new piece from; and if
    the new parameter has the old values.

    Args:
        old: The parameter as it was described.
        new: The parameter now.
        state: The old state.

    Raises:
        ValueError: Naming the parameter and the remedy, in any other case.
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
    """Cut this rank's new piece from its old one, which is whole unless the layouts are the same."""
    if old == new:
        return whole
    if isinstance(new, Layout):
        return new.piece(whole)
    start, stop = new.mine
    return new.elements(whole.unsqueeze(0))[0, start:stop]
