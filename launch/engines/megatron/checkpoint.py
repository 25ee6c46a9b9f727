"""Checkpoints of a Megatron run: megatron-core's own format, written completely or not at all, read at any layout.

A checkpoint is a directory ``step-00000100`` of ``megatron.core.dist_checkpointing``'s files, a ``job.json`` with the
loop's state, and the manifest of `launch.checkpoints.directory`, which is written last. A run uses no random numbers
after it has initialized its weights, so no generator's state is saved.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from pydantic import TypeAdapter

from launch.checkpoints.directory import describe_files, verify
from launch.checkpoints.manifest import (
    CHOOSE,
    CheckpointError,
    DamagedCheckpointError,
    read_json,
    write_json,
)
from launch.checkpoints.pickles import check_objects, check_torch_file, read_metadata
from launch.checkpoints.publish import publish_together
from launch.runtime.agreement import on_all_ranks, with_dcp
from launch.runtime.distributed import die_with_parent
from launch.runtime.signals import STOP_SIGNALS

# In this format the state of a distributed optimizer can be read at another number of data-parallel ranks.
_FORM = {"distrib_optim_sharding_type": "fully_reshardable"}
_JOB = "job.json"
_SETTINGS = "metadata.json"
# The only ones of Megatron's formats whose files are looked through here before Megatron unpickles them.
_FORMATS = {"sharded_backend": "torch_dist", "common_backend": "torch"}


def save(
    directory: Path,
    step: int,
    *,
    model: Any,
    optimizer: Any,
    job: dict[str, Any],
    identity: dict[str, Any],
    keep: int,
    keep_every: int,
    checksums: bool | None = None,
) -> Path:
    """Write ``directory/step-XXXXXXXX``, then remove the oldest checkpoints; all ranks must call it.

    Args:
        directory: The folder of this run's checkpoints.
        step: Optimizer steps done.
        model: This rank's GPTModel without wrappers.
        optimizer: Megatron's optimizer.
        job: The loop's state, JSON-serializable and the same on all ranks.
        identity: JSON-serializable values that tell this run from others.
        keep: How many checkpoints to leave, this one included.
        keep_every: Also leave every checkpoint whose step is a multiple of this; 0 is for none.
        checksums: See `launch.checkpoints.directory.describe_files`.

    Returns:
        The directory of the finished checkpoint.

    Raises:
        CheckpointError: On all ranks, if the directory belongs to another run or cannot be written; earlier
            checkpoints are then unchanged.
    """
    rank = dist.get_rank()

    def write(writing: Path, failed: str, remedy: str) -> dict[str, Any]:
        def describe_own() -> dict[str, Any]:
            if failures:
                raise failures[0]
            paths = list(writing.glob(f"__{rank}_*"))
            if rank == 0:
                write_json(writing / _JOB, job)
                paths += [path for path in writing.iterdir() if not path.name.startswith("__")]
            return describe_files(paths, checksums=checksums)

        _keep_helper()
        state = _state(model, optimizer, loading=False)
        with _noting_failures() as failures:
            _with_megatron(lambda: dist_checkpointing.save(state, str(writing)), failed, remedy)
        return on_all_ranks(describe_own, failed, remedy)

    return publish_together(directory, step, write, identity=identity, keep=keep, keep_every=keep_every)


def load(path: Path, *, model: Any, optimizer: Any, identity: dict[str, Any], job: TypeAdapter[Any]) -> dict[str, Any]:
    """Restore a checkpoint, which may have been written at another layout; all ranks must call it.

    Args:
        path: The checkpoint's directory.
        model: This rank's GPTModel without wrappers.
        optimizer: Megatron's optimizer.
        identity: JSON-serializable values that tell this run from others.
        job: What the `job` given to `save` must be.

    Returns:
        The `job` given to `save`.

    Raises:
        CheckpointError: On all ranks, if the checkpoint is missing, damaged, another run's, or has other tensors.
    """
    failed = f"cannot read {path}"

    def read_job() -> dict[str, Any]:
        step = _checked(path, identity=identity)
        found = read_json(path / _JOB, job)
        if found["step"] != step:
            raise DamagedCheckpointError(
                f"{path / _JOB} is of step {found['step']}, but the manifest of step {step}; {CHOOSE}"
            )
        return found

    found = on_all_ranks(read_job, failed, CHOOSE)
    loaded = _loaded(_state(model, optimizer, loading=True), path, failed)
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    return found


def load_weights(path: Path, *, model: Any, optimizer: Any) -> int:
    """Restore only the weights of a checkpoint, of any run of this model; all ranks must call it.

    Args:
        path: The checkpoint's directory.
        model: This rank's GPTModel without wrappers.
        optimizer: Megatron's optimizer, which copies the weights into its own.

    Returns:
        The step at which the checkpoint was written.

    Raises:
        CheckpointError: As `load`, but whatever run the checkpoint is of.
    """
    failed = f"cannot read {path}"
    step = on_all_ranks(lambda: _checked(path, identity=None), failed, CHOOSE)
    model.load_state_dict(_loaded({"model": model.sharded_state_dict(metadata=_FORM)}, path, failed)["model"])
    optimizer.reload_model_params()
    return step


def _checked(path: Path, *, identity: dict[str, Any] | None) -> int:
    """Check a checkpoint's files, also for what Megatron would unpickle without restrictions; return its step."""
    manifest = verify(path, identity=identity, rank=dist.get_rank(), world=dist.get_world_size())
    settings = read_json(path / _SETTINGS, TypeAdapter(dict[str, Any]))
    if any(settings.get(key) != value for key, value in _FORMATS.items()):
        raise DamagedCheckpointError(f"{path / _SETTINGS} names other formats than this job writes; {CHOOSE}")
    check_objects(path, read_metadata(path))
    check_torch_file(path / "common.pt", str(path / "common.pt"))
    return manifest["step"]


