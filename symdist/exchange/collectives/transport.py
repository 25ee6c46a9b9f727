"""The part of torch.distributed that an optimizer step uses: five asynchronous collectives on flat buffers.

`TorchTransport` runs the collectives. `CountingTransport` records them, and runs them only if it wraps another
transport.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from symdist.layouts import Group

# PyTorch 2.13 renamed both functions.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Wait until work issued after this call may read the result of the collective."""


class Transport(Protocol):
    """The collectives that the exchange needs.

    All ranks of `group` must call each of them, in the same order. Buffers are flat, contiguous and of one dtype. Each
    collective returns a handle; the result may be read after `wait` on that handle.
    """

    def prepare(self, groups: Iterable[Group]) -> None:
        """Get ready to communicate over groups.

        All ranks of these groups call it before the first step.

        Args:
            groups: The groups that communicate in a step.
        """

    def gather_objects(self, value: Any, *, group: Group) -> list[Any]:
        """Gather a value from every rank and wait for it; not used in a step.

        Args:
            value: This rank's value, which must pickle.
            group: The ranks that take part.

        Returns:
            The values, in rank order.
        """

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """Replace `buffer` by its sum over the group.

        Args:
            buffer: `[n]`, overwritten with the sum.
            group: The ranks to sum over.

        Returns:
            The handle to wait on.
        """

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """Sum `buffer` over the group, and write the i-th of its equal chunks to rank i's `out`.

        Args:
            out: `[n]`, receives this rank's chunk of the sum.
            buffer: `[group size · n]`, the summand.
            group: The ranks to sum over.

        Returns:
            The handle to wait on.
        """

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """Write the buffers of all ranks to `out`, in rank order.

        Args:
            out: `[group size · n]`, receives the buffers.
            buffer: `[n]`, this rank's buffer.
            group: The ranks that take part.

        Returns:
            The handle to wait on.
        """

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """Send each rank its part of `buffer`, and write what each rank sends here to `out`, in rank order.

        Args:
            out: `[sum(received)]`, receives the parts in rank order.
            buffer: `[sum(sent)]`, the parts to send, in rank order.
            received: How many elements come from each rank.
            sent: How many elements go to each rank.
            group: The ranks that take part.

        Returns:
            The handle to wait on.
        """

    def broadcast(self, buffer: Tensor, *, group: Group) -> Handle:
        """Replace `buffer` by that of the group's first rank.

        Args:
            buffer: `[n]`, overwritten on all other ranks.
            group: The ranks that take part.

        Returns:
            The handle to wait on.
        """


