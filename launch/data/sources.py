"""Sources of text: each yields documents in a fixed order, marked for training or validation.

The mark depends only on a document's content, so two copies of a text never end up one in each.
"""

import hashlib
import io
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from launch.data.errors import DataError, errors_as, reason, some_of
from launch.data.files import list_files, listing, reading

_PROSE = {".csv", ".html", ".json", ".md", ".rst", ".tex", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
_CODE = {
    ".c",
    ".cc",
    ".cpp",
    ".go",
    ".h",
    ".hpp",
    ".java",
    ".js",
    ".py",
    ".rs",
    ".sh",
    ".sql",
    ".toml",
    ".ts",
}
_TEXT = tuple(_PROSE | _CODE)
_PARQUET = (".parquet",)
# Compressed files of the name of JSON hold lines of it, as those of C4 do.
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What is read at once has a bound, so that a compressed file of zeros does not fill the memory.
_LINE_BYTES = 2**28
_FILE_BYTES = 2**31
_NOT_STDLIB = frozenset({"site-packages", "dist-packages"})
_ROWS_PER_READ = 1024
_SHOWN_COLUMNS = 20


class Document(NamedTuple):
    """One text, and whether it is for validation."""

    text: str
    validation: bool


class TextSource(Protocol):
    """The interface of a source that preparation needs."""

    @property
    def identity(self) -> str:
        """Text that identifies the source and the state of its files, without reading their contents."""

    @property
    def passed_over(self) -> tuple[Path, ...]:
        """Files of other kinds, which are not read."""

    def documents(self) -> Iterator[Document]:
        """Yield every document; each call starts again and gives the same documents in the same order."""


def open_source(source: str, *, text_column: str, validation_fraction: float) -> TextSource:
    """Open a source of text.

    Of a directory with files of several kinds, those are read that hold rows, `.parquet` before JSON lines; its text
    files are read if there are neither.

    Args:
        source: `stdlib`, `datasets:NAME[:CONFIG]`, or a directory of text files, JSON lines or `.parquet` files.
        text_column: Column that holds the text in parquet files, JSON lines and datasets.
        validation_fraction: Fraction of the documents for validation, between 0 and 1.

    Raises:
        DataError: If the directory does not exist or holds no text.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in list_files(root, pruned=_NOT_STDLIB) if path.suffix == ".py"]
        return TextFiles(root, files, (), validation_fraction, skip_undecodable=True)
    if source.startswith("datasets:"):
        return DatasetRows(source, text_column, validation_fraction)
    root = Path(source)
    if not root.is_dir():
        raise DataError(
            f"{source}: no such directory; give 'stdlib', a directory, 'datasets:NAME[:CONFIG]' or 'bin:GLOB'"
        )
    files = list_files(root)
    for suffixes, read in ((_PARQUET, _parquet_texts), (_JSON_LINES, _json_texts), (_TEXT, None)):
        chosen = [path for path in files if path.name.lower().endswith(suffixes)]
        others = tuple(path for path in files if not path.name.lower().endswith(suffixes))
        if chosen and read is None:
            return TextFiles(root, chosen, others, validation_fraction)
        if chosen and read is not None:
            return FileRows(root, chosen, others, validation_fraction, partial(read, column=text_column), text_column)
    names = f" but {some_of([path.relative_to(root) for path in files])}" if files else ""
    raise DataError(f"{source}: holds no text, JSON lines, .parquet or .bin file{names}; give a directory that does")


@dataclass
class TextFiles:
    """Text files below `root`, one document each; files that are empty are skipped."""

    root: Path
    files: list[Path]
    passed_over: tuple[Path, ...]
    fraction: float
    skip_undecodable: bool = False
    """Whether to skip files that are not UTF-8, which are in the standard library for its own tests."""

    def __post_init__(self) -> None:
        # Ordered by hash, which mixes the folders, so that any first part of the corpus is a fair sample of it.
        self.files = sorted(self.files, key=lambda path: _digest(os.fsencode(path.relative_to(self.root).as_posix())))

    @property
    def identity(self) -> str:
        """The directory with the names, sizes and times of its files."""
        return listing(self.root, sorted(self.files))

    def documents(self) -> Iterator[Document]:
        """Yield the files' contents.

        Raises:
            DataError: If a file is not readable or not UTF-8, or there are not at least two different texts.
        """
        threshold = self._threshold
        for text in self._texts():
            yield Document(text, _digest(text.encode()) <= threshold)

    @cached_property
    def _threshold(self) -> int:
        # If there are few files, perhaps none has a hash below the fraction; then the lowest is for validation.
        digests = sorted({_digest(text.encode()) for text in self._texts()})
        if len(digests) < 2:
            raise DataError(
                f"{self.root}: it has {len(digests)} different UTF-8 texts, but each file is used whole, for training "
                "or validation, which takes at least two; split the text into more files"
            )
        return min(max(_limit(self.fraction), digests[0]), digests[-2])

    def _texts(self) -> Iterator[str]:
        refused = []
        for path in self.files:
            with reading(path, "text file") as file:
                if os.fstat(file.fileno()).st_size > _FILE_BYTES:
                    raise DataError(f"{path}: longer than {_FILE_BYTES:,} bytes; split it into more files")
                data = file.read()
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                refused.append(f"{path} (at byte {error.start:,})")
                continue
            if text:
                yield text
        if refused and not self.skip_undecodable:
            raise DataError(f"{some_of(refused)}: not UTF-8; convert to it, as with iconv, or take out")


@dataclass
class FileRows:
    """A text column of the files below `root`, one document per row."""

    root: Path
    files: list[Path]
    passed_over: tuple[Path, ...]
    fraction: float
    read: Callable[[Path], Iterator[tuple[str, Any]]]
    """Yields where a row is, and what its text column holds."""
    column: str

    @property
    def identity(self) -> str:
        """The directory with the names, sizes and times of its files."""
        return listing(self.root, self.files)

    def documents(self) -> Iterator[Document]:
        """Yield the rows, read batch by batch.

        Raises:
            DataError: If a file is not readable, or lacks the column.
        """
        for path in self.files:
            yield from _split_rows(self.read(path), self.column, self.fraction)


def _parquet_texts(path: Path, *, column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    with reading(path, "parquet file") as file:
        parquet = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        _require_column(column, parquet.schema_arrow.names, str(path))
        missing = parquet.metadata.num_rows
        for rows in parquet.iter_batches(_ROWS_PER_READ, columns=[column]):
            missing -= rows.num_rows
            yield from ((str(path), text) for text in rows.column(0).to_pylist())
        if missing:
            raise DataError(f"{path}: has {-missing:+,} rows beside what its footer says; fetch it again")


def _json_texts(path: Path, *, column: str) -> Iterator[tuple[str, Any]]:
    import pyarrow

    compression = _COMPRESSIONS.get(path.suffix.lower())
    with reading(path, "file of JSON lines") as file:
        if compression and not os.fstat(file.fileno()).st_size:
            raise DataError(f"{path}: truncated, it has no bytes; fetch it again")
        lines = io.BufferedReader(pyarrow.input_stream(file, compression=compression)) if compression else file
        for number in itertools.count(1):
            line = lines.readline(_LINE_BYTES + 1)
            if not line:
                return
            where = f"{path}, line {number:,}"
            if len(line) > _LINE_BYTES:
                raise DataError(f"{where}: longer than {_LINE_BYTES:,} bytes; split it into more documents")
            if line.strip():
                yield where, _json_text(line, column, where)


def _json_text(line: bytes, column: str, where: str) -> Any:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at its byte {error.start:,}; convert the file, as with iconv") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({reason(error)}); correct the line, or take it out") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds no object but {type(row).__name__}; write one object a line")
    _require_column(column, list(row), where)
    return row[column]


class DatasetRows:
    """A text column of the `train` split of a `datasets` dataset, streamed, one document per row."""

    def __init__(self, source: str, column: str, validation_fraction: float) -> None:
        self.source = source
        self.name, _, self.config = source.removeprefix("datasets:").partition(":")
        self.column = column
        self.fraction = validation_fraction
        self.passed_over: tuple[Path, ...] = ()

    @property
    def identity(self) -> str:
        """The name of the dataset, and for a local directory also its files."""
        root = Path(self.name)
        return f"{self.source}\n{listing(root, list_files(root)) if root.is_dir() else ''}"

    def documents(self) -> Iterator[Document]:
        """Yield the rows, streamed.

        Raises:
            DataError: If the dataset does not open, or lacks the column.
        """
        from datasets import load_dataset

        with errors_as(f"{self.source}: cannot be opened or read", "check its name and config, and its files"):
            # The user names the dataset; rows are data, and no code of a dataset is run.
            rows = load_dataset(self.name, self.config or None, split="train", streaming=True)  # nosec B615
            for row in rows:
                _require_column(self.column, list(row), self.source)
                yield from _split_rows([(self.source, row[self.column])], self.column, self.fraction)


def _split_rows(rows: Iterable[tuple[str, Any]], column: str, fraction: float) -> Iterator[Document]:
    for where, text in rows:
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{where}: column '{column}' holds {type(text).__name__}, not text; set another text_column"
            )
        if text:
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: column '{column}' has half a character at {error.start:,}; correct or drop the text"
                ) from error
            yield Document(text, _digest(data) <= _limit(fraction))


def _require_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        raise DataError(
            f"{where}: no column '{column}'; set text_column to one of {', '.join(columns[:_SHOWN_COLUMNS])}"
        )


def _digest(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _limit(fraction: float) -> int:
    return int(fraction * 2**64)
