"""Sums and Gram roots over a group: every matrix that asks at once travels in one buffer."""

import functools
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symdist.exchange.balance import balance
from symdist.exchange.symmetric import pack, packed_size, unpack
from symdist.exchange.transport import Transport
from symdist.layouts import Group
from symdist.rules import InverseRoot, Root, Sum, inverse_root

# Reduce-scatter wants equal chunks. Padding every owner to the fullest one saves two all-to-alls; beyond this
# factor (few Grams, many ranks) it moves more than they would.
_PADDING = 1.25


def answer_sums(requests: Sequence[Sum], *, group: Group, transport: Transport) -> Generator[Any, None, list[Tensor]]:
    """One all-reduce for all of them."""
    # cat of a single tensor may alias it, and no request's values may be written to.
    buffer = (
        torch.cat([r.values.reshape(-1) for r in requests])
        if len(requests) > 1
        else (requests[0].values.reshape(-1).clone())
    )
    yield transport.all_reduce(buffer, group=group)
    parts = buffer.split([r.values.numel() for r in requests])
    return [part.view(r.values.shape) for part, r in zip(parts, requests, strict=True)]


def answer_roots(
    requests: Sequence[Root], *, group: Group, transport: Transport, loads: list[float] | None = None
) -> Generator[Any, None, list[InverseRoot]]:
    """Reduce-scatter the partial Grams, take each root on one rank, all-gather the roots: of each, one triangle.

    `loads` are the operations that the ranks have done or will do otherwise; the roots' are added.

    The volume is that of one all-reduce of the triangles. Where the Grams do not spread evenly over the ranks, the
    sums are cut into equal chunks regardless of the Grams' borders, and an all-to-all each way completes them on their
    owners.
    """
    like = requests[0].gram
    units = [(i, j) for i, request in enumerate(requests) for j in range(request.gram.shape[0])]
    edges = [requests[i].gram.shape[-1] for i, _ in units]
    operations = [requests[i].numerics.operations(d) for (i, _), d in zip(units, edges, strict=True)]
    owners = balance(operations, parts=group.size, loads=loads)

    aligned = _spread_evenly([packed_size(d) for d in edges], owners, group.size)
    grams = _slots([packed_size(d) for d in edges], owners, group.size, aligned=aligned)
    buffer = like.new_zeros(grams.chunk * group.size)
    unit = 0
    for request in requests:
        for packed in pack(request.gram):
            buffer[grams.starts[unit] : grams.starts[unit] + grams.sizes[unit]] = packed
            unit += 1
    chunk = like.new_empty(grams.chunk)
    yield transport.reduce_scatter(chunk, buffer, group=group)
    del buffer
    owned = yield from _to_owners(chunk, grams, group=group, transport=transport)

    # Beside each root travel the two norms it knows of its matrix.
    roots = _slots([packed_size(d) + 2 for d in edges], owners, group.size, aligned=aligned)
    answers: dict[int, Tensor] = {}
    for i, request in enumerate(requests):
        mine = [u for u in owned if units[u][0] == i]
        if mine:
            d = request.gram.shape[-1]
            root = inverse_root(unpack(torch.stack([owned[u] for u in mine]), d), request.numerics)
            flat = torch.cat([pack(root.matrix), root.nuclear.flatten(1), root.frobenius.flatten(1)], dim=1)
            answers.update(zip(mine, flat.to(like.dtype), strict=True))
    chunk = yield from _from_owners(answers, roots, like=like, group=group, transport=transport)
    buffer = like.new_empty(roots.chunk * group.size)
    yield transport.all_gather(buffer, chunk, group=group)

    unpacked = []
    unit = 0
    for request in requests:
        b, d = request.gram.shape[:2]
        found = [buffer[roots.starts[u] : roots.starts[u] + roots.sizes[u]] for u in range(unit, unit + b)]
        # Without a matrix among these ranks, as where their experts are none, there is nothing to stack.
        rows = torch.stack(found) if found else like.new_empty((0, packed_size(d) + 2))
        unit += b
        norms = rows[:, -2, None, None], rows[:, -1, None, None]
        unpacked.append(InverseRoot(unpack(rows[:, :-2], d), norms=norms))
    return unpacked


@dataclass(frozen=True, kw_only=True)
class _Slots:
    """Where each unit lies in a buffer of equal chunks, one a rank."""

    chunk: int
    starts: list[int]
    sizes: list[int]
    owners: list[int]
    aligned: bool
    """Every unit lies in its owner's chunk."""

    def overlap(self, *, holder: int, owner: int) -> list[tuple[int, int, int]]:
        """`(unit, start, stop)`, in buffer coordinates, of what `holder`'s chunk has of the units of `owner`."""
        return self._parts.get((holder, owner), [])

    @functools.cached_property
    def _parts(self) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
        # Once for all ranks: asked for one by one, many units over many ranks take long.
        parts: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for unit, (start, size, owner) in enumerate(zip(self.starts, self.sizes, self.owners, strict=True)):
            for holder in range(start // self.chunk, -(-(start + size) // self.chunk)):
                low, high = holder * self.chunk, (holder + 1) * self.chunk
                parts.setdefault((holder, owner), []).append((unit, max(start, low), min(start + size, high)))
        return parts


def _loads(sizes: list[int], owners: list[int], ranks: int) -> list[int]:
    loads = [0] * ranks
    for size, owner in zip(sizes, owners, strict=True):
        loads[owner] += size
    return loads


def _spread_evenly(sizes: list[int], owners: list[int], ranks: int) -> bool:
    """Whether padding every owner's chunk to the fullest moves less than completing cut units would."""
    return max(_loads(sizes, owners, ranks)) * ranks <= _PADDING * sum(sizes)


def _slots(sizes: list[int], owners: list[int], ranks: int, *, aligned: bool) -> _Slots:
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
) -> Generator[Any, None, dict[int, Tensor]]:
    """The whole units this rank owns, from the chunks that every rank holds."""
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
) -> Generator[Any, None, Tensor]:
    """This rank's chunk, from the whole units that every owner holds."""
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
    return sum(hi - lo for of_rank in ranges for _, lo, hi in of_rank)
