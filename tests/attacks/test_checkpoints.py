"""Checkpoints as a failing disk or a hostile hand leaves them: refused in one line, or read, and never run as code."""

import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, Metadata, MetadataIndex

from launch.checkpoints.directory import describe_files
from launch.checkpoints.manifest import CheckpointError, digest
from launch.checkpoints.pickles import check_objects, check_torch_file, read_metadata
from launch.checkpoints.sharded import load, load_weights, save
from launch.engines.deepspeed.checkpoint import check_files
from launch.loop.resumption import Job
from symdist import SymDist

IDENTITY = {"model": "tiny", "recipe": {"matrix": {"rule": "muon"}}}
JOB: Job = {
    "step": 2,
    "elapsed": 0.5,
    "data": {"position": 8, "fingerprint": "abc", "seed": 1},
    "counts": {"skipped_steps": 0, "spikes": 0},
    "spikes": {"seen": [3.0]},
    "skipped_in_a_row": 0,
    "unvalidated": False,
    "settings": {"batch": 4},
}
HOSTILE = (
    *(None, True, -1, 0, 2**70, -0.5, math.inf, math.nan, "", "x", "../x", "/etc/passwd", "\0", "[/x]\x1b[2J"),
    *([], {}, [None], {"": 1}, [[[[[]]]]], {"a": {"b": {}}}),
)
# The gate runs a tenth.
BATCHES, DAMAGES, RESIGNED = range(10), 20, 20


