"""A run under Megatron: its options, and how its ranks divide model and data. Imports no Megatron."""

import math
from dataclasses import dataclass
from typing import Any

from launch.engines.megatron.shape import Shape, shape_of
from launch.loop.config import Config
from symdist.tools.models import build


@dataclass(frozen=True, kw_only=True)
class MegatronRun(Config):
    """A pretraining run under Megatron. Every value can stand in the TOML file and on the command line, which wins.

    The ranks of one tensor- and pipeline-parallel group hold one copy of the model between them and see the same
    sequences; all such groups together are the data-parallel ranks, among which experts are spread. A data-parallel
    rank takes batch / (data-parallel ranks × accumulation) sequences at once.
    """

    tensor_parallel: int = 1
    """Ranks that share attention, dense feed-forward, embedding and head, and the tokens between these."""
    pipeline_parallel: int = 1
    """Stages of layers, each on ranks of its own."""
    expert_parallel: int = 1
    """Ranks that the experts of a layer are spread over."""
    expert_tensor_parallel: int | None = None
    """Ranks that share each expert's weights; left out, as many as share the others."""
    distributed_optimizer: bool = True
    """Whether masters and state of the optimizer are sharded over the data-parallel ranks."""
    overlap: bool = False
    """Whether gradients are reduced, and weights gathered, while forward and backward compute."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is filled up to a multiple of this, whatever the layout; tensor-parallel ranks must divide it."""

    def check(self, *, ranks: int) -> None:
        """As `Config.check`, and for the layout and the model; the batch must split over the data-parallel ranks."""
        for name in (
            "tensor_parallel",
            "pipeline_parallel",
            "expert_parallel",
            "make_vocab_size_divisible_by",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.expert_tensor < 1:
            raise ValueError(f"--expert-tensor-parallel is {self.expert_tensor}; it must be at least 1")
        shape = self.shape()
        self._check_ranks(ranks)
        self._check_model(shape)
        super().check(ranks=ranks)
        if self.overlap and not self.distributed_optimizer:
            raise ValueError("--overlap gathers the weights that a distributed optimizer shards; leave one of them out")

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """See `Config`: Megatron's buffers are laid out by Megatron alone."""
        return None

    @property
    def expert_tensor(self) -> int:
        """How many ranks share each expert's weights."""
        return self.tensor_parallel if self.expert_tensor_parallel is None else self.expert_tensor_parallel

    def shape(self) -> Shape:
        """The model's sizes; ValueError for a model that has no counterpart in Megatron."""
        return shape_of(build(self.model, device="meta", overrides=self.model_settings()).config)

    def data_ranks(self, ranks: int) -> int:
        """See `Config`."""
        return ranks // (self.tensor_parallel * self.pipeline_parallel)

    def padded(self, vocabulary: int) -> int:
        """The rows of embedding and head for a vocabulary."""
        return math.ceil(vocabulary / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by

    def _check_ranks(self, ranks: int) -> None:
        experts = f"--expert-tensor-parallel {self.expert_tensor} × --expert-parallel {self.expert_parallel}"
        for what, size in (
            (f"--tensor-parallel {self.tensor_parallel}", self.tensor_parallel),
            (experts, self.expert_tensor * self.expert_parallel),
        ):
            if ranks % (size * self.pipeline_parallel):
                needed = size * self.pipeline_parallel
                raise ValueError(
                    f"{what} × --pipeline-parallel {self.pipeline_parallel} needs a multiple of {needed} ranks, "
                    f"there are {ranks}; start as many, or take smaller ones"
                )

    def _check_model(self, shape: Shape) -> None:
        if not shape.experts and (self.expert_parallel > 1 or self.expert_tensor != self.tensor_parallel):
            raise ValueError(
                f"{self.model} has no experts to share; leave out --expert-parallel and --expert-tensor-parallel"
            )
        tensor = "--tensor-parallel", self.tensor_parallel
        dense = shape.ffn if not all(shape.moe_layers or (False,)) else self.tensor_parallel
        for (option, parts), what, size in (
            (tensor, "attention heads", shape.heads),
            (tensor, "key/value heads", shape.groups),
            (tensor, "columns of a dense feed-forward", dense),
            # Between attention and feed-forward each of the ranks has its share of the tokens.
            (tensor, "tokens of a sequence", self.sequence),
            (tensor, "rows that --make-vocab-size-divisible-by gives", self.make_vocab_size_divisible_by),
            (("--pipeline-parallel", self.pipeline_parallel), "layers", shape.layers),
            (("--expert-parallel", self.expert_parallel), "experts", shape.experts),
            (("--expert-tensor-parallel", self.expert_tensor), "columns of an expert", shape.expert_ffn),
        ):
            if size % parts:
                raise ValueError(f"{option} {parts} does not divide the {size} {what}; take a divisor of {size}")
