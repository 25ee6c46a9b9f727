"""Progress of a step: the wave it is in, and the collectives under way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from symdist.exchange.collectives.transport import Handle
from symdist.layouts import Group


class ExchangeError(RuntimeError):
    """A collective of a step failed; the message names the wave, the parameters, the ranks and the cause."""


@dataclass(eq=False, kw_only=True)
class PendingCollective:
    """A collective that was started.

    Attributes:
        text: A description of the collective, for messages.
        done: A function that returns, without waiting, whether the collective is over.
    """

    text: str
    done: Callable[[], bool]


class StepProgress:
    """Records what a step has under way, so that a report can say where a hung step is.

    Another thread may read it while the step runs.

    Attributes:
        waves: The number of waves of the step.
        wave: The number of the wave being computed, from 1; 0 outside of the waves.
        before: What the step is doing before its waves; otherwise empty.
    """

    def __init__(self) -> None:
        self.waves = 0
        self.wave = 0
        self.before = ""
        self._pending: list[PendingCollective] = []

    def begin(self, waves: int) -> None:
        """Start the record of a new step, and forget the previous step.

        Args:
            waves: The number of waves of the step.
        """
        self.waves, self.wave, self.before, self._pending = waves, 0, "", []

    def end(self) -> None:
        """Record that the step has issued all its work."""
        self.wave = 0

    def started(self, wave: int, kind: str, group: Group, names: Sequence[str], handle: Handle) -> PendingCollective:
        """Record that a collective was started.

        Args:
            wave: The number of its wave, from 1.
            kind: The kind of request that it answers.
            group: The ranks that take part in it.
            names: The names of the parameters it is for.
            handle: Its handle. If the handle has no `is_completed`, the collective counts as over at once.

        Returns:
            The record of the collective, to pass to `waited`.
        """
        text = f"wave {wave} of {self.waves}, {kind} over {_ranks(group)} for {_named(names)}"
        pending = PendingCollective(text=text, done=getattr(handle, "is_completed", lambda: True))
        self._pending.append(pending)
        return pending

    def waited(self, mark: PendingCollective, device: torch.device) -> None:
        """Record that the wait for a collective has returned.

        On CUDA, a wait only makes later work on the device wait for the collective, so an event is recorded to tell
        when it is over.

        Args:
            mark: The result of `started`.
            device: The device of the collective's tensors.
        """
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            mark.done = event.query
        else:
            self._pending.remove(mark)

    def text(self) -> str:
        """Describe the first collective that is not over.

        Returns:
            The description. If no collective is under way, the wave being computed or what the step is doing before its
            waves; empty between steps.
        """
        for pending in list(self._pending):
            if not pending.done():
                return pending.text
        return f"wave {self.wave} of {self.waves}" if self.wave else self.before


def _ranks(group: Group) -> str:
    ranks = [str(rank) for rank in group.ranks]
    return f"ranks {', '.join(ranks if len(ranks) <= 8 else [*ranks[:6], '…', ranks[-1]])}"


def _named(names: Sequence[str]) -> str:
    if not names:
        return "parameters without a name"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
