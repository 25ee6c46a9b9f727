"""Writes a checkpoint's directory from all ranks, so that it appears complete or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launch.checkpoints.directory import prepare, prune, publish
from launch.checkpoints.manifest import CheckpointError
from launch.runtime.agreement import gather, on_rank_0, rank_and_world
from symdist.tools.tables import in_bytes

Write = Callable[[Path, str, str], dict[str, Any]]
"""Writes this rank's files into a directory and returns their `describe_files` entries; called on all ranks.

Its arguments are the directory and the texts `failed` and `remedy` for the CheckpointError that it raises on all ranks.
"""


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
    """Write ``directory/step-XXXXXXXX`` from all ranks, then remove the oldest checkpoints.

    All ranks of ``group`` must call it.

    Args:
        directory: The folder of the run's checkpoints; created if missing.
        step: Optimizer steps done.
        write: Called on all ranks as ``write(writing, failed, remedy)``; it may communicate over ``group``.
        identity: JSON-serializable values that tell this run from others.
        keep: How many checkpoints to leave, this one included.
        keep_every: Also leave every checkpoint whose step is a multiple of this; 0 is for none.
        group: A process group of all ranks; the default group if None.
        after: Called on rank 0 with the checkpoint's path once it has its final name.

    Returns:
        The directory of the finished checkpoint.

    Raises:
        ValueError: If ``keep`` is below 1.
        CheckpointError: On all ranks, if any of them could not write. Earlier checkpoints are then unchanged, and
            nothing of this one is left. Also if this one is written but an older one cannot be removed.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}; it must be at least 1, for the newest checkpoint")
    final = directory / f"step-{step:08d}"
    writing = directory / f"{final.name}.writing"
    failed = f"cannot write {final}"
    remedy = "free space or choose another directory; earlier checkpoints are unchanged"

    def publish_all() -> None:
        files = {name: entry for share in shares for name, entry in share.items()}
        publish(writing, final, world=rank_and_world()[1], identity=identity, files=files)
        after(final)

    try:
        on_rank_0(lambda: prepare(writing, final, identity=identity), failed, remedy, group)
        shares = gather(write(writing, failed, remedy), group)
        on_rank_0(publish_all, failed, remedy, group)
    except CheckpointError as error:
        # Error messages of writers often do not say that the disk is full.
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
