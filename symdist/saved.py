"""Whether saved state fits an optimizer, before any of it is loaded."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from symdist.layouts import local
from symdist.rules import get_rule


def check_groups(groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where saved param groups differ from `groups` in number, rule, parameters or what a rule goes by."""
    if len(saved) != len(groups):
        raise ValueError(
            f"the saved state has {len(saved)} param groups, this optimizer {len(groups)}. "
            "Build the optimizer with the recipe of the saved run"
        )
    for mine, theirs in zip(groups, saved, strict=True):
        if theirs.get("rule") != mine["rule"] or len(theirs["params"]) != len(mine["params"]):
            raise ValueError(
                f"param group {mine['role'] or mine['names'][0]!r} has rule {mine['rule']!r} and "
                f"{len(mine['params'])} parameters; the saved one has {theirs.get('rule')!r} and "
                f"{len(theirs['params'])}. Build the optimizer with the recipe of the saved run"
            )
        fixed = {"view", "stale_rows", "padding_rows", *get_rule(mine["rule"]).defaults}
        changed = sorted(key for key in fixed if key in theirs and theirs[key] != mine[key])
        if changed:
            raise ValueError(
                f"param group {mine['role'] or mine['names'][0]!r}: the saved run had "
                f"{', '.join(f'{key}={theirs[key]!r}' for key in changed)}, this one has "
                f"{', '.join(f'{key}={mine[key]!r}' for key in changed)}. "
                "Build the optimizer with the recipe of the saved run"
            )


def check_state(name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """ValueError, naming the parameter, where saved state lacks something or has another shape."""
    for key, tensor in mine.items():
        if key not in theirs or tuple(theirs[key].shape) != tuple(tensor.shape):
            found = f"shape {tuple(theirs[key].shape)}" if key in theirs else "none"
            raise ValueError(f"{name}: needs state {key!r} of shape {tuple(tensor.shape)}; the saved state has {found}")
        if local(theirs[key]).shape != local(tensor).shape:
            raise ValueError(
                f"{name}: state {key!r} was saved in pieces of {tuple(local(theirs[key]).shape)}, this rank holds "
                f"{tuple(local(tensor).shape)}; load it through torch.distributed.checkpoint, which re-shards"
            )
