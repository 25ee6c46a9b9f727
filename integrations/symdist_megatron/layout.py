"""Find which elements of an optimized tensor belong to each matrix, and how the matrix lies on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from symdist.layouts import FlatLayout, Layout
from symdist.layouts.rank_grid import RankGrid
from symdist.layouts.strided_slice import joined, put_back
from symdist.param_specs import coordinate_wise
from symdist.routing.fused_weights import MatrixSpec


@dataclass(frozen=True, kw_only=True)
class HeldRange:
    """The elements of a parameter that a rank steps.

    Attributes:
        low: The offset of the first element in the rank's tensor-parallel part of the parameter.
        high: The offset after the last element.
        bounds: The offsets in that part between the ranges of the data-parallel ranks, from 0 to its end. None if each
            of these ranks holds all of it.
        copies: Whether other data-parallel ranks may hold the same elements, so that one can do the work for all. True
            by default.
    """

    low: int
    high: int
    bounds: tuple[int, ...] | None
    copies: bool = True


@dataclass(kw_only=True)
class MatrixShard:
    """A matrix's or vector's part of an optimized tensor, as a parameter of its own.

    Attributes:
        name: The name of the matrix or vector.
        unit: Its description.
        layout: How it lies on all ranks.
        held: The elements of the model's parameter that this rank steps.
        at: The position of the first element of this rank's part of `unit`, in the sense of `StridedSlice`.
        parameter: The part itself: a view of the optimized tensor if it is contiguous there, otherwise a copy that is
            only filled during the step.
        copied: Whether `parameter` is a copy; set by `bind`.
        itself: Always False: `parameter` is never the optimized tensor itself.
    """

    name: str
    unit: MatrixSpec
    layout: Layout | FlatLayout
    held: HeldRange
    at: int
    parameter: nn.Parameter = field(init=False)
    copied: bool = False
    itself = False

    def bind(self, tensor: Tensor) -> None:
        """Make the parameter its part of a tensor.

        Args:
            tensor: The optimized tensor.
        """
        values = self.of(tensor)
        self.copied = values.numel() > 0 and values.data_ptr() != self._parts(tensor)[0].data_ptr()
        if hasattr(self, "parameter"):
            self.parameter.data = values
        else:
            self.parameter = nn.Parameter(values)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix's part of a tensor.

        Args:
            tensor: A tensor of the optimized tensor's shape.

        Returns:
            A view if the part is contiguous, otherwise a copy; of the layout's local shape.
        """
        return joined(self._parts(tensor), self.layout.local_shape, tensor.detach())

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write values back to a part that is not contiguous.

        Args:
            tensor: A tensor of the optimized tensor's shape.
            values: The values, of the layout's local shape.
        """
        put_back(self._parts(tensor), values)

    def _parts(self, tensor: Tensor) -> list[Tensor]:
        unit, held = self.unit, self.held
        low = min(max(unit.base, held.low), held.high)
        high = min(max(unit.base + unit.size, held.low), held.high)
        stretch = tensor.detach().view(-1)[low - held.low : high - held.low]
        return self.unit.strided_slice.parts(stretch, at=self.at + low - unit.base)


def shard_of(unit: MatrixSpec, rank_grid: RankGrid, held: HeldRange, options: Mapping[str, Any]) -> MatrixShard:
    """Create the shard of a matrix or vector on this rank.

    If the rule treats every element independently, the layout has only the local elements and no other rank.

    Args:
        unit: The matrix or vector.
        rank_grid: The ranks that hold it.
        held: The elements of the parameter that this rank steps.
        options: The options of its rule.

    Returns:
        The shard, which is yet to be bound to a tensor.
    """
    at, numel = unit.elements(rank_grid, held.low, held.high)
    layout: Layout | FlatLayout
    if coordinate_wise(options):
        layout = Layout(shape=(numel,))
    else:
        layout = unit.layout(rank_grid, held.bounds, alone=not held.copies)
    return MatrixShard(name=unit.name, unit=unit, layout=layout, held=held, at=at)
