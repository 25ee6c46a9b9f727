"""Redistribution of flat parameters: from the runs of elements that ranks hold to whole rows or matrices, and back."""

import bisect
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from symdist.layouts import Group
from symdist.layouts.flat import Range


class FlatRedistribution:
    """Sends elements from the ranks that hold them to those that want them, and back; see `Redistribution`.

    Elements that a rank both holds and wants are not sent.

    Args:
        group: The ranks.
        have: For each matrix, the run of elements that each rank holds.
        want: For each matrix, the run of elements that each rank wants.

    Attributes:
        held: For each matrix, where the run this rank holds starts and stops.
        wanted: For each matrix, where the run this rank wants starts and stops.
        staying: What stays here: the matrix, the place in its piece, and the place in the buffer of all wanted runs.
        outgoing: What goes to each rank: the matrix, and the place in its piece.
        incoming: What comes from each rank: the place in the buffer.
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
        """Return what this rank keeps of its pieces, which are vectors."""
        return [pieces[matrix][part] for matrix, part, _ in self.staying]

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return what this rank sends of its pieces, by rank."""
        return {rank: [pieces[matrix][part] for matrix, part in wanted] for rank, wanted in self.outgoing.items()}

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives, by rank."""
        return {rank: sum(map(_length, parts)) for rank, parts in self.incoming.items()}

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """Put together all runs this rank wants, matrix after matrix, in one vector of `size` elements.

        Args:
            received: What came from each rank, flat.
            like: An empty tensor with the dtype and device of the result.
            kept: What `kept` returned.
        """
        buffer = like.new_empty(self.size)
        for (_, _, into), part in zip(self.staying, kept, strict=True):
            buffer[into] = part
        for rank, parts in self.incoming.items():
            for into, part in zip(parts, received[rank].split(list(map(_length, parts))), strict=True):
                buffer[into] = part
        return buffer

    def kept_home(self, made: Tensor) -> list[Tensor]:
        """Return what this rank keeps of the updates it made."""
        return [made[into] for _, _, into in self.staying]

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """Return what this rank sends of the updates it made, by rank; `made` is a vector like that of `wholes`."""
        return {rank: [made[into] for into in parts] for rank, parts in self.incoming.items()}

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates this rank receives, by rank."""
        return {rank: sum(_length(part) for _, part in wanted) for rank, wanted in self.outgoing.items()}

    def home(
        self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Put together this rank's piece of every matrix's update, a vector.

        Args:
            received: What came from each rank, flat.
            shape: Unused, as every piece has its own length.
            like: An empty tensor with the dtype and device of the result.
            kept: What `kept_home` returned.
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
    if len(parts) == 1:
        return parts[0][1]
    return torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])]) if parts else like.new_empty(0)


def _length(part: slice) -> int:
    return part.stop - part.start


def _of(runs: tuple[Range, ...], rank: int) -> tuple[int, int]:
    """Where the run of a rank starts and stops; (0, 0) if it has none."""
    return next(((start, stop) for holder, start, stop in runs if holder == rank), (0, 0))


def _within(runs: tuple[Range, ...], span: tuple[int, int]) -> list[Range]:
    """The parts of `runs` that lie in `span`."""
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
    """Return the runs of a matrix that one rank has whole, for `FlatRedistribution`.

    Args:
        rank: The rank's group index.
        shape: The shape of the matrix.
    """
    return ((rank, 0, math.prod(shape)),)
