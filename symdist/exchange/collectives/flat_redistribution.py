"""Redistribution of flat parameters: puts whole rows or matrices together from the runs of elements that ranks hold."""

import bisect
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from symdist.exchange.collectives.gather_scatter import Batch
from symdist.layouts import Box, Group
from symdist.layouts.flat import Range, elements_of, matrices_of


class FlatRedistribution:
    """Sends runs of elements from the ranks that hold them to the ranks that need them, and updates back.

    It implements `Redistribution`. A run is a range of consecutive elements of a flattened matrix. Elements that a rank
    both holds and needs are not sent. The constructor does not communicate.

    Args:
        group: The ranks that exchange runs.
        have: For each matrix, the run that each rank holds.
        want: For each matrix, the run that each rank needs: the whole matrix, or whole rows.
        shape: The shape of a matrix.
        column_blocks: The widths of the column blocks that order the elements of whole matrices; none by default.
        box: What this rank needs of every matrix that it needs anything of, which is then one batch, even of none. None
            (default) for one batch per number of rows.
        by_place: Whether pieces are in one batch only if they also start at the same row; False by default.
        travels: Whether any rank sends anything; True by default.

    Attributes:
        held: For each matrix, the start and stop of the run that this rank holds.
        wanted: For each matrix, the start and stop of the run that this rank needs.
        staying: The elements that stay on this rank, as (matrix, slice of this rank's piece, slice of the buffer). The
            buffer is a vector of all runs that this rank needs, matrix after matrix.
        outgoing: The elements that go to each rank, as (matrix, slice of this rank's piece).
        incoming: The elements that come from each rank, as slices of the buffer.
        size: The number of elements in the buffer.

    Example:
        Rank 0 holds elements 0 to 5 of one matrix, rank 1 elements 5 to 8; rank 0 gathers them:

            have, want = [((0, 0, 5), (1, 5, 8))], [owned_by(0, (2, 4))]
            redistribution = FlatRedistribution(Group(ranks=(0, 1), index=0), have=have, want=want, shape=(2, 4))
            redistribution.received_pieces()  # {1: 3}
    """

    def __init__(
        self,
        group: Group,
        *,
        have: Sequence[tuple[Range, ...]],
        want: Sequence[tuple[Range, ...]],
        shape: tuple[int, ...],
        column_blocks: tuple[int, ...] = (),
        box: Box | None = None,
        by_place: bool = False,
        travels: bool = True,
    ):
        me = group.index
        self.gathers = self.scatters = travels
        self._shape, self._column_blocks = shape, column_blocks
        self.held = [_of(runs, me) for runs in have]
        self.wanted = [_of(runs, me) for runs in want]
        self.staying: list[tuple[int, slice, slice]] = []
        self.outgoing: dict[int, list[tuple[int, slice]]] = {}
        self.incoming: dict[int, list[slice]] = {}
        self.size = 0
        for matrix, (held, needed) in enumerate(zip(self.held, self.wanted, strict=True)):
            for rank, start, stop in _within(want[matrix], held):
                in_piece = slice(start - held[0], stop - held[0])
                if rank == me:
                    in_buffer = slice(self.size + start - needed[0], self.size + stop - needed[0])
                    self.staying.append((matrix, in_piece, in_buffer))
                else:
                    self.outgoing.setdefault(rank, []).append((matrix, in_piece))
            for rank, start, stop in _within(have[matrix], needed):
                if rank != me:
                    in_buffer = slice(self.size + start - needed[0], self.size + stop - needed[0])
                    self.incoming.setdefault(rank, []).append(in_buffer)
            self.size += needed[1] - needed[0]
        self.batches: Sequence[Batch]
        self._parts: list[list[slice]]
        if box is None:
            self.batches, self._parts = self._by_rows(by_place)
        else:
            needed_here = [i for i, (start, stop) in enumerate(self.wanted) if stop > start]
            self.batches = [Batch(members=needed_here if math.prod(map(len, box)) else range(len(want)), box=box)]
            self._parts = [[slice(0, self.size)]]

    def _by_rows(self, by_place: bool) -> tuple[list[Batch], list[list[slice]]]:
        """Return batches of pieces with the same number of rows, and where the pieces lie in the buffer."""
        width = math.prod(self._shape[1:])
        by_key: dict[tuple[int, int], dict[int, slice]] = {}
        offset = 0
        for matrix, (start, stop) in enumerate(self.wanted):
            if stop > start:
                key = (start if by_place else 0, stop - start)
                by_key.setdefault(key, {})[matrix] = slice(offset, offset + stop - start)
            offset += stop - start
        rows = [range(start // width, (start + size) // width) for start, size in by_key]
        batches = [
            Batch(members=list(parts), box=[side, *map(range, self._shape[1:])])
            for side, parts in zip(rows, by_key.values(), strict=True)
        ]
        return batches, [list(parts.values()) for parts in by_key.values()]

    def stacked(self, assembled: Tensor, batch: int) -> Tensor:
        """Return the pieces of a batch: rows, or whole matrices, `[k, *shape]`."""
        parts = self._parts[batch]
        if all(a.stop == b.start for a, b in itertools.pairwise(parts)):
            elements = assembled[parts[0].start : parts[-1].stop]
        else:
            elements = torch.cat([assembled[part] for part in parts])
        shape = len(self.batches[batch].members), *map(len, self.batches[batch].box)
        if self._column_blocks:
            elements = elements.view(shape[0], math.prod(shape[1:]))
            return matrices_of(elements, shape[1:], column_blocks=self._column_blocks)
        return elements.view(shape)

    def unstacked(self, updates: Sequence[Tensor], *, like: Tensor) -> Tensor:
        """Return the updates of all pieces as one vector, in the order of the result of `wholes`."""
        flat = [elements_of(stack, column_blocks=self._column_blocks) for stack in updates]
        if len(flat) == 1:
            return flat[0].reshape(-1)
        buffer = like.new_empty(self.size)
        for pieces, parts in zip(flat, self._parts, strict=True):
            for piece, part in zip(pieces, parts, strict=True):
                buffer[part] = piece
        return buffer

    def kept(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of this rank's pieces that stay here: a vector per entry of `staying`."""
        return [pieces[matrix][part] for matrix, part, _ in self.staying]

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return the parts of this rank's pieces that are sent to other ranks, as vectors."""
        return {rank: [pieces[matrix][part] for matrix, part in parts] for rank, parts in self.outgoing.items()}

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives from each rank, by group index."""
        return {rank: sum(map(_length, parts)) for rank, parts in self.incoming.items()}

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Put together the runs that this rank needs: a vector of `size` elements, matrix after matrix."""
        buffer = like.new_empty(self.size)
        for (_, _, in_buffer), part in zip(self.staying, kept, strict=True):
            buffer[in_buffer] = part
        for rank, parts in self.incoming.items():
            for in_buffer, part in zip(parts, received[rank].split(list(map(_length, parts))), strict=True):
                buffer[in_buffer] = part
        return buffer

    def kept_home(self, updates: Tensor) -> list[Tensor]:
        """Return the parts of the updates that stay here: a vector per entry of `staying`."""
        return [updates[in_buffer] for _, _, in_buffer in self.staying]

    def sent_home(self, updates: Tensor) -> dict[int, list[Tensor]]:
        """Return the parts of the updates that go back to other ranks, as vectors."""
        return {rank: [updates[in_buffer] for in_buffer in parts] for rank, parts in self.incoming.items()}

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates this rank receives from each rank, by group index."""
        return {rank: sum(_length(part) for _, part in parts) for rank, parts in self.outgoing.items()}

    def home(self, received: dict[int, Tensor], *, like: Tensor, kept: Sequence[Tensor]) -> list[Tensor]:
        """Put together this rank's piece of every matrix's update: vectors as long as the runs that it holds."""
        by_matrix: list[list[tuple[int, Tensor]]] = [[] for _ in self.held]
        for (matrix, part, _), tensor in zip(self.staying, kept, strict=True):
            by_matrix[matrix].append((part.start, tensor))
        for rank, parts in self.outgoing.items():
            for (matrix, part), tensor in zip(
                parts, received[rank].split([_length(part) for _, part in parts]), strict=True
            ):
                by_matrix[matrix].append((part.start, tensor.to(like.dtype)))
        return [_joined(parts, like) for parts in by_matrix]


def _joined(parts: list[tuple[int, Tensor]], like: Tensor) -> Tensor:
    """Concatenate parts of one piece in the order of their starts."""
    if len(parts) == 1:
        return parts[0][1]
    return torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])]) if parts else like.new_empty(0)


def _length(part: slice) -> int:
    return part.stop - part.start


def _of(runs: tuple[Range, ...], rank: int) -> tuple[int, int]:
    """Return the start and stop of a rank's run; (0, 0) if the rank has none."""
    return next(((start, stop) for holder, start, stop in runs if holder == rank), (0, 0))


def _within(runs: tuple[Range, ...], span: tuple[int, int]) -> list[Range]:
    """Return the parts of `runs` that lie within `span`, as (rank, start, stop)."""
    start, stop = span
    if start == stop:
        return []
    parts = []
    index = max(bisect.bisect_right(runs, start, key=lambda run: run[1]) - 1, 0)
    while index < len(runs) and runs[index][1] < stop:
        rank, a, b = runs[index]
        if max(a, start) < min(b, stop):
            parts.append((rank, max(a, start), min(b, stop)))
        index += 1
    return parts


def owned_by(rank: int, shape: Sequence[int]) -> tuple[Range, ...]:
    """Return the runs of a matrix that lies whole on one rank, as `FlatRedistribution` takes them.

    Args:
        rank: The rank's group index.
        shape: The shape of the matrix.

    Returns:
        A single run with all elements of the matrix.
    """
    return ((rank, 0, math.prod(shape)),)
