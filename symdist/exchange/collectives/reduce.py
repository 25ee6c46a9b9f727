"""Answers sums, Gram roots and QRs over a group; all matrices with pending requests share one buffer."""

import functools
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from symdist.exchange.collectives.balance import balance
from symdist.exchange.collectives.transport import Handle, Transport
from symdist.exchange.collectives.triangles import pack, packed_size, unpack
from symdist.layouts import Group
from symdist.rules import InverseRoot, Orthonormal, Root, Sum, inverse_root
from symdist.rules.linalg.orthonormal import orthonormal

# Reduce-scatter needs equal chunks. Padding all chunks to the largest one saves two all-to-alls. But if the padding
# makes the buffer larger by more than this factor (few Grams, many ranks), it sends more than the all-to-alls would.
_PADDING = 1.25


def answer_sums(
    requests: Sequence[Sum], *, group: Group, transport: Transport
) -> Generator[Handle, None, list[Tensor]]:
    """Answer Sum requests with one all-reduce.

    This is a generator: it yields the handle of the all-reduce, and its caller resumes it once the wait on that handle
    has returned. All ranks of `group` must call it.

    Args:
        requests: Sum requests of one dtype and device; their values are not written to.
        group: The ranks to sum over.
        transport: Runs the all-reduce.

    Returns:
        For each request, the sum, in the shape of its values.
    """
    # Concatenating a single tensor may return an alias of it, and the all-reduce writes to the buffer.
    buffer = (
        torch.cat([r.values.reshape(-1) for r in requests])
        if len(requests) > 1
        else (requests[0].values.reshape(-1).clone())
    )
    yield transport.all_reduce(buffer, group=group)
    parts = buffer.split([r.values.numel() for r in requests])
    return [part.view(r.values.shape) for part, r in zip(parts, requests, strict=True)]


class _Work(Protocol):
    """A request whose matrices are each summed over the ranks and then processed on one rank.

    In the buffers, each matrix is a flat vector.

    Attributes:
        sum_size: How many numbers the sum of one matrix takes.
        answer_size: How many numbers the answer for one matrix takes.
        operations: The FLOPs to process one matrix.
        parts: This rank's summands, `[b, …]`.
    """

    sum_size: int
    answer_size: int
    operations: float
    parts: Tensor

    def packed(self) -> Tensor:
        """Pack this rank's summands as `[b, sum_size]`."""

    def solved(self, sums: Tensor) -> Tensor:
        """Compute the answers `[u, answer_size]` for u matrices from their sums `[u, sum_size]`."""

    def answer(self, packed: Tensor) -> Any:
        """Build the answer to the request from `[b, answer_size]`."""


class _RootWork:
    """An inverse root: triangles of the Gram and the root are sent, and two norms unless the iteration restarts."""

    def __init__(self, request: Root):
        self.parts = request.gram.to(torch.promote_types(request.gram.dtype, torch.float32))
        self.edge = request.gram.shape[-1]
        self.sum_size = packed_size(self.edge)
        self.norms = 0 if request.numerics.half else 2
        self.answer_size = self.sum_size + self.norms
        self.segment = request.segment
        self.numerics = request.numerics
        self.unit = request.unit
        self.operations = request.operations

    def packed(self) -> Tensor:
        return pack(self.parts)

    def solved(self, sums: Tensor) -> Tensor:
        root = inverse_root(unpack(sums, self.edge), self.numerics, self.segment)
        if not self.norms:
            return pack(root.dense().to(sums.dtype))
        return torch.cat([pack(root.matrix), root.nuclear.flatten(1), root.frobenius.flatten(1)], dim=1)

    def answer(self, packed: Tensor) -> InverseRoot:
        if not self.norms:
            return InverseRoot(unpack(packed, self.edge))
        norms = packed[:, -2, None, None], packed[:, -1, None, None]
        return InverseRoot(unpack(packed[:, :-2], self.edge), norms=norms).of_larger(self.unit)


