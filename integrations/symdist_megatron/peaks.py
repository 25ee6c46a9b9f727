"""Learning rates of a resumed run: its own or the checkpoint's, depending on the options of Megatron's scheduler."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

# Keys that tell groups apart under every layout. Whether a group is of experts is not one of them, because only some
# layouts keep experts in groups of their own.
KIND = ("wd_mult", "lr_mult", "is_decoupled_lr")
# Keys that a scheduler reads from a group in place of its own settings. A resumed run may change them.
RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
# Keys whose values loading does not change, because Megatron may load one group of a kind in place of another.
KEPT = ("default_config", *RATES)


def counterparts(group: Mapping[str, Any], saved: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Find the saved groups that are of a group's kind.

    If there are several, only those are returned that also agree in `default_config`, and then in the keys of `RATES`,
    as far as any do.

    Args:
        group: The group.
        saved: The saved groups.

    Returns:
        The matching groups.
    """
    matches = [candidate for candidate in saved if _alike(candidate, group, KIND)]
    for keys in (("default_config",), RATES):
        matches = [candidate for candidate in matches if _alike(candidate, group, keys)] or matches
    return matches


def rates(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's values for schedulers.

    Args:
        group: The group.

    Returns:
        The values it has, by the keys of `RATES`.
    """
    return {key: group[key] for key in RATES if key in group}


def saved_rates(groups: Iterable[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each group, the values for schedulers of its counterpart in a checkpoint.

    Args:
        groups: The groups.
        saved: The saved groups.

    Returns:
        The values in the order of `groups`; a group's own if it has no counterpart.
    """
    return [rates(next(iter(counterparts(group, saved)), group)) for group in groups]


def take_rates(group: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Replace a group's values for schedulers.

    Args:
        group: The group.
        values: The new values; keys of `RATES` that are not in it are removed from the group.
    """
    for key in RATES:
        group.pop(key, None)
    group.update(values)


def follow_schedulers() -> None:
    """Make Megatron's scheduler switch the optimizer to a checkpoint's learning rates when it loads the checkpoint.

    With `override_opt_param_scheduler`, this run's rates stay. A further call does nothing.
    """
    load = OptimizerParamScheduler.load_state_dict
    if getattr(load, "knows_symdist", False):
        return

    @functools.wraps(load)
    def loaded(self: Any, state_dict: dict[str, Any]) -> None:
        take_saved_rates = getattr(self.optimizer, "take_saved_rates", None)
        if take_saved_rates is not None and not self.override_opt_param_scheduler:
            take_saved_rates()
        load(self, state_dict)

    loaded.knows_symdist = True  # type: ignore[attr-defined]
    OptimizerParamScheduler.load_state_dict = loaded


def _alike(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)
