"""What a checkpoint says of itself: its manifest, and the JSON files beside it, checked before anything believes them.

No function here communicates; the callers decide which rank calls what.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
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
VERSION = 2
CHOOSE = "choose another checkpoint, or start the run afresh"
MANIFEST = "manifest.json"
"""The file that is written last, so that a directory which has one is finished."""


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


_TYPE = TypeAdapter(Manifest)

FiniteJson = TypeAliasType(
    "FiniteJson",
    "bool | int | str | Annotated[float, AllowInfNan(False)] | list[FiniteJson] | dict[str, FiniteJson] | None",
)
"""A value of JSON without infinities and NaNs."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or must not be read; the message says which, why, and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint cannot be read because it is damaged; another one may be intact."""


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
    try:
        if not file.is_file():
            raise DamagedCheckpointError(f"{file} is missing, or not a file; {CHOOSE}")
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


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint at ``path``.

    Raises:
        DamagedCheckpointError: If it is missing or damaged, or the directory is another program's.
        CheckpointError: If there is no such directory, or it is of another format version.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"there is no checkpoint directory {path}; check the path")
    try:
        (path / MANIFEST).stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise DamagedCheckpointError(
                f"{path} has no {MANIFEST}: it was never finished, or is no symdist checkpoint; {CHOOSE}"
            ) from error
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); mend its permissions, or move it") from error
    content = read_json(path / MANIFEST, TypeAdapter(dict[str, Any]))
    if content.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{path} is not a {FORMAT} directory but another program's; {CHOOSE}")
    if content.pop("sha256", None) != digest(content):
        raise DamagedCheckpointError(f"{path / MANIFEST} is damaged (its checksum does not match); {CHOOSE}")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')}, but this release of symdist reads {VERSION}; "
            "load it with the release that wrote it"
        )
    return validated(content, _TYPE, path / MANIFEST)


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


def digest(manifest: dict[str, Any]) -> str:
    """Return the checksum that a manifest has of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
