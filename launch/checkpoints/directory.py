"""The directory of a checkpoint: its manifest, its checks, and the removal of old checkpoints.

No function here communicates; the callers decide which rank calls what.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.checkpoints.manifest import (
    CHOOSE,
    FORMAT,
    MANIFEST,
    VERSION,
    CheckpointError,
    DamagedCheckpointError,
    Manifest,
    check_identity,
    digest,
    read_manifest,
    write_json,
)

CHECKSUM_LIMIT = 4 * 2**30

_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}\.(writing|removing)")


def latest(directory: Path) -> Path | None:
    """Return the checkpoint of the highest step in ``directory`` whose manifest can be read, or None."""
    held = {path: step for path in directory.glob("step-*") if (step := _held_step(path)) is not None}
    return max(held, key=lambda path: held[path], default=None)


def newest_first(directory: Path) -> list[Path]:
    """Return all checkpoints in ``directory``, damaged ones too, highest step first; verifies no checksums.

    The step is the one that a checkpoint holds; only that of a damaged one is taken from its name.
    """

    def step(path: Path) -> tuple[int, int]:
        held = _held_step(path)
        return (_named_step(path) if held is None else held, _named_step(path))

    return sorted((path for path in directory.glob("step-*") if _NAME.fullmatch(path.name)), key=step, reverse=True)


def check_mixing(directory: Path, path: Path) -> None:
    """Check that a run that continues from ``path`` would not mix with newer checkpoints in ``directory``.

    Raises:
        ValueError: If ``path`` is in ``directory`` and is not the newest checkpoint there.
    """
    newest = latest(directory)
    if newest is not None and newest != path and newest.parent.resolve() == path.parent.resolve():
        raise ValueError(
            f"{directory} already has the newer checkpoint {newest.name}, which would get mixed with those of a run "
            f"from {path.name}; give another --output"
        )


def quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint so that it is no longer found, and return its new path; nothing is deleted."""
    renamed = path.with_name(f"{path.name}.damaged")
    number = 1
    while os.path.lexists(renamed):
        number += 1
        renamed = path.with_name(f"{path.name}.damaged-{number}")
    path.rename(renamed)
    return renamed


def prepare(writing: Path, final: Path, *, identity: dict[str, Any]) -> None:
    """Create the directory ``writing`` next to ``final``, and delete what interrupted saves left there.

    If ``final`` exists but is not a readable checkpoint, it is renamed.

    Args:
        writing: The directory to write the files into.
        final: The checkpoint's directory once it is complete.
        identity: JSON-serializable values that tell this run from others.

    Raises:
        CheckpointError: If the folder holds another run's checkpoints.
        OSError: If a directory cannot be created or removed.
    """
    directory = final.parent
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.iterdir():
        if _UNFINISHED.fullmatch(leftover.name):
            _delete(leftover)
    finished = _finished(directory, identity=identity)
    if os.path.lexists(final) and finished.get(final) != _named_step(final):
        quarantine(final)
    writing.mkdir()


def describe_files(paths: Sequence[Path], *, checksums: bool | None = None) -> dict[str, Any]:
    """Flush the files to disk, and return their manifest entries: size in bytes, and perhaps SHA-256, by file name.

    Args:
        paths: The files.
        checksums: Whether to compute SHA-256; None does for files of at most `CHECKSUM_LIMIT` bytes.
    """
    limit = {None: CHECKSUM_LIMIT, True: math.inf, False: -1}[checksums]
    entries: dict[str, Any] = {}
    for path in paths:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        entries[path.name] = {"bytes": path.stat().st_size}
        if entries[path.name]["bytes"] <= limit:
            entries[path.name]["sha256"] = _sha256(path)
    return entries


def publish(writing: Path, final: Path, *, world: int, identity: dict[str, Any], files: dict[str, Any]) -> None:
    """Add the manifest to ``writing``, flush it to disk, and rename it to ``final``.

    Args:
        writing: The directory that holds all other files.
        final: The checkpoint's directory; an existing one is replaced.
        world: Number of ranks that wrote the checkpoint.
        identity: JSON-serializable values that tell this run from others.
        files: The entries of all files, from `describe_files`.
    """
    manifest = {"format": FORMAT, "version": VERSION, "step": _named_step(final), "world_size": world}
    manifest |= {"identity": identity, "files": files}
    write_json(writing / MANIFEST, manifest | {"sha256": digest(manifest)})
    _sync_directory(writing)
    replaced = _leave(final) if os.path.lexists(final) else None
    writing.rename(final)
    _sync_directory(final.parent)
    if replaced is not None:
        _delete(replaced)


