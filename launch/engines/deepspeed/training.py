"""Training under DeepSpeed, whose engine shards, accumulates, clips, steps and saves with symdist as its optimizer."""

import copy
import json
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
from torch.optim.lr_scheduler import LambdaLR
from transformers.integrations import deepspeed as transformers_deepspeed

import symdist
from launch.checkpoints.directory import describe_files
from launch.checkpoints.manifest import CHOOSE, CheckpointError, write_json
from launch.checkpoints.publish import publish_together
from launch.checkpoints.rng import read_rng_state, rng_file, rng_state, set_rng_state
from launch.data import Corpus
from launch.engines.deepspeed import checkpoint
from launch.engines.deepspeed.checkpoint import JOB, DeepSpeedJob
from launch.engines.deepspeed.config import TYPE, DeepSpeedRun, loads_universal, precision, zero_stage
from launch.loop.resumption import keeping_options
from launch.loop.schedules import build_scheduler, move_to
from launch.loop.training import Training, numbers
from launch.runtime.agreement import on_all_ranks
from launch.runtime.distributed import Ranks
from launch.runtime.watchdog import Watchdog
from symdist.routing.recipes import Recipe
from symdist_deepspeed.options import Options


class DeepSpeedTraining(Training):
    """A run whose model is in a DeepSpeed engine; see `Training` for the arguments."""

    config: DeepSpeedRun
    launcher = "deepspeed"

    def __init__(self, config: DeepSpeedRun, corpus: Corpus, ranks: Ranks, watchdog: Watchdog):
        self.ds_config = config.settings(ranks=ranks.world)
        self.stage = zero_stage(self.ds_config)
        self.optimizer_type = str(self.ds_config["optimizer"]["type"])
        super().__init__(config, corpus, ranks, watchdog)

    def _load_recipe(self) -> Recipe:
        if self.optimizer_type != TYPE:
            return super()._load_recipe()
        return Options.from_params(self.ds_config["optimizer"]["params"]).scaled()[0]

    def _build(self, outline: nn.Module) -> Any:
        if self.ranks.device.type == "cpu":
            # DeepSpeed would spend a minute compiling C++ for a collective that this job does not use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        schedule = None
        if "scheduler" not in self.ds_config:
            schedule = partial(build_scheduler, schedules=self._schedules(), total=self.config.steps)
        model = self._build_model()
        self.engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            # A copy, since DeepSpeed removes entries that it has read.
            config=copy.deepcopy(self.ds_config),
            lr_scheduler=schedule,
        )
        self._base_lrs = [float(lr) for lr in getattr(self.engine.lr_scheduler, "base_lrs", ())]
        if getattr(self.engine.checkpoint_engine, "is_decoupled", bool)():
            raise ValueError(
                f"{self.config.deepspeed}: its decoupled checkpoint writer is still writing when a save returns, and "
                "this job would take an incomplete checkpoint for finished; leave the writer out of the file"
            )
        return self.engine

    def _build_model(self) -> Any:
        config = self.config
        if self._drawn_whole():
            # The whole model with the same seed on every rank: the weights are the same at any world size.
            return self._make_model(seed=config.seed)
        if self.stage < 3:
            if config.initialize == "sharded":
                raise ValueError(
                    f"--initialize sharded needs ZeRO stage 3, but {config.deepspeed} has stage {self.stage}, where "
                    "every rank holds all weights; leave the option out"
                )
            # Directly on the device, which is faster than on the CPU, whose memory all ranks of a machine share.
            return self._make_model(seed=config.seed, device=self.ranks.device)
        sharding = _Sharding(self.ds_config)
        transformers_deepspeed.set_hf_deepspeed_config(sharding)
        try:
            return self._make_model(seed=config.seed)
        finally:
            transformers_deepspeed.unset_hf_deepspeed_config()

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # The engine also divides by the number of micro-batches.
        self.engine.backward(loss)
        if not last:
            # Before the last micro-batch this only counts; `_update` makes the actual step.
            self.engine.step()

    def _update(self) -> tuple[Tensor | float | None, float]:
        norm = None
        if self.engine.optimizer is self.engine.basic_optimizer:
            # At stage 0 without master weights DeepSpeed clips but reports no norm; the gradients are not sharded.
            norm = symdist.clip_grad_norm_(self.engine.module.parameters(), float("inf"))
        stepping = self._clock()
        # The time includes DeepSpeed's own work: norm, clipping, and gathering the updated weights.
        self.engine.step()
        seconds = self._clock() - stepping
        return self.engine.get_global_grad_norm() if norm is None else norm, seconds

    @property
    def symdist(self) -> symdist.SymDist | None:
        """See `Training`."""
        return self.engine.basic_optimizer.symdist if self.optimizer_type == TYPE else None

    @property
    def mesh(self) -> dict[str, int]:
        """See `Training`."""
        return {"zero_stage": self.stage, "dp": self.ranks.world}

    @property
    def low_precision(self) -> bool:
        """See `Training`."""
        return precision(self.ds_config) == "bfloat16"

    @property
    def skipped(self) -> int:
        """See `Training`."""
        return super().skipped + self.engine.skipped_steps

    @property
    def identity(self) -> dict[str, Any]:
        """See `Training`; an optimizer of another type is identified by its section of the DeepSpeed config."""
        if self.optimizer_type == TYPE:
            return super().identity
        optimizer = self.ds_config["optimizer"]
        options = numbers(optimizer.get("params", {}), False)
        return super().identity | {"recipe": None, "optimizer": {"type": self.optimizer_type, "params": options}}

    @property
    def settings(self) -> dict[str, Any]:
        """See `Training`."""
        if self.optimizer_type == TYPE:
            return super().settings
        optimizer = numbers(self.ds_config["optimizer"].get("params", {}), True)
        return super().settings | {"recipe": None, "optimizer": optimizer}

    def finished_checkpoints(self) -> list[Path]:
        """See `Training`; if the run loads universal checkpoints, only the newest of them."""
        if not loads_universal(self.ds_config):
            return super().finished_checkpoints()
        path = checkpoint.newest_universal(self.checkpoints)
        return [] if path is None else [path]

    def check_mixing(self, path: Path) -> None:
        """Do nothing, since `load` makes this check."""

    def load(self, path: Path) -> dict[str, Any]:
        """See `Training`."""
        universal = loads_universal(self.ds_config)
        failed = f"cannot read {path}"

        def checked() -> tuple[dict[str, Any], dict[str, Any] | None]:
            job = checkpoint.checked_job(
                path,
                directory=self.checkpoints,
                identity=self.identity,
                stage=self.stage,
                rank=self.ranks.rank,
                world=self.ranks.world,
                universal=universal,
            )
            return dict(job), None if universal else read_rng_state(path, self.ranks.rank)

        self._look_through(path)
        job, rng = on_all_ranks(checked, failed, CHOOSE)
        # DeepSpeed's own scheduler sets the rate of a step at the end of the one before.
        ours = isinstance(self.engine.lr_scheduler, LambdaLR) or self.engine.lr_scheduler is None
        with keeping_options(self._groups, but=() if ours else ("lr", "initial_lr", "betas", "momentum")):
            loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found no files to load in {path}; choose another checkpoint")
        if isinstance(self.engine.lr_scheduler, LambdaLR):
            move_to(self.engine.lr_scheduler, job["step"], base_lrs=self._base_lrs)
        if rng is not None:
            set_rng_state(rng)
        return job

    def load_weights(self, path: Path) -> int:
        """See `Training`."""
        self._look_through(path)
        # At stage 3 a module's weights are elsewhere.
        weights = self.engine.module.state_dict() if self.stage < 3 else None

        def checked() -> DeepSpeedJob:
            job = checkpoint.read_job(path)
            if self.stage == 3 or job["stage"] == 3:
                raise CheckpointError(
                    f"--from-weights {path}: DeepSpeed reads weights alone only at ZeRO stages 0 to 2, from a "
                    "checkpoint of one of these; start the run at another stage, or resume the checkpoint"
                )
            return checkpoint.read_job(path, weights=weights)

        job = on_all_ranks(checked, f"cannot read {path}", CHOOSE)
        loaded, _ = self.engine.load_checkpoint(str(path.parent), tag=path.name, load_module_only=True)
        if loaded is None:
            raise CheckpointError(f"DeepSpeed found no weights to load in {path}; choose another checkpoint")
        return job["step"]

    def _look_through(self, path: Path) -> None:
        """Look through DeepSpeed's files on all ranks, before any rank unpickles one of them."""
        if not self.config.trust_checkpoints:
            rank, world = self.ranks.rank, self.ranks.world
            on_all_ranks(lambda: checkpoint.check_files(path, rank=rank, world=world), f"cannot read {path}", CHOOSE)

    def _groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def save(self, *, wait: bool) -> Path:
        """See `Training`; the checkpoint is always written before this returns."""
        rank, world = self.ranks.rank, self.ranks.world
        # Identities are compared as JSON stores them, with lists in place of tuples.
        identity = json.loads(json.dumps(self.identity))
        job = self.job() | {"identity": identity, "stage": self.stage, "ranks": world}

        def write(writing: Path, failed: str, remedy: str) -> dict[str, Any]:
            def describe_share() -> dict[str, Any]:
                files = sorted(path for path in writing.rglob("*") if path.is_file())
                return describe_files(files[rank::world], checksums=self.config.checksums)

            self._write(writing, job, failed, remedy)
            return on_all_ranks(describe_share, failed, remedy)

        return publish_together(
            self.checkpoints,
            self.step,
            write,
            identity=identity,
            keep=self.num_kept,
            keep_every=self.config.keep_every,
            after=checkpoint.point_to,
        )

    def _write(self, writing: Path, job: dict[str, Any], failed: str, remedy: str) -> None:
        """Have DeepSpeed write its files, and write this rank's random number generators next to them."""
        engine = self.engine.checkpoint_engine
        write, failures = engine.save, []

        def write_or_note(*arguments: Any, **options: Any) -> Any:
            # Raising here would leave the other ranks waiting at DeepSpeed's barriers.
            try:
                return write(*arguments, **options)
            except Exception as error:
                failures.append(error)

        def own_part() -> None:
            if failures:
                raise failures[0]
            write_json(rng_file(writing, self.ranks.rank), rng_state())

        engine.save = write_or_note
        try:
            self.engine.save_checkpoint(
                str(writing.parent),
                tag=writing.name,
                client_state={
                    JOB: job,
                    "iteration": self.step,
                    # The converter to universal checkpoints needs it.
                    UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE},
                },
                # Rank 0 would write `latest` before it knows that the other ranks have written their files.
                save_latest=False,
            )
        finally:
            del engine.save
        on_all_ranks(own_part, failed, remedy)

    def _summary(self, measures: dict[str, float]) -> dict[str, Any]:
        symmetric = self.optimizer_type == TYPE
        return super()._summary(measures) | {
            "recipe": self.recipe.name if symmetric else None,
            "optimizer": self.optimizer_type,
            "zero_stage": self.stage,
            "precision": precision(self.ds_config),
            "scheduler": self.ds_config.get("scheduler", {}).get("type", "recipe"),
            "deepspeed": deepspeed.__version__,
        }


class _Sharding:
    """Makes transformers build the model under `deepspeed.zero.Init`, and initialize one module at a time."""

    def __init__(self, settings: dict[str, Any]):
        self.config = settings

    def is_zero3(self) -> bool:
        return True
