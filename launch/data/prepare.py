"""Prepares a corpus: turns a source of text into token shards, built once and kept in a cache."""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer

from launch.data.cache import LAYOUT, TOKENIZER, load, publish, sweep, work_folder, write_manifest
from launch.data.corpus import Corpus
from launch.data.errors import DataError, reason, some_of
from launch.data.pretokenized import describe_split, split_shards
from launch.data.shards import ShardWriter, open_shard
from launch.data.sources import Document, TextSource, open_source
from launch.data.tokenizer import encode_documents, train_tokenizer
from symdist.tools.texts import printable

Progress = Callable[[str], None]

_BATCH_CHARACTERS = 2_000_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on and how to cut it into tokens."""

    source: str = "stdlib"
    """`stdlib`, a folder of text, JSON lines, `.parquet` or `.bin` files, `datasets:NAME[:CONFIG]`, or `bin:GLOB`."""
    vocabulary: int = 4096
    """Number of token ids: of the tokenizer to train, or of the tokenizer that made the `.bin` shards."""
    text_column: str = "text"
    """Column that holds the text in parquet files, JSON lines and datasets."""
    max_tokens: int | None = None
    """Training tokens to keep, with validation in proportion; None keeps all (not for `.bin` shards)."""
    validation_fraction: float = 0.05
    """Fraction of the documents used for validation, between 0 and 1 (not for `.bin` shards)."""
    cache: str = "data-cache"
    """Directory for prepared corpora, one folder each; safe to delete when no run uses it."""

    def __post_init__(self) -> None:
        if not self.source or not self.cache or "\0" in self.source + self.cache:
            raise DataError(f"source={self.source!r} and cache={self.cache!r} must name something")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"validation_fraction={self.validation_fraction} must lie between 0 and 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise DataError(f"max_tokens={self.max_tokens} must be at least 1, or None for all tokens")


def prepare(config: DataConfig, *, progress: Progress | None = None) -> Corpus:
    """Return the corpus of `config`, from the cache or built now, with all of its contents checked.

    Several processes may prepare the same corpus at once: each builds its own copy, and all use the first one finished.
    A corpus in the cache that is not what was prepared, by its checksums, is built again. Pre-tokenized shards stay
    where they are; they are read completely to check their token ids.

    Args:
        config: Which text to use and how to tokenize it.
        progress: Called with a sentence from time to time while building, and with what belongs in the log.

    Raises:
        DataError: If the source cannot be used.

    Example:
        >>> corpus = prepare(DataConfig(source="stdlib", vocabulary=4096), progress=print)
        >>> loader = TokenLoader(corpus.train, sequence=128, batch=8, rank=0, world=1, seed=0)
    """
    return _prepare(config, lambda message: progress(printable(message)) if progress else None, contents=True)


def prepare_on_ranks(
    config: DataConfig,
    *,
    everywhere: Callable[[Callable[[], Any]], Any],
    gather: Callable[[Any], list[Any]],
    rank: int,
    world: int,
) -> Corpus:
    """Return the corpus of `config` as `prepare` does, but share the reading of its contents; all ranks must call it.

    Args:
        config: Which text to use and how to tokenize it.
        everywhere: Calls a function on every rank, and raises on all of them if it fails on one.
        gather: Returns every rank's value.
        rank: This rank's number among those that share; take those of one node, as each node may have its own disk.
        world: Number of ranks that share.

    Raises:
        DataError: If the source cannot be used, or a shard is not what was prepared.
    """
    corpus: Corpus = everywhere(lambda: _prepare(config, lambda message: None, contents=False))
    shares = gather(everywhere(lambda: corpus.verify(rank=rank, world=world)))
    return everywhere(lambda: corpus.verified(shares))


def survey(config: DataConfig) -> tuple[str, int | None]:
    """Describe what `prepare` would find, without building anything.

    Args:
        config: Which text to use and how to tokenize it.

    Returns:
        A description, and the number of training tokens, or None if the corpus is not built yet.

    Raises:
        DataError: If the source cannot be used, as far as that shows without reading all of it.
    """
    with _disk_errors(config):
        pattern = _shard_pattern(config.source)
        if pattern is not None:
            train, validation = split_shards(pattern)
            tokens = sum(open_shard(path).size for path in train)
            return f"{tokens:,} tokens in {describe_split(train, validation)}", tokens
        source = _open_source(config)
        target = _target(config, source)
        others = f"; {passed_over}" if (passed_over := _passed_over(config, source)) else ""
        try:
            corpus = load(target, vocabulary=config.vocabulary, contents=False)
        except DataError:
            return f"{config.source} is not tokenized yet; the run will do it, into {target}{others}", None
        tokens = sum(open_shard(path).size for path in corpus.train)
        return f"{tokens:,} tokens of {config.source}, tokenized in {target}{others}", tokens


def _prepare(config: DataConfig, say: Progress, *, contents: bool) -> Corpus:
    with _disk_errors(config):
        pattern = _shard_pattern(config.source)
        if pattern is not None:
            return _pretokenized(pattern, config, say, contents=contents)
        source = _open_source(config)
        if passed_over := _passed_over(config, source):
            say(passed_over)
        target = _target(config, source)
        sweep(target.parent)
        if os.path.lexists(target):
            try:
                return load(target, vocabulary=config.vocabulary, contents=contents)
            except DataError as error:
                say(f"{error}; it is built again now")
        with work_folder(target) as work:
            _build(work, source, config, say)
            return publish(work, target, vocabulary=config.vocabulary)


@contextmanager
def _disk_errors(config: DataConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, problem = error.filename or config.cache, error.strerror or reason(error)
        raise DataError(f"{place}: {problem}; check data.source and data.cache, and the space there") from error


def _open_source(config: DataConfig) -> TextSource:
    return open_source(config.source, text_column=config.text_column, validation_fraction=config.validation_fraction)


def _target(config: DataConfig, source: TextSource) -> Path:
    return Path(config.cache) / _key(config, source)


def _passed_over(config: DataConfig, source: TextSource) -> str:
    names = [path.relative_to(config.source) for path in source.passed_over]
    return f"{config.source}: {len(names)} files of other kinds are passed over: {some_of(names)}" if names else ""


def _shard_pattern(source: str) -> str | None:
    if source.startswith("bin:"):
        return source.removeprefix("bin:")
    root = Path(source)
    suffixes = {path.suffix for path in root.glob("[!.]*") if path.is_file()}
    if ".bin" in suffixes and suffixes <= {".bin", ".idx"}:
        return source
    if ".bin" in suffixes:
        raise DataError(f"{source}: holds .bin shards and other files; give 'bin:{source}' to use the shards only")
    return None


def _pretokenized(pattern: str, config: DataConfig, say: Progress, *, contents: bool) -> Corpus:
    if config.max_tokens is not None:
        raise DataError(
            f"bin:{pattern}: max_tokens={config.max_tokens} cannot cut finished shards; leave it out, and match fewer "
            "shards instead"
        )
    train, validation = split_shards(pattern)
    say(f"bin:{pattern}: {describe_split(train, validation)}")
    corpus = Corpus(train, validation, config.vocabulary, None)
    return corpus.verified([corpus.verify()]) if contents else corpus


def _key(config: DataConfig, source: TextSource) -> str:
    settings = {name: value for name, value in asdict(config).items() if name not in ("source", "cache")}
    parts = [LAYOUT, tokenizers.__version__, source.identity, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def _build(work: Path, source: TextSource, config: DataConfig, progress: Progress) -> None:
    progress(f"training a tokenizer of {config.vocabulary} ids on {config.source}")
    tokenizer = train_tokenizer(
        (document.text for document in source.documents() if not document.validation),
        vocabulary=config.vocabulary,
    )
    (work / TOKENIZER).write_text(tokenizer.to_str(pretty=True))
    train, validation = _tokenize(work, source, tokenizer, config, progress)
    corpus = Corpus(train, validation, config.vocabulary, work / TOKENIZER)
    write_manifest(work, corpus.verified([corpus.verify()]), source=printable(config.source))


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
