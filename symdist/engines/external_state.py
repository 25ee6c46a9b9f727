"""SymDist for engines: an optimizer whose state lies in tensors that the engine keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symdist.optimizer import SymDist
from symdist.param_specs import ParamSpec
from symdist.rules import get_rule

ENGINE_STATE_NAMES = ("exp_avg", "exp_avg_sq")
"""Adam's names for state of a parameter's shape: the only ones that the engines' checkpoints save."""


def slots(rule: str, options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Assign each state of a rule to one of `ENGINE_STATE_NAMES`.

    Args:
        rule: The rule's name.
        options: The options of the rule; its defaults if None (default).

    Returns:
        The engine's name for each of the rule's state names.

    Raises:
        ValueError: If the rule has more state than the engine has names. The message names the rule.

    Example:
        >>> slots("adamw")
    """
    names = get_rule(rule).state_names(options)
    if len(names) > len(ENGINE_STATE_NAMES):
        raise ValueError(
            f"rule {rule!r} remembers {', '.join(names)}, and the checkpoints of DeepSpeed and Megatron hold only "
            f"{len(ENGINE_STATE_NAMES)} tensors per parameter: choose options or a rule with less state, "
            "or train under FSDP2"
        )
    return dict(zip(names, ENGINE_STATE_NAMES, strict=False))


class ExternalStateSymDist(SymDist):
    """SymDist over pieces of engine tensors, with their state in the engine's tensors.

    The engine thus saves, loads and moves momentum and moments. Only Adam's step count is kept by this optimizer, per
    piece.

    Args:
        groups: The param groups; their parameters are the pieces.
        state_tensors: By `id` of a piece, its parts of the engine's state, by the names in `ENGINE_STATE_NAMES`.
        **options: Keywords of `SymDist`.
    """

    def __init__(self, groups: list[dict[str, Any]], *, state_tensors: dict[int, dict[str, Tensor]], **options: Any):
        for group in groups:
            for key, usual in (("state_dtype", None), ("weight_rounding", "nearest")):
                if group.get(key, usual) != usual:
                    raise ValueError(
                        f"{key}={group[key]!r}: DeepSpeed and Megatron keep weights and state of their optimizers in "
                        "float32 themselves; leave it out"
                    )
        self._state_tensors = state_tensors
        self._slots: dict[int, dict[str, str]] = {}
        super().__init__(groups, **options)
        del self._state_tensors

    def slots(self, piece: Tensor) -> Mapping[str, str]:
        """Return the engine's name for each state of a piece."""
        return self._slots[id(piece)]

    def compare_plans(self) -> None:
        """Raise PlanError on all ranks if ranks that must run the same collectives plan different ones; all call it.

        Adapters call it after construction, once all ranks know that it succeeded on all.
        """
        super()._compare_plans()

    def _compare_plans(self) -> None:
        """Do nothing: a rank whose construction fails would leave the others waiting."""

    def _follow(self, *, at_step: bool = False) -> None:
        """Do nothing: the adapter itself moves the pieces along with the engine's tensors."""

    def _new_state(self, member: ParamSpec) -> dict[str, Tensor]:
        state_tensors = self._state_tensors[id(member.parameter)]
        slot_names = slots(member.rule.name, self.param_groups[member.group])
        self._slots[id(member.parameter)] = slot_names
        state = {name: state_tensors[slot] for name, slot in slot_names.items()}
        if member.rule.accumulator == "adam":
            state["step"] = torch.zeros((), dtype=torch.float32, device=member.parameter.device)
        return state
