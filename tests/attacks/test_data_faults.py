"""Data as a hostile or a failing disk gives them: each fault ends in one line, and leaves nothing half-written."""

import functools
import gzip
import json
import os
import random
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from launch.data import DataConfig, DataError, prepare, sources, write_shard
from tests.launch.corpora import megatron_shard, raw_shard, text_config, text_folder

Fault = Callable[[Path], object]
ROWS = "\n".join(json.dumps({"text": f"row {index} says {index * 31}"}) for index in range(200)).encode()
ZST = pyarrow.compress(ROWS, codec="zstd", asbytes=True)
GZ = gzip.compress(ROWS)
TABLE = pyarrow.table({"text": [f"row {index} says {index * 31}" for index in range(500)], "id": range(500)})


def parquet(table: pyarrow.Table = TABLE, **options: object) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="none", **options)
    return sink.getvalue().to_pybytes()


PARQUET = parquet(write_page_checksum=True)


FOOTER = 8 + struct.unpack("<I", PARQUET[-8:-4])[0]


def flipped(data: bytes, *places: int) -> bytes:
    changed = bytearray(data)
    for place in places:
        changed[place] ^= 4
    return bytes(changed)


def column(values: list[object], kind: pyarrow.DataType) -> bytes:
    return parquet(pyarrow.table({"text": pyarrow.array(values, kind)}))


def unix_socket(path: Path) -> None:
    place = os.getcwd()
    os.chdir(path.parent)  # the whole path may be too long for one
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(path.name)
    finally:
        os.chdir(place)


def linked(to: str) -> Fault:
    return lambda path: path.symlink_to(to)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


