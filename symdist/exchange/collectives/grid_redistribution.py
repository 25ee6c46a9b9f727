"""Redistribution of parameters in blocks (`Layout`): who sends which unit to whom, worked out alike on all ranks."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symdist.layouts import Box, Group, Layout


def canonical_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return a stored shape as `(units, p, q)`; units are the experts of a 3-D parameter, a matrix, or a vector."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (1, shape[0], shape[1]) if len(shape) == 2 else (1, shape[0], 1)


def _canonical_box(box: Box) -> tuple[range, range, range]:
    if len(box) == 3:
        return box[0], box[1], box[2]
    return (range(1), box[0], box[1]) if len(box) == 2 else (range(1), box[0], range(1))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Units that the same ranks hold: one range of experts, of all parameters.

    `sources` are the group indices of the ranks that hold pieces of them, within this rank's copy of the weight.
    """

    experts: range
    sources: tuple[int, ...]


class GridRedistribution:
    """Sends the units of parameters of one layout to their owners, and updates back; see `Redistribution`.

    A unit is a parameter, or an expert of a 3-D parameter. An owner receives pieces from the copy of the weight that it
    belongs to itself, and sends the update to all copies.

    Args:
        layout: The parameters' layout, over a group of ranks.
        count: How many parameters there are.
        owners: The group index of every unit's owner, all experts of the first parameter first.

    Attributes:
        outgoing: By rank, the units whose pieces this rank sends there, in order. They count this rank's own experts.
        homing: By rank, the units whose updates come back from there, counted alike.
        blocks: The blocks of units, each with the number of its units that this rank owns.
        owned_units: The units this rank owns, by block, then parameter and expert.
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
        # Updates come home by owner, then by unit: note where each unit stands in that order.
        order = [unit for owner in sorted(self.homing) for unit in self.homing[owner]]
        self._place = {unit: place for place, unit in enumerate(order)}

    @property
    def owned(self) -> int:
        """How many units this rank owns."""
        return len(self.owned_units)

    def kept(self, pieces: Sequence[Tensor]) -> None:
        """Return None: what this rank owns itself goes through the send buffer, too."""

    def kept_home(self, made: Tensor) -> None:
        """Return None, see `kept`."""

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return what this rank sends to each owner, from its pieces of the `count` parameters."""
        if not self.outgoing:
            return {}
        units = self._units(pieces)
        return {owner: [units[unit] for unit in wanted] for owner, wanted in sorted(self.outgoing.items())}

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives, by rank."""
        return {
            rank: found * len(self.boxes[rank][1]) * len(self.boxes[rank][2])
            for block, found in self.blocks
            if found
            for rank in block.sources
        }

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: None = None) -> Tensor:
        """Put together the units this rank owns.

        Args:
            received: What came from each rank, flat.
            like: An empty tensor with the dtype and device of the result.
            kept: Unused.

        Returns:
            `[owned, p, q]`.
        """
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
        """Return the units this rank owns, `[owned, p, q]`, if every rank holds every weight whole: nothing is sent."""
        assert self.whole_here
        units, wanted = self._units(pieces), self.outgoing.get(self.group.index, [])
        return torch.stack([units[unit] for unit in wanted]) if wanted else pieces[0].new_empty((0, *self.unit_shape))

    def sent_home(self, made: Tensor) -> dict[int, list[Tensor]]:
        """Return what this rank sends to each rank, from its updates `[owned, p, q]`."""
        sent = {}
        for rank, (experts, rows, columns) in enumerate(self.boxes):
            owned = self._block_of.get((experts.start, experts.stop))
            if owned is not None and owned.start < owned.stop and len(rows) and len(columns):
                sent[rank] = [made[owned, rows.start : rows.stop, columns.start : columns.stop]]
        return sent

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates come from each owner."""
        piece = len(self.here[1]) * len(self.here[2])
        return {owner: len(units) * piece for owner, units in sorted(self.homing.items())}

    def home(
        self, received: dict[int, Tensor], *, shape: Sequence[int], like: Tensor, kept: None = None
    ) -> list[Tensor]:
        """Put together this rank's piece of every parameter's update.

        Args:
            received: What came from each owner, flat.
            shape: The local shape of a parameter.
            like: An empty tensor with the dtype and device of the result.
            kept: Unused.
        """
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
    """Concatenate pieces in the order of their starts."""
    ordered = [piece for _, piece in sorted(pieces, key=lambda item: item[0])]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=dim)
