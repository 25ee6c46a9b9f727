"""Detects loss spikes, so that the loop can skip those steps."""

import math
import statistics
from collections import deque
from typing import Any

_WINDOW = 128
_LEAST = 32


class SpikeJudge:
    """Compares each step's loss with the 128 finite losses before it; ranks with the same losses agree.

    A loss is a spike if it is not finite, or, once 32 losses are known, if it is more than `sigma` standard deviations
    above their mean. If `sigma` is 0, nothing is a spike. After OLMo 2 (arXiv 2501.00656).
    """

    def __init__(self, sigma: float):
        self.sigma = sigma
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, loss: float) -> bool:
        """Return whether `loss` is a spike, and remember it for the losses that follow."""
        if not self.sigma:
            return False
        spike = not math.isfinite(loss)
        if not spike and len(self._losses) >= _LEAST:
            spike = loss > statistics.fmean(self._losses) + self.sigma * statistics.stdev(self._losses)
        if math.isfinite(loss):
            # Spikes included: if the loss stays at its new level, that level soon counts as normal.
            self._losses.append(loss)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered losses."""
        return {"seen": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the losses that `state_dict` returned."""
        self._losses = deque(state["seen"], maxlen=_WINDOW)