class TorchTransport:
    """Runs the collectives with torch.distributed, on any backend.

    For each group it uses an existing process group with exactly the same ranks, which may be the default group. If
    there is none, for example because the ranks lie along several mesh axes, it creates one when the group is first
    used: all ranks must then use such groups for the first time in the same order.
    """

    def __init__(self) -> None:
        self._handles: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def prepare(self, groups: Iterable[Group]) -> None:
        """Find or create the process group of every group, in ascending order of their ranks.

        All ranks of these groups must call it.

        Args:
            groups: The groups that communicate in a step; those of a single rank are skipped.

        Raises:
            RuntimeError: If a group has no process group and none can be created.
        """
        for group in sorted(groups, key=lambda group: group.ranks):
            if group.size > 1:
                self._handle(group)

    def gather_objects(self, value: Any, *, group: Group) -> list[Any]:
        """See `Transport`."""
        values: list[Any] = [None] * group.size
        dist.all_gather_object(values, value, group=self._handle(group))
        return values

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

    def broadcast(self, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        return dist.broadcast(buffer, src=group.ranks[0], group=self._handle(group), async_op=True)

    def _handle(self, group: Group) -> dist.ProcessGroup:
        if group.ranks not in self._handles:
            self._handles[group.ranks] = _existing_group(group) or _new_group(group)
        return self._handles[group.ranks]


def _existing_group(group: Group) -> dist.ProcessGroup | None:
    """Find a process group with the same ranks in the same order.

    If there are several, the one created first is returned, so that all ranks choose the same.
    """
    known = [group.handle] if group.handle is not None else [dist.group.WORLD, *distributed_c10d._world.pg_group_ranks]
    return next((handle for handle in known if tuple(dist.get_process_group_ranks(handle)) == group.ranks), None)


def _new_group(group: Group) -> dist.ProcessGroup:
    """Create a process group; only the ranks of `group` call this.

    Raises:
        RuntimeError: If no other process groups connect the ranks.
    """
    if not group.through:
        raise RuntimeError(
            f"there is no process group of ranks {group.ranks}, and symdist cannot create one. Call "
            f"torch.distributed.new_group({list(group.ranks)}) on all ranks before building the optimizer"
        )
    world = dist.group.WORLD
    assert world is not None
    bound_device, name_group = world.bound_device_id, distributed_c10d._process_group_name
    # If the default group is bound to a device, PyTorch makes a new group by splitting the default group, which needs
    # all of its ranks.
    world.bound_device_id = None
    # Only the ranks of this group make it; other ranks may never learn of it. PyTorch names groups by a number that
    # each rank counts for itself. Ranks that have made different numbers of groups would therefore wait for each other
    # forever: here, or, if this group were counted, at the next group that all of them make. Hence this group gets a
    # name of its own and is not counted.
    name = f"symdist:{'-'.join(map(str, group.ranks))}:{_times_created[group.ranks]}"
    _times_created[group.ranks] += 1
    distributed_c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        return dist.new_group(list(group.ranks), use_local_synchronization=True)
    finally:
        distributed_c10d._process_group_name = name_group
        world.bound_device_id = bound_device


_times_created: Counter[tuple[int, ...]] = Counter()
"""How many groups were created for each set of ranks; more than one only after process groups were destroyed."""


@dataclass(frozen=True, kw_only=True)
class CollectiveRecord:
    """The record of one collective.

    Attributes:
        kind: The name of the `Transport` method.
        size: The number of ranks in the group.
        sent: The bytes that this rank sends. For sums, this assumes a ring algorithm.
    """

    kind: str
    size: int
    sent: float


class _Done:
    """The handle of a collective that was not run."""

    def wait(self) -> None:
        """Return at once, as nothing was started."""


@dataclass
class CountingTransport:
    """Records every collective, and runs it if it wraps another transport.

    Otherwise the buffers keep what they contained, so results are meaningless: use meta tensors then.

    Attributes:
        inner: The transport that runs the collectives; None (default) to run none.
        log: The records of the collectives so far; empty by default.

    Example:
        >>> transport = CountingTransport(inner=TorchTransport())
        >>> norm = symdist.clip_grad_norm_(model.parameters(), 1.0, transport=transport)
        >>> print(transport.collectives, transport.sent)
    """

    inner: Transport | None = None
    log: list[CollectiveRecord] = field(default_factory=list)

    @property
    def collectives(self) -> int:
        """The number of collectives recorded."""
        return len(self.log)

    @property
    def sent(self) -> float:
        """The number of bytes that this rank sent, or would have sent."""
        return sum(record.sent for record in self.log)

    def prepare(self, groups: Iterable[Group]) -> None:
        """See `Transport`."""
        if self.inner is not None:
            self.inner.prepare(groups)

    def gather_objects(self, value: Any, *, group: Group) -> list[Any]:
        """See `Transport`. It is not recorded; without a transport to run it, all values are this rank's."""
        return self.inner.gather_objects(value, group=group) if self.inner else [value] * group.size

    def _record(self, kind: str, group: Group, sent: float) -> None:
        self.log.append(CollectiveRecord(kind=kind, size=group.size, sent=sent))

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._record("all_reduce", group, 2 * buffer.nbytes * (group.size - 1) / group.size)
        return self.inner.all_reduce(buffer, group=group) if self.inner else _Done()

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._record("reduce_scatter", group, buffer.nbytes - out.nbytes)
        return self.inner.reduce_scatter(out, buffer, group=group) if self.inner else _Done()

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._record("all_gather", group, out.nbytes - buffer.nbytes)
        return self.inner.all_gather(out, buffer, group=group) if self.inner else _Done()

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        """See `Transport`."""
        self._record("all_to_all", group, buffer.nbytes - sent[group.index] * buffer.element_size())
        if self.inner is None:
            return _Done()
        return self.inner.all_to_all(out, buffer, received=received, sent=sent, group=group)

    def broadcast(self, buffer: Tensor, *, group: Group) -> Handle:
        """See `Transport`."""
        self._record("broadcast", group, buffer.nbytes if group.index == 0 else 0)
        return self.inner.broadcast(buffer, group=group) if self.inner else _Done()
