"""Prepares a corpus: turns a source of text into token shards, built once and kept in a cache."""

import hashlib
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from launch.data.errors import DataError
from launch.data.pretokenized import split_shards, verify_tokens
from launch.data.shards import ShardWriter, read_shard
from launch.data.sources import Document, TextSource, open_source
from launch.data.tokenizer import encode_documents, train_tokenizer

Progress = Callable[[str], None]

_LAYOUT = 1
_MANIFEST = "manifest.json"
_TOKENIZER = "tokenizer.json"
_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on and how to cut it into tokens."""

    source: str = "stdlib"
    """`stdlib`, a directory of text, `.parquet` or `.bin` files, `datasets:NAME[:CONFIG]`, or `bin:GLOB`."""
    vocabulary: int = 4096
    """Number of token ids: of the tokenizer to train, or of the tokenizer that made the `.bin` shards."""
    text_column: str = "text"
    """Column that holds the text in parquet files and datasets."""
    max_tokens: int | None = None
    """Training tokens to keep, with validation in proportion; None keeps all (not for `.bin` shards)."""
    validation_fraction: float = 0.05
    """Fraction of the documents used for validation, between 0 and 1 (not for `.bin` shards)."""
    cache: str = "data-cache"
    """Directory for prepared corpora, one folder each; safe to delete when no run uses it."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"max_tokens={self.max_tokens} must be at least 1, or None for all tokens")


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus: token shards ready for loading."""

    train: tuple[Path, ...]
    """Shards to train on."""
    validation: tuple[Path, ...]
    """Shards to validate on, with other documents."""
    vocabulary: int
    """Every token id is below this."""
    tokenizer: Path | None
    """The tokenizer's JSON file; None for a corpus that came as `.bin` shards."""
    fingerprint: str
    """Hash of the vocabulary and the shards' contents."""


def prepare(config: DataConfig, *, progress: Progress | None = None) -> Corpus:
    """Return the corpus of `config`, from the cache or built now.

    Several processes may prepare the same corpus at once: each builds its own copy, and all use the first one finished.
    Pre-tokenized shards stay where they are; they are read completely to check their token ids.

    Args:
        config: Which text to use and how to tokenize it.
        progress: Called with a sentence from time to time while building.

    Raises:
        DataError: If the source cannot be used.

    Example:
        >>> corpus = prepare(DataConfig(source="stdlib", vocabulary=4096), progress=print)
        >>> loader = TokenLoader(corpus.train, sequence=128, batch=8, rank=0, world=1, seed=0)
    """
    pattern = _shard_pattern(config.source)
    if pattern is not None:
        return _pretokenized(pattern, config)
    source = open_source(config.source, text_column=config.text_column, validation_fraction=config.validation_fraction)
    target = Path(config.cache) / _key(config, source)
    corpus = _load(target)
    if corpus is not None:
        return corpus
    work = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    work.mkdir(parents=True)
    try:
        _build(work, source, config, progress or (lambda message: None))
        return _publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def survey(config: DataConfig) -> tuple[str, int | None]:
    """Describe what `prepare` would find, without building anything.

    Args:
        config: Which text to use and how to tokenize it.

    Returns:
        A description, and the number of training tokens, or None if the corpus is not built yet.

    Raises:
        DataError: If the source cannot be used, as far as that shows without reading all of it.
    """
    pattern = _shard_pattern(config.source)
    if pattern is not None:
        train, validation = split_shards(pattern)
        tokens = sum(read_shard(path).size for path in train)
        return f"{len(train)} shards of {tokens:,} tokens, {len(validation)} to validate on", tokens
    source = open_source(config.source, text_column=config.text_column, validation_fraction=config.validation_fraction)
    target = Path(config.cache) / _key(config, source)
    corpus = _load(target)
    if corpus is None:
        return f"{config.source} is not tokenized yet; the run will do it, into {target}", None
    tokens = sum(read_shard(path).size for path in corpus.train)
    return f"{tokens:,} tokens of {config.source}, tokenized in {target}", tokens


def _shard_pattern(source: str) -> str | None:
    if source.startswith("bin:"):
        return source.removeprefix("bin:")
    root = Path(source)
    suffixes = {path.suffix for path in root.glob("[!.]*") if path.is_file()}
    if suffixes == {".bin"}:
        return source
    if ".bin" in suffixes:
        raise DataError(f"{source}: holds .bin shards and other files; give 'bin:{source}' to use the shards only")
    return None


