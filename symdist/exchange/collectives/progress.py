"""Where a step is: its waves, and the collectives that are under way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from symdist.exchange.collectives.transport import Handle
from symdist.layouts import Group


class ExchangeError(RuntimeError):
    """A collective of a step failed: says in which wave, for which parameters, over which ranks, and why."""


@dataclass(eq=False, kw_only=True)
class PendingCollective:
    """A collective that was started; `done` tells without waiting whether it is over."""

    text: str
    done: Callable[[], bool]


class StepProgress:
    """Notes what a step has under way, for whoever must say where a hung one stands: another thread may read it."""

    def __init__(self) -> None:
        self.waves = 0
        self.wave = 0
        """The wave that is being computed, from 1; 0 outside of them."""
        self.before = ""
        """What a step is at before its waves."""
        self._marks: list[PendingCollective] = []

    def begin(self, waves: int) -> None:
        """A step of so many waves begins; what is known of the one before is forgotten."""
        self.waves, self.wave, self.before, self._marks = waves, 0, "", []

    def end(self) -> None:
        """The step has issued all its work."""
        self.wave = 0

    def started(self, wave: int, kind: str, group: Group, names: Sequence[str], handle: Handle) -> PendingCollective:
        """A collective was started."""
        text = f"wave {wave} of {self.waves}, {kind} over {_ranks(group)} for {_named(names)}"
        mark = PendingCollective(text=text, done=getattr(handle, "is_completed", lambda: True))
        self._marks.append(mark)
        return mark

    def waited(self, mark: PendingCollective, device: torch.device) -> None:
        """A wait for it has returned, which on a GPU says only that later work of this device waits for it."""
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            mark.done = event.query
        else:
            self._marks.remove(mark)

    def text(self) -> str:
        """The first collective that is not over, or the wave at work; empty between steps."""
        for mark in list(self._marks):
            if not mark.done():
                return mark.text
        return f"wave {self.wave} of {self.waves}" if self.wave else self.before


def _ranks(group: Group) -> str:
    ranks = [str(rank) for rank in group.ranks]
    return f"ranks {', '.join(ranks if len(ranks) <= 8 else [*ranks[:6], '…', ranks[-1]])}"


def _named(names: Sequence[str]) -> str:
    if not names:
        return "parameters without a name"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