# What a name can lead to, whatever its ending.
NO_FILES: dict[str, Fault] = {
    "fifo": os.mkfifo,
    "socket": unix_socket,
    "link to nothing": linked("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to a device": linked("/dev/zero"),
    "link to a folder": linked("/proc"),
    "link to what cannot be read": linked("/proc/self/mem"),
}
# Contents of one file among good ones, by its name.
CONTENTS: dict[str, dict[str, bytes | Fault]] = {
    "x.txt": {
        "latin-1": b"caf\xe9",
        "UTF-16": "text".encode("utf-16"),
        "half a character": "text §".encode()[:-1],
        "a surrogate": b"\xed\xa0\x80",
        "a tebibyte of nothing": sparse,
    },
    "x.jsonl": {
        "not JSON": b"text",
        "no object": b'["text"]',
        "a number": b"5",
        "nested without end": b"[" * 100_000,
        "nested in the text": b'{"text": ' + b'{"a":' * 100_000,
        "a number without end": b'{"text": ' + b"9" * 5000 + b"}",
        "not UTF-8": b'{"text": "caf\xe9"}',
        "UTF-16": '{"text": "a"}'.encode("utf-16"),
        "byte order mark": b'\xef\xbb\xbf{"text": "a"}',
        "zeros": bytes(1000),
        "half a character": rb'{"text": "\ud800"}',
        "another column": b'{"body": "a"}',
        "a control character as column": b'{"\\u001b[2J\\n": "a"}',
        "no text": b'{"text": 5}',
        "a list": b'{"text": ["a"]}',
        "cut": b'{"text": "a',
        "a line without end": b'{"text": "' + b"a" * 2_000_000 + b'"}',
    },
    "x.jsonl.gz": {
        "cut": GZ[:-9],
        "cut in the header": GZ[:5],
        "of no bytes": b"",
        "not gzip": ROWS,
        "flipped": flipped(GZ, len(GZ) // 2),
        "another sum": flipped(GZ, -6),
        "and more": GZ + b"more",
        "a bomb": gzip.compress(bytes(2**27)),
    },
    "x.jsonl.zst": {
        "cut": ZST[:-3],
        "of no bytes": b"",
        "not zstd": ROWS,
        "flipped": flipped(ZST, *range(9, len(ZST), 9)),
        "and more": ZST + b"more",
        "a bomb": pyarrow.compress(bytes(2**27), codec="zstd", asbytes=True),
    },
    "x.parquet": {
        "not parquet": ROWS,
        "of no bytes": b"",
        "only magic": b"PAR1PAR1",
        "cut": PARQUET[:-20],
        "without a head": PARQUET[100:],
        "another footer length": PARQUET[:-8] + struct.pack("<I", 2**31) + b"PAR1",
        "flipped footer": flipped(PARQUET, *range(len(PARQUET) - 600, len(PARQUET) - 8, 7)),
        "flipped page": flipped(PARQUET, 2000),
        "fewer rows than written": PARQUET[:-FOOTER] + PARQUET[-FOOTER:].replace(b"\xe8\x07", b"\xe6\x07", 1),
        "no such column": parquet(pyarrow.table({"body": ["a"]})),
        "numbers": column([1, 2], pyarrow.int64()),
        "bytes": column([b"a", b"b"], pyarrow.binary()),
        "lists": column([["a"], ["b"]], pyarrow.list_(pyarrow.string())),
        "objects": column([{"a": "b"}], pyarrow.struct({"a": pyarrow.string()})),
        "not UTF-8": parquet(
            pyarrow.table({"text": pyarrow.array([b"caf\xe9"]).view(pyarrow.string())}), use_dictionary=False
        ),
    },
}
SHARD = np.arange(50, dtype="<u2")


def headed(*header: int, tokens: np.ndarray = SHARD) -> Fault:
    return lambda path: raw_shard(path, list(header), tokens)


def indexed(change: Callable[[bytes], bytes]) -> Fault:
    """A shard of Megatron's with another index."""

    def write(path: Path) -> None:
        index = megatron_shard(path, [list(range(30)), list(range(20))]).with_suffix(".idx")
        index.write_bytes(change(index.read_bytes()))

    return write


def beside(fault: Fault) -> Fault:
    def write(path: Path) -> None:
        megatron_shard(path, [[1, 2]])
        path.with_suffix(".idx").unlink()
        fault(path.with_suffix(".idx"))

    return write


SHARDS: dict[str, Fault] = {
    "of no bytes": Path.touch,
    "without a whole header": lambda path: path.write_bytes(bytes(1000)),
    "bare ids": lambda path: SHARD.repeat(100).tofile(path),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "another magic": headed(20240521, 1, 50),
    "another version": headed(20240520, 7, 50),
    "another version of uint32": headed(20240801, 1, 50),
    "3 bytes a token": headed(20260317, 2, 50, 3),
    "-2 bytes a token": headed(20260317, 2, 50, -2),
    "no tokens": headed(20240520, 1, 0),
    "fewer than no tokens": headed(20240520, 1, -50),
    "2³¹ - 1 tokens": headed(20240520, 1, 2**31 - 1),
    "one token more": headed(20240520, 1, 51),
    "one token less": headed(20240520, 1, 49),
    "uint16 as uint32": headed(20240801, 7, 50),
    "ids outside the vocabulary": headed(20240520, 1, 50, tokens=SHARD + 1),
    "large ids": headed(20240801, 7, 50, tokens=(SHARD.astype("<u4") + 2**31)),
    "negative ids": lambda path: megatron_shard(path, [[1, -1]], code=4, dtype="<i4"),
    "index of fractions": lambda path: megatron_shard(path, [[1, 2]], code=7, dtype="<f4"),
    "index of no type": lambda path: megatron_shard(path, [[1, 2]], code=200),
    "index of no bytes": indexed(lambda data: b""),
    "index cut": indexed(lambda data: data[:40]),
    "index of something else": indexed(lambda data: b"TNTIDX\0\0" + data),
    "index of another version": indexed(lambda data: data[:9] + struct.pack("<Q", 2) + data[17:]),
    "index of no sequences": indexed(lambda data: data[:18] + bytes(8) + data[26:]),
    "index of 2⁶³ sequences": indexed(lambda data: data[:18] + struct.pack("<Q", 2**63) + data[26:]),
    "index of other lengths": indexed(lambda data: data[:34] + b"\xff" * 8 + data[42:]),
    "index of other places": indexed(lambda data: data[:42] + b"\xff" * 16 + data[58:]),
    "index that is a fifo": beside(os.mkfifo),
    "index that leads nowhere": beside(linked("nothing")),
}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """End a test that waits forever, as for a writer to a FIFO."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it hangs"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(config: DataConfig, name: str, *, progress: Callable[[str], object] | None = None) -> str:
    """Prepare, and return the one line with which that is refused; the cache holds nothing then."""
    with pytest.raises(DataError) as caught:
        prepare(config, progress=lambda message: progress(message) and None if progress else None)
    line = str(caught.value)
    assert line.isprintable()
    assert name in line
    assert "; " in line, "a remedy follows"
    assert len(line) <= 1001
    cache = Path(config.cache)
    assert not os.path.isdir(cache) or not list(cache.iterdir())
    return line


def good_files(folder: Path, ending: str) -> None:
    """Some files of a kind that are read, should the faulty one be."""
    if ending == "bin":
        for name in ("a", "b_val"):
            write_shard(folder / f"{name}.bin", SHARD, vocabulary=50)
    elif ending == "txt":
        text_folder(folder / "texts")
    else:
        whole = {"jsonl": ROWS, "jsonl.gz": GZ, "jsonl.zst": ZST, "parquet": PARQUET}[ending]
        (folder / f"a.{ending}").write_bytes(whole)


ENDINGS = ("txt", "jsonl", "jsonl.gz", "parquet", "bin")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fault", NO_FILES)
def test_what_is_no_file_is_named(tmp_path: Path, ending: str, fault: str) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    good_files(source, ending)
    NO_FILES[fault](source / f"x.{ending}")
    if (ending, fault) == ("bin", "link to a folder"):
        config = text_config(tmp_path, f"bin:{source}/[!a]*", vocabulary=50)
        refused(config, "only b_val.bin found")
    else:
        refused(text_config(tmp_path, source, vocabulary=300), f"x.{ending}")


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in CONTENTS.items() for fault in faults])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LINE_BYTES", 2**20)  # a bomb for that many is the same and is quicker made
    source = tmp_path / "corpus"
    source.mkdir()
    good_files(source, name.partition(".")[2])
    content = CONTENTS[name][fault]
    content(source / name) if callable(content) else (source / name).write_bytes(content)
    refused(text_config(tmp_path, source), name)


@pytest.mark.parametrize("fault", SHARDS)
def test_what_is_no_shard_is_named(tmp_path: Path, fault: str) -> None:
    good_files(tmp_path, "bin")
    SHARDS[fault](tmp_path / "x.bin")
    refused(text_config(tmp_path, f"bin:{tmp_path}/*.bin", vocabulary=50), "x.")


@pytest.mark.parametrize("place", range(48))
def test_flips_in_parquet_are_refused_or_change_no_row(tmp_path: Path, place: int) -> None:
    """Pages have checksums here. Flips that are not noticed are in statistics and names, which are not read."""
    draw = random.Random(place)
    source = tmp_path / "corpus"
    source.mkdir()
    # Half of them in the footer.
    start = (0, len(PARQUET) - 900)[place % 2]
    places = [draw.randrange(start, len(PARQUET)) for _ in range(1 + place // 2 % 4)]
    (source / "x.parquet").write_bytes(flipped(PARQUET, *places))
    config = text_config(tmp_path, source)
    open_source = functools.partial(sources.open_source, text_column="text", validation_fraction=0.5)
    try:
        texts = [document.text for document in open_source(str(source)).documents()]
    except DataError:
        refused(config, "x.parquet")
    else:
        assert texts == TABLE["text"].to_pylist()


SOURCES: dict[str, Callable[[Path], str]] = {
    "missing": lambda path: str(path / "missing"),
    "a file": lambda path: str((path / "x.txt").write_text("text") and path / "x.txt"),
    "a fifo": lambda path: os.mkfifo(path / "x") or str(path / "x"),
    "a link to nothing": lambda path: (path / "x").symlink_to("y") or str(path / "x"),
    "a link to itself": lambda path: (path / "x").symlink_to("x") or str(path / "x"),
    "a name too long": lambda path: str(path / ("x" * 300)),
    "a path too long": lambda path: str(path / ("x/" * 3000)),
    "an empty folder": lambda path: (path / "x").mkdir() or str(path / "x"),
    "a strange name": lambda path: str(path / "\x1b[2J\n[/x]"),
    "no match": lambda path: f"bin:{path}/*.bin",
    "a match of no file": lambda path: f"bin:{path}/\x1b[2J",
    "a data set that is missing": lambda path: f"datasets:{path}/missing",
    "a data set with a fifo": lambda path: os.mkfifo(path / "x.jsonl") or f"datasets:{path}",
    "a data set with a link to nothing": lambda path: (path / "x.csv").symlink_to("y") or f"datasets:{path}",
    "a data set that is not UTF-8": lambda path: (path / "x.jsonl").write_bytes(b"caf\xe9") and f"datasets:{path}",
    "a data set that is nested": lambda path: (path / "x.jsonl").write_bytes(b"[" * 99999) and f"datasets:{path}",
    "a data set that is pickled": lambda path: (path / "x.pkl").write_bytes(b"cos\nabort\n(tR.") and f"datasets:{path}",
}


@pytest.mark.parametrize("fault", SOURCES)
def test_a_source_that_is_none_is_named(tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "corpus"
    folder.mkdir()
    refused(text_config(tmp_path, SOURCES[fault](folder)), "/corpus")


@pytest.mark.parametrize("value", ["", "a\0b"])
@pytest.mark.parametrize("setting", ["source", "cache"])
def test_what_names_nothing_is_refused(setting: str, value: str) -> None:
    with pytest.raises(DataError, match=f"{setting}='.*must name something") as caught:
        DataConfig(**{setting: value})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("fault", [*NO_FILES, "removed", "cut", "none left"])
def test_a_file_may_change_while_it_is_read(tmp_path: Path, fault: str) -> None:
    source = text_folder(tmp_path / "corpus")
    paths = sorted(source.iterdir())

    def change(message: str) -> None:
        """Between the training of the tokenizer and the tokenization, or before."""
        for path in paths[:1] if fault in NO_FILES or fault == "removed" else paths:
            path.unlink(missing_ok=True)
            if fault in NO_FILES:
                NO_FILES[fault](path)
            elif fault == "cut":
                path.write_bytes(b"caf\xe9")

    refused(text_config(tmp_path, source), "/corpus", progress=change)
