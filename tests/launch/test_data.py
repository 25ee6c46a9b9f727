"""Corpora: the tokenizer, sources and their split, and the cache."""

import gzip
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from launch.data import (
    END_OF_TEXT,
    Corpus,
    DataConfig,
    DataError,
    load_tokenizer,
    prepare,
    prepare_on_ranks,
    read_shard,
    survey,
    write_shard,
)
from launch.data.cache import sweep, work_folder
from launch.data.sources import open_source
from launch.data.tokenizer import encode_documents, train_tokenizer
from tests.launch.corpora import decoded, raw_shard, text_config, text_folder

PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
    ".json.gz": gzip.compress,
}


def on_ranks(world: int, config: DataConfig) -> list[Corpus]:
    """What ranks get that share the reading; each is a thread."""
    values: list[Any] = [None] * world
    barrier = threading.Barrier(world)

    def run(rank: int) -> Corpus:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            barrier.wait()
            gathered = list(values)
            barrier.wait()
            return gathered

        def everywhere(function: Callable[[], Any]) -> Any:
            try:
                found = function()
            except DataError as error:
                found = error
            for outcome in gather(found):
                if isinstance(outcome, DataError):
                    raise outcome
            return found

        return prepare_on_ranks(config, everywhere=everywhere, gather=gather, rank=rank, world=world)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


# Tokenizer


def test_tokenizer_is_deterministic_and_lossless() -> None:
    texts = [Path(json.__file__).read_text(), Path(multiprocessing.__file__).read_text()]
    first, second = (train_tokenizer(texts, vocabulary=600) for _ in range(2))
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 600
    unseen = f"naïve ☃ \t {END_OF_TEXT} \x00 end" * 20_000  # longer than one piece of encoding
    ids = encode_documents(first, [unseen, "b"])
    assert [int((document == 0).sum()) for document in ids] == [1, 1]
    assert first.decode(ids[0][:-1].tolist()) == unseen


def test_vocabulary_too_small() -> None:
    with pytest.raises(DataError, match="vocabulary=299"):
        train_tokenizer(["text"], vocabulary=299)


# Sources


def test_text_folder_splits_by_content(tmp_path: Path) -> None:
    source = text_folder(tmp_path / "corpus")
    (source / "sub").mkdir()
    for path in sorted(source.glob("*.txt")):
        (source / "sub" / f"copy-{path.stem}.md").write_text(path.read_text())
    (source / "image.png").write_bytes(b"png")
    corpus = prepare(text_config(tmp_path, source, validation_fraction=0.3))
    assert corpus.tokenizer is not None
    train = decoded(corpus.train, corpus.tokenizer)
    validation = decoded(corpus.validation, corpus.tokenizer)
    assert not set(train) & set(validation)
    assert 10 <= len(validation) <= 40
    files = [path.read_text() for path in source.rglob("*.[tm]*")]
    assert sorted(train + validation) == sorted(files)


def test_texts_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    source = text_folder(tmp_path / "corpus")
    for index in range(5):
        (source / f"latin-{index}.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin-\d\.txt \(at byte 3\), .* and 2 more: not UTF-8"):
        prepare(text_config(tmp_path, source))


def test_names_that_are_not_utf_8_are_names(tmp_path: Path) -> None:
    source = text_folder(tmp_path / "corpus")
    (source / os.fsdecode(b"caf\xe9.txt")).write_text("the text of a file with an old name")
    (source / os.fsdecode(b"caf\xe9\x1b[2J\n.png")).write_bytes(b"png")
    said: list[str] = []
    corpus = prepare(text_config(tmp_path, source), progress=said.append)
    assert corpus.tokenizer is not None
    assert "the text of a file with an old name" in decoded((*corpus.train, *corpus.validation), corpus.tokenizer)
    assert any(r"1 files of other kinds are passed over: caf\udce9\x1b[2J\n.png" in line for line in said)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_few_files_leave_neither_side_empty(tmp_path: Path, fraction: float) -> None:
    source = text_folder(tmp_path / "corpus", count=3)
    documents = list(open_source(str(source), text_column="text", validation_fraction=fraction).documents())
    assert {document.validation for document in documents} == {True, False}


