"""An optimizer of pieces whose state an engine keeps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from symdist.optimizer import SymDist
from symdist.param_groups import ParamSpec
from symdist.rules import get_rule

ENGINE_STATE_NAMES = ("exp_avg", "exp_avg_sq")
"""The names that engines have for state of a parameter's shape: Adam's, which are all that their checkpoints know."""


def slots(rule: str, options: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Which of an engine's `ENGINE_STATE_NAMES` each state of a rule lies in.

    Args:
        rule: The rule's name.
        options: The options it runs with; its defaults unless given.

    Raises:
        ValueError: Naming the rule, where it has more state than there are names.
    """
    names = get_rule(rule).state_names(options)
    if len(names) > len(ENGINE_STATE_NAMES):
        raise ValueError(
            f"rule {rule!r} remembers {', '.join(names)}, and the checkpoints of DeepSpeed and Megatron hold "
            f"{len(ENGINE_STATE_NAMES)} tensors of a parameter's shape; choose options with less to remember, "
            "or train under FSDP2"
        )
    return dict(zip(names, ENGINE_STATE_NAMES, strict=False))


class ExternalStateSymDist(SymDist):
    """SymDist over pieces of larger tensors; `state_tensors` has, by `id` of a piece, its part of their state.

    Momentum and moments thus lie where an engine saves, loads and moves them. The count of steps is the piece's own.
    """

    def __init__(self, groups: list[dict[str, Any]], *, state_tensors: dict[int, dict[str, Tensor]], **options: Any):
        self._state_tensors = state_tensors
        self._slots: dict[int, dict[str, str]] = {}
        super().__init__(groups, **options)
        del self._state_tensors

    def slots(self, piece: Tensor) -> Mapping[str, str]:
        """Of a piece's states, which of the engine's each lies in."""
        return self._slots[id(piece)]

    def _follow(self, *, at_step: bool = False) -> None:
        """Nothing: pieces are the adapter's own, which moves them with the engine's tensors."""

    def _new_state(self, member: ParamSpec) -> dict[str, Tensor]:
        state_tensors = self._state_tensors[id(member.parameter)]
        found = slots(member.rule.name, self.param_groups[member.group])
        self._slots[id(member.parameter)] = found
        state = {name: state_tensors[slot] for name, slot in found.items()}
        if member.rule.accumulator == "adam":
            state["step"] = torch.zeros((), dtype=torch.float32, device=member.parameter.device)
        return state
