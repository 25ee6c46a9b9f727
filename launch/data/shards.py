"""Token shards on disk: a 1024-byte header followed by little-endian token ids.

The header is 256 int32 values. Two public layouts can be read:

=========  =======  ==========  =======================
magic      version  value [2]   payload
=========  =======  ==========  =======================
20240520   1        token count  uint16
20260317   2        token count  uint16 or uint32, as value [3] (bytes per token) says
=========  =======  ==========  =======================

Shards are written in version 2.
"""

import os
from pathlib import Path

import numpy as np

from launch.data.errors import DataError

HEADER_VALUES = 256
HEADER_BYTES = 4 * HEADER_VALUES
MAGIC_1, MAGIC_2 = 20240520, 20260317
SHARD_TOKENS = 2**25
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of one shard, without reading them.

    Returns:
        A read-only array `[tokens]` of uint16 or uint32.

    Raises:
        DataError: If the file cannot be read, or its header has neither layout or does not match the file's size.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the shard") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: truncated, it has {size} bytes but the header alone {HEADER_BYTES}; fetch it again")
    magic, version, count, width = (int(value) for value in np.frombuffer(raw, "<i4", count=4))
    if magic not in (MAGIC_1, MAGIC_2):
        raise DataError(
            f"{path}: not a token shard (it begins with {magic}, not {MAGIC_1} or {MAGIC_2}); convert it to one"
        )
    if version != (1 if magic == MAGIC_1 else 2):
        raise DataError(f"{path}: version {version} is not supported for magic {magic}; convert the shard")
    if magic == MAGIC_1:
        width = 2
    if width not in _DTYPES:
        raise DataError(f"{path}: {width} bytes per token are not supported; convert the shard to 2 or 4")
    if count < 1:
        raise DataError(f"{path}: the header says {count} tokens; remove the shard or write it again")
    expected = HEADER_BYTES + count * width
    if size < expected:
        raise DataError(f"{path}: truncated, {size} of {expected} bytes for {count} tokens; fetch it again")
    if size > expected:
        raise DataError(
            f"{path}: {size - expected} trailing bytes after the {count} tokens of the header; write it again"
        )
    return np.memmap(path, dtype=_DTYPES[width], mode="r", offset=HEADER_BYTES, shape=(count,))


def write_shard(path: Path, tokens: np.ndarray, *, vocabulary: int) -> None:
    """Write a version-2 shard; the file gets its name only when complete, so no reader sees part of it.

    Args:
        path: The shard's file.
        tokens: Integers below `vocabulary`, `[tokens]`; at least one.
        vocabulary: Number of token ids; up to 65536 the tokens are stored as uint16, else as uint32.
    """
    path = Path(path)
    assert tokens.size > 0
    assert int(tokens.max()) < vocabulary
    width = 2 if vocabulary <= 2**16 else 4
    header = np.zeros(HEADER_VALUES, dtype="<i4")
    header[:4] = MAGIC_2, 2, tokens.size, width
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(header.tobytes())
            file.write(tokens.astype(_DTYPES[width]).tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class ShardWriter:
    """Cuts a stream of tokens into shards `PREFIX-00000.bin`, `PREFIX-00001.bin`, … in one directory.

    Args:
        directory: Where the shards go.
        prefix: Start of the shards' names.
        vocabulary: Number of token ids.
        shard_tokens: Tokens per shard.
    """

    def __init__(self, directory: Path, prefix: str, *, vocabulary: int, shard_tokens: int = SHARD_TOKENS) -> None:
        self.directory = directory
        self.prefix = prefix
        self.vocabulary = vocabulary
        self.shard_tokens = shard_tokens
        self.tokens = 0
        self.paths: list[Path] = []
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        """Add `tokens` (`[tokens]`), and write each shard that is full."""
        self.tokens += tokens.size
        while tokens.size:
            head = tokens[: self.shard_tokens - self._pending_tokens]
            tokens = tokens[head.size :]
            self._pending.append(head)
            self._pending_tokens += head.size
            if self._pending_tokens == self.shard_tokens:
                self._flush()

    def close(self) -> tuple[Path, ...]:
        """Write the remaining tokens as a last, shorter shard, and return all paths in order."""
        if self._pending:
            self._flush()
        return tuple(self.paths)

    def _flush(self) -> None:
        path = self.directory / f"{self.prefix}-{len(self.paths):05d}.bin"
        write_shard(path, np.concatenate(self._pending), vocabulary=self.vocabulary)
        self.paths.append(path)
        self._pending, self._pending_tokens = [], 0
