"""The ranks that hold the dense parameters of a Megatron model, and those that hold its experts."""

from dataclasses import dataclass
from typing import Any

from symdist.layouts.rank_grid import RankGrid


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
