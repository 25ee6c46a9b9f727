"""Token shards on disk: little-endian token ids, mostly behind a 1024-byte header of 256 int32 values.

=========  =======  ==========  =======================
magic      version  value [2]   payload
=========  =======  ==========  =======================
20240520   1        token count  uint16, by llm.c
20240801   7        token count  uint32, by llm.c
20260317   2        token count  uint16 or uint32, as value [3] (bytes per token) says
=========  =======  ==========  =======================

Shards are written in the last of these. A `.bin` file beside an `.idx` file of the same name is Megatron's: bare ids,
whose type the index names. Its documents are read as one stream, as all shards are.

Shards are read and never mapped into memory: where a file is cut under a running job, a mapping ends the process with a
signal, and reading says which file it is.
"""

import hashlib
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from launch.data.errors import DataError
from launch.data.files import reading

HEADER_VALUES = 256
HEADER_BYTES = 4 * HEADER_VALUES
MAGIC_1, MAGIC_2, MAGIC_LLAMA = 20240520, 20260317, 20240801
SHARD_TOKENS = 2**25
CHUNK_BYTES = 2**25
_VERSIONS = {MAGIC_1: 1, MAGIC_2: 2, MAGIC_LLAMA: 7}
_WIDTHS = {MAGIC_1: 2, MAGIC_LLAMA: 4}
_DTYPES: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
# After the magic: version, code of the ids' type, number of sequences, number of document boundaries.
_INDEX_HEADER = struct.Struct("<QBQQ")
# Signed ids are read as unsigned ones: a negative id is then outside every vocabulary.
_INDEX_DTYPES = {code: np.dtype(name) for code, name in ((1, "u1"), (3, "<u2"), (4, "<u4"), (5, "<u8"), (8, "<u2"))}


@dataclass(frozen=True)
class Shard:
    """The place of the tokens in a shard's file, as it was when the shard was opened."""

    path: Path
    dtype: np.dtype
    offset: int
    """Bytes before the tokens."""
    size: int
    """Number of tokens."""
    state: tuple[int, int]
    """The file's size in bytes, and its time of modification in nanoseconds."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read tokens `start` to `stop`, by default all, as an array `[stop - start]` of `dtype`.

        Raises:
            DataError: If the file cannot be read, or has changed since it was opened.
        """
        width = self.dtype.itemsize
        count = (self.size if stop is None else stop) - start
        with self._unchanged() as file:
            file.seek(self.offset + start * width)
            data = file.read(count * width)
        if len(data) < count * width:
            raise self._changed()
        return np.frombuffer(data, self.dtype)

    def scan(self) -> tuple[str, int]:
        """Read the whole file, in chunks, and return its SHA-256 in hexadecimal and its largest token id.

        Raises:
            DataError: As for `read`.
        """
        total, largest = hashlib.sha256(), 0
        remaining = self.size * self.dtype.itemsize
        with self._unchanged() as file:
            total.update(file.read(self.offset))
            while remaining:
                chunk = file.read(min(CHUNK_BYTES, remaining))
                if not chunk or len(chunk) % self.dtype.itemsize:
                    raise self._changed()
                remaining -= len(chunk)
                total.update(chunk)
                largest = max(largest, int(np.frombuffer(chunk, self.dtype).max()))
        return total.hexdigest(), largest

    @contextmanager
    def _unchanged(self) -> Iterator[io.BufferedReader]:
        # Opened for each reading, since a corpus may have more shards than a process may have open files.
        with reading(self.path, "token shard") as file:
            if _state(file) != self.state:
                raise self._changed()
            yield file

    def _changed(self) -> DataError:
        return DataError(
            f"{self.path}: cut or changed since the run opened it; restore it, and resume from the last checkpoint"
        )