def build() -> tuple[torch.nn.Module, SymDist]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 4, bias=False), torch.nn.LayerNorm(4))
    embedding, matrix, norm = model
    rules = ({"params": [embedding.weight], "rule": "row_norm"}, {"params": [matrix.weight], "rule": "muon"})
    return model, SymDist([*rules, {"params": list(norm.parameters()), "rule": "adamw"}], lr=0.1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, optimizer = build()
    for _ in range(2):
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("saved")
    return save(folder, 2, model=model, optimizer=optimizer, trainer=dict(JOB), identity=IDENTITY)


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def outcome(path: Path) -> str | None:
    """The message that a checkpoint is refused with; None if it is read, to rates that are numbers."""
    model, optimizer = build()
    try:
        load(path, model=model, optimizer=optimizer, identity=IDENTITY, trainer=TypeAdapter(Job))
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert "\n" not in message.strip()
        return message
    assert all(math.isfinite(group["lr"]) for group in optimizer.param_groups)
    return None


def resign(path: Path) -> None:
    """What a hostile hand does after a change, so that sizes and checksums agree again."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256", None)
    with contextlib.suppress(OSError, TypeError, AttributeError, KeyError):
        manifest["files"] |= describe_files([path / name for name in manifest["files"]])
    sign(path, manifest)


def sign(path: Path, manifest: dict[str, Any]) -> None:
    (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digest(manifest)}))


def damage(path: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    at = draw.randrange(len(content))
    kind = draw.randrange(8)
    if kind < 3:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 3:
        del content[at:]
    elif kind == 4:
        content[at:at] = draw.randbytes(draw.randrange(1, 9))
    elif kind == 5:
        content[at : at + 64] = bytes(len(content[at : at + 64])) + b"\1"
    file.unlink()
    if kind < 6:
        file.write_bytes(content)
    elif kind == 7:
        draw.choice((Path.mkdir, os.mkfifo, lambda file: file.symlink_to(file)))(file)


@pytest.mark.parametrize("batch", BATCHES)
def test_damages_are_refused(saved: Path, tmp_path: Path, batch: int) -> None:
    assert outcome(saved) is None
    for number in range(DAMAGES):
        path = Path(shutil.copytree(saved, tmp_path / f"{number}" / saved.name))
        damage(path, random.Random(f"{batch} {number}"))
        assert outcome(path) is not None, (batch, number)


def spoil(value: Any, draw: random.Random) -> Any:
    """Replace one value somewhere in JSON."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        spoilt = value.copy()
        key = draw.choice(sorted(value)) if isinstance(value, dict) else draw.randrange(len(value))
        spoilt[key] = spoil(value[key], draw)
        return spoilt
    return draw.choice(HOSTILE)


@pytest.mark.parametrize("batch", BATCHES)
def test_resigned_changes_are_refused_or_read(saved: Path, tmp_path: Path, batch: int) -> None:
    for number in range(RESIGNED):
        draw = random.Random(f"{batch} {number}")
        path = Path(shutil.copytree(saved, tmp_path / f"{number}" / saved.name))
        name = draw.choice(("state.json", "manifest.json", "rng-00000.json", ".metadata", "__0_0.distcp"))
        if name == "manifest.json":
            content = spoil(json.loads((path / name).read_text()), draw)
            if isinstance(content, dict):
                sign(path, {key: value for key, value in content.items() if key != "sha256"})
            else:
                (path / name).write_text(json.dumps(content))
        elif name.endswith(".json"):
            (path / name).write_text(json.dumps(spoil(json.loads((path / name).read_text()), draw)))
            resign(path)
        else:
            binary = bytearray((path / name).read_bytes())
            binary[draw.randrange(len(binary))] ^= 1 << draw.randrange(8)
            (path / name).write_bytes(binary)
            resign(path)
        outcome(path)


def at(*keys: str | int) -> Callable[[dict[str, Any], Any], None]:
    def put(content: dict[str, Any], value: Any) -> None:
        for key in keys[:-1]:
            content = content[key]  # type: ignore[index]
        content[keys[-1]] = value  # type: ignore[index]

    return put


@pytest.mark.parametrize(
    ("file", "put", "value", "words"),
    [
        ("state.json", at("trainer", "step"), 1, "is of step 1, but the manifest of step 2"),
        ("state.json", at("trainer", "elapsed"), -1.0, "elapsed"),
        ("state.json", at("trainer", "elapsed"), math.nan, "elapsed"),
        ("state.json", at("trainer", "data", "position"), "0", "data.position"),
        ("state.json", at("trainer", "data"), None, "data"),
        ("state.json", at("trainer", "counts", "spikes"), True, "counts.spikes"),
        ("state.json", at("trainer", "spikes", "seen"), [math.inf], "spikes.seen"),
        ("state.json", at("trainer", "more"), 1, "more"),
        ("state.json", at("optimizer", "groups", 0, "lr"), "0.1", "lr of group 0 is '0.1'"),
        ("state.json", at("optimizer", "groups", 0, "lr"), math.nan, "lr"),
        ("state.json", at("optimizer", "groups", 1), {}, "other parameters"),
        ("state.json", at("optimizer", "groups"), None, "groups"),
        ("state.json", at("optimizer", "scalars"), {"x": {"y": 1}}, "x has values on one side only"),
        ("rng-00000.json", at("python"), [3, [1, 2], None], "no generator's state"),
        ("rng-00000.json", at("torch"), "AAAA", "no generator's state"),
        ("rng-00000.json", at("numpy"), {}, "no generator's state"),
        ("rng-00000.json", at("numpy", "state", "pos"), 700, "no generator's state"),
        ("rng-00000.json", at("cuda"), "?", "no generator's state"),
        ("manifest.json", at("world_size"), 0, "world_size"),
        ("manifest.json", at("step"), -1, "step"),
        ("manifest.json", at("files", "../state.json"), {"bytes": 1}, "../state.json"),
        ("manifest.json", at("files", "/etc/passwd"), {"bytes": 1}, "/etc/passwd"),
        ("manifest.json", at("files", "state.json", "bytes"), -1, "bytes"),
        ("manifest.json", at("files"), [], "files"),
        ("manifest.json", at("identity"), [], "identity"),
        ("manifest.json", at("identity", "recipe", "matrix", "rule"), "adamw", "recipe.matrix.rule is 'adamw' in the"),
    ],
)
def test_resigned_values_are_refused_by_name(
    copy: Path, file: str, put: Callable[[dict[str, Any], Any], None], value: Any, words: str
) -> None:
    content = json.loads((copy / file).read_text())
    put(content, value)
    if file == "manifest.json":
        content.pop("sha256")
        sign(copy, content)
    else:
        (copy / file).write_text(json.dumps(content))
        resign(copy)
    message = outcome(copy)
    assert message is not None
    assert words in message


def nested(path: Path) -> None:
    (path / "manifest.json").write_text('{"a":' * 100_000)


@pytest.mark.parametrize(
    "change",
    [
        nested,
        lambda path: (path / "manifest.json").write_bytes(b"\0" * 100),
        lambda path: (path / "manifest.json").write_text("[]"),
        lambda path: (path / "manifest.json").write_text("9" * 10_000),
    ],
    ids=["nested without end", "NULs", "a list", "a long number"],
)
def test_a_manifest_that_is_none_is_refused(copy: Path, change: Callable[[Path], object]) -> None:
    change(copy)
    assert "manifest.json" in (outcome(copy) or "")


def of_bytes(content: Metadata) -> None:
    content.state_dict_metadata["model.1.weight"] = BytesStorageMetadata()


def elsewhere(name: str) -> Callable[[Metadata], None]:
    def change(content: Metadata) -> None:
        next(iter(content.storage_data.values())).relative_path = name

    return change


def beyond(content: Metadata) -> None:
    next(iter(content.storage_data.values())).offset = 10**9


def with_chunks(*chunks: ChunkStorageMetadata) -> Callable[[Metadata], None]:
    def change(content: Metadata) -> None:
        content.state_dict_metadata["model.1.weight"].chunks = list(chunks)

    return change


def transformed(content: Metadata) -> None:
    next(iter(content.storage_data.values())).transform_descriptors = ["zstd"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (of_bytes, "is not stored as a tensor"),
        (elsewhere("../other"), "is not the name of a file"),
        (elsewhere("/etc/passwd"), "is not the name of a file"),
        (elsewhere("nothing"), "cannot be read"),
        (beyond, "is said to be at"),
        (with_chunks(), "do not make up a tensor"),
        (with_chunks(ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((5, 4)))), "do not make up a tensor"),
        (with_chunks(ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 4)))), "do not make up a tensor"),
        (with_chunks(*[ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 4)))] * 2), "do not make up a tensor"),
        (with_chunks(None), "do not make up a tensor"),  # type: ignore[arg-type]
        (transformed, "is stored as"),
    ],
)
def test_resigned_metadata_is_refused(copy: Path, change: Callable[[Metadata], None], words: str) -> None:
    content = read_metadata(copy)
    change(content)
    (copy / ".metadata").write_bytes(pickle.dumps(content))
    resign(copy)
    assert words in (outcome(copy) or "")


