"""A cache of prepared corpora that someone or something has changed: it is seen, said, and built again."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.data import Corpus, DataConfig, DataError, prepare, prepare_on_ranks, read_shard, write_shard
from launch.data.shards import open_shard
from tests.attacks.test_data_faults import NO_FILES, flipped, linked, no_hang, refused
from tests.launch.corpora import text_config, text_folder

__all__ = ["no_hang"]

Change = Callable[[dict], object]


def rewritten(change: Change) -> Callable[[Path], None]:
    """A manifest with other contents."""

    def write(path: Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return write


def resigned(change: Change) -> Callable[[Path], None]:
    """A manifest with other contents, and with the fingerprint that they have."""

    def write(path: Path) -> None:
        manifest = json.loads(path.read_text())
        change(manifest)
        shards = [tuple(map(Path, manifest[side])) for side in ("train", "validation")]
        checksums = (*manifest["train"], *manifest["validation"])
        manifest["fingerprint"] = Corpus(*shards, manifest["vocabulary"], None, checksums).fingerprint
        path.write_text(json.dumps(manifest))

    return write


def contents(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "of no bytes": contents(b""),
    "zeros": contents(bytes(2000)),
    "not UTF-8": contents(b'{"source": "caf\xe9"}'),
    "a list": contents(b"[]"),
    "null": contents(b"null"),
    "nested without end": contents(b"[" * 1_000_000),
    "objects without end": contents(b'{"train":' * 1_000_000),
    "a number without end": contents(b'{"layout": ' + b"9" * 100_000 + b"}"),
    "cut": lambda path: os.truncate(path, 300),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "missing": Path.unlink,
    "without checksums, as of earlier versions": contents(
        b'{"source": "stdlib", "vocabulary": 300, "train": ["train-00000.bin"], "validation": ["validation-00000.bin"]}'
    ),
    "paths": rewritten(lambda manifest: manifest.update(train=["../../../secret.bin"])),
    "absolute paths": rewritten(lambda manifest: manifest.update(train=["/etc/passwd"])),
    "another layout": rewritten(lambda manifest: manifest.update(layout=1)),
    "a layout in words": rewritten(lambda manifest: manifest.update(layout="2")),
    "another vocabulary": resigned(lambda manifest: manifest.update(vocabulary=301)),
    "a negative vocabulary": resigned(lambda manifest: manifest.update(vocabulary=-300)),
    "a vocabulary in words": rewritten(lambda manifest: manifest.update(vocabulary="300")),
    "a vocabulary of null": rewritten(lambda manifest: manifest.update(vocabulary=None)),
    "no train": rewritten(lambda manifest: manifest.pop("train")),
    "an empty train": resigned(lambda manifest: manifest.update(train=[])),
    "a train of numbers": rewritten(lambda manifest: manifest.update(train=[1])),
    "a train of words": rewritten(lambda manifest: manifest.update(train="train-00000.bin")),
    "one shard more": resigned(lambda manifest: manifest["train"].append("0" * 64)),
    "a thousand more": resigned(lambda manifest: manifest["train"].extend(["0" * 64] * 1000)),
    "one validation shard more": resigned(lambda manifest: manifest["validation"].append("0" * 64)),
    "sides exchanged": resigned(
        lambda manifest: manifest.update(train=manifest["validation"], validation=manifest["train"])
    ),
    "other checksums": resigned(lambda manifest: manifest.update(train=["0" * 64])),
    "checksums that are none": rewritten(lambda manifest: manifest.update(tokenizer="../" * 21 + "a")),
    "another fingerprint": rewritten(lambda manifest: manifest.update(fingerprint="0" * 64)),
    "another tokenizer": rewritten(lambda manifest: manifest.update(tokenizer="0" * 64)),
    "something more": rewritten(lambda manifest: manifest.update(run="import os")),
}


def other_ids(path: Path) -> None:
    """A whole shard of as many other ids."""
    write_shard(path, (read_shard(path).astype("<i4") + 1) % 300, vocabulary=300)


def ids_outside(path: Path) -> None:
    """A shard with an id outside the vocabulary, and a manifest that agrees with it."""
    tokens = read_shard(path).copy()
    tokens[-1] = 300
    write_shard(path, tokens, vocabulary=301)
    side = path.name.partition("-")[0]
    checksum, _ = open_shard(path).scan()
    resigned(lambda manifest: manifest.update({side: [checksum]}))(path.with_name("manifest.json"))


FILES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut to nothing": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0\0"),
    "first bit": lambda path: path.write_bytes(flipped(path.read_bytes(), 0)),
    "middle bit": lambda path: path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2)),
    "last bit": lambda path: path.write_bytes(flipped(path.read_bytes(), -1)),
    "a folder": lambda path: path.unlink() or path.mkdir(),
    "a link to the same": lambda path: path.symlink_to(path.rename(path.parents[2] / "outside.bin")),
}
SHARDS = FILES | {"other ids": other_ids, "ids outside the vocabulary": ids_outside}
FOLDERS: dict[str, Callable[[Path], object]] = {
    "empty": Path.mkdir,
    "a file": Path.touch,
    "a link to a folder": lambda path: path.symlink_to(path.parents[1] / "outside"),
}


def faults(files: dict[str, Callable[[Path], object]], *more: str) -> list[str]:
    return [*files, *more, *NO_FILES]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataConfig, Corpus]:
    folder = tmp_path_factory.mktemp("prepared")
    config = text_config(folder, text_folder(folder / "corpus"))
    corpus = prepare(config)
    shutil.copytree(config.cache, folder / "whole")
    return config, corpus


def is_built_again(prepared: tuple[DataConfig, Corpus], name: str, change: Callable[[Path], object]) -> None:
    """Change a file of the cache, or its folder if there is no name."""
    config, corpus = prepared
    cache = Path(config.cache)
    shutil.rmtree(cache)
    shutil.copytree(cache.with_name("whole"), cache)
    outside = cache.with_name("outside")
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    (outside / "file").write_text("of another")
    target = corpus.train[0].parent / name
    if not name:
        shutil.rmtree(target)
    elif change in NO_FILES.values():
        target.unlink()
    change(target)
    said: list[str] = []
    assert prepare(config, progress=said.append) == corpus
    assert all(line.isprintable() for line in said)
    assert said[0].startswith(str(corpus.train[0].parent))
    assert said[0].endswith("; it is built again now")
    assert [path.name for path in cache.iterdir()] == [corpus.train[0].parent.name]
    assert not any(path.is_symlink() for path in cache.rglob("*"))
    assert corpus.verify() == dict(enumerate(corpus.checksums))
    assert [path.name for path in outside.iterdir()] == ["file"]


@pytest.mark.parametrize("fault", faults(MANIFESTS))
def test_a_changed_manifest_is_seen(prepared: tuple[DataConfig, Corpus], fault: str) -> None:
    is_built_again(prepared, "manifest.json", (MANIFESTS | NO_FILES)[fault])


@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin"])
@pytest.mark.parametrize("fault", faults(SHARDS))
def test_a_changed_shard_is_seen(prepared: tuple[DataConfig, Corpus], name: str, fault: str) -> None:
    is_built_again(prepared, name, (SHARDS | NO_FILES)[fault])


@pytest.mark.parametrize("fault", faults(FILES))
def test_a_changed_tokenizer_is_seen(prepared: tuple[DataConfig, Corpus], fault: str) -> None:
    is_built_again(prepared, "tokenizer.json", (FILES | NO_FILES)[fault])


@pytest.mark.parametrize("fault", faults(FOLDERS))
def test_what_is_no_folder_of_the_cache_is_replaced(prepared: tuple[DataConfig, Corpus], fault: str) -> None:
    is_built_again(prepared, "", (FOLDERS | NO_FILES)[fault])


def test_an_index_beside_a_shard_changes_nothing(prepared: tuple[DataConfig, Corpus]) -> None:
    config, corpus = prepared
    tokens = read_shard(corpus.train[0])
    index = corpus.train[0].with_suffix(".idx")
    index.write_bytes(b"MMIDIDX\0\0")
    assert prepare(config) == corpus
    assert np.array_equal(read_shard(corpus.train[0]), tokens)
    index.unlink()


CACHES: dict[str, Callable[[Path], str]] = {
    "a file": lambda path: str(path.touch() or path),
    "below a file": lambda path: str(path.touch() or path / "cache"),
    "a fifo": lambda path: str(os.mkfifo(path) or path),
    "a link to nothing": lambda path: str(linked("nothing")(path) or path),
    "a link to itself": lambda path: str(linked(path.name)(path) or path),
    "names too long": lambda path: f"{path}/{'x' * 300}",
    "a place without files": lambda path: "/proc/self/caches",
}


@pytest.mark.parametrize("fault", CACHES)
def test_a_cache_that_cannot_be_is_named(tmp_path: Path, fault: str) -> None:
    cache = CACHES[fault](tmp_path / "caches")
    refused(text_config(tmp_path, text_folder(tmp_path / "corpus"), cache=cache), "/caches")


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk."""
    script = (
        "import resource, signal, sys\n"
        "from launch.data import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"config = DataConfig(source={str(text_folder(tmp_path / 'corpus'))!r}, vocabulary=300, cache=sys.argv[1])\n"
    )
    done = python(script + "try: prepare(config)\nexcept DataError as error: print(error)", str(tmp_path / "cache"))
    assert "File too large" in done.stdout
    assert str(tmp_path / "cache") in done.stdout
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, "")
    assert not list((tmp_path / "cache").iterdir())


