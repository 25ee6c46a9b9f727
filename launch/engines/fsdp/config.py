"""Configuration of a run under FSDP2, and the mesh of its ranks.

The ranks of one tp group read the same sequences; every tp group counts as one data-parallel rank and takes
batch / (data-parallel ranks × accumulation) sequences at once.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import with_config

from launch.loop.config import STRICT, Config, Count
from symdist.tools.models import check_sizes


@with_config(STRICT)
@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the ranks divide model and data; the product of the sizes is the number of ranks."""

    dp_replicate: Count = 1
    """Number of replicas of the model, each held by one group of ranks."""
    dp_shard: Count | None = None
    """Ranks that shard every weight; the default is all ranks divided by the other three sizes."""
    ep: Count = 1
    """Ranks that the experts of a layer are spread over; they shard every other weight as dp_shard does."""
    tp: Count = 1
    """Tensor-parallel ranks: they split attention, dense feed-forward, embedding and head, and read the same data."""

    def sizes(self, ranks: int) -> dict[str, int]:
        """Return every size by name, outermost dimension first.

        Args:
            ranks: Number of ranks of the run.

        Raises:
            ValueError: If the sizes do not multiply to `ranks`; the message names the remedy.
        """
        fixed = {"dp_replicate": self.dp_replicate, "ep": self.ep, "tp": self.tp}
        others = math.prod(fixed.values())
        product = " × ".join(f"{name} {size}" for name, size in fixed.items() if size > 1) or "the mesh"
        if self.dp_shard is None and ranks % others:
            raise ValueError(
                f"{product} needs a multiple of {others} ranks, there are {ranks}; start as many, or choose smaller "
                "mesh sizes"
            )
        shard = ranks // others if self.dp_shard is None else self.dp_shard
        if others * shard != ranks:
            whole = f"dp_shard {shard}" if others == 1 else f"{product} × dp_shard {shard}"
            raise ValueError(
                f"{whole} is {others * shard} ranks, there are {ranks}; leave out --mesh.dp-shard to use all ranks, or "
                f"start {others * shard}"
            )
        return {"dp_replicate": self.dp_replicate, "dp_shard": shard, "ep": self.ep, "tp": self.tp}


@dataclass(frozen=True, kw_only=True)
class FsdpRun(Config):
    """A pretraining run under FSDP2; every value can be set in the TOML file or on the command line, which wins."""

    mesh: Mesh = field(default_factory=Mesh)
    """How the ranks divide model and data."""
    background_checkpoints: bool = True
    """Write checkpoints while training continues, from a copy in host memory."""

    def data_ranks(self, ranks: int) -> int:
        """See `Config`: ranks of one tp group read the same sequences.

        Raises:
            ValueError: If the mesh does not fit the number of ranks.
        """
        return ranks // self.mesh.sizes(ranks)["tp"]

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """See `Config`."""
        sizes = self.mesh.sizes(ranks)
        return {"mesh": {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}}

    def check(self, *, ranks: int) -> None:
        """Check as `Config.check` does, and that the mesh fits the ranks and the model."""
        super().check(ranks=ranks)
        if self.mesh.ep > 1 or self.mesh.tp > 1:
            # Only then, since it imports transformers, which other meshes do not need.
            check_sizes(self.outline(), ep=self.mesh.ep, tp=self.mesh.tp)
