"""Who sends which matrix of a job to whom: worked out once, the same on all ranks."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symdist.layouts import Box, Group, Layout


def canonical_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """`[units, p, q]`: experts of a 3-D parameter one by one, a matrix as one unit, a vector as a column."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (1, shape[0], shape[1]) if len(shape) == 2 else (1, shape[0], 1)


def _canonical_box(box: Box) -> tuple[range, range, range]:
    if len(box) == 3:
        return box[0], box[1], box[2]
    return (range(1), box[0], box[1]) if len(box) == 2 else (range(1), box[0], range(1))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Units that the same ranks hold: those of one range of experts, of all parameters."""

    experts: range
    sources: tuple[int, ...]
    """Ranks that hold pieces of them, by group index, within one copy of the weight."""


class GridRedistribution:
    """The way of `count` parameters of one layout to their owners and back.

    A unit is what is owned as one: a parameter, or an expert of it. `owners` has the group index of the owner of every
    unit, the experts of the first parameter first. Each owner is sent the pieces of the copy of the weight that it
    holds a piece of itself, and sends the update to all copies.

    `outgoing[rank]` and `homing[rank]` list, in the order in which they travel, this rank's own units (of
    `count × its experts`) whose pieces go to that rank, and come back from it. `owned_units` are
    those this rank puts together, ordered by `blocks`, then by parameter and expert.
    """

    def __init__(self, layout: Layout, *, count: int, owners: Sequence[int]):
        assert layout.group is not None
        self.group: Group = layout.group
        self.boxes = [_canonical_box(box) for box in layout.boxes]
        self.unit_shape = canonical_shape(layout.shape)[1:]
        self.count = count
        experts = canonical_shape(layout.shape)[0]
        me = self.group.index
        self.here = self.boxes[me]
        self._copy = layout.replica_ids
        self.whole_here = not layout.splits

        self.outgoing: dict[int, list[int]] = {}
        self.homing: dict[int, list[int]] = {}
        mine = itertools.product(range(count), self.here[0])
        for unit, (member, expert) in enumerate(mine):
            owner = owners[member * experts + expert]
            self.homing.setdefault(owner, []).append(unit)
            if self._copy[owner] == self._copy[me]:
                self.outgoing.setdefault(owner, []).append(unit)
        if not math.prod(map(len, self.here[1:])):
            self.outgoing, self.homing = {}, {}

        self.blocks: list[tuple[_Block, int]] = []
        by_experts: dict[tuple[int, int], list[int]] = {}
        for rank, (held, rows, columns) in enumerate(self.boxes):
            if len(held) and len(rows) and len(columns):
                by_experts.setdefault((held.start, held.stop), []).append(rank)
        self._block_of: dict[tuple[int, int], slice] = {}
        mine_to_own = [unit for unit, owner in enumerate(owners) if owner == me]
        self.owned_units: list[int] = []
        for start, stop in sorted(by_experts):
            here = [unit for unit in mine_to_own if start <= unit % experts < stop]
            sources = tuple(rank for rank in by_experts[start, stop] if self._copy[rank] == self._copy[me])
            self.blocks.append((_Block(experts=range(start, stop), sources=sources), len(here)))
            self._block_of[start, stop] = slice(self.owned, self.owned + len(here))
            self.owned_units += here
        # By owner, then in the order of units: where each unit stands in what comes home.
        order = [unit for owner in sorted(self.homing) for unit in self.homing[owner]]
        self._place = {unit: place for place, unit in enumerate(order)}

    @property
    def owned(self) -> int:
        """How many whole units this rank puts together."""
        return len(self.owned_units)

    def kept(self, pieces: Sequence[Tensor]) -> None:
        """Nothing: what this rank owns itself goes through the buffer like the rest."""

    def kept_home(self, made: Tensor) -> None:
        """Nothing, see `kept`."""

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """What goes to each owner, of this rank's `count` pieces."""
        if not self.outgoing:
            return {}
        units = self._units(pieces)
        return {owner: [units[unit] for unit in wanted] for owner, wanted in sorted(self.outgoing.items())}

    def received_pieces(self) -> dict[int, int]:
        """How many numbers come from each rank."""
        return {
            rank: found * len(self.boxes[rank][1]) * len(self.boxes[rank][2])
            for block, found in self.blocks
            if found
            for rank in block.sources
        }

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: None = None) -> Tensor:
        """`[owned, p, q]`, of the dtype of `like`: the units this rank owns, from what came from each rank."""
        whole = []
        for block, found in self.blocks:
            if not found:
                continue
            bands: dict[int, list[tuple[int, Tensor]]] = {}
            for rank in block.sources:
                _, rows, columns = self.boxes[rank]
                piece = received[rank].view(found, len(rows), len(columns))
                bands.setdefault(rows.start, []).append((columns.start, piece))
            whole.append(torch.cat([_joined(bands[start], dim=2) for start in sorted(bands)], dim=1))
        if not whole:
            return like.new_empty((0, *self.unit_shape))
        return torch.cat(whole).to(like.dtype)

    def own_wholes(self, pieces: Sequence[Tensor]) -> Tensor:
        """The units this rank owns where it holds every weight whole: nothing need come from anywhere."""
        assert self.whole_here
        units, wanted = self._units(pieces), self.outgoing.get(self.group.index, [])
        return torch.stack([units[unit] for unit in wanted]) if wanted else pieces[0].new_empty((0, *self.unit_shape))

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """What goes to each rank, of the `[owned, p, q]` updates made here."""
        sent = {}
        for rank, (experts, rows, columns) in enumerate(self.boxes):
            owned = self._block_of.get((experts.start, experts.stop))
            if owned is not None and owned.start < owned.stop and len(rows) and len(columns):
                sent[rank] = [made[owned, rows.start : rows.stop, columns.start : columns.stop]]
        return sent

    def received_home(self) -> dict[int, int]:
        """How many numbers come back from each owner."""
        piece = len(self.here[1]) * len(self.here[2])
        return {owner: len(units) * piece for owner, units in sorted(self.homing.items())}

    def home(
        self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: None = None
    ) -> list[Tensor]:
        """This rank's piece, of local `shape`, of every parameter."""
        experts, rows, columns = self.here
        k = self.count
        if not self.homing:
            return [like.new_empty(shape) for _ in range(k)]
        parts = [received[owner].view(-1, len(rows), len(columns)) for owner in sorted(self.homing)]
        flat = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(like.dtype)
        if len(experts) == 1:
            return [flat[self._place[unit]].view(tuple(shape)) for unit in range(k)]
        order = [self._place[unit] for unit in range(k * len(experts))]
        if order != list(range(len(order))):
            flat = flat.index_select(0, torch.tensor(order, device=flat.device))
        return list(flat.view(k, *shape).unbind(0))

    def _units(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        rows, columns = len(self.here[1]), len(self.here[2])
        return [unit for piece in pieces for unit in piece.reshape(-1, rows, columns).unbind(0)]


def _joined(pieces: list[tuple[int, Tensor]], *, dim: int) -> Tensor:
    """Pieces put together in the order of where they start."""
    ordered = [piece for _, piece in sorted(pieces, key=lambda item: item[0])]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=dim)
