"""The directory of a checkpoint: its manifest, its checks, and the removal of old checkpoints.

No function here communicates; the callers decide which rank calls what.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = "symdist-checkpoint"
CHECKSUM_LIMIT = 4 * 2**30
VERSION = 1
CHOOSE = "choose another checkpoint, or start the run afresh"

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}\.(writing|removing)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or must not be read; the message says which, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read because it is damaged; another one may be intact."""


def latest(directory: Path) -> Path | None:
    """Return the finished checkpoint of the highest step in ``directory``, or None; verifies no checksums."""
    return next(iter(newest_first(directory)), None)


def newest_first(directory: Path) -> list[Path]:
    """Return all finished checkpoints in ``directory``, highest step first; verifies no checksums."""
    named = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted((path for path in named if (path / _MANIFEST).exists()), key=_step, reverse=True)


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
    while renamed.exists():
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
            shutil.rmtree(leftover)
    finished = _finished(directory, identity=identity)
    if final.exists() and final not in finished:
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
    manifest = {"format": FORMAT, "version": VERSION, "step": _step(final), "world_size": world}
    manifest |= {"identity": identity, "files": files}
    write_json(writing / _MANIFEST, manifest | {"sha256": _digest(manifest)})
    _sync_directory(writing)
    replaced = _leave(final) if final.exists() else None
    writing.rename(final)
    _sync_directory(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced)


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
    older = [path for path in _finished(final.parent, identity=identity) if _step(path) < _step(final)]
    for path in older[: max(0, len(older) - (keep - 1))]:
        if not (keep_every and _step(path) % keep_every == 0):
            remove(path)


def verify(path: Path, *, identity: dict[str, Any], rank: int, world: int) -> int:
    """Check a checkpoint's manifest, and sizes and, where it has them, checksums of this rank's share of its files.

    Args:
        path: The checkpoint.
        identity: JSON-serializable values that tell this run from others.
        rank: This rank, which checks every ``world``-th file.
        world: Number of ranks.

    Returns:
        The number of ranks that wrote the checkpoint.

    Raises:
        DamagedCheckpointError: If anything is missing or damaged, or the directory is another program's.
        CheckpointError: If there is no such directory, or it is another run's or of another format version.
    """
    manifest = _read_manifest(path)
    check_identity(path, manifest["identity"], identity)
    for index, (name, entry) in enumerate(sorted(manifest["files"].items())):
        file = path / name
        if index % world != rank:
            continue
        if not file.exists():
            problem = "is missing"
        elif file.stat().st_size != entry["bytes"]:
            problem = f"has {file.stat().st_size} bytes instead of {entry['bytes']}"
        elif "sha256" in entry and _sha256(file) != entry["sha256"]:
            problem = "does not match its checksum"
        else:
            continue
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} {problem}; {CHOOSE}")
    return manifest["world_size"]


def verify_sizes(path: Path) -> None:
    """Check a checkpoint's manifest and the size of every file, but no checksums and no identity.

    Raises:
        DamagedCheckpointError: If anything is missing or damaged, or the directory is another program's.
        CheckpointError: If there is no such directory, or it is of another format version.
    """
    for name, entry in _read_manifest(path)["files"].items():
        file = path / name
        if not file.exists() or file.stat().st_size != entry["bytes"]:
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} is missing or truncated; {CHOOSE}")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` to ``path`` and wait until it is on the disk."""
    with open(path, "w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


def _finished(directory: Path, *, identity: dict[str, Any]) -> list[Path]:
    """Return this run's finished checkpoints, oldest first; raise CheckpointError if any is another run's."""
    checkpoints = []
    for path in directory.glob("step-*"):
        try:
            manifest = _read_manifest(path)
        except CheckpointError:
            continue  # not a readable checkpoint, so neither counted nor removed
        if _NAME.fullmatch(path.name):
            check_identity(path, manifest["identity"], identity)
            checkpoints.append(path)
    return sorted(checkpoints, key=_step)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
    if not (path / _MANIFEST).exists():
        raise DamagedCheckpointError(
            f"{path} has no {_MANIFEST}: it was never finished, or is no symdist checkpoint; {CHOOSE}"
        )
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
    except ValueError as error:
        raise DamagedCheckpointError(f"{path / _MANIFEST} is damaged ({error}); {CHOOSE}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a {FORMAT} directory but another program's; {CHOOSE}")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise DamagedCheckpointError(f"{path / _MANIFEST} is damaged (its checksum does not match); {CHOOSE}")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {manifest.get('version')}, but this release of symdist reads {VERSION}; "
            "load it with the release that wrote it"
        )
    return manifest


def check_identity(path: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        path: The checkpoint, for the message.
        stored: The identity stored in the checkpoint.
        identity: The identity of this run.

    Raises:
        CheckpointError: If they differ; the message names every difference.
    """
    identity = json.loads(json.dumps(identity))  # turns tuples into lists, as in the stored identity
    differing = [
        f"{key} is {stored.get(key)!r} in the checkpoint but {identity.get(key)!r} in this run"
        for key in sorted(stored.keys() | identity.keys())
        if stored.get(key) != identity.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run: {'; '.join(differing)}; "
            "give this run another --output, or the settings of the checkpoint's run"
        )


def _step(path: Path) -> int:
    matched = _NAME.fullmatch(path.name)
    assert matched is not None
    return int(matched[1])


def remove(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a partly removed one never looks finished."""
    shutil.rmtree(_leave(path))


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


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
