"""Token shards: their layouts, what is refused, their split, and the converter."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.data import (
    DataConfig,
    DataError,
    ShardWriter,
    TokenLoader,
    prepare,
    read_shard,
    validation_batches,
    write_shard,
)
from launch.data.convert import Conversion, convert
from launch.data.pretokenized import split_shards
from tests.launch.corpora import megatron_shard, numbered_shards, raw_shard


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_shard_round_trip(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    tokens = np.array([0, 5, vocabulary - 1, 7])
    write_shard(tmp_path / "a.bin", tokens, vocabulary=vocabulary)
    read = read_shard(tmp_path / "a.bin")
    assert read.dtype == np.dtype(dtype)
    assert read.tolist() == tokens.tolist()
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize(("header", "dtype"), [([20240520, 1, 3], "<u2"), ([20240801, 7, 3], "<u4")])
def test_shards_of_llm_c_are_read(tmp_path: Path, header: list[int], dtype: str) -> None:
    path = raw_shard(tmp_path / "a.bin", header, np.array([1, 50256, 2], dtype))
    assert read_shard(path).tolist() == [1, 50256, 2]


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_shards_of_megatron_are_read(tmp_path: Path, code: int, dtype: str) -> None:
    path = megatron_shard(tmp_path / "a_text_document.bin", [[1, 2, 99], [3], [4, 99]], code=code, dtype=dtype)
    assert read_shard(path).tolist() == [1, 2, 99, 3, 4, 99]


def test_what_megatron_writes_is_read(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for name, dtype in (("train", np.int32), ("val", np.uint16)):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        for start in (0, 40):
            builder.add_document(torch.arange(start, start + 40), [10, 30])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    corpus = prepare(DataConfig(source=str(tmp_path), vocabulary=80))
    assert [path.name for path in (*corpus.train, *corpus.validation)] == ["train.bin", "val.bin"]
    assert read_shard(corpus.train[0]).tolist() == list(range(80))
    batch = next(TokenLoader(corpus.train, sequence=79, batch=1, rank=0, world=1, seed=0))
    assert batch.tolist() == [list(range(80))]


def test_a_negative_id_is_outside_every_vocabulary(tmp_path: Path) -> None:
    for name, ids in (("a", [0, -1]), ("b", [0, 1])):
        megatron_shard(tmp_path / f"{name}.bin", [ids], code=4, dtype="<i4")
    with pytest.raises(DataError, match=r"a\.bin: token id 4294967295 is outside"):
        prepare(DataConfig(source=f"bin:{tmp_path}/*", vocabulary=50))


def test_bare_ids_are_converted(tmp_path: Path) -> None:
    for name, dtype in (("train", "<u2"), ("val", "<u2")):
        np.arange(1000, dtype=dtype).tofile(tmp_path / f"{name}.bin")
    with pytest.raises(DataError, match=r"train\.bin: not a token shard.*python -m launch\.data\.convert"):
        prepare(DataConfig(source=str(tmp_path), vocabulary=1000))
    files = (tmp_path / "train.bin", tmp_path / "val.bin")
    convert(Conversion(files=files, dtype="uint16", output=tmp_path / "shards"))
    corpus = prepare(DataConfig(source=str(tmp_path / "shards"), vocabulary=1000))
    assert [path.name for path in (*corpus.train, *corpus.validation)] == ["train-00000.bin", "val-00000.bin"]
    assert read_shard(corpus.train[0]).tolist() == list(range(1000))
    with pytest.raises(DataError, match="exists already"):
        convert(Conversion(files=files, dtype="uint16", output=tmp_path / "shards"))
    files[1].write_bytes(b"odd")
    with pytest.raises(DataError, match=r"val\.bin: ends within an id"):
        convert(Conversion(files=files, dtype="uint16", output=tmp_path / "others"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "train.bin", "val.bin"]


@pytest.mark.parametrize("damage", ["cut", "replaced", "removed", "other ids"])
def test_a_shard_that_changes_under_a_run_is_named(tmp_path: Path, damage: str) -> None:
    """Read through a mapping of a file that was cut, the process would end with SIGBUS."""
    paths = numbered_shards(tmp_path, 100_000)
    loader = TokenLoader(paths, sequence=8, batch=8, rank=0, world=1, seed=0)
    validation = {"sequence": 8, "batch": 8, "rank": 0, "world": 1, "limit": 16}
    next(loader), list(validation_batches(paths, **validation))
    if damage == "cut":
        os.truncate(paths[0], 2000)
    elif damage == "replaced":
        numbered_shards(tmp_path, 100_001)
    elif damage == "removed":
        paths[0].unlink()
    else:
        with paths[0].open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"abcd")
    with pytest.raises(DataError, match=r"part-0\.bin: "):
        next(loader)
    with pytest.raises(DataError, match=r"part-0\.bin: "):
        list(validation_batches(paths, **validation))


@pytest.mark.parametrize(
    ("header", "payload", "problem"),
    [
        ([7, 1, 3], 3, "it begins with 7"),
        ([20240520, 2, 3], 3, "version 2"),
        ([20240801, 1, 3], 6, "version 1"),
        ([20240801, 7, 3], 3, "truncated"),
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


def test_bin_split_by_name_or_first(tmp_path: Path) -> None:
    for name in ("x_train_1", "x_train_0", "x_train_2"):
        write_shard(tmp_path / f"{name}.bin", np.arange(50), vocabulary=50)
    corpus = prepare(DataConfig(source=str(tmp_path), vocabulary=50))
    assert [path.name for path in corpus.train] == ["x_train_1.bin", "x_train_2.bin"]
    assert [path.name for path in corpus.validation] == ["x_train_0.bin"]
    assert corpus.tokenizer is None
    write_shard(tmp_path / "x_val_0.bin", np.arange(50), vocabulary=50)
    named = prepare(DataConfig(source=f"bin:{tmp_path}/*.bin", vocabulary=50))
    assert len(named.train) == 3
    assert [path.name for path in named.validation] == ["x_val_0.bin"]
    assert named.fingerprint != corpus.fingerprint


def test_another_shard_does_not_change_the_validation_split(tmp_path: Path) -> None:
    said: list[str] = []
    for number in range(3, 12):
        write_shard(tmp_path / f"part_{number:02d}.bin", np.arange(50), vocabulary=50)
        if number > 3:
            corpus = prepare(DataConfig(source=str(tmp_path), vocabulary=50), progress=said.append)
            assert [path.name for path in corpus.validation] == ["part_03.bin"]
            assert said[-1].endswith(f"{number - 3} shards to train on; to validate on: part_03.bin")


@pytest.mark.parametrize(
    ("name", "validates"),
    [
        *(
            ("fineweb_val_000000", True),
            ("val", True),
            ("val0", True),
            ("my-validation-00001", True),
            ("VALID.1", True),
        ),
        *(("interval_0", False), ("retrieval", False), ("evaluation_0", False), ("valley", False), ("naval-3", False)),
        *(("val/part-0", True), ("intervals/part-0", False)),
    ],
)
def test_only_whole_words_name_validation_shards(tmp_path: Path, name: str, validates: bool) -> None:
    folder = tmp_path / "val"  # which all are in, so it says nothing
    for stem in ("a", "b", name):
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        write_shard(folder / f"{stem}.bin", np.arange(50), vocabulary=50)
    _, validation = split_shards(f"{folder}/**/*.bin")
    assert validation == (folder / f"{name if validates else 'a'}.bin",)


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
