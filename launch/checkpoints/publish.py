"""A checkpoint's directory from the first byte to its name: written by all ranks, published whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.checkpoints.directory import CheckpointError, prepare, prune, publish
from launch.runtime.agreement import gather, on_rank_0, rank_and_world
from symdist.tools.tables import in_bytes

Write = Callable[[Path, str, str], dict[str, Any]]
"""Writes this rank's files into a directory and returns their descriptions; raises on all ranks, with the two texts."""


def publish_together(
    directory: Path,
    step: int,
    write: Write,
    *,
    identity: dict[str, Any],
    keep: int,
    keep_every: int,
    group: dist.ProcessGroup | None = None,
    after: Callable[[Path], None] = lambda final: None,
) -> Path:
    """Have all ranks write ``directory/step-XXXXXXXX``, then remove the oldest earlier ones; its path.

    ``write(writing, failed, remedy)`` is called by all ranks and may communicate, over ``group``. ``after`` is called
    on the first rank once the checkpoint has its name. Raises ValueError where ``keep`` is below 1, and CheckpointError
    on all ranks where any could not write: earlier checkpoints are then as they were, and nothing of this one is left.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least the newest checkpoint must stay")
    final = directory / f"step-{step:08d}"
    writing = directory / f"{final.name}.writing"
    failed = f"cannot write {final}"
    remedy = "free space or pick another directory; earlier checkpoints stand"

    def publish_all() -> None:
        files = {name: entry for share in shares for name, entry in share.items()}
        publish(writing, final, world=rank_and_world()[1], identity=identity, files=files)
        after(final)

    try:
        on_rank_0(lambda: prepare(writing, final, identity=identity), failed, remedy, group)
        shares = gather(write(writing, failed, remedy), group)
        on_rank_0(publish_all, failed, remedy, group)
    except CheckpointError as error:
        # Writers seldom say that a disk is full.
        free = f"; {in_bytes(shutil.disk_usage(directory).free)} were free there" if directory.exists() else ""
        on_rank_0(lambda: shutil.rmtree(writing, ignore_errors=True), failed, remedy, group)
        raise type(error)(f"{error}{free}") from error
    on_rank_0(
        lambda: prune(final, keep=keep, keep_every=keep_every, identity=identity),
        f"{final} is written, but an older checkpoint cannot be removed",
        "check the permissions of the directory",
        group,
    )
    return final