def test_directory_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such directory"):
        prepare(text_config(tmp_path, tmp_path / "nowhere"))
    (tmp_path / "corpus").mkdir()
    with pytest.raises(DataError, match="corpus: holds no text"):
        prepare(text_config(tmp_path, tmp_path / "corpus"))
    (tmp_path / "corpus" / "only.txt").write_text("alone")
    with pytest.raises(DataError, match="at least two"):
        prepare(text_config(tmp_path, tmp_path / "corpus"))
    with pytest.raises(DataError, match="validation_fraction"):
        DataConfig(validation_fraction=1.0)
    with pytest.raises(DataError, match="max_tokens"):
        DataConfig(max_tokens=0)


def test_parquet(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    texts = [f"row {index} says {index * 31}" for index in range(3000)]
    for part in range(2):
        rows = [*texts[part::2], None, ""]
        table = pyarrow.table({"body": rows, "id": list(range(len(rows)))})
        pyarrow.parquet.write_table(table, source / f"{part}.parquet")
    (source / "README.md").write_text("about the rows")
    corpus = prepare(text_config(tmp_path, source, text_column="body"))
    assert corpus.tokenizer is not None
    validation = decoded(corpus.validation, corpus.tokenizer)
    assert 75 < len(validation) < 250
    assert sorted(decoded(corpus.train, corpus.tokenizer) + validation) == sorted(texts)
    with pytest.raises(DataError, match=r"0\.parquet: no column 'text'.*body, id"):
        prepare(text_config(tmp_path, source))
    with pytest.raises(DataError, match="'id' holds int"):
        prepare(text_config(tmp_path, source, text_column="id"))
    (source / "0.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"0\.parquet: not a readable parquet file"):
        prepare(text_config(tmp_path, source, text_column="body"))


def test_json_lines(tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    texts = [f"line {index} of § says {index * 31}" for index in range(2000)]
    for part, (suffix, pack) in enumerate(PACKED.items()):
        rows = [{"body": text, "id": 1} for text in texts[part :: len(PACKED)]]
        lines = [json.dumps(row, ensure_ascii=bool(part % 2)) for row in (*rows, {"body": None}, {"body": ""})]
        (source / f"{part}{suffix}").write_bytes(pack("\n\n".join(lines).encode()))
    (source / "README.md").write_text("about the lines")
    said: list[str] = []
    corpus = prepare(text_config(tmp_path, source, text_column="body"), progress=said.append)
    assert said[0] == f"{source}: 1 files of other kinds are passed over: README.md"
    assert corpus.tokenizer is not None
    validation = decoded(corpus.validation, corpus.tokenizer)
    assert 50 < len(validation) < 150
    assert sorted(decoded(corpus.train, corpus.tokenizer) + validation) == sorted(texts)
    with pytest.raises(DataError, match=r"0\.jsonl, line 1: no column 'text'.*body, id"):
        prepare(text_config(tmp_path, source))
    with pytest.raises(DataError, match=r"0\.jsonl, line 1: column 'id' holds int"):
        prepare(text_config(tmp_path, source, text_column="id"))


def test_mixed_folders_name_what_they_pass_over(tmp_path: Path) -> None:
    source = text_folder(tmp_path / "corpus")
    (source / "elsewhere").symlink_to(tmp_path)
    (source / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    said: list[str] = []
    prepare(text_config(tmp_path, source), progress=said.append)
    assert said[0] == f"{source}: 2 files of other kinds are passed over: a.txt.gz, elsewhere"
    assert said[0] in survey(text_config(tmp_path, source))[0]
    (source / "rows.jsonl").write_text(json.dumps({"text": "a row"}))
    assert (
        "42 files of other kinds are passed over: 0.txt, 1.txt, 10.txt and 39 more"
        in survey(text_config(tmp_path, source))[0]
    )


def test_datasets_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = tmp_path / "rows"
    source.mkdir()
    lines = [json.dumps({"text": f"line {index} of many " * 5}) for index in range(2000)]
    (source / "train.jsonl").write_text("\n".join(lines))
    corpus = prepare(text_config(tmp_path, f"datasets:{source}", max_tokens=4000))
    assert corpus.tokenizer is not None
    assert [read_shard(path).size for path in corpus.train] == [4000]
    assert [read_shard(path).size for path in corpus.validation] == [200]
    ids = np.concatenate([read_shard(path) for path in (*corpus.train, *corpus.validation)])
    assert load_tokenizer(corpus.tokenizer).decode(ids[:60].tolist()).startswith("line 0 of many")
    with pytest.raises(DataError, match=r"no column 'body'.*text"):
        prepare(text_config(tmp_path, f"datasets:{source}", text_column="body"))
    with pytest.raises(DataError, match="cannot be opened"):
        prepare(text_config(tmp_path, f"datasets:{tmp_path}/absent"))


def test_datasets_name_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {index}" for index in range(500)]})
    asked = []

    def load(*names: str | None, split: str, streaming: bool) -> datasets.IterableDataset:
        asked.append((*names, split, streaming))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    corpora = [prepare(text_config(tmp_path, f"datasets:org/name{config}")) for config in ("", ":small")]
    assert set(asked) == {("org/name", None, "train", True), ("org/name", "small", "train", True)}
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert corpora[0].train != corpora[1].train


def test_standard_library(tmp_path: Path) -> None:
    corpus = prepare(DataConfig(vocabulary=512, max_tokens=30_000, cache=str(tmp_path)))
    assert corpus.tokenizer is not None
    assert sum(read_shard(path).size for path in corpus.train) == 30_000
    assert sum(read_shard(path).size for path in corpus.validation) == 1_500
    text = load_tokenizer(corpus.tokenizer).decode(read_shard(corpus.train[0])[:20_000].tolist())
    assert "import" in text
    files = open_source("stdlib", text_column="", validation_fraction=0.05)
    sides: dict[str, bool] = {}
    for document in files.documents():
        assert sides.setdefault(document.text, document.validation) == document.validation
    assert 0.03 < sum(sides.values()) / len(sides) < 0.07
    assert "site-packages" not in files.identity


# Cache


def test_cache_is_reused_and_keyed(tmp_path: Path) -> None:
    source = text_folder(tmp_path / "corpus")
    config = text_config(tmp_path, source)
    said: list[str] = []
    first = prepare(config, progress=said.append)
    assert said
    said.clear()
    assert prepare(config, progress=said.append) == first
    assert not said
    assert prepare(text_config(tmp_path, source, max_tokens=100)).fingerprint != first.fingerprint
    fresh = prepare(text_config(tmp_path, source, cache=str(tmp_path / "other")), progress=said.append)
    assert said
    assert fresh.fingerprint == first.fingerprint
    (source / "0.txt").write_text("now something else")
    assert prepare(config).fingerprint != first.fingerprint


def test_cache_that_lost_a_file_is_built_again(tmp_path: Path) -> None:
    config = text_config(tmp_path, text_folder(tmp_path / "corpus"))
    first = prepare(config)
    with first.train[0].open("r+b") as file:
        file.truncate(2000)
    assert prepare(config) == first
    assert read_shard(first.train[0]).size > 1000
    (first.train[0].parent / "manifest.json").unlink()
    assert prepare(config) == first


@pytest.mark.parametrize("place", [1024, -1])
def test_a_flipped_bit_in_the_cache_is_seen(tmp_path: Path, place: int) -> None:
    config = text_config(tmp_path, text_folder(tmp_path / "corpus"))
    first = prepare(config)
    for path in first.shards:
        before = path.read_bytes()
        changed = bytearray(before)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{path.name}: changed since it was prepared"):
            first.verify()
        said: list[str] = []
        assert prepare(config, progress=said.append) == first
        assert said[0].startswith(f"{path}: changed since it was prepared")
        assert path.read_bytes() == before
        assert [path.name[0] != "." for path in Path(config.cache).iterdir()] == [True]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    corpus = prepare(text_config(tmp_path, text_folder(tmp_path / "corpus")))
    write_shard(tmp_path / "c_train.bin", np.arange(50), vocabulary=50)
    write_shard(tmp_path / "b_val.bin", np.arange(50), vocabulary=50)
    write_shard(tmp_path / "a_train.bin", np.arange(40), vocabulary=50)
    bare = DataConfig(source=f"bin:{tmp_path}/*.bin", vocabulary=50)
    assert on_ranks(2, bare) == [prepare(bare)] * 2
    assert on_ranks(4, bare) == [prepare(bare)] * 4
    assert on_ranks(2, text_config(tmp_path, tmp_path / "corpus")) == [corpus] * 2
    shares = [replace(prepare(bare), checksums=()).verify(rank=rank, world=2) for rank in range(2)]
    assert [sorted(share) for share in shares] == [[0, 2], [1]]
    with pytest.raises(DataError, match=r"c_train\.bin: nodes have different files"):
        prepare(bare).verified([*shares, {1: "0" * 64}])
    for path in (tmp_path / "c_train.bin", tmp_path / "b_val.bin"):
        raw_shard(path, [20260317, 2, 50, 2], np.full(50, 51, "<u2"))
        with pytest.raises(DataError, match=rf"{path.name}: token id 51"):
            on_ranks(2, bare)
        write_shard(path, np.arange(50), vocabulary=50)


def _stall(config: DataConfig) -> None:
    prepare(config, progress=lambda message: time.sleep(60 if "validation" in message else 0))


def test_killed_preparation_leaves_no_corpus(tmp_path: Path) -> None:
    config = text_config(tmp_path, text_folder(tmp_path / "corpus"))
    process = multiprocessing.get_context("spawn").Process(target=_stall, args=(config,))
    process.start()
    cache = Path(config.cache)
    deadline = time.monotonic() + 30
    while not list(cache.glob(".*/tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [path.name[0] for path in cache.iterdir()] == ["."]
    corpus = prepare(config)
    assert all(read_shard(path).size for path in (*corpus.train, *corpus.validation))
    assert [path.name for path in cache.iterdir()] == [corpus.train[0].parent.name]


def test_only_what_nobody_prepares_is_swept(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with work_folder(cache / ("0" * 20)) as work:
        elsewhere = cache / f".{'1' * 20}-another-host-{'2' * 32}"
        old = cache / f".{'1' * 20}-{'3' * 32}"
        strange = cache / ".ssh"
        for folder in (elsewhere, old, strange):
            folder.mkdir()
        left_over = cache / work.name.replace("0" * 20, "4" * 20)
        left_over.symlink_to(tmp_path)
        os.utime(old, (0, 0))
        os.utime(strange, (0, 0))
        sweep(cache)
        assert all(path.is_dir() for path in (work, elsewhere, old, strange, left_over))
    sweep(cache)
    assert {*cache.iterdir()} == {elsewhere, strange}
    assert tmp_path.is_dir()


def test_the_loser_of_a_race_takes_the_winners_corpus(tmp_path: Path) -> None:
    config = text_config(tmp_path, text_folder(tmp_path / "corpus"))
    winners = []

    def overtake(message: str) -> None:
        if not winners:
            winners.append(prepare(config))
            winners.append(winners[0].train[0].stat().st_ino)

    loser = prepare(config, progress=overtake)
    assert loser == winners[0]
    assert loser.train[0].stat().st_ino == winners[1]
    assert [path.name for path in Path(config.cache).iterdir()] == [loser.train[0].parent.name]