def open_shard(path: Path, *, links: bool = True) -> Shard:
    """Find the tokens of one shard, without reading them.

    Args:
        path: The shard's file.
        links: Whether it may be a symbolic link.

    Raises:
        DataError: If the file cannot be read, or its header has none of the layouts or does not match the file's size.
    """
    path = Path(path)
    with reading(path, "token shard", links=links) as file:
        state = _state(file)
        raw = file.read(HEADER_BYTES)
    index = path.with_suffix(".idx")
    # The header comes first, so that no file laid beside a shard changes how it is read.
    if int.from_bytes(raw[:4], "little") not in _VERSIONS and os.path.lexists(index):
        dtype = _read_index(index, path, state[0])
        return Shard(path, dtype, 0, state[0] // dtype.itemsize, state)
    dtype, count = _read_header(path, raw, state[0])
    return Shard(path, dtype, HEADER_BYTES, count, state)


def read_shard(path: Path) -> np.ndarray:
    """Read all tokens of one shard, as an array `[tokens]`.

    Raises:
        DataError: As `open_shard`.
    """
    return open_shard(path).read()


def _state(file: io.BufferedReader) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _read_header(path: Path, raw: bytes, size: int) -> tuple[np.dtype, int]:
    """Return the tokens' type and number."""
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: truncated, it has {size} bytes but the header alone {HEADER_BYTES}; fetch it again")
    magic, version, count, width = (int(value) for value in np.frombuffer(raw, "<i4", count=4))
    if magic not in _VERSIONS:
        raise DataError(
            f"{path}: not a token shard (it begins with {magic}, not {', '.join(map(str, _VERSIONS))}); if these are "
            "bare ids, as nanoGPT writes them, convert them with python -m launch.data.convert; of Megatron's, put the "
            ".idx file beside it"
        )
    if version != _VERSIONS[magic]:
        raise DataError(f"{path}: version {version} is not supported for magic {magic}; convert the shard")
    width = _WIDTHS.get(magic, width)
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
    return _DTYPES[width], count


def _read_index(path: Path, shard: Path, size: int) -> np.dtype:
    """Return the type of the ids in Megatron's `shard` of `size` bytes, from its index."""
    header = len(_INDEX_MAGIC) + _INDEX_HEADER.size
    with reading(path, "index of Megatron's") as file:
        index_size, _ = _state(file)
        raw = file.read(header)
        if len(raw) < header or not raw.startswith(_INDEX_MAGIC):
            raise DataError(f"{path}: not an index of Megatron's; fetch it again, or take it out if {shard} is no such")
        version, code, sequences, _ = _INDEX_HEADER.unpack(raw[len(_INDEX_MAGIC) :])
        if version != 1 or code not in _INDEX_DTYPES:
            raise DataError(f"{path}: version {version} with ids of type {code} is not supported; preprocess it again")
        # The sequences' lengths (int32) and places (int64) follow; the last of each say where the tokens end.
        ends = header + 4 * sequences
        if not sequences or index_size < ends + 8 * sequences:
            raise DataError(f"{path}: truncated, {index_size} bytes for {sequences} sequences; fetch it again")
        file.seek(ends - 4)
        length = int.from_bytes(file.read(4), "little", signed=True)
        file.seek(ends + 8 * (sequences - 1))
        place = int.from_bytes(file.read(8), "little", signed=True)
    dtype = _INDEX_DTYPES[code]
    if place + length * dtype.itemsize != size or size % dtype.itemsize or not size:
        raise DataError(
            f"{shard}: has {size} bytes, but {path.name} says {place + length * dtype.itemsize}; fetch both again"
        )
    return dtype


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


def shard_name(prefix: str, index: int) -> str:
    """Return the name of a writer's shard: `PREFIX-00000.bin`, `PREFIX-00001.bin`, …."""
    return f"{prefix}-{index:05d}.bin"


class ShardWriter:
    """Cuts a stream of tokens into shards, named by `shard_name`, in one directory.

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
        path = self.directory / shard_name(self.prefix, len(self.paths))
        write_shard(path, np.concatenate(self._pending), vocabulary=self.vocabulary)
        self.paths.append(path)
        self._pending, self._pending_tokens = [], 0
