"""All that an optimizer step asks of torch.distributed: four asynchronous collectives on flat buffers.

`TorchTransport` moves data. `CountingTransport` notes what would be, or is being, moved.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

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

    def prepare(self, groups: Iterable[Group]) -> None:
        """Get ready to talk over `groups`: called at construction, by all their ranks."""

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """Replace `buffer` by its sum over the group."""

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """Sum `buffer` (size × out) over the group and leave rank i's equal chunk in its `out`."""

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """Put every rank's `buffer`, in rank order, into `out`."""

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """Send `sent[i]` elements of `buffer` to rank i and receive `received[i]` from it."""


class TorchTransport:
    """The collectives of torch.distributed, over the process groups that exist: gloo, NCCL or another.

    Ranks over several mesh axes seldom have a group of their own. One with exactly these ranks is used where it exists,
    be it the default group; else one is made, when first asked for, which all its ranks must do in the same order.
    """

    def __init__(self) -> None:
        self._handles: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def prepare(self, groups: Iterable[Group]) -> None:
        """Find or make the process groups of `groups`, by ascending ranks; RuntimeError where one cannot be made."""
        for group in sorted(groups, key=lambda group: group.ranks):
            if group.size > 1:
                self._handle(group)

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return dist.all_reduce(buffer, group=self._handle(group), async_op=True)

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return _reduce_scatter(out, buffer, group=self._handle(group), async_op=True)

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return _all_gather(out, buffer, group=self._handle(group), async_op=True)

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """See `Transport`."""
        return dist.all_to_all_single(out, buffer, received, sent, group=self._handle(group), async_op=True)

    def _handle(self, group: Group) -> dist.ProcessGroup:
        if group.ranks not in self._handles:
            self._handles[group.ranks] = _existing(group) or _made(group)
        return self._handles[group.ranks]


def _existing(group: Group) -> dist.ProcessGroup | None:
    """A process group that numbers the ranks of `group` as it does; the first made, so that all ranks take the same."""
    known = [group.handle] if group.handle is not None else [dist.group.WORLD, *distributed_c10d._world.pg_group_ranks]
    return next((each for each in known if tuple(dist.get_process_group_ranks(each)) == group.ranks), None)


def _made(group: Group) -> dist.ProcessGroup:
    if not group.through:
        raise RuntimeError(
            f"ranks {group.ranks} have no process group of their own, nor others that connect them. Call "
            f"torch.distributed.new_group({list(group.ranks)}) on all ranks before building the optimizer"
        )
    world = dist.group.WORLD
    assert world is not None
    bound, named = world.bound_device_id, distributed_c10d._process_group_name
    # A default group that is bound to a device would be split for each group, which takes all its ranks.
    world.bound_device_id = None
    # Without the ranks outside, which may never hear of it. PyTorch names a group by a number that each rank counts for
    # itself: ranks that have made different numbers of groups would wait for each other for ever, here, or, where this
    # group were counted, at the next group that all of them make. So it has a name of its own, and is not counted.
    name = f"symdist:{'-'.join(map(str, group.ranks))}:{_times_made[group.ranks]}"
    _times_made[group.ranks] += 1
    distributed_c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        return dist.new_group(list(group.ranks), use_local_synchronization=True)
    finally:
        distributed_c10d._process_group_name = named
        world.bound_device_id = bound


_times_made: Counter[tuple[int, ...]] = Counter()
"""How often each set of ranks was given a group: again only after the process groups have been destroyed."""


@dataclass(frozen=True, kw_only=True)
class CollectiveRecord:
    """One collective: its kind, its group's size, and the bytes this rank sends (ring algorithms for sums)."""

    kind: str
    size: int
    sent: float


class _Done:
    def wait(self) -> None:
        """Nothing was started."""


@dataclass
class CountingTransport:
    """Notes every collective in `log`, and passes it on to `inner`; without `inner` nothing moves.

    Without `inner` buffers keep what they held, so results are meaningless: it is for meta tensors.
    """

    inner: Transport | None = None
    log: list[CollectiveRecord] = field(default_factory=list)

    @property
    def collectives(self) -> int:
        """How many collectives were asked for."""
        return len(self.log)

    @property
    def sent(self) -> float:
        """Bytes this rank sent."""
        return sum(moved.sent for moved in self.log)

    def prepare(self, groups: Iterable[Group]) -> None:
        """See `Transport`."""
        if self.inner is not None:
            self.inner.prepare(groups)

    def _note(self, kind: str, group: Group, sent: float) -> None:
        self.log.append(CollectiveRecord(kind=kind, size=group.size, sent=sent))

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