def test_what_is_no_tensor_changes_no_weight(copy: Path) -> None:
    """The rest of the checkpoint is in order, so that DCP itself comes to the pickle."""
    content = read_metadata(copy)
    index = next(index for index in content.storage_data if index.fqn == "model.1.weight")
    place, stream = content.storage_data[index], io.BytesIO()
    torch.save({"not": "a tensor"}, stream)
    shard = (copy / "__0_0.distcp").read_bytes()
    place.offset, place.length = len(shard), len(stream.getvalue())
    (copy / "__0_0.distcp").write_bytes(shard + stream.getvalue())
    (copy / ".metadata").write_bytes(pickle.dumps(content))
    resign(copy)
    model, _ = build()
    before = model[1].weight.detach().clone()
    with pytest.raises(CheckpointError):
        load_weights(copy, model=model)
    assert torch.equal(model[1].weight, before)


# Pickles that leave a mark if any of their code runs. A name is looked up by importing its module, which runs as well.


class Marks:
    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def by_protocol(mark: Path, protocol: int) -> bytes:
    return pickle.dumps(Marks(os.mkdir, str(mark)), protocol)


def by_import(mark: Path) -> bytes:
    (mark.parent / "marking_module.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Harmless: pass\n")
    return b"cmarking_module\nHarmless\n)R."


