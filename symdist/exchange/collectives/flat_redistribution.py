"""Runs of elements to other runs of the same matrices: how cut rows, or whole matrices, are put together."""

import bisect
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from symdist.layouts import Group
from symdist.layouts.flat import Range


class FlatRedistribution:
    """The way of some matrices from the runs that ranks hold to the runs they want, and back.

    `have` and `want` list, for each matrix, who has and who wants what of it. What a rank keeps stays where it is.
    """

    def __init__(self, group: Group, *, have: Sequence[tuple[Range, ...]], want: Sequence[tuple[Range, ...]]):
        me = group.index
        self.held = [_of(runs, me) for runs in have]
        self.wanted = [_of(runs, me) for runs in want]
        self.staying: list[tuple[int, slice, slice]] = []
        """Matrix, where in the piece, where in the buffer of all that is wanted."""
        self.outgoing: dict[int, list[tuple[int, slice]]] = {}
        """To each rank: matrix, where in the piece."""
        self.incoming: dict[int, list[slice]] = {}
        """From each rank: where in the buffer."""
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
        """What stays here, of this rank's pieces."""
        return [pieces[matrix][part] for matrix, part, _ in self.staying]

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """What goes to each rank, of this rank's pieces."""
        return {rank: [pieces[matrix][part] for matrix, part in wanted] for rank, wanted in self.outgoing.items()}

    def received_pieces(self) -> dict[int, int]:
        """How many numbers come from each rank."""
        return {rank: sum(map(_length, parts)) for rank, parts in self.incoming.items()}

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Sequence[Tensor]) -> Tensor:
        """All that is wanted here, matrix after matrix, in one vector of the dtype of `like`."""
        buffer = like.new_empty(self.size)
        for (_, _, into), part in zip(self.staying, kept, strict=True):
            buffer[into] = part
        for rank, parts in self.incoming.items():
            for into, part in zip(parts, received[rank].split(list(map(_length, parts))), strict=True):
                buffer[into] = part
        return buffer

    def kept_home(self, made: Tensor) -> list[Tensor]:
        """What stays here, of the updates made here."""
        return [made[into] for _, _, into in self.staying]

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """What goes back to each rank, of the updates made here: a vector like that of `wholes`."""
        return {rank: [made[into] for into in parts] for rank, parts in self.incoming.items()}

    def received_home(self) -> dict[int, int]:
        """How many numbers come back from each rank."""
        return {rank: sum(_length(part) for _, part in wanted) for rank, wanted in self.outgoing.items()}

    def home(
        self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """This rank's piece of every matrix. Each is a vector of its own length; `shape` says nothing here."""
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
    """The run of a rank; nothing where it has none."""
    return next(((start, stop) for holder, start, stop in runs if holder == rank), (0, 0))


def _within(runs: tuple[Range, ...], span: tuple[int, int]) -> list[Range]:
    """What others have of a span."""
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
    """The whole of a matrix at one rank."""
    return ((rank, 0, math.prod(shape)),)
