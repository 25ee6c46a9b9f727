"""Checkpoints written in a thread while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from launch.checkpoints import sharded
from launch.checkpoints.sharded import CheckpointError
from launch.runtime.distributed import patience_of


class BackgroundSaver:
    """Writes one checkpoint at a time from a copy in the host's memory; every method is called by all ranks.

    The ranks' threads talk over a gloo group of their own, so that nothing of theirs comes between the collectives of
    training. The copy's buffers are kept: they cost as much host memory as weights and state of a rank take.
    """

    def __init__(self, directory: Path, *, keep_every: int, timeout: float):
        self.directory = directory
        self._keep_every = keep_every
        self._group = dist.new_group(backend="gloo", timeout=patience_of(timeout))
        gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        # A thread begins with the first GPU, whichever its process has.
        set_up = partial(torch.cuda.set_device, torch.cuda.current_device()) if gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=set_up)
        self._under_way: tuple[Path, Future[Path]] | None = None

    def start(
        self,
        step: int,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        trainer: dict[str, Any],
        identity: dict[str, Any],
        keep: int,
    ) -> Path:
        """Copy everything, and begin to write it; where it will be. One that is still being written must be done."""
        assert self._under_way is None
        copied = sharded.snapshot(step, model=model, optimizer=optimizer, trainer=trainer, stager=self._stager)
        writing = self._thread.submit(
            sharded.write,
            self.directory,
            copied,
            identity=identity,
            keep=keep,
            keep_every=self._keep_every,
            group=self._group,
        )
        self._under_way = self.directory / f"step-{step:08d}", writing
        return self._under_way[0]

    def outcome(self, *, wait: bool) -> tuple[Path, CheckpointError | None] | None:
        """The checkpoint that was written, or failed, since the last call; None where there is none, or none yet.

        Ranks see it end at different times, so that only with `wait` the answer is the same on all.
        """
        if self._under_way is None or not (wait or self._under_way[1].done()):
            return None
        path, writing = self._under_way
        self._under_way = None
        try:
            return writing.result(), None
        except CheckpointError as error:
            return path, error
