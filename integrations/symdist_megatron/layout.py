"""A parameter's matrices as this rank steps them: what of a stepped tensor is theirs, and how they lie on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from symdist.layouts import DimSplit, FlatLayout, Layout
from symdist.param_groups import coordinate_wise
from symdist_megatron.parameters import MatrixSpec
from symdist_megatron.rank_grid import RankGrid
from symdist_megatron.strided_slice import joined, put_back


@dataclass(frozen=True, kw_only=True)
class HeldRange:
    """Of a parameter, the elements that a rank steps: from `low` to `high` of its tensor-parallel part.

    `bounds` has where the data-parallel ranks' runs of that part meet, or is None where all have all of it. `copies`
    says that these are copies: one replica's work is as good as another's.
    """

    low: int
    high: int
    bounds: tuple[int, ...] | None
    copies: bool = True


@dataclass(kw_only=True)
class MatrixShard:
    """A unit's part of a stepped tensor, as a parameter of its own, and how it lies on all ranks.

    Where the part lies in one stretch of memory the parameter is a view of it; else it is filled for the step alone.
    """

    name: str
    unit: MatrixSpec
    layout: Layout | FlatLayout
    held: HeldRange
    at: int
    """Where the stretch of the unit's memory that may be held here begins, see `StridedSlice`."""
    parameter: nn.Parameter = field(init=False)
    copied: bool = False
    itself = False
    """It is never the tensor itself, but a view of it or a copy."""

    def bind(self, tensor: Tensor) -> None:
        """Let the parameter be its part of `tensor`."""
        values = self.of(tensor)
        self.copied = values.numel() > 0 and values.data_ptr() != self._parts(tensor)[0].data_ptr()
        if hasattr(self, "parameter"):
            self.parameter.data = values
        else:
            self.parameter = nn.Parameter(values)

    def of(self, tensor: Tensor) -> Tensor:
        """The unit's part of a tensor like the stepped one: a view of it, or a copy where it is not in one stretch."""
        return joined(self._parts(tensor), self.layout.local_shape, tensor.detach())

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write the part back, where it is a copy."""
        put_back(self._parts(tensor), values)

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        unit, held = self.unit, self.held
        low = min(max(unit.base, held.low), held.high)
        high = min(max(unit.base + unit.size, held.low), held.high)
        here = tensor.detach().view(-1)[low - held.low : high - held.low]
        return self.unit.strided_slice.parts(here, at=self.at + low - unit.base)


def shard_of(unit: MatrixSpec, rank_grid: RankGrid, held: HeldRange, options: Mapping[str, Any]) -> MatrixShard:
    """The shard of a unit that is held so, for the rule that `options` name.

    A rule that treats every number by itself, on nothing but local ones, is told of no other rank.
    """
    rank = rank_grid.across.index if unit.cut is not None else 0
    at = rank * unit.size
    low = min(max(held.low - unit.base, 0), unit.size)
    high = min(max(held.high - unit.base, 0), unit.size)
    mine = unit.strided_slice.between(at + low, at + high)
    layout: Layout | FlatLayout
    if coordinate_wise(options):
        layout = Layout(shape=(mine,))
    elif held.bounds is None:
        layout = _whole(unit, rank_grid, copies=held.copies)
    else:
        layout = _flat(unit, rank_grid, held.bounds)
    return MatrixShard(name=unit.name, unit=unit, layout=layout, held=held, at=at)


def _whole(unit: MatrixSpec, rank_grid: RankGrid, *, copies: bool) -> Layout:
    grid = rank_grid.grid if copies else rank_grid.tensor_grid
    if unit.cut is None or grid is None:
        return Layout(shape=unit.shape, grid=grid)
    ends = [sum(unit.widths[: i + 1]) for i in range(len(unit.widths))]
    ranges = tuple((end - width, end) for end, width in zip(ends, unit.widths, strict=True))
    split = DimSplit(dim=unit.cut, axes=(len(grid.sizes) - 1,), ranges=ranges)
    return Layout(shape=unit.shape, grid=grid, splits=(split,))


def _flat(unit: MatrixSpec, rank_grid: RankGrid, bounds: tuple[int, ...]) -> FlatLayout:
    """In runs of the memory of all tensor-parallel ranks one after another."""

    def within(rank: int) -> list[int]:
        at = rank * unit.size
        places = (min(max(bound - unit.base, 0), unit.size) for bound in bounds)
        return [unit.strided_slice.between(at, at + place) for place in places]

    if unit.cut is None:
        return FlatLayout(shape=unit.shape, group=rank_grid.data, bounds=tuple(within(0)))
    joined_bounds = [0]
    for rank in range(rank_grid.across.size):
        first = joined_bounds[-1]
        joined_bounds += [first + bound for bound in within(rank)[1:]]
    return FlatLayout(
        shape=unit.shape,
        group=rank_grid.everyone,
        bounds=tuple(joined_bounds),
        rank_order=rank_grid.rank_order,
        column_blocks=unit.widths if unit.cut == 1 else (),
    )
