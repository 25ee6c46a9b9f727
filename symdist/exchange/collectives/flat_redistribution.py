"""Redistribution of flat parameters: puts whole rows or matrices together from the runs of elements that ranks hold."""

import bisect
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from symdist.layouts import Group
from symdist.layouts.flat import Range


class FlatRedistribution:
    """Sends runs of elements from the ranks that hold them to the ranks that need them, and updates back.

    It implements `Redistribution`. A run is a range of consecutive elements of a flattened matrix. Elements that a rank
    both holds and needs are not sent. The constructor does not communicate.

    Args:
        group: The ranks.
        have: For each matrix, the run that each rank holds.
        want: For each matrix, the run that each rank needs.

    Attributes:
        held: For each matrix, the start and stop of the run that this rank holds.
        wanted: For each matrix, the start and stop of the run that this rank needs.
        staying: The elements that stay on this rank, as (matrix, slice of this rank's piece, slice of the buffer). The
            buffer is a vector of all runs that this rank needs, matrix after matrix.
        outgoing: The elements that go to each rank, as (matrix, slice of this rank's piece).
        incoming: The elements that come from each rank, as slices of the buffer.
        size: The number of elements in the buffer.
    """

    def __init__(self, group: Group, *, have: Sequence[tuple[Range, ...]], want: Sequence[tuple[Range, ...]]):
        me = group.index
        self.held = [_of(runs, me) for runs in have]
        self.wanted = [_of(runs, me) for runs in want]
        self.staying: list[tuple[int, slice, slice]] = []
        self.outgoing: dict[int, list[tuple[int, slice]]] = {}
        self.incoming: dict[int, list[slice]] = {}
        self.size = 0
        for matrix, (mine, here) in enumerate(zip(self.held, self.wanted, strict=True)):
            for rank, start, stop in _within(want[matrix], mine):
                there = slice(start - mine[0], stop - mine[0])
                if rank == me:
                    into = slice(self.size + start - here[0], self.size + stop - here[0])
                    self.staying.append((matrix, there, into))
                else:
                    self.outgoing.setdefault(rank, []).append((matrix, there))
            for rank, start, stop in _within(have[matrix], here):
                if rank != me:
                    into = slice(self.size + start - here[0], self.size + stop - here[0])
                    self.incoming.setdefault(rank, []).append(into)
            self.size += here[1] - here[0]

    def kept(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Return the parts of this rank's pieces that stay on this rank.

        Args:
            pieces: This rank's piece of every matrix, each a vector.

        Returns:
            One vector per entry of `staying`.
        """
        return [pieces[matrix][part] for matrix, part, _ in self.staying]

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return the parts of this rank's pieces that are sent to other ranks.

        Args:
            pieces: This rank's piece of every matrix, each a vector.

        Returns:
            The vectors to send to each rank, by group index.
        """
        return {rank: [pieces[matrix][part] for matrix, part in wanted] for rank, wanted in self.outgoing.items()}

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives from each rank, by group index."""
        return {rank: sum(map(_length, parts)) for rank, parts in self.incoming.items()}

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Put together all the runs that this rank needs.

        Args:
            received: What came from each rank, as one vector per rank.
            like: An empty tensor with the dtype and device of the result.
            kept: What `kept` returned.

        Returns:
            One vector of `size` elements: the runs, matrix after matrix.
        """
        buffer = like.new_empty(self.size)
        for (_, _, into), part in zip(self.staying, kept, strict=True):
            buffer[into] = part
        for rank, parts in self.incoming.items():
            for into, part in zip(parts, received[rank].split(list(map(_length, parts))), strict=True):
                buffer[into] = part
        return buffer

    def kept_home(self, made: Tensor) -> list[Tensor]:
        """Return the parts of the updates that this rank computed and that stay on it.

        Args:
            made: The updates, a vector in the order of the result of `wholes`.

        Returns:
            One vector per entry of `staying`.
        """
        return [made[into] for _, _, into in self.staying]

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """Return the parts of the updates that this rank sends back to other ranks.

        Args:
            made: The updates, a vector in the order of the result of `wholes`.

        Returns:
            The vectors to send to each rank, by group index.
        """
        return {rank: [made[into] for into in parts] for rank, parts in self.incoming.items()}

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates this rank receives from each rank, by group index."""
        return {rank: sum(_length(part) for _, part in wanted) for rank, wanted in self.outgoing.items()}

    def home(
        self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Put together this rank's piece of every matrix's update.

        Args:
            received: What came from each rank, as one vector per rank.
            shape: Not used, as every piece has its own length.
            like: An empty tensor with the dtype and device of the result.
            kept: What `kept_home` returned.

        Returns:
            One vector per matrix, as long as the run that this rank holds of it.
        """
        found: list[list[tuple[int, Tensor]]] = [[] for _ in self.held]
        for (matrix, part, _), tensor in zip(self.staying, kept, strict=True):
            found[matrix].append((part.start, tensor))
        for rank, wanted in self.outgoing.items():
            for (matrix, part), tensor in zip(
                wanted, received[rank].split([_length(part) for _, part in wanted]), strict=True
            ):
                found[matrix].append((part.start, tensor.to(like.dtype)))
        return [_joined(parts, like) for parts in found]


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
    found = []
    place = max(bisect.bisect_right(runs, start, key=lambda run: run[1]) - 1, 0)
    while place < len(runs) and runs[place][1] < stop:
        rank, a, b = runs[place]
        if max(a, start) < min(b, stop):
            found.append((rank, max(a, start), min(b, stop)))
        place += 1
    return found


def owned_by(rank: int, shape: Sequence[int]) -> tuple[Range, ...]:
    """Return the runs of a matrix that lies whole on one rank, as `FlatRedistribution` takes them.

    Args:
        rank: The rank's group index.
        shape: The shape of the matrix.

    Returns:
        A single run with all elements of the matrix.
    """
    return ((rank, 0, math.prod(shape)),)
