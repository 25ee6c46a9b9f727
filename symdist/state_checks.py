"""Loading of saved state: any form is matched to the optimizer's parameters and checked before anything changes."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symdist.layouts import local
from symdist.layouts.fsdp1 import is_flattened
from symdist.param_groups import ParamSpec
from symdist.param_names import plain_name
from symdist.rules import get_rule

_UNNAMED = re.compile(r"param_\d+$")
_REMEDY = "Build the optimizer with the recipe of the saved run"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A state dict matched to an optimizer.

    Attributes:
        groups: The options for each param group of the optimizer.
        states: The state of each parameter, in the optimizer's order; empty if nothing was saved.
    """

    groups: list[Mapping[str, Any]]
    states: list[Mapping[str, Any]]


def read_saved(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    matched: bool = False,
) -> Saved:
    """Match a state dict to an optimizer's param groups.

    It may be raw, as from `Optimizer.state_dict`; keyed by names, as from `torch.distributed.checkpoint.state_dict`; or
    flattened, with one key per value. Wrapper parts of names are ignored, see `plain_name`.

    Args:
        groups: The optimizer's param groups.
        names: The names of each group's parameters.
        state_dict: What was saved.
        strict: Whether both must have the same parameters. If not, parameters without saved state get empty state, and
            saved state of other parameters is ignored.
        matched: Whether PyTorch has already put it in the order of `groups`, by the model's own names.

    Raises:
        ValueError: For any other form; or, naming the parameters or the group, if something does not match.
    """
    if "param_groups" not in state_dict or "state" not in state_dict:
        state_dict = _nested(state_dict)
    saved, states = state_dict["param_groups"], state_dict["state"]
    keys = [key for group in saved for key in group["params"]]
    if any(isinstance(key, str) for key in keys):
        theirs = [plain_name(str(key)) for key in keys]
    else:
        theirs = [plain_name(str(name)) for group in saved for name in _names_of(group)]
    mine = [plain_name(name) for of_group in names for name in of_group]
    alike = [len(group["params"]) for group in saved] == [len(of_group) for of_group in names]
    unnamed = any(_UNNAMED.match(name) for name in (*mine, *theirs)) or len(set(theirs)) < len(keys)
    if unnamed or (alike and (matched or theirs == mine)):
        # Matched by order.
        if matched and not strict:
            saved = [each if "rule" in each else {**own, **each} for own, each in zip(groups, saved, strict=True)]
        check_groups(groups, saved)
        return Saved(groups=list(saved), states=[states.get(key, {}) for key in keys])
    _check_names(mine, theirs, strict=strict)
    of_key = {key: group for group in saved for key in group["params"]}
    by_name = {name: (of_key[key], states.get(key, {})) for name, key in zip(theirs, keys, strict=True)}
    chosen: list[Mapping[str, Any]] = []
    for of_group, group in zip(names, groups, strict=True):
        found = [by_name[plain_name(name)][0] for name in of_group if plain_name(name) in by_name]
        for name, its_group in zip(of_group, found, strict=False):
            check_options(group, its_group, name)
        chosen.append(found[0] if found else group)
    return Saved(groups=chosen, states=[by_name[name][1] if name in by_name else {} for name in mine])


def load_state(
    specs: Sequence[ParamSpec],
    groups: Sequence[dict[str, Any]],
    state: Mapping[Tensor, Mapping[str, Tensor]],
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
    matched: bool,
) -> bool:
    """Load a state dict into param groups and state, in place; tensors keep their dtype and device.

    Args:
        specs: The optimizer's parameters.
        groups: Its param groups; all saved keys but "params" and "param_names" are written to them.
        state: Its state, by parameter.
        state_dict: What was saved, in any form that `read_saved` takes.
        strict: Whether it is an error if nothing was saved for a trainable parameter; see also `read_saved`.
        matched: See `read_saved`.

    Returns:
        Whether any tensor was written.

    Raises:
        ValueError: Naming the group or parameter, before anything changes, if groups, rules or state do not match.
    """
    names = [group["param_names"] for group in groups]
    saved = read_saved(groups, names, state_dict, strict=strict, matched=matched)
    pairs: list[tuple[Tensor, Tensor]] = []
    for spec, theirs in zip(specs, saved.states, strict=True):
        mine = state[spec.parameter]
        # Flattened state has empty values for what was not saved, and `set_state_dict` leaves out frozen parameters.
        theirs = {key: value for key, value in theirs.items() if as_tensor(value) is not None}
        # FSDP1 saves no state on this rank for a parameter of which it has no piece here.
        nothing = is_flattened(spec.parameter) and spec.parameter.numel() == 0
        if theirs or (strict and spec.parameter.requires_grad and not nothing):
            check_state(spec.name, mine, theirs)
            pairs += [(tensor, value) for key, tensor in mine.items() if (value := as_tensor(theirs[key])) is not None]
    for group, theirs in zip(groups, saved.groups, strict=True):
        # Names are not loaded: the saved ones may be another pipeline stage's.
        group.update({key: value for key, value in theirs.items() if key not in ("params", "param_names")})
    # A trainer may load the very tensors that the optimizer gave it: then there is nothing to write.
    written = [(tensor, value) for tensor, value in pairs if value is not tensor]
    with torch.no_grad():
        for tensor, value in written:
            local(tensor).copy_(local(value))
    return bool(written)


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if saved groups differ in number, rule, parameter count or options that fix the state.

    Args:
        groups: The optimizer's param groups.
        saved: The saved ones, in the same order.
    """
    if len(saved) != len(groups):
        raise ValueError(f"the saved state has {len(saved)} param groups, this optimizer {len(groups)}. {_REMEDY}")
    for mine, theirs in zip(groups, saved, strict=True):
        if theirs.get("rule") != mine["rule"] or len(theirs["params"]) != len(mine["params"]):
            raise ValueError(
                f"param group {_label(mine)} has rule {mine['rule']!r} and "
                f"{len(mine['params'])} parameters; the saved one has {theirs.get('rule')!r} and "
                f"{len(theirs['params'])}. {_REMEDY}"
            )
        check_options(mine, theirs, f"param group {_label(mine)}")


def check_options(mine: Mapping[str, Any], theirs: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a saved group differs in its rule or in options that its state depends on.

    Args:
        mine: The optimizer's param group.
        theirs: The saved one; keys that it lacks are not compared.
        where: Begins the message: the group or the parameter.
    """
    fixed = {"rule", "view", "skip_zero_grad_rows", "padding_rows", *get_rule(mine["rule"]).defaults}
    changed = sorted(key for key in fixed if key in theirs and theirs[key] != mine[key])
    if changed:
        raise ValueError(
            f"{where}: the saved run had {', '.join(f'{key}={theirs[key]!r}' for key in changed)}, this one has "
            f"{', '.join(f'{key}={mine[key]!r}' for key in changed)}. {_REMEDY}"
        )


