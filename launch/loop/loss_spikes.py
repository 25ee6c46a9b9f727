"""Which steps to leave out: those whose loss jumps."""

import math
import statistics
from collections import deque
from typing import Any

_WINDOW = 128
_LEAST = 32


class SpikeJudge:
    """Judges each step's loss by the 128 before it; the same on all ranks, given the same losses.

    A loss `sigma` standard deviations above their mean is a spike, and so is one that is not finite. Nothing is before
    32 losses are known, nor ever where `sigma` is 0. After OLMo 2 (arXiv 2501.00656).
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self._seen: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, loss: float) -> bool:
        """Whether this loss is a spike; it counts for those that follow."""
        if not self.sigma:
            return False
        spike = not math.isfinite(loss)
        if not spike and len(self._seen) >= _LEAST:
            spike = loss > statistics.fmean(self._seen) + self.sigma * statistics.stdev(self._seen)
        if math.isfinite(loss):
            # Spikes too: a loss that stays where it has jumped to is soon none.
            self._seen.append(loss)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """The losses it goes by."""
        return {"seen": list(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go by the losses of `state_dict`."""
        self._seen = deque(state["seen"], maxlen=_WINDOW)
