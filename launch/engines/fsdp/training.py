"""Training under FSDP2, with symdist's own optimizer and clipping, and DCP checkpoints."""

from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import symdist
from launch.checkpoints import sharded
from launch.checkpoints.background import BackgroundSaver
from launch.checkpoints.manifest import CheckpointError
from launch.engines.fsdp.config import FsdpRun
from launch.loop.resumption import Job, keeping_options
from launch.loop.schedules import build_scheduler, move_to
from launch.loop.training import Training
from symdist.tools.models import shard


class FsdpTraining(Training):
    """A run under FSDP2, with the replicas, tensor and expert parallelism that the mesh asks for."""

    config: FsdpRun
    launcher = "fsdp2"

    def _build(self, outline: nn.Module) -> Any:
        config = self.config
        model = self._build_model(outline)
        self.optimizer = symdist.build_optimizer(model, self.recipe, nonfinite=config.nonfinite)
        self.scheduler = build_scheduler(self.optimizer, self._schedules(), config.steps)
        self._base_lrs = [float(lr) for lr in self.scheduler.base_lrs]
        self._saver = None
        if config.background_checkpoints:
            self._saver = BackgroundSaver(
                self.checkpoints, keep_every=config.keep_every, checksums=config.checksums, timeout=config.timeout
            )
        return model

    def _build_model(self, outline: nn.Module) -> Any:
        config = self.config
        sizes = self.mesh
        # dp_shard stays even if its size is 1, since FSDP2 also provides the mixed precision.
        names = tuple(name for name, size in sizes.items() if size > 1 or name == "dp_shard")
        shape = tuple(sizes[name] for name in names)
        mesh = init_device_mesh(self.ranks.device.type, shape, mesh_dim_names=names)
        low = self.low_precision
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if low else None, reduce_dtype=torch.float32 if low else None
        )
        if self._drawn_whole():
            # The whole model with the same seed on every rank: the weights are the same at any world size.
            return shard(self._make_model(seed=config.seed), mesh, policy=policy)
        on_cpu = self.ranks.device.type == "cpu"
        if on_cpu and sizes["tp"] > 1:
            raise ValueError(
                f"--mesh.tp {sizes['tp']} on the CPU cannot initialize weights in shards: ranks would disagree about "
                "weights that tp does not split; leave out --mesh.tp, or give --initialize whole"
            )
        model: Any = outline
        shard(model, mesh, policy=policy).to_empty(device=self.ranks.device)
        # On the CPU each shard needs its own seed, the same on all replicas; on GPUs DTensor takes care of both.
        shards = self.ranks.world // sizes["dp_replicate"]
        torch.manual_seed(config.seed + (self.ranks.rank % shards if on_cpu else 0))
        model.init_weights()
        return model

    def _data_share(self) -> tuple[int, int]:
        tp = self.mesh["tp"]
        return self.ranks.rank // tp, self.ranks.world // tp

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # Gradients are reduced only once per step, with the last micro-batch.
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
    def symdist(self) -> symdist.SymDist:
        """See `Training`."""
        return self.optimizer

    @property
    def mesh(self) -> dict[str, int]:
        """See `Training`."""
        return self.config.mesh.sizes(self.ranks.world)

    def load(self, path: Path) -> dict[str, Any]:
        """See `Training`."""
        with keeping_options(lambda: self.optimizer.param_groups):
            job = sharded.load(
                path, model=self.model, optimizer=self.optimizer, identity=self.identity, trainer=TypeAdapter(Job)
            )
        move_to(self.scheduler, job["step"], base_lrs=self._base_lrs)
        return job

    def load_weights(self, path: Path) -> int:
        """See `Training`."""
        return sharded.load_weights(path, model=self.model)

    def save(self, *, wait: bool) -> Path:
        """See `Training`."""
        if self._saver is not None:
            return self._saver.start(
                self.step,
                model=self.model,
                optimizer=self.optimizer,
                trainer=self.job(),
                identity=self.identity,
                keep=self.num_kept,
            )
        return sharded.save(
            self.checkpoints,
            self.step,
            model=self.model,
            optimizer=self.optimizer,
            trainer=self.job(),
            identity=self.identity,
            keep=self.num_kept,
            keep_every=self.config.keep_every,
            checksums=self.config.checksums,
        )

    @property
    def background(self) -> bool:
        """See `Training`."""
        return self._saver is not None

    def saved(self, *, wait: bool) -> tuple[Path, CheckpointError | None] | None:
        """See `Training`."""
        return None if self._saver is None else self._saver.outcome(wait=wait)