def in_metadata(mark: Path) -> bytes:
    content = Metadata({}, planner_data=Marks(os.mkdir, str(mark)), storage_data={})
    return pickle.dumps(content)


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "protocol 0": lambda mark: by_protocol(mark, 0),
    "protocol 2": lambda mark: by_protocol(mark, 2),
    "protocol 4": lambda mark: by_protocol(mark, 4),
    "exec": lambda mark: pickle.dumps(Marks(exec, f"import os; os.mkdir({str(mark)!r})")),
    "getattr": lambda mark: pickle.dumps(Marks(getattr, Marks(__import__, "os"), "mkdir")),
    "partial": lambda mark: pickle.dumps(functools.partial(os.mkdir, str(mark))),
    "import": by_import,
    "in metadata": in_metadata,
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", PICKLES)
def test_no_pickle_runs_from_metadata(copy: Path, mark: Path, kind: str) -> None:
    (copy / ".metadata").write_bytes(PICKLES[kind](mark))
    resign(copy)
    assert "it was not loaded, as it could run code" in (outcome(copy) or "")


def test_a_key_that_compares_otherwise_hides_nothing(tmp_path: Path) -> None:
    """A pickle may set attributes of the classes that it may name, and of keys that are in a table already."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state": [1], "weight": torch.ones(2)}, checkpoint_id=tmp_path / "there")
    file = tmp_path / "there" / ".metadata"
    plain = file.read_bytes()
    index, place = (
        b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n",
        b"ctorch.distributed.checkpoint.metadata\n",
    )
    equal = b"(N(dS'__eq__'\n" + place + b"Metadata\nst" + b"b"
    before = dict(vars(MetadataIndex))
    file.write_bytes(index + equal + b"0" + plain)
    with pytest.raises(CheckpointError, match=r"it changes MetadataIndex\.__eq__"):
        read_metadata(tmp_path / "there")
    assert dict(vars(MetadataIndex)) == before


def test_a_link_in_a_deepspeed_checkpoint_is_refused(tmp_path: Path, mark: Path) -> None:
    """DeepSpeed would follow it to files that nobody has looked through."""
    torch_file(tmp_path / "elsewhere" / "fp32.pt", {"module": Marks(os.mkdir, str(mark))})
    (tmp_path / "step-00000002" / "zero").mkdir(parents=True)
    (tmp_path / "step-00000002" / "zero" / "weight").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        check_files(tmp_path / "step-00000002", rank=0, world=1)


def torch_file(file: Path, content: Any, **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file, **options)
    return file


def test_the_marks_show(tmp_path: Path) -> None:
    """That the pickles above would run: else no test of them could fail."""
    for kind in PICKLES.keys() - {"import", "getattr"}:
        pickle.loads(PICKLES[kind](tmp_path / "shown"))
        if kind != "partial":
            (tmp_path / "shown").rmdir()


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}])
@pytest.mark.parametrize(
    "name",
    [
        *("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        *("zero/model.embed_tokens.weight/fp32.pt", "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_no_pickle_of_deepspeeds_runs(tmp_path: Path, mark: Path, name: str, options: dict[str, Any]) -> None:
    torch_file(tmp_path / "step-00000002" / name, {"module": Marks(os.mkdir, str(mark))}, **options)
    with pytest.raises(CheckpointError, match=r"mkdir.*--trust-checkpoints|is no file of torch.save"):
        check_files(tmp_path / "step-00000002", rank=0, world=1)


def test_no_pickle_of_megatrons_runs(tmp_path: Path, mark: Path) -> None:
    """Objects among the shards, such as the states of modules, and the file that all ranks share."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state": Marks(os.mkdir, str(mark)), "weight": torch.ones(2)}, checkpoint_id=tmp_path / "there")
    with pytest.raises(CheckpointError, match=r"state in .*mkdir"):
        check_objects(tmp_path / "there", read_metadata(tmp_path / "there"))
    file = torch_file(tmp_path / "common.pt", {"args": Marks(os.mkdir, str(mark))})
    with pytest.raises(CheckpointError, match="mkdir"):
        check_torch_file(file, "common.pt")


def test_plain_objects_of_megatrons_are_read(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"state": {"a": [1, 2.5, "b"]}, "weight": torch.ones(2)}, checkpoint_id=tmp_path / "there")
    check_objects(tmp_path / "there", read_metadata(tmp_path / "there"))
