"""The ranks among which a Megatron parameter lies: data-parallel replicas or shards, times tensor parallelism."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from symdist.layouts import Grid, Group, ascending


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Data-parallel × tensor-parallel ranks; `columns[t]` are the data-parallel ranks of tensor-parallel rank t."""

    data: Group
    across: Group
    columns: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def grid(self) -> Grid | None:
        """The ranks that hold a parameter, with an axis for each of the two that has more than one rank."""
        return _grid([self.data, self.across], [rank for row in zip(*self.columns, strict=True) for rank in row])

    @functools.cached_property
    def tensor_grid(self) -> Grid | None:
        """The ranks of tensor parallelism alone."""
        return _grid([self.across], list(self.across.ranks))

    @functools.cached_property
    def everyone(self) -> Group:
        """All ranks, of both kinds of parallelism."""
        assert self.grid is not None
        return self.grid.group(range(len(self.grid.sizes)))

    @functools.cached_property
    def rank_order(self) -> tuple[int, ...]:
        """The places in `everyone` of all ranks, one tensor-parallel rank's after another's."""
        place = {rank: i for i, rank in enumerate(self.everyone.ranks)}
        return tuple(place[rank] for column in self.columns for rank in column)


@dataclass(frozen=True, kw_only=True)
class RankGrids:
    """Those of all kinds of parameters; `expert_rank` is this rank's place among expert parallelism's."""

    dense: RankGrid
    expert: RankGrid
    expert_rank: int

    def of(self, parameter: Any, *, expert: bool) -> RankGrid:
        """The ranks of a parameter, which is one of an expert or not.

        Without expert parallelism Megatron reduces the gradients of experts like all others, over the same ranks.
        """
        return self.expert if expert and not getattr(parameter, "allreduce", True) else self.dense

    def tensor_ranks(self, *, expert: bool) -> int:
        """How many ranks share a matrix that tensor parallelism cuts."""
        return (self.expert if expert else self.dense).across.size


def find_rank_grid(data: Any, across: Any) -> RankGrid:
    """The ranks of two process groups. All ranks of `across` must call it; raises ValueError where they overlap."""
    mine, tensor = ascending(data), ascending(across)
    columns: list[Any] = [None] * tensor.size
    dist.all_gather_object(columns, list(mine.ranks), group=across)
    every = [rank for column in columns for rank in column]
    if len(set(every)) != mine.size * tensor.size:
        raise ValueError(f"symdist: data-parallel ranks {columns} of tensor-parallel ranks {tensor.ranks} overlap")
    return RankGrid(data=mine, across=tensor, columns=tuple(map(tuple, columns)))


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
