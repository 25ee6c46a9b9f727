"""Find the ranks that hold a Megatron parameter: data-parallel ranks times tensor-parallel ranks."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from symdist.layouts import Grid, Group, ascending


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """A grid of data-parallel and tensor-parallel ranks.

    Attributes:
        data: This rank's data-parallel group.
        across: This rank's tensor-parallel group.
        columns: For each tensor-parallel rank, the data-parallel ranks that hold the same part of a parameter.
    """

    data: Group
    across: Group
    columns: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def grid(self) -> Grid | None:
        """All ranks, with an axis for each of the two kinds that has more than one rank; None for a single rank."""
        return _grid([self.data, self.across], [rank for row in zip(*self.columns, strict=True) for rank in row])

    @functools.cached_property
    def tensor_grid(self) -> Grid | None:
        """The tensor-parallel ranks alone; None for a single rank."""
        return _grid([self.across], list(self.across.ranks))

    @functools.cached_property
    def everyone(self) -> Group:
        """The group of all ranks of the grid."""
        assert self.grid is not None
        return self.grid.group(range(len(self.grid.sizes)))

    @functools.cached_property
    def rank_order(self) -> tuple[int, ...]:
        """The indices in `everyone` of all ranks, in the order of `columns`."""
        index = {rank: i for i, rank in enumerate(self.everyone.ranks)}
        return tuple(index[rank] for column in self.columns for rank in column)


@dataclass(frozen=True, kw_only=True)
class RankGrids:
    """The rank grids of dense parameters and of experts.

    Attributes:
        dense: The ranks of dense parameters.
        expert: The ranks of experts.
        expert_rank: This rank's index in its expert-parallel group.
    """

    dense: RankGrid
    expert: RankGrid
    expert_rank: int

    def of(self, parameter: Any, *, expert: bool) -> RankGrid:
        """Return the ranks that hold a parameter.

        Without expert parallelism, Megatron reduces the gradients of experts over the same ranks as all others.

        Args:
            parameter: The parameter.
            expert: Whether it belongs to an expert.

        Returns:
            Its rank grid.
        """
        return self.expert if expert and not getattr(parameter, "allreduce", True) else self.dense

    def tensor_ranks(self, *, expert: bool) -> int:
        """Return the number of ranks over which tensor parallelism cuts a matrix.

        Args:
            expert: Whether the matrix belongs to an expert.

        Returns:
            The number of ranks.
        """
        return (self.expert if expert else self.dense).across.size


def find_rank_grid(data: Any, across: Any) -> RankGrid:
    """Gather the rank grid of two process groups; all ranks of `across` must call it.

    Args:
        data: This rank's data-parallel process group.
        across: This rank's tensor-parallel process group.

    Returns:
        The rank grid.

    Raises:
        ValueError: If the data-parallel groups of different tensor-parallel ranks overlap or differ in size, or a group
            does not number its ranks in ascending order.
    """
    data_group, tensor_group = ascending(data), ascending(across)
    columns: list[Any] = [None] * tensor_group.size
    dist.all_gather_object(columns, list(data_group.ranks), group=across)
    ranks = [rank for column in columns for rank in column]
    if len(set(ranks)) != data_group.size * tensor_group.size:
        raise ValueError(
            f"symdist: the data-parallel groups {columns} of tensor-parallel ranks {tensor_group.ranks} overlap or "
            "differ in size; initialize Megatron's process groups so that they form a grid"
        )
    return RankGrid(data=data_group, across=tensor_group, columns=tuple(map(tuple, columns)))


def _grid(groups: Sequence[Group], ranks: list[int]) -> Grid | None:
    large = [group for group in groups if group.size > 1]
    if not large:
        return None
    position = 0
    for group in large:
        position = position * group.size + group.index
    return Grid(
        sizes=tuple(group.size for group in large),
        ranks=tuple(ranks),
        position=position,
        handles=tuple(group.handle for group in large),
    )