def check_state(name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """Raise ValueError if saved state lacks a tensor or has one of another shape, whole or local.

    Args:
        name: The parameter's name, for the message.
        mine: The optimizer's state of the parameter.
        theirs: The saved state; keys that `mine` lacks are ignored.
    """
    for key, tensor in mine.items():
        found = as_tensor(theirs.get(key))
        if found is None:
            raise ValueError(
                f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has none. "
                "load_state_dict(…, strict=False), or StateDictOptions(strict=False), leaves its state as it is"
            )
        if tuple(found.shape) != tuple(tensor.shape):
            raise ValueError(
                f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has shape "
                f"{tuple(found.shape)}"
            )
        if local(found).shape != local(tensor).shape:
            raise ValueError(
                f"{name}: state {key!r} was saved in pieces of {tuple(local(found).shape)}, this rank holds "
                f"{tuple(local(tensor).shape)}; load it through torch.distributed.checkpoint, which re-shards"
            )


def as_tensor(value: Any) -> Tensor | None:
    """Return a saved value, a tensor or plain number, as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(float(value)) if isinstance(value, int | float) else None


def flattened_zeros(
    specs: Sequence[ParamSpec], state: Mapping[Tensor, Mapping[str, Tensor]]
) -> dict[int, dict[str, Tensor]]:
    """Make zeros for the state that some parameters of FSDP1 units have and others lack, but for "step".

    Args:
        specs: The optimizer's parameters.
        state: Its state, by parameter.

    Returns:
        For each parameter of an FSDP1 unit, by index, the zeros by state name, in the parameter's shape. Each is one
        number, expanded, so they take no memory.
    """
    pieces = [i for i, spec in enumerate(specs) if is_flattened(spec.parameter)]
    names = {key for i in pieces for key in state[specs[i].parameter]} - {"step"}
    found = {}
    for i in pieces:
        zero = torch.zeros(1, dtype=specs[i].dtype, device=specs[i].parameter.device)
        absent = names - set(state[specs[i].parameter])
        found[i] = dict.fromkeys(sorted(absent), zero.expand(specs[i].parameter.shape))
    return found


def asked_by_pytorch() -> bool | None:
    """Return whether PyTorch's `set_optimizer_state_dict` is loading strictly; None if it is not what loads.

    It looks for PyTorch's function on the call stack. PyTorch does not pass `strict` on, and what it passes is the same
    either way: nothing for a parameter without state, or, of flattened state, empty values.
    """
    frame = sys._getframe(2)
    for _ in range(4):
        strict = getattr(frame.f_locals.get("info"), "strict", None)
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict" and strict is not None:
            return bool(strict)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn flattened keys, `state.NAME.KEY` and `param_groups.NAME.KEY`, into a state dict with one group per name."""
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = str(key).partition(".")
        name, _, word = rest.rpartition(".")
        if kind not in ("state", "param_groups") or not name:
            raise ValueError(
                f"the saved state has a key {key!r}; symdist loads what Optimizer.state_dict gave, or "
                "torch.distributed.checkpoint.state_dict, flattened or not"
            )
        (states if kind == "state" else groups).setdefault(name, {})[word] = value
    return {
        "state": states,
        "param_groups": [{**groups.get(name, {}), "params": [name]} for name in dict.fromkeys([*groups, *states])],
    }


def _names_of(group: Mapping[str, Any]) -> Sequence[Any]:
    names = group.get("param_names") or ()
    # If their number differs, the names are another rank's, as of another pipeline stage.
    return names if len(names) == len(group["params"]) else [f"param_{i}" for i in range(len(group["params"]))]


def _check_names(mine: Sequence[str], theirs: Sequence[str], *, strict: bool) -> None:
    missing = [name for name in mine if name not in set(theirs)]
    more = [name for name in theirs if name not in set(mine)]
    if not strict or not (missing or more):
        return
    said = [f"nothing of {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}"] if missing else []
    said += [f"state of {', '.join(more[:5])}{' and others' if len(more) > 5 else ''}, not here"] if more else []
    raise ValueError(
        f"the saved state has {' and '.join(said)}. load_state_dict(…, strict=False) loads what both have and leaves "
        "other state as it is"
    )


def _label(group: Mapping[str, Any]) -> str:
    return repr(group["role"] or group["param_names"][0])