class _OrthonormalWork:
    """A QR: the matrix is sent, and its Q factor comes back."""

    def __init__(self, request: Orthonormal):
        self.parts = request.values
        self.shape = request.values.shape[1:]
        self.sum_size = self.answer_size = self.shape.numel()
        self.operations = request.operations()

    def packed(self) -> Tensor:
        return self.parts.flatten(1)

    def solved(self, sums: Tensor) -> Tensor:
        return orthonormal(sums.unflatten(1, self.shape)).flatten(1)

    def answer(self, packed: Tensor) -> Tensor:
        return packed.unflatten(1, self.shape)


def answer_shared(
    requests: Sequence[Root | Orthonormal], *, group: Group, transport: Transport, loads: list[float] | None = None
) -> Generator[Handle, None, list[Any]]:
    """Answer Root and Orthonormal requests, with each matrix processed on only one rank.

    A reduce-scatter sums the matrices, each rank processes those it owns, and an all-gather distributes the results.
    The volume is that of one all-reduce. If the matrices do not spread evenly over the ranks, the buffer is cut into
    equal chunks regardless of where matrices end; an additional all-to-all before and after the processing then
    completes them on their owners.

    This is a generator like `answer_sums`. All ranks of `group` must call it.

    Args:
        requests: Root and Orthonormal requests of one dtype and device.
        group: The ranks to sum over.
        transport: Runs the collectives.
        loads: The FLOPs that each rank has so far, updated in place; matrices go to the least loaded ranks. Zeros by
            default.

    Returns:
        For each request its answer: an `InverseRoot` for a Root, Q in the shape of the values for an Orthonormal.
    """
    works: list[_Work] = [_RootWork(r) if isinstance(r, Root) else _OrthonormalWork(r) for r in requests]
    like = works[0].parts
    of_unit = [work for work in works for _ in range(work.parts.shape[0])]
    owners = balance([work.operations for work in of_unit], parts=group.size, loads=loads)

    sizes = [work.sum_size for work in of_unit]
    aligned = _spread_evenly(sizes, owners, group.size)
    sums = _slots(sizes, owners, group.size, aligned=aligned)
    buffer = like.new_zeros(sums.chunk * group.size)
    unit = 0
    for work in works:
        for packed in work.packed():
            buffer[sums.starts[unit] : sums.starts[unit] + sums.sizes[unit]] = packed
            unit += 1
    chunk = like.new_empty(sums.chunk)
    yield transport.reduce_scatter(chunk, buffer, group=group)
    del buffer
    owned = yield from _to_owners(chunk, sums, group=group, transport=transport)

    slots = _slots([work.answer_size for work in of_unit], owners, group.size, aligned=aligned)
    answers: dict[int, Tensor] = {}
    for work in works:
        units = [u for u in owned if of_unit[u] is work]
        if units:
            solved = work.solved(torch.stack([owned[u] for u in units]))
            answers.update(zip(units, solved.to(like.dtype), strict=True))
    chunk = yield from _from_owners(answers, slots, like=like, group=group, transport=transport)
    buffer = like.new_empty(slots.chunk * group.size)
    yield transport.all_gather(buffer, chunk, group=group)

    results = []
    unit = 0
    for work in works:
        b = work.parts.shape[0]
        rows = [buffer[slots.starts[u] : slots.starts[u] + slots.sizes[u]] for u in range(unit, unit + b)]
        # A request may have no matrix at all, for example if its ranks hold no experts.
        results.append(work.answer(torch.stack(rows) if rows else like.new_empty((0, work.answer_size))))
        unit += b
    return results


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """The position of every unit in a buffer of equal chunks of `chunk` numbers, one chunk per rank.

    A unit is one matrix to process. `aligned` says that every unit lies within its owner's chunk.
    """

    chunk: int
    starts: list[int]
    sizes: list[int]
    owners: list[int]
    aligned: bool

    def overlap(self, *, holder: int, owner: int) -> list[tuple[int, int, int]]:
        """Return the parts of `owner`'s units that lie in `holder`'s chunk, as `(unit, start, stop)` in the buffer."""
        return self._parts.get((holder, owner), [])

    @functools.cached_property
    def _parts(self) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
        # Computed once for all pairs of ranks: a search per pair would be slow for many units and ranks.
        parts: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for unit, (start, size, owner) in enumerate(zip(self.starts, self.sizes, self.owners, strict=True)):
            for holder in range(start // self.chunk, -(-(start + size) // self.chunk)):
                low, high = holder * self.chunk, (holder + 1) * self.chunk
                parts.setdefault((holder, owner), []).append((unit, max(start, low), min(start + size, high)))
        return parts


def _loads(sizes: list[int], owners: list[int], ranks: int) -> list[int]:
    """Return the total size of the units that each rank owns."""
    loads = [0] * ranks
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    return loads


def _spread_evenly(sizes: list[int], owners: list[int], ranks: int) -> bool:
    """Return whether padding all chunks to the largest sends less than completing cut units would."""
    return max(_loads(sizes, owners, ranks)) * ranks <= _PADDING * sum(sizes)


def _slots(sizes: list[int], owners: list[int], ranks: int, *, aligned: bool) -> _Slots:
    """Place the units of each rank one after another, in chunks padded to the largest if `aligned`."""
    loads = _loads(sizes, owners, ranks)
    chunk = max(loads) if aligned else -(-sum(sizes) // ranks)
    free = [rank * chunk for rank in range(ranks)] if aligned else [0, *itertools.accumulate(loads[:-1])]
    starts = []
    for size, owner in zip(sizes, owners, strict=True):
        starts.append(free[owner])
        free[owner] += size
    return _Slots(chunk=chunk, starts=starts, sizes=sizes, owners=owners, aligned=aligned)


def _to_owners(
    chunk: Tensor, slots: _Slots, *, group: Group, transport: Transport
) -> Generator[Handle, None, dict[int, Tensor]]:
    """Return the complete units that this rank owns, by unit, from the summed chunks of all ranks."""
    me, base = group.index, group.index * slots.chunk
    if slots.aligned:
        return {unit: chunk[lo - base : hi - base] for unit, lo, hi in slots.overlap(holder=me, owner=me)}
    outgoing = [slots.overlap(holder=me, owner=rank) for rank in range(group.size)]
    incoming = [slots.overlap(holder=rank, owner=me) for rank in range(group.size)]
    cut = {rank: [chunk[lo - base : hi - base] for _, lo, hi in outgoing[rank]] for rank in range(group.size)}
    out = chunk.new_empty(_length(incoming))
    yield transport.all_to_all(
        out,
        torch.cat([chunk.new_empty(0), *(part for parts in cut.values() for part in parts)]),
        received=[_length([ranges]) for ranges in incoming],
        sent=[_length([ranges]) for ranges in outgoing],
        group=group,
    )
    parts: dict[int, list[Tensor]] = {}
    position = 0
    for unit, lo, hi in (part for ranges in incoming for part in ranges):
        parts.setdefault(unit, []).append(out[position : position + hi - lo])
        position += hi - lo
    return {unit: torch.cat(pieces) for unit, pieces in parts.items()}


def _from_owners(
    answers: dict[int, Tensor], slots: _Slots, *, like: Tensor, group: Group, transport: Transport
) -> Generator[Handle, None, Tensor]:
    """Return this rank's chunk of the answers, from the answers that all owners computed."""
    me, base = group.index, group.index * slots.chunk
    chunk = like.new_zeros(slots.chunk)
    if slots.aligned:
        for unit, answer in answers.items():
            chunk[slots.starts[unit] - base : slots.starts[unit] - base + slots.sizes[unit]] = answer
        return chunk
    outgoing = [slots.overlap(holder=rank, owner=me) for rank in range(group.size)]
    incoming = [slots.overlap(holder=me, owner=rank) for rank in range(group.size)]
    cut = [
        answers[unit][lo - slots.starts[unit] : hi - slots.starts[unit]]
        for ranges in outgoing
        for unit, lo, hi in ranges
    ]
    out = like.new_empty(_length(incoming))
    yield transport.all_to_all(
        out,
        torch.cat([like.new_empty(0), *cut]),
        received=[_length([ranges]) for ranges in incoming],
        sent=[_length([ranges]) for ranges in outgoing],
        group=group,
    )
    position = 0
    for _, lo, hi in (part for ranges in incoming for part in ranges):
        chunk[lo - base : hi - base] = out[position : position + hi - lo]
        position += hi - lo
    return chunk


def _length(ranges: list[list[tuple[int, int, int]]]) -> int:
    """Return the total length of `(unit, start, stop)` parts."""
    return sum(hi - lo for of_rank in ranges for _, lo, hi in of_rank)