def _pretokenized(pattern: str, config: DataConfig) -> Corpus:
    if config.max_tokens is not None:
        raise DataError(
            f"bin:{pattern}: max_tokens={config.max_tokens} cannot cut finished shards; leave it out, and match fewer "
            "shards instead"
        )
    train, validation = split_shards(pattern)
    for path in (*train, *validation):
        verify_tokens(path, config.vocabulary)
    fingerprint = _fingerprint(train, validation, config.vocabulary)
    return Corpus(train, validation, config.vocabulary, None, fingerprint)


def _key(config: DataConfig, source: TextSource) -> str:
    settings = {name: value for name, value in asdict(config).items() if name not in ("source", "cache")}
    parts = [_LAYOUT, tokenizers.__version__, source.identity, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _build(work: Path, source: TextSource, config: DataConfig, progress: Progress) -> None:
    progress(f"training a tokenizer of {config.vocabulary} ids on {config.source}")
    tokenizer = train_tokenizer(
        (document.text for document in source.documents() if not document.validation),
        vocabulary=config.vocabulary,
    )
    tokenizer.save(str(work / _TOKENIZER))
    train, validation = _tokenize(work, source, tokenizer, config, progress)
    manifest = {
        "source": config.source,
        "vocabulary": config.vocabulary,
        "train": [path.name for path in train],
        "validation": [path.name for path in validation],
        "fingerprint": _fingerprint(train, validation, config.vocabulary),
    }
    # Written last, since a folder without a manifest does not count as a corpus.
    (work / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def _tokenize(
    work: Path, source: TextSource, tokenizer: Tokenizer, config: DataConfig, progress: Progress
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    limit = sys.maxsize if config.max_tokens is None else config.max_tokens
    room = {False: limit, True: math.ceil(limit * config.validation_fraction)}
    writers = {
        side: ShardWriter(work, name, vocabulary=config.vocabulary)
        for side, name in ((False, "train"), (True, "validation"))
    }
    for batch in _batches(source.documents(), room):
        tokens = encode_documents(tokenizer, [document.text for document in batch])
        for document, ids in zip(batch, tokens, strict=True):
            side = document.validation
            ids = ids[: room[side]]
            writers[side].append(ids)
            room[side] -= ids.size
        progress(f"{writers[False].tokens:,} training and {writers[True].tokens:,} validation tokens")
    train, validation = writers[False].close(), writers[True].close()
    for name, paths, remedy in (("training", train, "lower"), ("validation", validation, "raise")):
        if not paths:
            raise DataError(
                f"{config.source}: none of the documents read is for {name}; {remedy} validation_fraction "
                f"(now {config.validation_fraction}) or give more documents"
            )
    return train, validation


def _batches(documents: Iterator[Document], room: dict[bool, int]) -> Iterator[list[Document]]:
    """Group documents whose side (training or validation) still needs tokens, until neither does."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if max(room.values()) <= 0:
            break
        if room[document.validation] <= 0:
            continue
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fingerprint(train: tuple[Path, ...], validation: tuple[Path, ...], vocabulary: int) -> str:
    total = hashlib.sha256(f"{vocabulary} {len(train)} {len(validation)}".encode())
    for path in (*train, *validation):
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _load(target: Path) -> Corpus | None:
    try:
        manifest = json.loads((target / _MANIFEST).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    train = tuple(target / name for name in manifest["train"])
    validation = tuple(target / name for name in manifest["validation"])
    tokenizer = target / _TOKENIZER
    try:
        for path in (*train, *validation):
            read_shard(path)
    except DataError:
        return None  # a file in the cache is missing or truncated, so the corpus is built again
    if not tokenizer.is_file():
        return None
    return Corpus(train, validation, manifest["vocabulary"], tokenizer, manifest["fingerprint"])


def _publish(work: Path, target: Path) -> Corpus:
    """Give the finished folder its final name, unless another process has finished its own first."""
    try:
        os.rename(work, target)
    except OSError:
        if not target.is_dir():
            raise
        if _load(target) is None:  # not another process's corpus but a damaged old one
            shutil.rmtree(target)
            os.rename(work, target)
    corpus = _load(target)
    assert corpus is not None
    return corpus
