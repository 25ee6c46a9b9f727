"""A run under FSDP2: its options, and the mesh its ranks form."""

import math
from dataclasses import dataclass, field
from typing import Any

from launch.loop.config import Config
from symdist.tools.models import check_sizes


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How the ranks divide model and data; the sizes multiply to the number of ranks."""

    dp_replicate: int = 1
    """Groups of ranks that each hold the whole model between them."""
    dp_shard: int | None = None
    """Ranks that shard every weight; left out, as many as there are for the other three."""
    ep: int = 1
    """Ranks that the experts of a layer are spread over; to every other weight they are more of dp_shard."""
    tp: int = 1
    """Ranks that share attention, dense feed-forward, embedding and head, and see the same sequences."""

    def sizes(self, ranks: int) -> dict[str, int]:
        """Every size by name, outermost first; ValueError, naming the remedy, where they do not make up `ranks`."""
        given = {"dp_replicate": self.dp_replicate, "ep": self.ep, "tp": self.tp}
        for name, size in {**given, "dp_shard": 1 if self.dp_shard is None else self.dp_shard}.items():
            if size < 1:
                raise ValueError(f"--mesh.{name.replace('_', '-')} is {size}; it must be at least 1")
        others = math.prod(given.values())
        product = " × ".join(f"{name} {size}" for name, size in given.items() if size > 1) or "the mesh"
        if self.dp_shard is None and ranks % others:
            raise ValueError(
                f"{product} needs a multiple of {others} ranks, there are {ranks}; start as many, or make the mesh "
                "smaller"
            )
        shard = ranks // others if self.dp_shard is None else self.dp_shard
        if others * shard != ranks:
            whole = f"dp_shard {shard}" if others == 1 else f"{product} × dp_shard {shard}"
            raise ValueError(
                f"{whole} is {others * shard} ranks, there are {ranks}; leave out --mesh.dp-shard to take what is "
                "left, or start as many ranks as the mesh has"
            )
        return {"dp_replicate": self.dp_replicate, "dp_shard": shard, "ep": self.ep, "tp": self.tp}


@dataclass(frozen=True, kw_only=True)
class FsdpRun(Config):
    """A pretraining run under FSDP2. Every value can stand in the TOML file and on the command line, which wins.

    Ranks of one tp group see the same sequences, all others their own. A data-parallel rank takes
    batch / (data-parallel ranks × accumulation) sequences at once.
    """

    mesh: Mesh = field(default_factory=Mesh)
    """How the ranks divide model and data."""
    background_checkpoints: bool = True
    """Write checkpoints while training goes on, from a copy in the memory of the host."""

    def data_ranks(self, ranks: int) -> int:
        """See `Config`; ValueError where the mesh has another number of ranks."""
        return ranks // self.mesh.sizes(ranks)["tp"]

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """See `Config`."""
        sizes = self.mesh.sizes(ranks)
        return {"mesh": {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}}

    def check(self, *, ranks: int) -> None:
        """As `Config.check`, and for the mesh: its size, and the model on it."""
        super().check(ranks=ranks)
        if self.mesh.ep > 1 or self.mesh.tp > 1:
            # Imports transformers, which other meshes do without.
            check_sizes(self.outline(), ep=self.mesh.ep, tp=self.mesh.tp)