def _loaded(state: dict[str, Any], path: Path, failed: str) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    _with_megatron(lambda: loaded.update(dist_checkpointing.load(state, str(path))), failed, CHOOSE, read=True)
    return loaded


def _state(model: Any, optimizer: Any, *, loading: bool) -> dict[str, Any]:
    weights = model.sharded_state_dict(metadata=_FORM)
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=_FORM),
    }


@contextmanager
def _noting_failures() -> Iterator[list[Exception]]:
    """Collect errors of the files that only rank 0 writes; raising them there would leave the other ranks waiting."""
    failures: list[Exception] = []
    make = getattr(serialization, "get_default_save_common_strategy", None)
    if make is None:
        # Releases after 0.16 have no such function, and write these files in another way.
        yield failures
        return
    strategy = make()
    write = strategy.save_common

    def write_or_note(*arguments: Any, **options: Any) -> None:
        try:
            write(*arguments, **options)
        except Exception as error:
            failures.append(error)

    strategy.save_common = write_or_note
    serialization.get_default_save_common_strategy = lambda *arguments, **options: strategy
    try:
        yield failures
    finally:
        serialization.get_default_save_common_strategy = make
        del strategy.save_common


def _keep_helper() -> None:
    """Start the process that collects the results of Megatron's writers, and have it ignore signals.

    Launchers signal all processes of a rank. The process that Megatron itself starts would then end, and be missing for
    the checkpoint that the signal asks for.
    """
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(_begin_helper)
        filesystem_async._results_queue = manager.Queue()


def _begin_helper() -> None:
    die_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _with_megatron(function: Callable[[], object], failed: str, remedy: str, *, read: bool = False) -> None:
    """Run a collective of Megatron's and raise its checkpoint errors, the same on all ranks, as CheckpointError."""
    try:
        with_dcp(function, failed, remedy, read=read)
    except CheckpointingException as error:
        raise CheckpointError(f"{failed}: {error}; {remedy}") from error
