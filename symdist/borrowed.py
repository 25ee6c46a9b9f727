"""An optimizer of pieces whose state an engine keeps."""

from typing import Any

import torch
from torch import Tensor

from symdist.groups import Member
from symdist.optimizer import SymDist


class BorrowedState(SymDist):
    """SymDist over pieces of larger tensors; `homes` has, by `id` of a piece, its part of their state.

    Momentum and moments thus lie where an engine saves, loads and moves them. The count of steps is the piece's own.
    """

    def __init__(self, groups: list[dict[str, Any]], *, homes: dict[int, dict[str, Tensor]], **options: Any):
        self._homes = homes
        super().__init__(groups, **options)
        del self._homes

    def _new_state(self, member: Member) -> dict[str, Tensor]:
        state = dict(self._homes[id(member.parameter)])
        if member.rule.accumulator == "adam":
            state["step"] = torch.zeros((), dtype=torch.float32, device=member.parameter.device)
        return state
