"""Checkpoints of two real ranks (see ``checkpoint_ranks.py``), and of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from launch.checkpoints import directory as checkpoints
from launch.checkpoints.sharded import CheckpointError, latest, load, save

ROOT = Path(__file__).parents[2]
RANKS = Path(__file__).with_name("checkpoint_ranks.py")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*command, str(RANKS), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module", params=[0, 1], ids=["rank0", "rank1"])
def seen(request: pytest.FixtureRequest, out: Path) -> dict[str, Any]:
    return json.loads((out / f"rank-{request.param}.json").read_text())


def test_losses_continue_bit_for_bit(seen: dict[str, Any]) -> None:
    case = seen["continues"]
    assert case["continued"] == case["expected"]
    assert case["unrestored"] != case["expected"]
    assert case["trainer"] == {"step": 3, "position": [7, 0.1], "rng_restored": True}
    assert case["betas"] == "(0.8, 0.9)"
    assert case["scale"] == [1.0, 1.0]
    assert Path(case["path"]).name == "step-00000003"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("truncated", "__1_0.distcp has"),
        ("longer", "__1_0.distcp has"),
        ("flipped shard of rank 0", "__0_0.distcp does not match its checksum"),
        ("flipped shard of rank 1", "__1_0.distcp does not match its checksum"),
        ("flipped metadata", ".metadata does not match its checksum"),
        ("flipped rng", "rng-00001.json does not match its checksum"),
        ("missing file", "__0_0.distcp is missing"),
        ("no manifest", "was never finished, or is no symdist checkpoint"),
        ("garbled manifest", "manifest.json is damaged"),
        ("edited manifest", "its checksum does not match"),
        ("foreign", "another program's"),
        ("newer version", "has format version 3, but this release of symdist reads 2"),
        ("flipped manifest", "manifest.json is damaged"),
        ("missing directory", "there is no checkpoint directory"),
        ("other run", "recipe is 'adamw' in the checkpoint but 'muon' in this run"),
        ("other shape", "model.0.weight has shape (5, 4) and torch.float32 in the checkpoint, but (6, 4)"),
    ],
)
def test_refuses_on_every_rank_and_touches_nothing(seen: dict[str, Any], case: str, words: str) -> None:
    found = seen["refuses"][case]
    assert words in found["message"]
    assert "step-00000003" in found["message"]
    assert found["same files"]
    assert found["same weights"]


@pytest.mark.parametrize("case", ["shards", "rng"])
def test_failed_write_leaves_earlier_checkpoints_only(seen: dict[str, Any], case: str) -> None:
    found = seen["fails_to_write"][case]
    assert "step-00000002" in found["message"]
    assert "OSError on rank 1: [Errno 28] No space left on device" in found["message"]
    assert found["names"] == ["step-00000001"]
    assert found["stands"]


def test_save_after_a_failure(seen: dict[str, Any]) -> None:
    found = seen["fails_to_write"]
    assert found["loaded step"] == 1
    assert found["names"] == ["step-00000001", "step-00000002"]
    assert found["latest beside leftover"].endswith("step-00000001")


def test_keeps_the_newest(seen: dict[str, Any]) -> None:
    found = seen["keeps"]
    assert found["none"] is None
    assert found["kept"] == ["step-00000010", "step-00000020"]
    assert found["latest"].endswith("step-00000020")
    assert found["again"] == ["step-00000010", "step-00000020"]


def test_save_refuses_the_directory_of_another_run(seen: dict[str, Any]) -> None:
    found = seen["keeps"]
    assert "model is 'tiny' in the checkpoint but 'other' in this run" in found["other run"]
    assert found["after refusal"] == found["again"]


class _HalfWeights(torch.optim.Optimizer):
    """Keeps a float32 momentum, a count and a plain number for bfloat16 weights."""

    def __init__(self, weights: list[torch.nn.Parameter]) -> None:
        super().__init__(weights, {"lr": 0.1, "rule": "half", "window": (1, 2)})
        for weight in weights:
            momentum = torch.full(weight.shape, 1 / 3, dtype=torch.float32)
            self.state[weight] = {"momentum": momentum, "count": torch.tensor(2**40 + 1), "scale": 0.5}

    def step(self, closure: Any = None) -> None:
        raise AssertionError("state that exists already needs no step to make it")


def _half_run() -> tuple[torch.nn.Module, _HalfWeights]:
    model = torch.nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    return model, _HalfWeights(list(model.parameters()))


def test_single_process_keeps_dtypes_and_plain_values(tmp_path: Path) -> None:
    model, optimizer = _half_run()
    expected = model.weight.detach().clone()
    save(tmp_path, 7, model=model, optimizer=optimizer, trainer={"step": 7}, identity={"model": "half"})

    model, optimizer = _half_run()
    state = optimizer.state[model.weight]
    state["momentum"].zero_()
    state["count"].zero_()
    state["scale"] = 0.0
    optimizer.param_groups[0].update(lr=9.0, window=(8, 9))
    path = latest(tmp_path)
    assert path == tmp_path / "step-00000007"
    trainer = load(path, model=model, optimizer=optimizer, identity={"model": "half"})

    assert trainer == {"step": 7, "rng_restored": True}
    assert torch.equal(model.weight, expected)
    state = optimizer.state[model.weight]
    assert torch.equal(state["momentum"], torch.full((2, 3), 1 / 3, dtype=torch.float32))
    assert state["count"] == 2**40 + 1
    assert state["scale"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["window"] == (1, 2)


def test_fewer_ranks_load_the_shards_but_no_random_state(out: Path) -> None:
    sys.path.insert(0, str(RANKS.parent))
    try:
        from checkpoint_ranks import IDENTITY, build
    finally:
        sys.path.pop(0)
    path = out / "run" / "step-00000003"
    model, optimizer = build(6)
    before = torch.get_rng_state()
    trainer = load(path, model=model, optimizer=optimizer, identity=IDENTITY)
    assert trainer["rng_restored"] is False
    assert torch.equal(torch.get_rng_state(), before)
    stored = {"model.0.weight": torch.zeros(5, 4)}
    dcp.load(stored, storage_reader=dcp.FileSystemReader(path))
    assert torch.equal(model[0].weight, stored["model.0.weight"])
    assert stored["model.0.weight"].any()
    assert optimizer.state[model[0].weight]["step"] == 3


def test_unserialisable_trainer_value_leaves_nothing(tmp_path: Path) -> None:
    model, optimizer = _half_run()
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save(tmp_path, 1, model=model, optimizer=optimizer, trainer={"x": object()}, identity={})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("checksums", "limit", "damage_shows"), [(None, 10**6, True), (None, 0, False), (False, 0, False), (True, 0, True)]
)
def test_checksums_by_size_or_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checksums: bool | None, limit: int, damage_shows: bool
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKSUM_LIMIT", limit)
    model, optimizer = _half_run()
    path = save(tmp_path, 1, model=model, optimizer=optimizer, trainer={}, identity={}, checksums=checksums)
    shard = path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    if damage_shows:
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            checkpoints.verify(path, identity={}, rank=0, world=1)
    else:
        assert checkpoints.verify(path, identity={}, rank=0, world=1)["step"] == 1


def test_keep_must_leave_one(tmp_path: Path) -> None:
    model, optimizer = _half_run()
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, 1, model=model, optimizer=optimizer, trainer={}, identity={}, keep=0)
