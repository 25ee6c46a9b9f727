"""Recipes beside PyTorch's AdamW, measured in one run: each has its own copy of the model, and they take turns.

Taking turns step by step lets what else the machine does fall on all alike; numbers of different runs do not compare.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from symdist.clipping import clip_grad_norm_
from symdist.commands.preview import preview
from symdist.diagnostics.memory import peak_bytes
from symdist.exchange import Collectives, Counting
from symdist.layouts import local
from symdist.models import build, shard
from symdist.routing import build_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Settings: TypeAlias = dict[str, Any]

YARDSTICK = "torch.optim.AdamW"
_WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One arm. Times are seconds, of the slowest rank each step and the median over steps; bytes are the worst rank's.

    A step is forward, backward, clipping and the optimizer. `ratio` is optimizer time over the yardstick's, `share`
    over that of the whole step. `peak_bytes` is what the optimizer's step needs for a moment on top of all it keeps.
    """

    name: str
    step_seconds: float
    optimizer_seconds: float
    share: float
    ratio: float
    collectives: int
    sent_bytes: float
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was run, and every arm, the yardstick first."""

    model: str
    ranks: int
    threads: int
    backend: str
    device: str
    torch: str
    steps: int
    batch: int
    sequence: int
    arms: list[Measured]

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def compare(
    model: str, recipes: Sequence[str], *, ranks: int = 2, steps: int = 12, batch: int = 8, sequence: int = 128
) -> Comparison:
    """Start `ranks` processes and train each recipe and the yardstick on random tokens for `steps` measured steps.

    `model` and `recipes` are names or TOML files. `batch` sequences of `sequence` tokens go to every rank every step.
    The ranks talk NCCL where each has a GPU, else gloo, with the machine's cores divided among them. Raises
    ValueError for a model or recipe that cannot be run, and for counts below 1.
    """
    for name, count in (("ranks", ranks), ("steps", steps), ("batch", batch), ("sequence", sequence)):
        if count < 1:
            raise ValueError(f"{name}={count} must be 1 or more")
    for recipe in recipes:
        # In seconds and in this process, where the message reaches the user, not as a traceback of some rank.
        preview(model, recipe, ranks=ranks)
    cuda = torch.cuda.device_count() >= ranks
    run: Settings = {
        "model": model,
        "ranks": ranks,
        "threads": max(1, (os.cpu_count() or 1) // ranks),
        "backend": "nccl" if cuda else "gloo",
        "device": "cuda" if cuda else "cpu",
        "steps": steps,
        "batch": batch,
        "sequence": sequence,
    }
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(_rank, args=(directory, run, list(recipes)), nprocs=ranks)
        by_rank = [json.loads((Path(directory) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return Comparison(**run, torch=torch.__version__, arms=_summary(by_rank))


@dataclass(kw_only=True)
class _Arm:
    """A model with its optimizer, and this rank's seconds, `steps` and `optimizer`, a number a step."""

    name: str
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    counting: Counting
    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "optimizer": []})

    def step(self, tokens: Tensor) -> None:
        """One step of training, timed."""
        # Nobody's step begins while another rank still computes the arm before.
        dist.barrier()
        self._wait()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self._wait()
        clipped = time.perf_counter()
        self.counting.log.clear()
        self.optimizer.step()
        self._wait()
        done = time.perf_counter()
        self.seconds["step"].append(done - start)
        self.seconds["optimizer"].append(done - clipped)

    def report(self) -> dict[str, Any]:
        """What this rank has seen; takes one more optimizer step, with the last gradients, to watch its memory."""
        moved = {"collectives": self.counting.collectives, "sent_bytes": self.counting.sent}
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        return {
            "name": self.name,
            "seconds": {key: values[_WARMUP:] for key, values in self.seconds.items()},
            **moved,
            "state_bytes": sum(local(tensor).nbytes for tensor in state),
            "peak_bytes": peak_bytes(self.optimizer.step, device=self.device),
        }

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _rank(rank: int, directory: str, run: Settings, recipes: list[str]) -> None:
    device = torch.device(run["device"], rank) if run["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(run["threads"])
    # Each rank seeds its own generator here, so what DTensor has no generator for does no harm.
    warnings.filterwarnings("ignore", message="DTensor random operators")
    store = f"file://{directory}/store"
    dist.init_process_group(run["backend"], init_method=store, rank=rank, world_size=run["ranks"])
    mesh = init_device_mesh(device.type, (run["ranks"],))
    arms = [_arm(recipe, run["model"], mesh, device) for recipe in (None, *recipes)]
    vocabulary = arms[0].model.config.vocab_size
    for step in range(_WARMUP + run["steps"]):
        tokens = torch.randint(vocabulary, (run["batch"], run["sequence"]), device=device)
        first = step % len(arms)
        for arm in arms[first:] + arms[:first]:
            arm.step(tokens)
    reports = [arm.report() for arm in arms]
    (Path(directory) / f"rank-{rank}.json").write_text(json.dumps(reports))
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads can abort a process whose interpreter is torn down (pytorch#190489), and all is written.
    os._exit(0)


def _arm(recipe: str | None, name: str, mesh: DeviceMesh, device: torch.device) -> _Arm:
    """The arm of a recipe, or of the yardstick where there is none, on the model of that name."""
    model = shard(build(name, device="meta"), mesh)
    model.to_empty(device=device)
    # Each rank draws its shards by itself: other seeds on other ranks, the same for every arm.
    torch.manual_seed(mesh.get_rank())
    model.init_weights()
    counting = Counting(inner=Collectives())
    if recipe is None:
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    else:
        optimizer = build_optimizer(model, recipe, transport=counting)
    return _Arm(name=recipe or YARDSTICK, model=model, optimizer=optimizer, counting=counting, device=device)


def _summary(by_rank: list[list[dict[str, Any]]]) -> list[Measured]:
    """The arms, from what every rank reported of them."""
    arms: list[Measured] = []
    for reports in zip(*by_rank, strict=True):
        step, optimizer = (
            statistics.median(map(max, zip(*(report["seconds"][key] for report in reports), strict=True)))
            for key in ("step", "optimizer")
        )
        arms.append(
            Measured(
                name=reports[0]["name"],
                step_seconds=step,
                optimizer_seconds=optimizer,
                share=optimizer / step,
                ratio=optimizer / (arms[0].optimizer_seconds if arms else optimizer),
                collectives=max(report["collectives"] for report in reports),
                sent_bytes=max(report["sent_bytes"] for report in reports),
                state_bytes=max(report["state_bytes"] for report in reports),
                peak_bytes=max(report["peak_bytes"] for report in reports),
            )
        )
    return arms
