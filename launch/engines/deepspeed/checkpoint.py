"""The folder of DeepSpeed's checkpoints: which one to go on from, and whether this run can.

A checkpoint is a folder `step-00000100` of DeepSpeed's files, one `rng-00000.json` a rank, and the manifest of
`launch.checkpoints.directory`, written last. `latest` names the newest one. What the loop must know is part of
DeepSpeed's own file of model states, since the converter to universal checkpoints takes that along. Nothing here
communicates.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints.directory import CHOOSE, CheckpointError, check_identity, verify

JOB = "symdist_job"
"""The key of what the loop must know, among DeepSpeed's model states."""

_LATEST = "latest"
_LATEST_UNIVERSAL = "latest_universal"
_NAME = re.compile(r"step-\d{8,}")


def rng_file(path: Path, rank: int) -> Path:
    """Where a rank's generators of random numbers are kept."""
    return path / f"rng-{rank:05d}.json"


def newest_universal(directory: Path) -> Path | None:
    """The newest universal checkpoint of `directory`; CheckpointError where there are only others."""
    newest = _pointed(directory, _LATEST)
    path = _pointed(directory, _LATEST_UNIVERSAL)
    if path is None and newest is not None:
        raise CheckpointError(
            f"the DeepSpeed config says load_universal, but no checkpoint in {directory} is universal; leave "
            f"load_universal out, or {_conversion(newest)}"
        )
    return path


def read_job(path: Path) -> dict[str, Any]:
    """What the loop had saved of itself; CheckpointError where there is no checkpoint of this job."""
    files = sorted(path.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise CheckpointError(f"{path} is no checkpoint of DeepSpeed's; {CHOOSE}")
    # Mapped: of the weights in the same file nothing is read.
    states = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)
    if JOB not in states:
        raise CheckpointError(f"{path} was written by another program than this job; {CHOOSE}")
    return states[JOB]


def checked_job(
    path: Path,
    *,
    directory: Path,
    identity: dict[str, Any],
    stage: int,
    rank: int,
    world: int,
    universal: bool,
) -> dict[str, Any]:
    """What the loop saved of itself in a checkpoint, once it is known that this run can go on from it.

    Args:
        path: The checkpoint.
        directory: Where the run saves its own.
        identity: What must be the same in both runs.
        stage: The ZeRO stage of this run.
        universal: Whether this run loads universal checkpoints.
        rank: This rank, which reads its share of the files.
        world: The number of ranks.

    Raises:
        DamagedCheckpointError: Where a file is missing or is not what was written.
        CheckpointError: With the remedy, where the run is another.
    """
    if not universal and path.is_dir() and not (path / "zero").is_dir():
        # The converter writes no manifest.
        verify(path, identity=identity, rank=rank, world=world)
    job = read_job(path)
    check_identity(path, job["identity"], identity)
    newest = _pointed(directory, _LATEST) if path.parent.resolve() == directory.resolve() else None
    if newest is not None and _step(newest) > job["step"]:
        raise CheckpointError(
            f"{directory} goes on to {newest.name}, which a run from {path.name} would mix with; give another --output"
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
            f'{path} is universal; give the DeepSpeed config "checkpoint": {{"load_universal": true}}'
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
    """Make a checkpoint that is whole the newest, for DeepSpeed's own tools."""
    pointer = path.parent / _LATEST
    writing = pointer.with_name(f"{_LATEST}.writing")
    writing.write_text(path.name)
    os.replace(writing, pointer)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-")) if _NAME.fullmatch(path.name) else 0


def _pointed(directory: Path, pointer: str) -> Path | None:
    file = directory / pointer
    if not file.exists():
        return None
    path = directory / file.read_text().strip()
    return path if path.is_dir() else None


def _conversion(path: Path) -> str:
    universal = f"{path}_universal"
    return (
        f"convert it by `python -m deepspeed.checkpoint.ds_to_universal --input_folder {path} "
        f'--output_folder {universal}`, give the DeepSpeed config "checkpoint": {{"load_universal": true}}, and '
        f"--resume {universal}"
    )
