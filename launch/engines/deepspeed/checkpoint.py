"""The folder of a DeepSpeed run's checkpoints: which one to resume from, and whether this run can.

A checkpoint is a folder `step-00000100` of DeepSpeed's files, one `rng-00000.json` per rank, and the manifest of
`launch.checkpoints.directory`, which is written last. The file `latest` names the newest checkpoint. The loop's state
is stored in DeepSpeed's own file of model states, since the converter to universal checkpoints keeps that. DeepSpeed
unpickles its files without restrictions, so they are looked through first. Nothing here communicates.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from launch.checkpoints.directory import verify
from launch.checkpoints.manifest import (
    CHOOSE,
    CheckpointError,
    DamagedCheckpointError,
    check_identity,
    validated,
)
from launch.checkpoints.pickles import check_torch_file
from launch.loop.resumption import Job

JOB = "symdist_job"
"""Key of the loop's state in DeepSpeed's model states."""

_LATEST = "latest"
_LATEST_UNIVERSAL = "latest_universal"
_NAME = re.compile(r"step-\d{8,}")
# Classes of DeepSpeed's that hold values and do nothing when they are unpickled.
_HARMLESS = (
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


class DeepSpeedJob(Job):
    """What a checkpoint holds of the loop, and of the engine it was written under."""

    identity: dict[str, Any]
    stage: int
    ranks: int


def newest_universal(directory: Path) -> Path | None:
    """Return the newest universal checkpoint in `directory`, or None if there are no checkpoints.

    Raises:
        CheckpointError: If there are checkpoints but no universal one; the message says how to convert.
    """
    newest = _pointed(directory, _LATEST)
    path = _pointed(directory, _LATEST_UNIVERSAL)
    if path is None and newest is not None:
        raise CheckpointError(
            f"the DeepSpeed config says load_universal, but no checkpoint in {directory} is universal; leave "
            f"load_universal out, or {_conversion(newest)}"
        )
    return path


def read_job(path: Path, *, weights: Mapping[str, torch.Tensor] | None = None) -> DeepSpeedJob:
    """Return the loop's state from the checkpoint at `path`.

    Args:
        path: The checkpoint.
        weights: Weights whose names and shapes the checkpoint's must have; None to accept any.

    Raises:
        DamagedCheckpointError: If the state is not what this job writes.
        CheckpointError: If it is not a checkpoint that this job wrote, or it holds other weights.
    """
    files = sorted(path.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise CheckpointError(f"{path} is not a DeepSpeed checkpoint; {CHOOSE}")
    # Memory-mapped, so that the weights in the same file are not read. `check_files` has looked through the file.
    states = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)  # nosec B614
    if not isinstance(states, dict) or JOB not in states:
        raise CheckpointError(f"{path} was not written by launch.pretrain_deepspeed; {CHOOSE}")
    job = validated(states[JOB], TypeAdapter(DeepSpeedJob), files[0])
    if weights is not None and (problem := _mismatch(states.get("module"), weights)):
        raise CheckpointError(f"checkpoint {path} does not fit this model: {problem}; choose another checkpoint")
    return job


def _mismatch(stored: Any, weights: Mapping[str, torch.Tensor]) -> str | None:
    """Describe how stored weights differ in name or shape from those of a model; None if they do not."""
    if not isinstance(stored, dict):
        return "it holds no weights"
    there = {name: tuple(value.shape) for name, value in stored.items() if isinstance(value, torch.Tensor)}
    here = {name: tuple(value.shape) for name, value in weights.items()}
    differing = [name for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if not differing:
        return None
    name = differing[0]
    return f"{name} has shape {there.get(name, 'none')} in the checkpoint, but {here.get(name, 'none')} in this run"


def check_files(path: Path, *, rank: int, world: int) -> None:
    """Check that this rank's share of DeepSpeed's files refers to nothing that could run code.

    Raises:
        DamagedCheckpointError: If a file does; the message names `--trust-checkpoints`.
    """
    remedy = f"if you trust whoever wrote it, pass --trust-checkpoints, else {CHOOSE}"
    for file in _torch_files(path)[rank::world]:
        check_torch_file(file, str(file), harmless=_HARMLESS, remedy=remedy)


def _torch_files(path: Path) -> list[Path]:
    """Return all files of `torch.save` in a folder; a link in it could lead DeepSpeed to others."""

    def refuse(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); {CHOOSE}") from error

    found = []
    for folder, folders, files in os.walk(path, onerror=refuse):
        for entry in (Path(folder) / name for name in folders + files):
            if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                raise DamagedCheckpointError(f"{entry} is a link, or neither a file nor a folder; {CHOOSE}")
            if entry.suffix == ".pt":
                found.append(entry)
    return sorted(found)


def checked_job(
    path: Path,
    *,
    directory: Path,
    identity: dict[str, Any],
    stage: int,
    rank: int,
    world: int,
    universal: bool,
) -> DeepSpeedJob:
    """Check that this run can resume from a checkpoint, and return the loop's state that it holds.

    Args:
        path: The checkpoint.
        directory: The folder where this run saves its own checkpoints.
        identity: The settings that must be the same in both runs.
        stage: The ZeRO stage of this run.
        rank: This rank, which verifies its share of the files.
        world: Number of ranks.
        universal: Whether this run loads universal checkpoints.

    Raises:
        DamagedCheckpointError: If a file is missing or damaged.
        CheckpointError: If this run cannot resume from it; the message names the remedy.
    """
    step = None
    if not universal and path.is_dir() and not (path / "zero").is_dir():
        # Only for checkpoints that are not universal: the converter writes no manifest.
        step = verify(path, identity=None, rank=rank, world=world)["step"]
    job = read_job(path)
    if job["step"] != (job["step"] if step is None else step):
        raise DamagedCheckpointError(f"{path} is of step {job['step']}, but its manifest of step {step}; {CHOOSE}")
    check_identity(path, job["identity"], identity)
    newest = _pointed(directory, _LATEST) if path.parent.resolve() == directory.resolve() else None
    if newest is not None and _step(newest) > job["step"]:
        raise CheckpointError(
            f"{directory} already has the newer checkpoint {newest.name}, which would get mixed with those of a run "
            f"from {path.name}; give another --output"
            + (f", leave load_universal out of the DeepSpeed config, or {_conversion(newest)}" if universal else "")
        )
    if universal:
        if not (path / "zero").is_dir():
            raise CheckpointError(
                f"the DeepSpeed config says load_universal, but {path} is not universal; {_conversion(path)}, "
                "or leave load_universal out"
            )
        return job
    if (path / "zero").is_dir():
        raise CheckpointError(
            f'{path} is a universal checkpoint; add "checkpoint": {{"load_universal": true}} to the DeepSpeed config'
        )
    if job["stage"] != stage:
        raise CheckpointError(
            f"{path} was saved at ZeRO stage {job['stage']}, this run has stage {stage}; "
            "resume at the stage of the saved run"
        )
    if job["ranks"] != world:
        raise CheckpointError(f"{path} was saved by {job['ranks']} ranks, this run has {world}; {_conversion(path)}")
    return job


def point_to(path: Path) -> None:
    """Name a finished checkpoint as the newest in the file `latest`, which DeepSpeed's own tools read."""
    pointer = path.parent / _LATEST
    writing = pointer.with_name(f"{_LATEST}.writing")
    writing.write_text(path.name)
    os.replace(writing, pointer)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-")) if _NAME.fullmatch(path.name) else 0


def _pointed(directory: Path, pointer: str) -> Path | None:
    try:
        name = (directory / pointer).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    path = directory / name
    return path if name == path.name and path.is_dir() else None


def _conversion(path: Path) -> str:
    universal = f"{path}_universal"
    return (
        f"convert it by `python -m deepspeed.checkpoint.ds_to_universal --input_folder {path} "
        f'--output_folder {universal}`, add "checkpoint": {{"load_universal": true}} to the DeepSpeed config, and '
        f"pass --resume {universal}"
    )
