"""Whose rates a resumed run has, its own or the checkpoint's: Megatron's scheduler says so, after groups are loaded."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

# What tells groups apart that another layout has as well; experts are in groups of their own on some layouts only.
KIND = ("wd_mult", "lr_mult", "is_decoupled_lr")
# What a scheduler reads of a group in place of its own: a run may change it from one part to the next.
RATES = ("max_lr", "min_lr", "start_wd", "end_wd")
# What a group keeps, whatever is loaded: Megatron may load one group of a kind in place of another.
KEPT = ("default_config", *RATES)


def counterparts(group: Mapping[str, Any], saved: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The saved groups of a group's kind: of several the nearest, by whether the run told their rates, and by these."""
    found = [theirs for theirs in saved if _alike(theirs, group, KIND)]
    for keys in (("default_config",), RATES):
        found = [theirs for theirs in found if _alike(theirs, group, keys)] or found
    return found


def rates(group: Mapping[str, Any]) -> dict[str, Any]:
    """What a group says to schedulers."""
    return {key: group[key] for key in RATES if key in group}


def saved_rates(groups: Iterable[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each group, what its counterpart in a checkpoint says to schedulers; its own where there is none."""
    return [rates(next(iter(counterparts(group, saved)), group)) for group in groups]


def take_rates(group: dict[str, Any], taken: Mapping[str, Any]) -> None:
    """Let a group say this to schedulers, and nothing else."""
    for key in RATES:
        group.pop(key, None)
    group.update(taken)


def follow_schedulers() -> None:
    """Have Megatron's scheduler, as it loads what it saved, tell an optimizer that asks for it whose rates count.

    Where `override_opt_param_scheduler` is set they are this run's, else the checkpoint's. Again it does nothing.
    """
    load = OptimizerParamScheduler.load_state_dict
    if getattr(load, "knows_symdist", False):
        return

    @functools.wraps(load)
    def loaded(self: Any, state_dict: dict[str, Any]) -> None:
        take = getattr(self.optimizer, "take_saved_rates", None)
        if take is not None and not self.override_opt_param_scheduler:
            take()
        load(self, state_dict)

    loaded.knows_symdist = True  # type: ignore[attr-defined]
    OptimizerParamScheduler.load_state_dict = loaded


def _alike(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)
