"""The cache of prepared corpora: one folder each, held to the checksums in its manifest.

A manifest names no paths: how many shards there are says what they are called. So nothing in it leads out of the
folder.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from launch.data.corpus import Corpus
from launch.data.errors import DataError, reason
from launch.data.files import reading
from launch.data.shards import open_shard, shard_name

LAYOUT: Literal[2] = 2
TOKENIZER = "tokenizer.json"
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 2**26
_LEFT_OVER = re.compile(r"\.[0-9a-f]{20}-(?:(?P<host>.+)-)?[0-9a-f]{32}")
_DAY = 24 * 60 * 60

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel):
    """What a prepared corpus consists of."""

    model_config = ConfigDict(strict=True, extra="forbid")

    layout: Literal[2] = LAYOUT
    source: str
    vocabulary: int
    tokenizer: Sha256
    train: list[Sha256] = Field(min_length=1)
    validation: list[Sha256] = Field(min_length=1)
    fingerprint: Sha256


def write_manifest(folder: Path, corpus: Corpus, *, source: str) -> None:
    """Write the manifest of a corpus whose shards are in `folder`; without one, a folder does not count as a corpus."""
    assert corpus.tokenizer is not None
    manifest = _Manifest(
        source=source,
        vocabulary=corpus.vocabulary,
        tokenizer=_sha256(corpus.tokenizer),
        train=list(corpus.checksums[: len(corpus.train)]),
        validation=list(corpus.checksums[len(corpus.train) :]),
        fingerprint=corpus.fingerprint,
    )
    (folder / _MANIFEST).write_text(manifest.model_dump_json(indent=2))


def load(folder: Path, *, vocabulary: int, contents: bool) -> Corpus:
    """Return the corpus in a folder of the cache.

    Args:
        folder: The folder.
        vocabulary: The vocabulary it was prepared for.
        contents: Whether to read all shards and check ids and checksums; otherwise headers and sizes are checked.

    Raises:
        DataError: If anything in it is missing, or is not what was prepared.
    """
    if folder.is_symlink():
        raise DataError(f"{folder}: a link, but prepared corpora are folders; remove it")
    path = folder / _MANIFEST
    with reading(path, "manifest", links=False) as file:
        text = file.read(_MANIFEST_BYTES)
    try:
        manifest = _Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{path}: not the manifest of a prepared corpus ({place} {reason(ValueError(first['msg']))}); "
            f"remove the folder {folder}"
        ) from error
    tokenizer = folder / TOKENIZER
    train, validation = (
        tuple(folder / shard_name(prefix, index) for index in range(len(checksums)))
        for prefix, checksums in (("train", manifest.train), ("validation", manifest.validation))
    )
    corpus = Corpus(train, validation, vocabulary, tokenizer, (*manifest.train, *manifest.validation))
    if (manifest.vocabulary, manifest.fingerprint) != (vocabulary, corpus.fingerprint):
        raise DataError(f"{path}: does not agree with itself or the vocabulary of {vocabulary}; remove {folder}")
    if _sha256(tokenizer) != manifest.tokenizer:
        raise DataError(f"{tokenizer}: changed since it was prepared; remove the folder {folder}")
    for shard in corpus.shards:
        open_shard(shard, links=False)
    if contents:
        corpus.verify()
    return corpus


@contextlib.contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """Make a folder in which to prepare what will become `target`, and remove what is left of it in the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _beside(target)
    with _locked(target.parent, fcntl.LOCK_SH):
        try:
            work.mkdir()
            yield work
        finally:
            _remove(work)


def publish(work: Path, target: Path, *, vocabulary: int) -> Corpus:
    """Give the finished folder its final name, unless another process has finished its own first."""
    with contextlib.suppress(DataError):
        return load(target, vocabulary=vocabulary, contents=True)
    if os.path.lexists(target):
        damaged = _beside(target)
        os.rename(target, damaged)
        _remove(damaged)
    try:
        os.rename(work, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    return load(target, vocabulary=vocabulary, contents=False)


def sweep(cache: Path) -> None:
    """Remove the folders of preparations that were killed, unless a process of this machine is preparing something.

    What another machine left is removed after a day: not every file system has locks that reach that far.
    """
    with contextlib.suppress(OSError), _locked(cache, fcntl.LOCK_EX | fcntl.LOCK_NB) as locked:
        for path in cache.iterdir() if locked else ():
            found = _LEFT_OVER.fullmatch(path.name)
            if found and (found["host"] == socket.gethostname() or path.lstat().st_mtime < time.time() - _DAY):
                _remove(path)


@contextlib.contextmanager
def _locked(folder: Path, operation: int) -> Iterator[bool]:
    """Hold a lock, which ends with the process; yield whether there is one."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, operation)
        except OSError:  # another process has it, or the file system has none
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}-{socket.gethostname()}-{uuid.uuid4().hex}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with reading(path, "file", links=False) as file:
        return file_digest(file, "sha256").hexdigest()
