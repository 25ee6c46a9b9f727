"""Configuration of a run under Megatron, and how its ranks divide model and data; imports no Megatron.

The ranks of one tensor- and pipeline-parallel group hold one copy of the model and read the same sequences. Each such
group counts as one data-parallel rank and takes batch / (data-parallel ranks × accumulation) sequences at once. Experts
are spread over the data-parallel ranks.
"""

import math
from dataclasses import dataclass
from typing import Any

from launch.engines.megatron.shape import Shape, shape_of
from launch.loop.config import Config, Count
from symdist.tools.megatron import MegatronMesh
from symdist.tools.models import build


@dataclass(frozen=True, kw_only=True)
class MegatronRun(Config):
    """A pretraining run under Megatron; every value can be set in the TOML file or on the command line, which wins."""

    tensor_parallel: Count = 1
    """Ranks that split attention, dense feed-forward, embedding and head, and the tokens between these."""
    pipeline_parallel: Count = 1
    """Number of pipeline stages, each with part of the layers on its own ranks."""
    expert_parallel: Count = 1
    """Ranks that the experts of a layer are spread over."""
    expert_tensor_parallel: Count | None = None
    """Ranks that split each expert's weights; the default is tensor_parallel."""
    distributed_optimizer: bool = True
    """Shard master weights and optimizer state over the data-parallel ranks."""
    overlap: bool = False
    """Reduce gradients and gather weights while forward and backward compute."""
    make_vocab_size_divisible_by: Count = 128
    """Pad the vocabulary to a multiple of this, which must be a multiple of tensor_parallel."""

    def check(self, *, ranks: int) -> None:
        """Check as `Config.check` does, and that the layout fits the ranks and the model."""
        self.check_values()
        shape = self.shape()
        self._check_ranks(ranks)
        self._check_model(shape)
        super().check(ranks=ranks)
        if self.overlap and not self.distributed_optimizer:
            raise ValueError(
                "--overlap needs the distributed optimizer, whose weights it gathers; leave --overlap or "
                "--no-distributed-optimizer out"
            )

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """See `Config`."""
        stage = ranks // self.pipeline_parallel
        mesh = MegatronMesh(
            tp=self.tensor_parallel,
            pp=self.pipeline_parallel,
            ep=self.expert_parallel,
            etp=self.expert_tensor,
            dp=stage // self.tensor_parallel,
            distributed=self.distributed_optimizer,
            bucket=0 if self.overlap else None,
            vocabulary_multiple=self.make_vocab_size_divisible_by // self.tensor_parallel,
        )
        return {"mesh": mesh}

    @property
    def expert_tensor(self) -> int:
        """How many ranks split each expert's weights."""
        return self.tensor_parallel if self.expert_tensor_parallel is None else self.expert_tensor_parallel

    def shape(self) -> Shape:
        """Return the model's sizes.

        Raises:
            ValueError: If the model has no counterpart in Megatron.
        """
        return shape_of(build(self.model, device="meta", overrides=self.model_settings()).config)

    def data_ranks(self, ranks: int) -> int:
        """See `Config`: the ranks of one tensor- and pipeline-parallel group read the same sequences."""
        return ranks // (self.tensor_parallel * self.pipeline_parallel)

    def padded(self, vocabulary: int) -> int:
        """Return the rows of embedding and head: `vocabulary` rounded up to `make_vocab_size_divisible_by`."""
        return math.ceil(vocabulary / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by

    def _check_ranks(self, ranks: int) -> None:
        experts = f"--expert-tensor-parallel {self.expert_tensor} × --expert-parallel {self.expert_parallel}"
        for option, size in (
            (f"--tensor-parallel {self.tensor_parallel}", self.tensor_parallel),
            (experts, self.expert_tensor * self.expert_parallel),
        ):
            if ranks % (size * self.pipeline_parallel):
                needed = size * self.pipeline_parallel
                raise ValueError(
                    f"{option} × --pipeline-parallel {self.pipeline_parallel} needs a multiple of {needed} ranks, "
                    f"there are {ranks}; start as many, or choose smaller sizes"
                )

    def _check_model(self, shape: Shape) -> None:
        if not shape.experts and (self.expert_parallel > 1 or self.expert_tensor != self.tensor_parallel):
            raise ValueError(
                f"{self.model} has no experts to divide among ranks; leave out --expert-parallel and "
                "--expert-tensor-parallel"
            )
        tensor = "--tensor-parallel", self.tensor_parallel
        dense = shape.ffn if not all(shape.moe_layers or (False,)) else self.tensor_parallel
        for (option, parts), dimension, size in (
            (tensor, "attention heads", shape.heads),
            (tensor, "key/value heads", shape.groups),
            (tensor, "columns of a dense feed-forward", dense),
            # Between attention and feed-forward each tensor-parallel rank holds its share of the tokens.
            (tensor, "tokens of a sequence", self.sequence),
            (tensor, "rows that --make-vocab-size-divisible-by gives", self.make_vocab_size_divisible_by),
            (("--pipeline-parallel", self.pipeline_parallel), "layers", shape.layers),
            (("--expert-parallel", self.expert_parallel), "experts", shape.experts),
            (("--expert-tensor-parallel", self.expert_tensor), "columns of an expert", shape.expert_ffn),
        ):
            if size % parts:
                raise ValueError(f"{option} {parts} does not divide the {size} {dimension}; choose a divisor of {size}")
