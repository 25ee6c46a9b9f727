"""Redistribution of parameters cut into blocks (`Layout`): which rank sends which units to which other rank.

Every rank computes this for itself, with the same result, so nothing needs to be negotiated.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from symdist.exchange.collectives.gather_scatter import Batch
from symdist.layouts import Box, Group, Layout


def canonical_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return a stored shape as `(units, p, q)`.

    The units of a 3-D parameter are its experts; a matrix or a vector is a single unit.

    Args:
        shape: The stored shape, with one to three dimensions.

    Returns:
        `(units, p, q)`; `q` is 1 for a vector.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return (1, shape[0], shape[1]) if len(shape) == 2 else (1, shape[0], 1)


def _canonical_box(box: Box) -> tuple[range, range, range]:
    """Return a box with three ranges, for the dimensions of `canonical_shape`."""
    if len(box) == 3:
        return box[0], box[1], box[2]
    return (range(1), box[0], box[1]) if len(box) == 2 else (range(1), box[0], range(1))


@dataclass(frozen=True, kw_only=True)
class _Block:
    """All units of one range of experts, of all parameters; the same ranks hold pieces of them.

    `sources` are the group indices of those ranks, restricted to this rank's copy of the weight.
    """

    experts: range
    sources: tuple[int, ...]


Part: TypeAlias = tuple[range, range]
"""Rows and columns of a unit."""


class GridRedistribution:
    """Sends units to their owners, and updates back, for parameters of one layout.

    It implements `Redistribution`. A unit is a whole parameter, or one expert of a 3-D parameter. Its owner is one
    rank, or a team of ranks, each of which gets a block of its rows or columns. Where the weight is replicated, an
    owner receives pieces only from the copy that it belongs to itself, but sends the update to all copies. The
    constructor does not communicate.

    Args:
        layout: The layout of the parameters, over a group of ranks.
        count: The number of parameters.
        owners: The owner of every unit, as the group index of a rank, or as the number of a team: first all experts of
            the first parameter, then those of the second, and so on.
        team: The layout of a unit's blocks over teams of consecutive ranks; None (default) if single ranks own units.

    Attributes:
        outgoing: For each rank, the units whose pieces this rank sends there, in order. Units are numbered over the
            experts that this rank holds.
        homing: For each rank, the units whose updates come back from there, numbered in the same way.
        blocks: The blocks of units, each with the number of its units that this rank owns.
        owned_units: The units that this rank owns, by block, then by parameter and expert.

    Example:
        Two parameters whose rows are cut over two ranks; rank 0 owns the first, rank 1 the second:

            layout = cut_along((5, 2), dim=0, sizes=(3, 2), ranks=(0, 1), index=0)
            redistribution = GridRedistribution(layout, count=2, owners=[0, 1])
            redistribution.received_pieces()  # {0: 6, 1: 4}
    """

    def __init__(self, layout: Layout, *, count: int, owners: Sequence[int], team: Layout | None = None):
        assert layout.group is not None
        self.group: Group = layout.group
        self.boxes = [_canonical_box(box) for box in layout.boxes]
        self.count = count
        experts, p, q = canonical_shape(layout.shape)
        me = self.group.index
        self.local_box = self.boxes[me]
        # What each rank gets of a unit that it owns, alone or with its team.
        self.parts: list[Part] = [(range(p), range(q))] * self.group.size
        self.team_size = 1
        if team is not None:
            self.parts = [_canonical_box(box)[1:] for box in team.boxes]
            assert team.shard_group is not None
            self.team_size = team.shard_group.size
        self._mine = self.parts[me]
        self._copy = layout.replica_ids
        self._piece_shape = layout.local_shape
        self._vectors = len(layout.shape) == 1
        self.gathers, self.scatters = bool(layout.splits), True

        self.outgoing: dict[int, list[int]] = {}
        self.homing: dict[int, list[int]] = {}
        local_units = itertools.product(range(count), self.local_box[0])
        for unit, (member, expert) in enumerate(local_units):
            owner = owners[member * experts + expert]
            for rank in range(owner * self.team_size, (owner + 1) * self.team_size):
                if _numel(self._held_of(me, self.parts[rank])):
                    self.homing.setdefault(rank, []).append(unit)
                    if self._copy[rank] == self._copy[me]:
                        self.outgoing.setdefault(rank, []).append(unit)

        self.blocks: list[tuple[_Block, int]] = []
        by_experts: dict[tuple[int, int], list[int]] = {}
        for rank, (held_experts, rows, columns) in enumerate(self.boxes):
            if len(held_experts) and len(rows) and len(columns):
                by_experts.setdefault((held_experts.start, held_experts.stop), []).append(rank)
        self._block_of: dict[tuple[int, int], slice] = {}
        owned = [unit for unit, owner in enumerate(owners) if owner == me // self.team_size]
        self.owned_units: list[int] = []
        for start, stop in sorted(by_experts):
            in_block = [unit for unit in owned if start <= unit % experts < stop]
            sources = tuple(
                rank
                for rank in by_experts[start, stop]
                if self._copy[rank] == self._copy[me] and _numel(self._held_of(rank, self._mine))
            )
            self.blocks.append((_Block(experts=range(start, stop), sources=sources), len(in_block)))
            self._block_of[start, stop] = slice(self.owned, self.owned + len(in_block))
            self.owned_units += in_block
        # Found once, since there may be thousands of ranks.
        self._homes: list[tuple[int, tuple[slice, slice, slice]]] = []
        for rank, (held_experts, _, _) in enumerate(self.boxes):
            units = self._block_of.get((held_experts.start, held_experts.stop))
            held = self._held_of(rank, self._mine)
            if units is not None and units.start < units.stop and _numel(held):
                self._homes.append((rank, (units, *_within(held, self._mine))))
        # Updates arrive sorted by owner, then by unit. Note the position of each unit in that order. All ranks of a
        # team return the same units.
        order = dict.fromkeys(unit for owner in sorted(self.homing) for unit in self.homing[owner])
        self._position = {unit: position for position, unit in enumerate(order)}
        whole = [range(size) for size in layout.shape[:-2]]
        box = [*whole, *(self._mine[:1] if self._vectors else self._mine)]
        self.batches: Sequence[Batch] = [Batch(members=[unit // experts for unit in self.owned_units], box=box)]

    def _held_of(self, rank: int, part: Part) -> Part:
        """Return the rows and columns of a part of a unit that a rank holds."""
        _, rows, columns = self.boxes[rank]
        return _overlap(rows, part[0]), _overlap(columns, part[1])

    @property
    def owned(self) -> int:
        """The number of units that this rank owns."""
        return len(self.owned_units)

    def stacked(self, assembled: Tensor, batch: int) -> Tensor:
        """Return the units that this rank owns, `[owned, p, q]`, or `[owned, p]` if they are vectors."""
        return assembled.squeeze(-1) if self._vectors else assembled

    def unstacked(self, updates: Sequence[Tensor], *, like: Tensor) -> Tensor:
        """Return the updates of the units that this rank owns, `[owned, p, q]`."""
        if not updates:
            return self._none(like)
        return updates[0].unsqueeze(-1) if self._vectors else updates[0]

    def kept(self, pieces: Sequence[Tensor]) -> Tensor | None:
        """Return the units that this rank owns, `[owned, p, q]`, if all ranks hold all weights whole, otherwise None.

        Where weights are cut, even units that this rank owns itself go through the send buffer.
        """
        if self.gathers:
            return None
        units, owned = self._units(pieces), self.outgoing.get(self.group.index, [])
        if not owned:
            return self._none(pieces[0])
        rows, columns = self._mine
        return torch.stack([units[unit][rows.start : rows.stop, columns.start : columns.stop] for unit in owned])

    def kept_home(self, updates: Tensor) -> None:
        """Return None: all updates go through the send buffer."""

    def sent_pieces(self, pieces: Sequence[Tensor]) -> dict[int, list[Tensor]]:
        """Return this rank's piece of every unit to send, by owner."""
        if not self.outgoing:
            return {}
        units = self._units(pieces)
        _, rows, columns = self.local_box
        sent = {}
        for owner, outgoing in sorted(self.outgoing.items()):
            inside = _within(self._held_of(self.group.index, self.parts[owner]), (rows, columns))
            sent[owner] = [units[unit][inside] for unit in outgoing]
        return sent

    def received_pieces(self) -> dict[int, int]:
        """Return how many numbers this rank receives from each rank, by group index."""
        return {
            rank: num_units * _numel(self._held_of(rank, self._mine))
            for block, num_units in self.blocks
            if num_units
            for rank in block.sources
        }

    def wholes(self, received: dict[int, Tensor], *, like: Tensor, kept: Tensor | None = None) -> Tensor:
        """Put together the units that this rank owns: `[owned, p, q]`, in the order of `owned_units`."""
        if kept is not None:
            return kept
        whole = []
        for block, num_units in self.blocks:
            if not num_units:
                continue
            bands: dict[int, list[tuple[int, Tensor]]] = {}
            for rank in block.sources:
                rows, columns = self._held_of(rank, self._mine)
                piece = received[rank].view(num_units, len(rows), len(columns))
                bands.setdefault(rows.start, []).append((columns.start, piece))
            whole.append(torch.cat([_joined(bands[start], dim=2) for start in sorted(bands)], dim=1))
        if not whole:
            return self._none(like)
        return torch.cat(whole).to(like.dtype)

    def sent_home(self, updates: Tensor) -> dict[int, list[Tensor]]:
        """Return each rank's piece of the updates of the units that this rank owns."""
        return {rank: [updates[inside]] for rank, inside in self._homes}

    def received_home(self) -> dict[int, int]:
        """Return how many numbers of updates come from each owner, by group index."""
        me = self.group.index
        return {
            owner: len(units) * _numel(self._held_of(me, self.parts[owner]))
            for owner, units in sorted(self.homing.items())
        }

    def home(self, received: dict[int, Tensor], *, like: Tensor, kept: None = None) -> list[Tensor]:
        """Put together this rank's piece of every parameter's update."""
        shape = self._piece_shape
        experts = self.local_box[0]
        k = self.count
        if not self.homing:
            return [like.new_empty(shape) for _ in range(k)]
        by_part: dict[tuple[int, int], list[Tensor]] = {}
        for owner in sorted(self.homing):
            rows, columns = self._held_of(self.group.index, self.parts[owner])
            update = received[owner].view(-1, len(rows), len(columns))
            by_part.setdefault((rows.start, columns.start), []).append(update)
        # The parts of a team lie one below the other, or side by side.
        dim = 1 if len({rows for rows, _ in by_part}) > 1 else 2
        parts = [of_part[0] if len(of_part) == 1 else torch.cat(of_part) for _, of_part in sorted(by_part.items())]
        flat = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)).to(like.dtype)
        if len(experts) == 1:
            return [flat[self._position[unit]].view(shape) for unit in range(k)]
        order = [self._position[unit] for unit in range(k * len(experts))]
        if order != list(range(len(order))):
            # The host does not wait for the copy.
            flat = flat.index_select(0, torch.tensor(order).to(flat.device, non_blocking=True))
        return list(flat.view(k, *shape).unbind(0))

    def _none(self, like: Tensor) -> Tensor:
        """Return no units."""
        return like.new_empty((0, *map(len, self._mine)))

    def _units(self, pieces: Sequence[Tensor]) -> list[Tensor]:
        """Split this rank's pieces into pieces of single units."""
        rows, columns = len(self.local_box[1]), len(self.local_box[2])
        return [unit for piece in pieces for unit in piece.reshape(-1, rows, columns).unbind(0)]


def _joined(pieces: list[tuple[int, Tensor]], *, dim: int) -> Tensor:
    """Concatenate pieces in the order of their starts."""
    ordered = [piece for _, piece in sorted(pieces, key=lambda item: item[0])]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim=dim)


def _overlap(one: range, other: range) -> range:
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def _numel(part: Part) -> int:
    return len(part[0]) * len(part[1])


def _within(part: Part, outer: Part) -> tuple[slice, slice]:
    """Return where a part lies in another one."""
    rows, columns = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, outer, strict=True))
    return rows, columns
