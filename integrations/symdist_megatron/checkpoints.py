"""Convert the state of a chain of optimizers to and from a form that does not depend on the parallel layout."""

from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from symdist_megatron.peaks import KEPT, KIND, RATES, counterparts

COMMON = "symdist"
"""Key in the checkpoint of the state that all optimizers of the chain have in common."""

# Keys of a group that depend on the layout.
_LAYOUT_KEYS = ("params", "is_expert_parallel")


def reshardable(metadata: Mapping[str, Any] | None, optimizers: Iterable[Any]) -> bool:
    """Return whether a checkpoint is saved by the shapes of parameters, not of one layout's buffers.

    Args:
        metadata: Megatron's metadata of the checkpoint, or None.
        optimizers: The optimizers of the chain.

    Returns:
        True without the distributed optimizer, or if `metadata` names one of its fully reshardable formats.
    """
    distributed = any(isinstance(optimizer, DistributedOptimizer) for optimizer in optimizers)
    kind = (metadata or {}).get("distrib_optim_sharding_type", "fully_sharded_model_space")
    return not distributed or kind in DistributedOptimizer.checkpoint_fully_reshardable_formats


def common_state(optimizers: Iterable[Any]) -> dict[str, Any]:
    """Return the param groups of all optimizers, one of each kind, with the rules of the run.

    Args:
        optimizers: The optimizers of the chain.

    Returns:
        The common state, the same on all ranks.
    """
    groups: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            groups.setdefault(
                _kind(group, *KIND, *RATES), {key: value for key, value in group.items() if key not in _LAYOUT_KEYS}
            )
    return {"groups": groups}


def without_groups(part: dict[str, Any]) -> dict[str, Any]:
    """Exclude from one optimizer's sharded state what is common to all optimizers or specific to this layout.

    Args:
        part: The optimizer's sharded state, which is changed.

    Returns:
        The same dict.
    """
    holder = part.get("optimizer", part)
    groups = [dict(group) for group in holder["param_groups"]]
    for group in groups:
        if isinstance(group.get("params"), LocalNonpersistentObject):
            group["params"] = group["params"].unwrap()
    holder["param_groups"] = LocalNonpersistentObject(groups)
    holder.get("state", {}).pop("common_step", None)
    if "fp32_from_fp16_params" in part:
        # Keyed by index, because a list would lose the positions of entries that are empty on this rank.
        masters = part["fp32_from_fp16_params"]
        part["fp32_from_fp16_params"] = {i: dict(enumerate(group)) for i, group in enumerate(masters)}
    if "param_state_sharding_type" in part:
        part["param_state_sharding_type"] = LocalNonpersistentObject(part["param_state_sharding_type"])
    return part


def own_copies(parts: Mapping[Any, Any]) -> None:
    """Declare all state of this rank the only copy, so that it is saved whatever the rank's data-parallel index is.

    Args:
        parts: The sharded state of all optimizers, which is changed.
    """
    for sharded in nested_values(parts):
        replica = getattr(sharded, "replica_id", None)
        if replica is not None:
            sharded.replica_id = 0 if isinstance(replica, int) else (*replica[:2], 0)


def with_groups(part: dict[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Put the checkpoint's param groups into one optimizer's loaded state.

    The values that tell groups apart, and those for schedulers, stay this run's.

    Args:
        part: The optimizer's loaded state, which is changed.
        common: The result of `common_state` when the checkpoint was saved.

    Returns:
        The same dict.

    Raises:
        ValueError: If the checkpoint has no group, or several, of a group's kind.
    """
    holder = part.get("optimizer", part)
    holder.setdefault("state", {})
    if "fp32_from_fp16_params" in part:
        masters = part["fp32_from_fp16_params"]
        part["fp32_from_fp16_params"] = [
            [masters[i][j] for j in sorted(masters.get(i, {}))] for i in range(len(holder["param_groups"]))
        ]
    saved = common["groups"]
    for group in holder["param_groups"]:
        matches = counterparts(group, saved.values())
        if len(matches) != 1:
            raise ValueError(
                f"the checkpoint has {'several param groups' if matches else 'no param group'} with "
                f"{_kind(group, *KIND)}; its groups are {'; '.join(saved)}. Use the lr and the config_overrides of the "
                "saved run"
            )
        group.update({key: value for key, value in matches[0].items() if key not in (*KIND, *KEPT)})
    return part


def _kind(group: Mapping[str, Any], *keys: str) -> str:
    return ", ".join(f"{key}={group.get(key)}" for key in keys)
