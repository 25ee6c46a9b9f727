"""Corpora that come as token shards: which shards are for training or validation, and whether their ids are valid."""

import glob
from pathlib import Path

from launch.data.errors import DataError
from launch.data.shards import read_shard

CHUNK_TOKENS = 2**24


def split_shards(pattern: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Split shards into training and validation shards.

    Shards with `val` in their name are for validation; if there are none, the last shard is.

    Args:
        pattern: A glob, or a directory of `.bin` files.

    Returns:
        The training shards and the validation shards.

    Raises:
        DataError: If either group would be empty.
    """
    if Path(pattern).is_dir():
        pattern = str(Path(glob.escape(pattern)) / "*.bin")
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not paths:
        raise DataError(f"bin:{pattern}: no shard matches; check the path and the quoting of the pattern")
    validation = tuple(path for path in paths if "val" in path.name) or (paths[-1],)
    train = tuple(path for path in paths if path not in validation)
    if not train:
        raise DataError(
            f"bin:{pattern}: only {', '.join(path.name for path in paths)} found, which leaves nothing to "
            "train on beside validation; give at least one more shard without 'val' in its name"
        )
    return train, validation


def verify_tokens(path: Path, vocabulary: int) -> None:
    """Read the whole shard, in chunks, and check its token ids.

    Raises:
        DataError: If an id is not below `vocabulary`.
    """
    tokens = read_shard(path)
    for start in range(0, tokens.size, CHUNK_TOKENS):
        largest = int(tokens[start : start + CHUNK_TOKENS].max())
        if largest >= vocabulary:
            raise DataError(
                f"{path}: token id {largest} is outside the vocabulary of {vocabulary}; "
                f"set vocabulary to that of the tokenizer the shards were made with (at least {largest + 1})"
            )
