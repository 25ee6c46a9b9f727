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
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    AllowInfNan,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import from_json
from typing_extensions import TypeAliasType, TypedDict

T = TypeVar("T")

FORMAT = "symdist-checkpoint"
CHECKSUM_LIMIT = 4 * 2**30
VERSION = 2
CHOOSE = "choose another checkpoint, or start the run afresh"

_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = re.compile(r"step-\d{8,}\.(writing|removing)")
STRICT = ConfigDict(strict=True, extra="forbid")
"""For what a checkpoint holds: of the right types, and nothing else."""


def _file_name(name: str) -> str:
    if name in ("", ".", "..") or name != Path(name).name or "\0" in name:
        raise ValueError("not the name of a file in the checkpoint")
    return name


@with_config(STRICT)
class _File(TypedDict):
    bytes: NonNegativeInt
    sha256: NotRequired[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


@with_config(STRICT)
class Manifest(TypedDict):
    """What ``manifest.json`` holds, beside its own checksum."""

    format: Literal["symdist-checkpoint"]
    version: int
    step: NonNegativeInt
    world_size: PositiveInt
    identity: dict[str, Any]
    files: dict[Annotated[str, AfterValidator(_file_name)], _File]


_MANIFEST_TYPE = TypeAdapter(Manifest)

FiniteJson = TypeAliasType(
    "FiniteJson",
    "bool | int | str | Annotated[float, AllowInfNan(False)] | list[FiniteJson] | dict[str, FiniteJson] | None",
)
"""A value of JSON without infinities and NaNs."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or must not be read; the message says which, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read because it is damaged; another one may be intact."""


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
    write_json(writing / _MANIFEST, manifest | {"sha256": _digest(manifest)})
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
    manifest = _read_manifest(path)
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
    for name, entry in _read_manifest(path)["files"].items():
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


def read_json(file: Path, kind: TypeAdapter[T]) -> T:
    """Read a JSON file of a checkpoint.

    Args:
        file: The file.
        kind: What it must hold; unknown keys and values of other types are refused.

    Returns:
        Its content.

    Raises:
        DamagedCheckpointError: If it is missing, no JSON file, or holds anything else.
        CheckpointError: If the disk does not let it be read.
    """
    if not file.is_file():
        raise DamagedCheckpointError(f"{file} is missing, or not a file; {CHOOSE}")
    try:
        content = from_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}); {CHOOSE}") from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{file} is damaged ({error}); {CHOOSE}") from error
    return validated(content, kind, file)


def validated(content: Any, kind: TypeAdapter[T], file: Path) -> T:
    """Check what a file of a checkpoint holds; see `read_json`."""
    try:
        return kind.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "its content"
        raise DamagedCheckpointError(f"{file} is damaged: {where}: {first['msg']}; {CHOOSE}") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` to ``path``, whole or not at all, and wait until it is on the disk."""
    writing = path.with_name(f"{path.name}.writing")
    with open(writing, "w") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(writing, path)


def _finished(directory: Path, *, identity: dict[str, Any]) -> dict[Path, int]:
    """Return this run's finished checkpoints and their steps; raise CheckpointError if any is another run's."""
    held = {}
    for path in directory.glob("step-*"):
        try:
            manifest = _read_manifest(path)
        except CheckpointError:
            continue  # not a readable checkpoint, so neither counted nor removed
        if _NAME.fullmatch(path.name):
            check_identity(path, manifest["identity"], identity)
            held[path] = manifest["step"]
    return held


def _held_step(path: Path) -> int | None:
    """Return the step that a checkpoint's manifest names; None if it has no readable manifest or another name."""
    try:
        return _read_manifest(path)["step"] if _NAME.fullmatch(path.name) else None
    except CheckpointError:
        return None


def _read_manifest(path: Path) -> Manifest:
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
    if not (path / _MANIFEST).exists():
        raise DamagedCheckpointError(
            f"{path} has no {_MANIFEST}: it was never finished, or is no symdist checkpoint; {CHOOSE}"
        )
    content = read_json(path / _MANIFEST, TypeAdapter(dict[str, Any]))
    if content.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a {FORMAT} directory but another program's; {CHOOSE}")
    if content.pop("sha256", None) != _digest(content):
        raise DamagedCheckpointError(f"{path / _MANIFEST} is damaged (its checksum does not match); {CHOOSE}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}, but this release of symdist reads {VERSION}; "
            "load it with the release that wrote it"
        )
    return validated(content, _MANIFEST_TYPE, path / _MANIFEST)


def check_identity(path: Path, stored: dict[str, Any], identity: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        path: The checkpoint, for the message.
        stored: The identity stored in the checkpoint.
        identity: The identity of this run.

    Raises:
        CheckpointError: If they differ; the message names every difference.
    """
    here = by_path(json.loads(json.dumps(identity)))  # turns tuples into lists, as in the stored identity
    there = by_path(stored)
    missing = object()
    differing = [
        f"{key} is {there.get(key, 'missing')!r} in the checkpoint but {here.get(key, 'missing')!r} in this run"
        for key in sorted(here.keys() | there.keys())
        if there.get(key, missing) != here.get(key, missing)
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {path} belongs to another run: {'; '.join(differing)}; "
            "give this run another --output, or the settings of the checkpoint's run"
        )


def by_path(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested tables by their path, as in ``recipe.matrix.lr``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= by_path(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found


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


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
