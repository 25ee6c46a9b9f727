"""Corpora that come as token shards: which shards are for training, and which for validation."""

import glob
import os
import re
from pathlib import Path

from launch.data.errors import DataError, some_of

_VALIDATION = {"val", "valid", "validation"}


def split_shards(pattern: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Split shards into training and validation shards.

    Shards with `val`, `valid` or `validation` as a word of their name, or of a folder's that not all of them are in,
    are for validation. If there are none, the first shard is, since shards that are added later come after it.

    Args:
        pattern: A glob, or a directory of `.bin` files.

    Returns:
        The training shards and the validation shards.

    Raises:
        DataError: If either group would be empty.
    """
    if Path(pattern).is_dir():
        pattern = str(Path(glob.escape(pattern)) / "*.bin")
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]
    # Whatever else is no file, such as a link to nowhere, is refused where it is opened: left out, it would be missed.
    paths = [path for path in found if not path.is_dir() and path.suffix != ".idx"]
    if not paths:
        raise DataError(f"bin:{pattern}: no shard matches; check the path and the quoting of the pattern")
    common = os.path.commonpath([path.parent for path in paths])
    validation = tuple(path for path in paths if _VALIDATION & _words(os.path.relpath(path, common))) or (paths[0],)
    train = tuple(path for path in paths if path not in validation)
    if not train:
        raise DataError(
            f"bin:{pattern}: only {some_of([path.name for path in paths])} found, which leaves nothing to "
            "train on beside validation; give at least one more shard without 'val' in its name"
        )
    return train, validation


def describe_split(train: tuple[Path, ...], validation: tuple[Path, ...]) -> str:
    """Say which shards are for validation, and of how many."""
    return f"{len(train)} shards to train on; to validate on: {some_of([path.name for path in validation])}"


def _words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.lower()))
