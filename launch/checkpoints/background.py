"""Writes checkpoints in a thread while training continues."""

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
    """Writes one checkpoint at a time from a copy in host memory; all ranks must create it and call its methods.

    The ranks' threads use their own gloo group, so that their collectives do not mix with those of training. The copy's
    buffers are kept between checkpoints; they take as much host memory as the rank's weights and optimizer state.

    Args:
        directory: The folder of the run's checkpoints.
        keep_every: Keep every checkpoint whose step is a multiple of this; 0 is for none.
        checksums: See `launch.checkpoints.directory.describe_files`.
        timeout: The watchdog's limit in seconds, from which the timeout of the gloo group follows.
    """

    def __init__(self, directory: Path, *, keep_every: int, checksums: bool | None, timeout: float):
        self.directory = directory
        self._keep_every, self._checksums = keep_every, checksums
        self._group = dist.new_group(backend="gloo", timeout=patience_of(timeout))
        gpu = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(gpu, False, False, gpu))
        # A new thread uses the first GPU unless it is told which one its process has.
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
        """Copy everything to host memory, and start to write it; no earlier checkpoint may still be in progress.

        Args:
            step: Optimizer steps done.
            model: The model to save.
            optimizer: The optimizer to save.
            trainer: JSON-serializable values of the loop, the same on all ranks.
            identity: JSON-serializable values that tell this run from others.
            keep: How many checkpoints to leave, this one included.

        Returns:
            The directory where the checkpoint will be.
        """
        assert self._under_way is None
        copied = sharded.snapshot(step, model=model, optimizer=optimizer, trainer=trainer, stager=self._stager)
        writing = self._thread.submit(
            sharded.write,
            self.directory,
            copied,
            identity=identity,
            keep=keep,
            keep_every=self._keep_every,
            checksums=self._checksums,
            group=self._group,
        )
        self._under_way = self.directory / f"step-{step:08d}", writing
        return self._under_way[0]

    def outcome(self, *, wait: bool) -> tuple[Path, CheckpointError | None] | None:
        """Return the checkpoint that was written, or failed, since the last call.

        Args:
            wait: Whether to wait for it. If not, ranks may get different answers, since they finish at different times.

        Returns:
            The checkpoint's path and its error (None if it was written), or None if no checkpoint ended.
        """
        if self._under_way is None or not (wait or self._under_way[1].done()):
            return None
        path, writing = self._under_way
        self._under_way = None
        try:
            return writing.result(), None
        except CheckpointError as error:
            return path, error
