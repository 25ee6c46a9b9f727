"""Training under DeepSpeed: its engine shards, accumulates, clips, steps and saves; symdist is its optimizer."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)
from torch import Tensor, nn
from transformers.integrations import deepspeed as transformers_deepspeed

import symdist
from launch import deepspeed_checkpoint
from launch.checkpoint_directory import CheckpointError, write_json
from launch.data import Corpus
from launch.deepspeed_checkpoint import JOB, name_of, rng_file
from launch.deepspeed_config import TYPE, DeepSpeedRun, loads_universal, precision, zero_stage
from launch.ranks import Ranks
from launch.rng import rng_state, set_rng_state
from launch.schedules import build_scheduler
from launch.training import Training
from symdist.recipes import Recipe
from symdist_deepspeed.options import Options


class DeepSpeedTraining(Training):
    """A run whose model is in a DeepSpeed engine; `config` must have been checked for this number of ranks."""

    config: DeepSpeedRun

    def __init__(self, config: DeepSpeedRun, corpus: Corpus, ranks: Ranks):
        self.settings = config.settings(ranks=ranks.world)
        self.stage = zero_stage(self.settings)
        self.optimizer_type = str(self.settings["optimizer"]["type"])
        # What earlier parts of the run skipped; DeepSpeed keeps count of its own skipped steps.
        self._skipped_before = 0
        super().__init__(config, corpus, ranks)

    def _load_recipe(self) -> Recipe:
        if self.optimizer_type != TYPE:
            return super()._load_recipe()
        return Options.from_params(self.settings["optimizer"]["params"]).scaled()[0]

    def _build(self, outline: nn.Module) -> Any:
        if self.ranks.device.type == "cpu":
            # It would compile C++ for a minute, to speed up a collective that is none of ours.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        schedule = None
        if "scheduler" not in self.settings:
            schedule = partial(build_scheduler, schedules=self._schedules(), total=self.config.steps)
        model = self._build_model()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            # A copy: DeepSpeed takes out of it what it has read.
            config=copy.deepcopy(self.settings),
            lr_scheduler=schedule,
        )
        if getattr(self.engine.checkpoint_engine, "is_decoupled", bool)():
            raise ValueError(
                f"{self.config.deepspeed}: checkpoints that are written while training goes on are not whole when the "
                "job goes on from saving them; leave the decoupled writer out of the file"
            )
        return self.engine

    def _build_model(self) -> Any:
        config = self.config
        if self._drawn_whole():
            # On every rank the same weights, drawn whole: a run starts alike at any world size.
            return self._make_model(seed=config.seed)
        if self.stage < 3:
            if config.initialize == "sharded":
                raise ValueError(
                    f"--initialize sharded needs ZeRO stage 3, {config.deepspeed} has stage {self.stage}: below it, "
                    "every rank holds all weights anyway"
                )
            # Where they will lie: quicker than on the CPU, whose memory all ranks of a machine share.
            return self._make_model(seed=config.seed, device=self.ranks.device)
        told = _Sharding(self.settings)
        transformers_deepspeed.set_hf_deepspeed_config(told)
        try:
            return self._make_model(seed=config.seed)
        finally:
            transformers_deepspeed.unset_hf_deepspeed_config()

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # Divides by the number of micro-batches, too.
        self.engine.backward(loss)
        if not last:
            # Counts it; what is done at the last one is `_update`.
            self.engine.step()

    def _update(self) -> tuple[Tensor | float | None, float]:
        norm = None
        if self.engine.optimizer is self.engine.basic_optimizer:
            # At stage 0 without masters DeepSpeed clips without telling what it found; gradients are whole there.
            norm = symdist.clip_grad_norm_(self.engine.module.parameters(), float("inf"))
        stepping = self._clock()
        # With DeepSpeed's own part: norm and clipping, and gathering the weights that were stepped.
        self.engine.step()
        seconds = self._clock() - stepping
        return self.engine.get_global_grad_norm() if norm is None else norm, seconds

    @property
    def skipped_steps(self) -> int:
        """See `Training`; those that DeepSpeed left out are counted as well."""
        own = self.engine.basic_optimizer.skipped_steps if self.optimizer_type == TYPE else 0
        return self._skipped_before + own + self.engine.skipped_steps

    @property
    def identity(self) -> dict[str, Any]:
        """See `Training`; an optimizer of another type is told by its section of the DeepSpeed config."""
        if self.optimizer_type == TYPE:
            return super().identity
        return super().identity | {"recipe": None, "optimizer": self.settings["optimizer"]}

    def resume(self, log_to: Callable[[str], None]) -> int | None:
        """See `Training`."""
        if self.config.resume is None:
            return None
        universal = loads_universal(self.settings)
        path = deepspeed_checkpoint.chosen(self.checkpoints, self.config.resume, universal=universal)
        if path is None:
            kind = "universal checkpoint" if universal else "checkpoint"
            log_to(f"no {kind} in {self.checkpoints}: starting from the beginning")
            return None
        job = deepspeed_checkpoint.read_job(path)
        deepspeed_checkpoint.check(
            path,
            job,
            directory=self.checkpoints,
            identity=self.identity,
            stage=self.stage,
            world=self.ranks.world,
            universal=universal,
        )
        loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {path}; choose another checkpoint")
        self.step, self.elapsed = job["step"], job["elapsed"]
        self.loader.load_state_dict(job["data"])
        self._skipped_before = job["skipped_steps"] - self.engine.skipped_steps
        if not universal:
            set_rng_state(json.loads(rng_file(path, self.ranks.rank).read_text()))
        return self.step

    def save(self) -> Path:
        """See `Training`."""
        path = self.checkpoints / name_of(self.step)
        job = {
            "step": self.step,
            "elapsed": self.elapsed,
            "data": self.loader.state_dict(),
            "skipped_steps": self.skipped_steps,
            # As JSON has it, for that is what identities are compared as.
            "identity": json.loads(json.dumps(self.identity)),
            "stage": self.stage,
            "ranks": self.ranks.world,
        }
        if self.ranks.rank == 0:
            deepspeed_checkpoint.clear(path)
        self.engine.save_checkpoint(
            str(self.checkpoints),
            tag=path.name,
            client_state={
                JOB: job,
                "iteration": self.step,
                # The converter to universal checkpoints asks for it.
                UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE},
            },
            # DeepSpeed's first rank would name it before it knows that the others have written theirs.
            save_latest=False,
        )
        write_json(rng_file(path, self.ranks.rank), rng_state())
        self.ranks.sum(torch.zeros(1, device=self.ranks.device))
        if self.ranks.rank == 0:
            deepspeed_checkpoint.publish(path, keep=self.config.keep)
        return path

    def _summary(self, measures: dict[str, float]) -> dict[str, Any]:
        symmetric = self.optimizer_type == TYPE
        return super()._summary(measures) | {
            "recipe": self.recipe.name if symmetric else None,
            "optimizer": self.optimizer_type,
            "zero_stage": self.stage,
            "precision": precision(self.settings),
            "scheduler": self.settings.get("scheduler", {}).get("type", "recipe"),
            "deepspeed": deepspeed.__version__,
        }


class _Sharding:
    """Tells transformers to build a model under `deepspeed.zero.Init`, and to draw its weights one module at a time."""

    def __init__(self, settings: dict[str, Any]):
        self.config = settings

    def is_zero3(self) -> bool:
        return True