def test_a_shard_cut_under_a_running_job_is_named(tmp_path: Path) -> None:
    """A mapping of the file would end the process with SIGBUS."""
    write_shard(tmp_path / "a.bin", np.arange(500_000) % 300, vocabulary=300)
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from launch.data import *\n"
        "path = Path(sys.argv[1])\n"
        "loader = TokenLoader([path], sequence=64, batch=64, rank=0, world=1, seed=0)\n"
        "next(loader)\n"
        "os.truncate(path, 5000)\n"
        "try: next(loader)\nexcept DataError as error: print(error)\n"
    )
    done = python(script, str(tmp_path / "a.bin"))
    assert done.stdout.startswith(f"{tmp_path}/a.bin: cut or changed since the run opened it; ")
    assert done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (0, "")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300)


def test_ranks_refuse_what_changed_after_it_was_prepared(prepared: tuple[DataConfig, Corpus]) -> None:
    """Nothing is built again under other ranks: the first has done that before they meet."""
    config, corpus = prepared
    before = corpus.train[0].read_bytes()
    corpus.train[0].write_bytes(flipped(before, -1))
    with pytest.raises(DataError, match=r"train-00000\.bin: changed since .*; remove the folder"):
        prepare_on_ranks(config, everywhere=lambda call: call(), gather=lambda one: [one], rank=0, world=1)
    corpus.train[0].write_bytes(before)
    assert prepare_on_ranks(config, everywhere=lambda call: call(), gather=lambda one: [one], rank=0, world=1) == corpus
