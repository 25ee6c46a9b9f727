"""Sources of text: each yields documents in a fixed order, marked for training or validation.

The mark depends only on a document's content, so two copies of a text never end up one in each.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from launch.data.errors import DataError

_PROSE = {".csv", ".html", ".json", ".jsonl", ".md", ".rst", ".tex", ".tsv", ".txt", ".xml", ".yaml", ".yml"}
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
TEXT_SUFFIXES = _PROSE | _CODE
_NOT_STDLIB = frozenset({"site-packages", "dist-packages"})
_ROWS_PER_READ = 1024


class Document(NamedTuple):
    """One text, and whether it is for validation."""

    text: str
    validation: bool


class TextSource(Protocol):
    """The interface of a source that preparation needs."""

    @property
    def identity(self) -> str:
        """Text that identifies the source and the state of its files, without reading their contents."""

    def documents(self) -> Iterator[Document]:
        """Yield every document; each call starts again and gives the same documents in the same order."""


def open_source(source: str, *, text_column: str, validation_fraction: float) -> TextSource:
    """Open a source of text.

    Args:
        source: `stdlib`, `datasets:NAME[:CONFIG]`, or a directory of text or `.parquet` files.
        text_column: Column that holds the text in parquet files and datasets.
        validation_fraction: Fraction of the documents for validation, between 0 and 1.

    Raises:
        DataError: If the directory does not exist or holds no text.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return TextFiles(root, _list_files(root, {".py"}, pruned=_NOT_STDLIB), validation_fraction)
    if source.startswith("datasets:"):
        return DatasetRows(source, text_column, validation_fraction)
    root = Path(source)
    if not root.is_dir():
        raise DataError(
            f"{source}: no such directory; give 'stdlib', a directory, 'datasets:NAME[:CONFIG]' or 'bin:GLOB'"
        )
    if parquet := _list_files(root, {".parquet"}):
        return ParquetRows(root, parquet, text_column, validation_fraction)
    if texts := _list_files(root, TEXT_SUFFIXES):
        return TextFiles(root, texts, validation_fraction)
    raise DataError(f"{source}: holds no text, .parquet or .bin file; give a directory that does")


class TextFiles:
    """Text files below `root`, one document each; files that are empty or not UTF-8 are skipped."""

    def __init__(self, root: Path, files: list[Path], validation_fraction: float) -> None:
        self.root = root
        # Ordered by hash, which mixes the folders, so that any first part of the corpus is a fair sample of it.
        self.files = sorted(files, key=lambda path: _digest(path.relative_to(root).as_posix()))
        self.fraction = validation_fraction

    @property
    def identity(self) -> str:
        """The directory with the names, sizes and times of its files."""
        return _listing(self.root, self.files)

    def documents(self) -> Iterator[Document]:
        """Yield the files' contents.

        Raises:
            DataError: If there are not at least two different texts.
        """
        for path in self.files:
            if text := _read_text(path):
                yield Document(text, _digest(text) <= self._threshold)

    @cached_property
    def _threshold(self) -> int:
        # If there are few files, perhaps none has a hash below the fraction; then the lowest is for validation.
        digests = sorted({_digest(text) for path in self.files if (text := _read_text(path))})
        if len(digests) < 2:
            raise DataError(
                f"{self.root}: it has {len(digests)} different UTF-8 texts, but each file is used whole, for training "
                "or validation, which takes at least two; split the text into more files"
            )
        return min(max(_limit(self.fraction), digests[0]), digests[-2])


class ParquetRows:
    """A text column of the `.parquet` files below `root`, one document per row."""

    def __init__(self, root: Path, files: list[Path], column: str, validation_fraction: float) -> None:
        self.root = root
        self.files = sorted(files)
        self.column = column
        self.fraction = validation_fraction

    @property
    def identity(self) -> str:
        """The directory with the names, sizes and times of its files."""
        return _listing(self.root, self.files)

    def documents(self) -> Iterator[Document]:
        """Yield the rows, read batch by batch.

        Raises:
            DataError: If a file is not readable, or lacks the column.
        """
        import pyarrow
        import pyarrow.parquet

        for path in self.files:
            try:
                with pyarrow.parquet.ParquetFile(path) as file:
                    _require_column(self.column, file.schema_arrow.names, str(path))
                    for rows in file.iter_batches(_ROWS_PER_READ, columns=[self.column]):
                        texts = rows.column(0).to_pylist()
                        yield from _split_rows(texts, self.column, str(path), self.fraction)
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"{path}: not a readable parquet file ({error}); fetch it again") from error


class DatasetRows:
    """A text column of the `train` split of a `datasets` dataset, streamed, one document per row."""

    def __init__(self, source: str, column: str, validation_fraction: float) -> None:
        self.source = source
        self.name, _, self.config = source.removeprefix("datasets:").partition(":")
        self.column = column
        self.fraction = validation_fraction

    @property
    def identity(self) -> str:
        """The name of the dataset, and for a local directory also its files."""
        root = Path(self.name)
        return f"{self.source}\n{_listing(root, _list_files(root)) if root.is_dir() else ''}"

    def documents(self) -> Iterator[Document]:
        """Yield the rows, streamed.

        Raises:
            DataError: If the dataset does not open, or lacks the column.
        """
        from datasets import load_dataset

        try:
            rows = load_dataset(self.name, self.config or None, split="train", streaming=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.source}: cannot be opened ({error}); check its name and config") from error
        for row in rows:
            _require_column(self.column, list(row), self.source)
            yield from _split_rows([row[self.column]], self.column, self.source, self.fraction)


def _split_rows(values: Iterable[Any], column: str, origin: str, fraction: float) -> Iterator[Document]:
    for text in values:
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{origin}: column '{column}' holds {type(text).__name__}, not text; set another text_column"
            )
        if text:
            yield Document(text, _digest(text) <= _limit(fraction))


def _require_column(column: str, columns: list[str], origin: str) -> None:
    if column not in columns:
        raise DataError(f"{origin}: no column '{column}'; set text_column to one of {', '.join(columns)}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _limit(fraction: float) -> int:
    return int(fraction * 2**64)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return ""


def _list_files(
    root: Path, suffixes: Iterable[str] | None = None, *, pruned: frozenset[str] = frozenset()
) -> list[Path]:
    files = []
    for folder, folders, names in os.walk(root):
        # Pruned during the walk, since site-packages can hold a hundred times as many files as the standard library.
        folders[:] = [name for name in folders if name not in pruned | {"__pycache__"} and not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return [path for path in files if suffixes is None or path.suffix.lower() in suffixes]


def _listing(root: Path, files: list[Path]) -> str:
    lines = []
    for path in sorted(files):
        stat = path.stat()
        lines.append(f"{path.relative_to(root).as_posix()} {stat.st_size} {stat.st_mtime_ns}")
    return "\n".join([str(root.resolve()), *lines])
