"""Training under FSDP2: the model's shards, symdist's own optimizer and clipping, DCP checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import symdist
from launch import checkpoint, checkpoint_directory
from launch.schedules import build_scheduler
from launch.training import Training
from symdist.models import shard


class FsdpTraining(Training):
    """A run whose model `fully_shard` has cut over all ranks."""

    def _build(self, outline: nn.Module) -> Any:
        model = self._build_model(outline)
        self.optimizer = symdist.build_optimizer(model, self.recipe, nonfinite=self.config.nonfinite)
        self.scheduler = build_scheduler(self.optimizer, self._schedules(), self.config.steps)
        return model

    def _build_model(self, outline: nn.Module) -> Any:
        config = self.config
        low = config.precision == "bfloat16" or (
            config.precision == "auto" and self.ranks.device.type == "cuda" and torch.cuda.is_bf16_supported()
        )
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
        )
        if self._drawn_whole():
            # On every rank the same weights, drawn whole: a run starts alike at any world size.
            return shard(self._make_model(seed=config.seed), self.ranks.mesh, policy=policy)
        model: Any = outline
        shard(model, self.ranks.mesh, policy=policy).to_empty(device=self.ranks.device)
        # On the CPU each rank draws its own shards; on GPUs DTensor keeps the ranks' draws apart by itself.
        torch.manual_seed(config.seed + (self.ranks.rank if self.ranks.device.type == "cpu" else 0))
        model.init_weights()
        return model

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients meet once a step, however many micro-batches it has.
        self.model.set_requires_gradient_sync(last)
        super()._backward(loss, last=last)

    def _update(self) -> tuple[Tensor | float | None, float]:
        norm = symdist.clip_grad_norm_(self.model.parameters(), self.config.clip or float("inf"))
        stepping = self._clock()
        self.optimizer.step()
        seconds = self._clock() - stepping
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return norm, seconds

    @property
    def skipped_steps(self) -> int:
        """See `Training`."""
        return self.optimizer.skipped_steps

    def resume(self, log_to: Callable[[str], None]) -> int | None:
        """See `Training`."""
        wanted = self.config.resume
        if wanted is None:
            return None
        path = checkpoint_directory.chosen(self.checkpoints, wanted)
        if path is None:
            log_to(f"no checkpoint in {self.checkpoints}: starting from the beginning")
            return None
        state = checkpoint.load(path, model=self.model, optimizer=self.optimizer, identity=self.identity)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.scheduler.load_state_dict(state["scheduler"])
        self.loader.load_state_dict(state["data"])
        self.optimizer.skipped_steps = state["skipped_steps"]
        return self.step

    def save(self) -> Path:
        """See `Training`."""
        trainer = {
            "step": self.step,
            "elapsed": self.elapsed,
            "scheduler": self.scheduler.state_dict(),
            "data": self.loader.state_dict(),
            "skipped_steps": self.optimizer.skipped_steps,
        }
        return checkpoint.save(
            self.checkpoints,
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            trainer=trainer,
            identity=self.identity,
            keep=self.config.keep,
        )