def prune(final: Path, *, keep: int, keep_every: int, identity: dict[str, Any]) -> None:
    """Remove the oldest checkpoints before ``final``.

    Args:
        final: The checkpoint just written; those of later steps are neither counted nor removed.
        keep: How many of the newest checkpoints to leave, ``final`` included.
        keep_every: Also leave every checkpoint whose step is a multiple of this; 0 is for none.
        identity: JSON-serializable values that tell this run from others.

    Raises:
        CheckpointError: If the folder holds another run's checkpoints.
    """
    held = _finished(final.parent, identity=identity)
    older = sorted((path for path in held if held[path] < held[final]), key=lambda path: held[path])
    for path in older[: max(0, len(older) - (keep - 1))]:
        if not (keep_every and held[path] % keep_every == 0):
            remove(path)


def verify(path: Path, *, identity: dict[str, Any] | None, rank: int, world: int) -> Manifest:
    """Check a checkpoint's manifest, and sizes and, where it has them, checksums of this rank's share of its files.

    Args:
        path: The checkpoint.
        identity: JSON-serializable values that tell this run from others; None to accept any run's.
        rank: This rank, which checks every ``world``-th file.
        world: Number of ranks.

    Returns:
        The manifest.

    Raises:
        DamagedCheckpointError: If anything is missing or damaged, or the directory is another program's.
        CheckpointError: If there is no such directory, or it is another run's or of another format version.
    """
    manifest = read_manifest(path)
    if identity is not None:
        check_identity(path, manifest["identity"], identity)
    for name, entry in sorted(manifest["files"].items())[rank::world]:
        problem = _size_problem(path / name, entry["bytes"])
        if problem is None and "sha256" in entry and _sha256(path / name) != entry["sha256"]:
            problem = "does not match its checksum"
        if problem is not None:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} {problem}; {CHOOSE}")
    return manifest


def verify_sizes(path: Path) -> None:
    """Check a checkpoint's manifest and the size of every file, but no checksums and no identity.

    Raises:
        DamagedCheckpointError: If anything is missing or damaged, or the directory is another program's.
        CheckpointError: If there is no such directory, or it is of another format version.
    """
    for name, entry in read_manifest(path)["files"].items():
        if problem := _size_problem(path / name, entry["bytes"]):
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} {problem}; {CHOOSE}")


def _size_problem(file: Path, size: int) -> str | None:
    try:
        found = file.stat()
    except OSError as error:
        return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(found.st_mode):
        return "is not a file"
    return None if found.st_size == size else f"has {found.st_size} bytes instead of {size}"


def _finished(directory: Path, *, identity: dict[str, Any]) -> dict[Path, int]:
    """Return this run's finished checkpoints and their steps; raise CheckpointError if any is another run's."""
    held = {}
    for path in directory.glob("step-*"):
        try:
            manifest = read_manifest(path)
        except CheckpointError:
            continue  # not a readable checkpoint, so neither counted nor removed
        if _NAME.fullmatch(path.name):
            check_identity(path, manifest["identity"], identity)
            held[path] = manifest["step"]
    return held


def _held_step(path: Path) -> int | None:
    """Return the step that a checkpoint's manifest names; None if it has no readable manifest or another name."""
    try:
        return read_manifest(path)["step"] if _NAME.fullmatch(path.name) else None
    except CheckpointError:
        return None


def _named_step(path: Path) -> int:
    matched = _NAME.fullmatch(path.name)
    assert matched is not None
    return int(matched[1])


def remove(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a partly removed one never looks finished."""
    _delete(_leave(path))


def _delete(path: Path) -> None:
    """Delete a directory with all it holds, a link or a file; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _leave(path: Path) -> Path:
    """Rename a checkpoint that will be removed, and return its new path."""
    leaving = path.with_name(f"{path.name}.removing")
    path.rename(leaving)
    return leaving


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # in chunks
