"""In test ranks: a few steps of training a Megatron model, by its own schedules, from weights given by name."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.symdist_megatron.how import SEQUENCE, How
from tests.symdist_megatron.models import build, keep_written_results, optimizer_config, parameters, part_of

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from symdist_megatron import get_symdist_optimizer

BATCH = 4
VOCABULARY = 37
Recipe = dict[str, Any]


class Training:
    """A model, what steps it, and the batches both are given: the same for any layout."""

    def __init__(self, how: How, recipe: Recipe, *, clip: float = 0.1, **options: Any):
        self.how = how
        self.config, self.chunks = build(how)
        self.config.finalize_model_grads_func = finalize_model_grads
        if how.overlap:
            self.config.no_sync_func = self.chunks[0].no_sync
        self.optimizer = get_symdist_optimizer(
            optimizer_config(how, clip_grad=clip),
            self.chunks,
            recipe=recipe,
            vocabulary=VOCABULARY,
            layer_wise=how.layer_wise,
            **options,
        )
        self.steps = 0
        self.form = "fully_reshardable"
        self.norms: list[float] = []

    def train(self, steps: int) -> list[float]:
        """The losses of the steps, over the whole batch; clipping norms are kept."""
        losses = []
        for _ in range(steps):
            for chunk in self.chunks:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            share = BATCH // parallel_state.get_data_parallel_world_size()
            found = get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=self._batches(),
                model=self.chunks[0],
                num_microbatches=share,
                seq_length=SEQUENCE,
                micro_batch_size=1,
                forward_only=False,
            )
            self.steps += 1
            success, norm, _ = self.optimizer.step()
            assert success
            self.norms.append(float(norm))
            total = torch.tensor([sum(float(each["loss"]) for each in found)], dtype=torch.float64)
            # The last stage of a pipeline knows it, of its part of the batch.
            count = total.new_tensor([float(len(found))])
            dist.all_reduce(total)
            dist.all_reduce(count)
            losses.append(float(total / count))
        return losses

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        tokens = torch.randint(
            VOCABULARY, (BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(self.steps % 4)
        )
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        for row in tokens[rank::ranks]:
            yield row[None, :-1], row[None, 1:]

    def weights(self) -> dict[str, Tensor]:
        """This rank's parameters by their names in the whole model."""
        return {name: parameter.detach().clone() for name, parameter, _ in parameters(self.chunks, self.config)}

    def furthest(self, full: dict[str, Tensor]) -> float:
        """How far any weight here is from its part of full ones, beside its own size."""
        errors = []
        for chunk in self.chunks if self.how.overlap and self.how.distributed else ():
            # Else they are gathered when the next forward asks for them.
            chunk.start_param_sync(force_sync=True)
        for name, parameter, _ in parameters(self.chunks, self.config):
            mine = part_of(name, full[name], self.config).reshape(parameter.shape)
            errors.append(float((parameter.detach().float() - mine.float()).norm() / mine.float().norm()))
        return max(errors)

    def state(self, *, loading: bool) -> dict[str, Any]:
        """What Megatron's distributed checkpoints take."""
        metadata = {"distrib_optim_sharding_type": self.form, "chained_optim_avoid_prefix": True}
        model = _bare(self.chunks[0]).sharded_state_dict(metadata=metadata)
        return {
            "model": model,
            "optimizer": self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata),
        }


def _bare(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _forward(batches: Iterator[tuple[Tensor, Tensor]], model: Any) -> Any:
    tokens, labels = next(batches)
    output = model(tokens, torch.arange(SEQUENCE)[None], None, labels=labels)

    def loss(each: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean = each.mean()
        return mean, {"loss": mean.detach().clone()}

    return output, loss


def trained(
    mesh: DeviceMesh, how: How, recipe: Recipe, steps: int
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms and the weights after so many steps."""
    training = Training(how, recipe)
    return training.train(steps), training.norms, training.weights()


def beside(
    mesh: DeviceMesh, how: How, recipe: Recipe, steps: int, full: dict[str, Tensor]
) -> tuple[list[float], list[float], float]:
    """Losses, norms, and how far any weight is from the full ones that are given."""
    training = Training(how, recipe)
    return training.train(steps), training.norms, training.furthest(full)


def saved(mesh: DeviceMesh, how: How, recipe: Recipe, given: dict[str, Any]) -> list[float]:
    """Train, from a checkpoint where one is given, save, and go on: the losses after the checkpoint."""
    folder, resume, steps = given["folder"], given["resume"], given["steps"]
    keep_written_results()
    training = Training(how, recipe)
    training.form = given.get("form", training.form)
    if resume is not None:
        # What it had learnt by itself must not show.
        training.train(1)
        found = dist_checkpointing.load(training.state(loading=True), resume)
        _bare(training.chunks[0]).load_state_dict(found["model"])
        training.optimizer.load_state_dict(found["optimizer"])
        training.steps = steps
    else:
        training.train(steps)
    if mesh.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(parents=True)
    dist.barrier(group=mesh.get_group())
    dist_checkpointing.save(training.state(loading=False), folder)
    return training.train(given["after"])
