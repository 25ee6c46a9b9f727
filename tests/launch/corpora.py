"""Small corpora for tests: folders of text, and token shards."""

import struct
from pathlib import Path

import numpy as np

from launch.data import END_OF_TEXT, DataConfig, load_tokenizer, read_shard, write_shard


def raw_shard(path: Path, header: list[int], tokens: np.ndarray) -> Path:
    values = np.zeros(256, "<i4")
    values[: len(header)] = header
    path.write_bytes(values.tobytes() + tokens.tobytes())
    return path


def megatron_shard(path: Path, documents: list[list[int]], *, code: int = 8, dtype: str = "<u2") -> Path:
    """A `.bin` file of Megatron's with its `.idx` file."""
    lengths = np.array([len(document) for document in documents], "<i4")
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    places = (np.cumsum(lengths) - lengths).astype("<i8") * np.dtype(dtype).itemsize
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    boundaries = np.arange(len(documents) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + places.tobytes() + boundaries.tobytes())
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
