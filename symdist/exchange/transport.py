"""All that an optimizer step asks of torch.distributed: four asynchronous collectives on flat buffers.

`Collectives` moves data. `Counting` notes what would be, or is being, moved.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from symdist.layouts import Group

# PyTorch 2.13 renamed both.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return once the result may be read by work issued after this call."""


class Transport(Protocol):
    """What the exchange needs. All buffers are flat, contiguous and of one dtype."""

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """Replace `buffer` by its sum over the group."""

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """Sum `buffer` (size × out) over the group and leave rank i's equal chunk in its `out`."""

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """Put every rank's `buffer`, in rank order, into `out`."""

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """Send `sent[i]` elements of `buffer` to rank i and receive `received[i]` from it."""


class Collectives:
    """The collectives of the process group that the layout's mesh was built on: gloo, NCCL or another."""

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return dist.all_reduce(buffer, group=group.handle, async_op=True)

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return _reduce_scatter(out, buffer, group=group.handle, async_op=True)

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return _all_gather(out, buffer, group=group.handle, async_op=True)

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """See `Transport`."""
        return dist.all_to_all_single(out, buffer, received, sent, group=group.handle, async_op=True)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """One collective: its kind, its group's size, and the bytes this rank sends (ring algorithms for sums)."""

    kind: str
    size: int
    sent: float


class _Done:
    def wait(self) -> None:
        """Nothing was started."""


@dataclass
class Counting:
    """Notes every collective in `log`, and passes it on to `inner`; without `inner` nothing moves.

    Without `inner` buffers keep what they held, so results are meaningless: it is for meta tensors.
    """

    inner: Transport | None = None
    log: list[Moved] = field(default_factory=list)

    @property
    def collectives(self) -> int:
        """How many collectives were asked for."""
        return len(self.log)

    @property
    def sent(self) -> float:
        """Bytes this rank sent."""
        return sum(moved.sent for moved in self.log)

    def _note(self, kind: str, group: Group, sent: float) -> None:
        self.log.append(Moved(kind=kind, size=group.size, sent=sent))

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._note("all_reduce", group, 2 * buffer.nbytes * (group.size - 1) / group.size)
        return self.inner.all_reduce(buffer, group=group) if self.inner else _Done()

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._note("reduce_scatter", group, buffer.nbytes - out.nbytes)
        return self.inner.reduce_scatter(out, buffer, group=group) if self.inner else _Done()

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._note("all_gather", group, out.nbytes - buffer.nbytes)
        return self.inner.all_gather(out, buffer, group=group) if self.inner else _Done()

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """See `Transport`."""
        self._note("all_to_all", group, buffer.nbytes - sent[group.index] * buffer.element_size())
        if self.inner is None:
            return _Done()
        return self.inner.all_to_all(out, buffer, received=received, sent=sent, group=group)
