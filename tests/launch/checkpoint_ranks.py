"""One rank of the two-rank checkpoint tests; writes what it saw to ``OUT/rank-N.json`` for pytest to judge.

Run as ``python -m torch.distributed.run --nproc_per_node=2 checkpoint_ranks.py OUT``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

IDENTITY = {"model": "tiny", "recipe": "adamw", "betas": (0.9, 0.95)}


def build(seed: int, *, width: int = 5) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model with an uneven first dimension, so that the two shards differ in shape."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.3), torch.nn.Linear(width, 3))
    model.register_buffer("scale", torch.full((2,), float(seed)))
    if dist.is_initialized():
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.9))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Take steps on data and dropout that come from all three generators; return the losses of this rank."""
    losses = []
    for _ in range(steps):
        inputs = torch.tensor(np.random.standard_normal((6, 4)), dtype=torch.float32) + random.random()
        loss = (model(inputs).square().sum(dim=1) - torch.randn(6)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def seed_rank(seed: int) -> None:
    """Give each rank its own stream of random numbers."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    random.seed(seed + rank)
    np.random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def bytes_of(values: dict[str, Any]) -> str:
    """Return a digest of this rank's part of every tensor in ``values``."""
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        local = value.to_local() if isinstance(value, DTensor) else value
        digest.update(name.encode() + local.detach().numpy().tobytes())
    return digest.hexdigest()


def listing(directory: Path) -> dict[str, str]:
    """Return the digest of every file below ``directory``, hidden ones included."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the CheckpointError that ``call`` raises, or a note that it raised none."""
    from launch.checkpoints.sharded import CheckpointError

    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "NOT REFUSED"


def rewrite(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 1
    return data


def edit_manifest(path: Path, **values: Any) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def sign_manifest(path: Path, **values: Any) -> None:
    """As a program of another version would write it."""
    content = json.loads((path / "manifest.json").read_text()) | values
    del content["sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    edit_manifest(path, **values, sha256=digest)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: rewrite(path / "__1_0.distcp", lambda data: data[:-1]),
    "longer": lambda path: rewrite(path / "__1_0.distcp", lambda data: data + b"x"),
    "flipped shard of rank 0": lambda path: rewrite(path / "__0_0.distcp", flip),
    "flipped shard of rank 1": lambda path: rewrite(path / "__1_0.distcp", flip),
    "flipped metadata": lambda path: rewrite(path / ".metadata", flip),
    "flipped rng": lambda path: rewrite(path / "rng-00001.json", flip),
    "missing file": lambda path: (path / "__0_0.distcp").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "garbled manifest": lambda path: rewrite(path / "manifest.json", lambda data: data[:-9]),
    "edited manifest": lambda path: edit_manifest(path, step=99),
    "foreign": lambda path: edit_manifest(path, format="other"),
    "newer version": lambda path: sign_manifest(path, version=3),
    "flipped manifest": lambda path: rewrite(path / "manifest.json", flip),
    "missing directory": shutil.rmtree,
}


def continues(out: Path) -> dict[str, Any]:
    """Save amid training, go on, and go on again from the checkpoint with everything else different."""
    from launch.checkpoints.sharded import load, save

    model, optimizer = build(1)
    seed_rank(10)
    train(model, optimizer, 3)
    trainer = {"step": 3, "position": [7, 0.1]}
    path = save(out / "run", 3, model=model, optimizer=optimizer, trainer=trainer, identity=IDENTITY)
    expected = train(model, optimizer, 4)
    model, optimizer = build(2)
    optimizer.param_groups[0]["lr"] = 1.0
    seed_rank(20)
    unrestored = train(*build(2), 4)
    seed_rank(20)
    restored = load(path, model=model, optimizer=optimizer, identity=IDENTITY)
    return {
        "expected": expected,
        "unrestored": unrestored,
        "continued": train(model, optimizer, 4),
        "trainer": restored,
        "betas": repr(optimizer.param_groups[0]["betas"]),
        "scale": model.scale.tolist(),
        "path": str(path),
    }


def refuses(out: Path) -> dict[str, Any]:
    """Try to load damaged copies of a good checkpoint."""
    from launch.checkpoints.sharded import load

    good = out / "run" / "step-00000003"
    model, optimizer = build(3)
    train(model, optimizer, 1)
    before = bytes_of(model.state_dict()), bytes_of(dict(enumerate_state(optimizer)))

    def attempt(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
        files = listing(path)
        message = refusal(lambda: load(path, model=model, optimizer=optimizer, identity=identity))
        after = bytes_of(model.state_dict()), bytes_of(dict(enumerate_state(optimizer)))
        return {"message": message, "same files": listing(path) == files, "same weights": after == before}

    seen = {}
    for index, (name, damage) in enumerate(DAMAGES.items()):
        path = out / f"damaged-{index}" / "step-00000003"
        if dist.get_rank() == 0:
            shutil.copytree(good, path)
            damage(path)
        dist.barrier()
        seen[name] = attempt(path, IDENTITY)
        dist.barrier()
    seen["other run"] = attempt(good, IDENTITY | {"recipe": "muon"})
    model, optimizer = build(3, width=6)
    train(model, optimizer, 1)
    before = bytes_of(model.state_dict()), bytes_of(dict(enumerate_state(optimizer)))
    seen["other shape"] = attempt(good, IDENTITY)
    return seen


def enumerate_state(optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Return the optimizer's state tensors under names that sort."""
    states = enumerate(optimizer.state.values())
    return [(f"{index:03d}.{key}", value) for index, state in states for key, value in state.items()]


def fails_to_write(out: Path) -> dict[str, Any]:
    """Fail on one rank only, in the shards and then in the file of random states; then save for good."""
    import launch.checkpoints.sharded as checkpoint

    model, optimizer = build(4)

    def save(step: int) -> Path:
        return checkpoint.save(
            out / "failing", step, model=model, optimizer=optimizer, trainer={"step": step}, identity=IDENTITY
        )

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    first = save(1)
    # A save that was killed before left this; the next one clears it.
    leftover = out / "failing" / "step-00000002.writing"
    if dist.get_rank() == 0:
        leftover.mkdir()
        (leftover / "manifest.json").write_text("{}")
    dist.barrier()
    newest_beside_leftover = str(checkpoint.latest(out / "failing"))
    before = listing(first)
    seen: dict[str, Any] = {"latest beside leftover": newest_beside_leftover}
    for name, owner, attribute in (
        ("shards", dcp.FileSystemWriter, "write_data"),
        ("rng", checkpoint, "write_json"),
    ):
        original = getattr(owner, attribute)
        if dist.get_rank() == 1:
            setattr(owner, attribute, full)
        message = refusal(lambda: save(2))
        setattr(owner, attribute, original)
        names = sorted(os.listdir(out / "failing"))
        seen[name] = {"message": message, "names": names, "stands": listing(first) == before}
        dist.barrier()
    trainer = checkpoint.load(first, model=model, optimizer=optimizer, identity=IDENTITY)
    dist.barrier()
    save(2)
    return seen | {"loaded step": trainer["step"], "names": sorted(os.listdir(out / "failing"))}


def keeps(out: Path) -> dict[str, Any]:
    """Save five times and keep two; then save again from an earlier step."""
    from launch.checkpoints.sharded import latest, save

    model, optimizer = build(5)
    seen: dict[str, Any] = {"none": latest(out / "kept")}

    def save_step(step: int, identity: dict[str, Any] = IDENTITY) -> None:
        save(out / "kept", step, model=model, optimizer=optimizer, trainer={}, identity=identity, keep=2)

    for step in (1, 2, 3, 10, 20):
        save_step(step)
        dist.barrier()
    seen["kept"] = sorted(os.listdir(out / "kept"))
    seen["latest"] = str(latest(out / "kept"))
    dist.barrier()  # nobody starts the next save while another still looks
    save_step(10)
    seen["again"] = sorted(os.listdir(out / "kept"))
    dist.barrier()
    seen["other run"] = refusal(lambda: save_step(30, {"model": "other"}))
    seen["after refusal"] = sorted(os.listdir(out / "kept"))
    return seen


def main(out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = (continues, refuses, fails_to_write, keeps)
    seen = {case.__name__: case(out) for case in cases}
    (out / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()
    # Gloo's threads can abort a process whose interpreter is torn down (pytorch#190489).
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
