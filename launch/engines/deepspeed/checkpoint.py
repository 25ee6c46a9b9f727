"""The folder of a DeepSpeed run's checkpoints: which one to resume from, and whether this run can.

A checkpoint is a folder `step-00000100` of DeepSpeed's files, one `rng-00000.json` per rank, and the manifest of
`launch.checkpoints.directory`, which is written last. The file `latest` names the newest checkpoint. The loop's state
is stored in DeepSpeed's own file of model states, since the converter to universal checkpoints keeps that. Nothing here
communicates.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints.directory import CHOOSE, CheckpointError, check_identity, verify

JOB = "symdist_job"
"""Key of the loop's state in DeepSpeed's model states."""

_LATEST = "latest"
_LATEST_UNIVERSAL = "latest_universal"
_NAME = re.compile(r"step-\d{8,}")


def rng_file(path: Path, rank: int) -> Path:
    """Return the file with the random number generators of `rank` in the checkpoint at `path`."""
    return path / f"rng-{rank:05d}.json"


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


def read_job(path: Path) -> dict[str, Any]:
    """Return the loop's state from the checkpoint at `path`.

    Raises:
        CheckpointError: If it is not a checkpoint that this job wrote.
    """
    files = sorted(path.glob("*mp_rank_00_model_states.pt"))
    if not files:
        raise CheckpointError(f"{path} is not a DeepSpeed checkpoint; {CHOOSE}")
    # Memory-mapped, so that the weights in the same file are not read.
    states = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)
    if JOB not in states:
        raise CheckpointError(f"{path} was not written by launch.pretrain_deepspeed; {CHOOSE}")
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
    if not universal and path.is_dir() and not (path / "zero").is_dir():
        # Only for checkpoints that are not universal: the converter writes no manifest.
        verify(path, identity=identity, rank=rank, world=world)
    job = read_job(path)
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
    file = directory / pointer
    if not file.exists():
        return None
    path = directory / file.read_text().strip()
    return path if path.is_dir() else None


def _conversion(path: Path) -> str:
    universal = f"{path}_universal"
    return (
        f"convert it by `python -m deepspeed.checkpoint.ds_to_universal --input_folder {path} "
        f'--output_folder {universal}`, add "checkpoint": {{"load_universal": true}} to the DeepSpeed config, and '
        f"pass --resume {universal}"
    )
