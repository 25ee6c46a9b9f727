"""Corpora: sources and their split, the cache, token shards, and what each rank reads."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from launch.data import (
    END_OF_TEXT,
    DataConfig,
    DataError,
    ShardWriter,
    TokenLoader,
    load_tokenizer,
    prepare,
    read_shard,
    validation_batches,
    write_shard,
)
from launch.data.permutation import permute
from launch.data.sources import open_source
from launch.data.tokenizer import encode_documents, train_tokenizer


def raw_shard(path: Path, header: list[int], tokens: np.ndarray) -> Path:
    values = np.zeros(256, "<i4")
    values[: len(header)] = header
    path.write_bytes(values.tobytes() + tokens.tobytes())
    return path


def numbered_shards(folder: Path, *sizes: int) -> list[Path]:
    """Shards whose tokens count on from 0, so that a window tells its own place."""
    paths, start = [], 0
    for index, size in enumerate(sizes):
        paths.append(folder / f"part-{index}.bin")
        write_shard(paths[-1], np.arange(start, start + size), vocabulary=2**17)
        start += size
    return paths


def text_folder(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    for index in range(count):
        (folder / f"{index}.txt").write_text(f"document {index}: " + f"words about subject {index * 7919} " * 20)
    return folder


def text_config(tmp_path: Path, source: Path | str, **changes: object) -> DataConfig:
    settings = {"source": str(source), "vocabulary": 300, "cache": str(tmp_path / "cache")} | changes
    return DataConfig(**settings)


def decoded(paths: tuple[Path, ...], tokenizer: Path) -> list[str]:
    """The documents of some shards."""
    ids = np.concatenate([read_shard(path) for path in paths])
    text = load_tokenizer(tokenizer).decode(ids.tolist(), skip_special_tokens=False)
    assert text.endswith(END_OF_TEXT)
    return text.split(END_OF_TEXT)[:-1]


# Shards


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_shard_round_trip(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    tokens = np.array([0, 5, vocabulary - 1, 7])
    write_shard(tmp_path / "a.bin", tokens, vocabulary=vocabulary)
    mapped = read_shard(tmp_path / "a.bin")
    assert isinstance(mapped, np.memmap)
    assert mapped.dtype == np.dtype(dtype)
    assert mapped.tolist() == tokens.tolist()
    assert os.listdir(tmp_path) == ["a.bin"]


def test_version_1_is_read(tmp_path: Path) -> None:
    path = raw_shard(tmp_path / "a.bin", [20240520, 1, 3], np.array([1, 50256, 2], "<u2"))
    assert read_shard(path).tolist() == [1, 50256, 2]


@pytest.mark.parametrize(
    ("header", "payload", "problem"),
    [
        ([7, 1, 3], 3, "it begins with 7"),
        ([20240520, 2, 3], 3, "version 2"),
        ([20260317, 1, 3, 2], 3, "version 1"),
        ([20260317, 2, 3, 3], 3, "3 bytes per token"),
        ([20240520, 1, 0], 0, "says 0 tokens"),
        ([20240520, 1, 4], 3, "truncated"),
        ([20240520, 1, 2], 3, "2 trailing bytes"),
    ],
)
def test_broken_shards(tmp_path: Path, header: list[int], payload: int, problem: str) -> None:
    path = raw_shard(tmp_path / "broken.bin", header, np.zeros(payload, "<u2"))
    with pytest.raises(DataError, match=rf"broken\.bin: .*{problem}"):
        read_shard(path)


def test_shard_without_a_whole_header(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match="truncated, it has 100 bytes"):
        read_shard(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"b\.bin: cannot be read"):
        read_shard(tmp_path / "b.bin")


def test_writer_cuts_the_stream(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", vocabulary=100, shard_tokens=10)
    for start in (0, 3, 17):
        writer.append(np.arange(start, {0: 3, 3: 17, 17: 34}[start]))
    paths = writer.close()
    assert [path.name for path in paths] == [f"train-0000{index}.bin" for index in range(4)]
    assert [read_shard(path).size for path in paths] == [10, 10, 10, 4]
    assert np.concatenate([read_shard(path) for path in paths]).tolist() == list(range(34))


# Pre-tokenized corpora


def test_bin_split_by_name_or_last(tmp_path: Path) -> None:
    for name in ("x_train_1", "x_train_0", "x_train_2"):
        write_shard(tmp_path / f"{name}.bin", np.arange(50), vocabulary=50)
    corpus = prepare(DataConfig(source=str(tmp_path), vocabulary=50))
    assert [path.name for path in corpus.train] == ["x_train_0.bin", "x_train_1.bin"]
    assert [path.name for path in corpus.validation] == ["x_train_2.bin"]
    assert corpus.tokenizer is None
    write_shard(tmp_path / "x_val_0.bin", np.arange(50), vocabulary=50)
    named = prepare(DataConfig(source=f"bin:{tmp_path}/*.bin", vocabulary=50))
    assert len(named.train) == 3
    assert [path.name for path in named.validation] == ["x_val_0.bin"]
    assert named.fingerprint != corpus.fingerprint


def test_bin_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shard matches"):
        prepare(DataConfig(source=f"bin:{tmp_path}/*.bin"))
    write_shard(tmp_path / "one.bin", np.arange(60), vocabulary=60)
    with pytest.raises(DataError, match=r"only one\.bin"):
        prepare(DataConfig(source=f"bin:{tmp_path}/*.bin"))
    write_shard(tmp_path / "two.bin", np.arange(50), vocabulary=60)
    with pytest.raises(DataError, match=r"one\.bin: token id 59 is outside the vocabulary of 50.*at least 60"):
        prepare(DataConfig(source=f"bin:{tmp_path}", vocabulary=50))
    with pytest.raises(DataError, match="max_tokens"):
        prepare(DataConfig(source=f"bin:{tmp_path}", vocabulary=60, max_tokens=5))
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(DataError, match=f"give 'bin:{tmp_path}'"):
        prepare(DataConfig(source=str(tmp_path)))


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
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "image.png").write_bytes(b"png")
    corpus = prepare(text_config(tmp_path, source, validation_fraction=0.3))
    assert corpus.tokenizer is not None
    train = decoded(corpus.train, corpus.tokenizer)
    validation = decoded(corpus.validation, corpus.tokenizer)
    assert not set(train) & set(validation)
    assert 10 <= len(validation) <= 40
    files = [path.read_text() for path in source.rglob("*.[tm]*") if path.name != "latin.txt"]
    assert sorted(train + validation) == sorted(files)


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


# Loading


@pytest.mark.parametrize("size", [1, 2, 3, 64, 65, 1000])
def test_permutation_is_one_to_one(size: int) -> None:
    positions = np.arange(size)
    first = permute(positions, size=size, seed=1, epoch=0)
    assert sorted(first) == list(range(size))
    if size >= 64:
        others = [permute(positions, size=size, seed=seed, epoch=epoch) for seed, epoch in ((1, 1), (2, 0))]
        assert all((first == other).mean() < 0.2 for other in [positions, *others])
        assert len(np.unique(np.diff(first))) > size // 4
    assert permute(positions[-1:], size=size, seed=1, epoch=0) == first[-1]


def test_permutation_of_a_huge_range() -> None:
    size = 3 * 10**12
    places = permute(np.arange(size - 1000, size), size=size, seed=0, epoch=0)
    assert len(np.unique(places)) == 1000
    assert 0.4 < places.mean() / size < 0.6
    assert places.max() < size


def loaders(paths: list[Path], world: int, batch: int = 2, **options: object) -> list[TokenLoader]:
    settings = {"sequence": 8, "seed": 3} | options
    return [TokenLoader(paths, batch=batch, rank=rank, world=world, **settings) for rank in range(world)]


def step(ranks: list[TokenLoader]) -> list[int]:
    """First token of each window that one step of all ranks reads, in global order."""
    batches = [next(loader) for loader in ranks]
    assert all(tokens.dtype == torch.int64 and tokens.shape[1] == 9 for tokens in batches)
    assert all((tokens.diff(dim=1) == 1).all() for tokens in batches)
    return torch.cat(batches)[:, 0].tolist()


def test_an_epoch_covers_each_window_once(tmp_path: Path) -> None:
    paths = numbered_shards(tmp_path, 8 * 10 + 1, 5, 8 * 13 + 8, 8 + 1)
    starts = [*range(0, 80, 8), *range(86, 86 + 8 * 13, 8), 86 + 112]
    ranks = loaders(paths, world=3)
    assert ranks[0].windows == len(starts) == 24
    epochs = [[start for _ in range(4) for start in step(ranks)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == starts
    assert epochs[0] != epochs[1]
    assert epochs[0] != starts
    ordered = loaders(paths, world=3, shuffle=False)
    assert [start for _ in range(4) for start in step(ordered)] == starts


def test_seed_decides_the_order(tmp_path: Path) -> None:
    paths = numbered_shards(tmp_path, 8 * 50 + 1)
    assert step(loaders(paths, world=2)) == step(loaders(paths, world=2))
    assert step(loaders(paths, world=2)) != step(loaders(paths, world=2, seed=4))


@pytest.mark.parametrize(("world", "batch"), [(2, 2), (1, 4), (4, 1), (3, 2)])
def test_resuming_continues_the_global_row(tmp_path: Path, world: int, batch: int) -> None:
    paths = numbered_shards(tmp_path, 8 * 30 + 1, 8 * 11 + 3)
    whole = loaders(paths, world=2)
    for _ in range(7):
        step(whole)
    state = json.loads(json.dumps(whole[1].state_dict()))
    assert state["position"] == 28
    expected = [start for _ in range(12) for start in step(whole)]  # past the end of the first epoch
    resumed = loaders(paths, world=world, batch=batch)
    for loader in resumed:
        loader.load_state_dict(state)
    found = [start for _ in range(48 // (world * batch)) for start in step(resumed)]
    assert found == expected


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    paths, others = numbered_shards(tmp_path, 200), numbered_shards(tmp_path / "b", 199)
    state = loaders(paths, world=1)[0].state_dict()
    for changed, problem in (
        (loaders(others, world=1), "fingerprint"),
        (loaders(paths, world=1, sequence=9), "sequence 8.*sequence 9"),
        (loaders(paths, world=1, shuffle=False), "shuffled.*in order"),
        (loaders(paths, world=1, seed=4), "seed"),
    ):
        with pytest.raises(DataError, match=problem):
            changed[0].load_state_dict(state)


def test_loader_errors(tmp_path: Path) -> None:
    paths = numbered_shards(tmp_path, 8 * 5 + 1)
    with pytest.raises(DataError, match=r"part-0\.bin: 5 windows .* global batch of 6"):
        loaders(paths, world=3)
    with pytest.raises(DataError, match="outside the vocabulary of 3"):
        next(loaders(paths, world=1, vocabulary=3)[0])
    with pytest.raises(DataError, match="too short for one window"):
        validation_batches(paths, sequence=64, batch=1, rank=0, world=1, limit=None)


@pytest.mark.parametrize("limit", [1, 7, 12, None])
def test_validation_is_the_same_at_any_world_size(tmp_path: Path, limit: int | None) -> None:
    paths = numbered_shards(tmp_path, 8 * 9 + 1, 8 * 4 + 2)
    sets = []
    for world in (1, 2, 3):
        seen: list[int] = []
        counts = set()
        for rank in range(world):
            found = list(validation_batches(paths, sequence=8, batch=2, rank=rank, world=world, limit=limit))
            counts.add(len(found))
            for tokens, weight in found:
                assert tokens.shape == (2, 9)
                assert set(weight.tolist()) <= {0.0, 1.0}
                seen += tokens[weight == 1][:, 0].tolist()
        assert len(counts) == 1
        sets.append(sorted(seen))
    assert sets[0] == sets[1] == sets[2]
    assert len(set(sets[0])) == len(sets[0]) == min(limit or 13, 13)
