"""Recipes beside the optimizers one would use instead, in one run: each has its own copy of the model, in turns.

Taking turns step by step lets what else the machine does fall on all alike; numbers of different runs do not compare.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.util import _run_finalizers  # type: ignore[attr-defined]
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from symdist.build import build_optimizer
from symdist.diagnostics.collective_counter import CollectiveCounter
from symdist.diagnostics.memory import peak_bytes
from symdist.gradients.clipping import clip_grad_norm_
from symdist.layouts import local
from symdist.tools.baselines import ADAMW, NAMES, build_baseline, describe_baseline, refusal
from symdist.tools.models import build, shard
from symdist.tools.preview import preview
from symdist.tools.simulate import simulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Settings: TypeAlias = dict[str, Any]

_WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One arm. Times are seconds, of the slowest rank each step and the median over steps; bytes are the worst rank's.

    A step is forward, backward, clipping and the optimizer. The ratios are times over those of `ADAMW`, `share` is
    the optimizer's part of the step. `collectives` and `sent_bytes` are what passed through torch.distributed in one
    step of the optimizer, as `CollectiveCounter` counts it; `peak_bytes` is what one needs for a moment on top of all
    it keeps. Both are watched uncompiled. `note` says what steps what.
    """

    name: str
    note: str
    step_seconds: float
    step_ratio: float
    optimizer_seconds: float
    optimizer_ratio: float
    share: float
    collectives: int
    sent_bytes: float
    state_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was run on one number of ranks, every arm, `ADAMW` first, and by name why others could not be run."""

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
    refused: dict[str, str]


def write(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write all of them as a JSON list."""
    path.write_text(json.dumps([asdict(comparison) for comparison in comparisons], indent=2) + "\n")


def compare(
    model: str,
    recipes: Sequence[str],
    *,
    against: Sequence[str] = NAMES,
    ranks: Sequence[int] = (2,),
    steps: int = 12,
    batch: int = 8,
    sequence: int = 128,
) -> Iterator[Comparison]:
    """Train `ADAMW`, baselines and recipes on random tokens, for `steps` measured steps, on each number of ranks.

    `model` and `recipes` are names or TOML files, `against` names of baselines; one that is not installed, or cannot
    step the model's shards, is left out and named in `refused`. `batch` sequences of `sequence` tokens go to every
    rank every step. Each number of ranks has its own processes, started when its result is asked for. They talk NCCL
    where each has a GPU, else gloo, with the machine's cores divided among them. Raises ValueError at once for a
    model, recipe or baseline that there is not or that cannot be run, and for counts below 1.
    """
    sizes = {"steps": steps, "batch": batch, "sequence": sequence}
    for name, count in [*(("ranks", count) for count in ranks), *sizes.items()]:
        if count < 1:
            raise ValueError(f"{name}={count} must be 1 or more")
    if not ranks:
        raise ValueError("ranks is empty: give one number of processes or more")
    if unknown := sorted(set(against) - set(NAMES)):
        raise ValueError(f"no baseline {unknown[0]!r}: one of {', '.join(NAMES)}")
    # In seconds and in this process, where the message reaches the user, not as a traceback of some rank.
    plans = [(count, *_plan(model, recipes, against, count)) for count in ranks]
    return (_run(model, count, sizes, arms, refused) for count, arms, refused in plans)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """An arm to be run: a recipe, or a baseline."""

    name: str
    note: str
    recipe: bool


def _plan(model: str, recipes: Sequence[str], against: Sequence[str], ranks: int) -> tuple[list[_Plan], dict[str, str]]:
    """The arms, and why others cannot be run: decided here from shapes, so alike for all ranks."""
    with simulate(model, "muon", mesh={"dp_shard": ranks}) as simulated:
        refused = {name: reason for name in against if (reason := refusal(name, simulated.model, ranks))}
        arms = [
            _Plan(name=name, note=describe_baseline(name, simulated.model), recipe=False)
            for name in (ADAMW, *against)
            if name not in refused
        ]
    for recipe in recipes:
        rules = Counter(parameter.rule for parameter in preview(model, recipe, mesh={"dp_shard": ranks}).parameters)
        what = ", ".join(f"{count} by {rule}" for rule, count in rules.items())
        arms.append(_Plan(name=recipe, note=f"symdist: {what}", recipe=True))
    return arms, refused


def _run(model: str, ranks: int, sizes: dict[str, int], plans: list[_Plan], refused: dict[str, str]) -> Comparison:
    cuda = torch.cuda.device_count() >= ranks
    run: Settings = {
        "model": model,
        "ranks": ranks,
        "threads": max(1, (os.cpu_count() or 1) // ranks),
        "backend": "nccl" if cuda else "gloo",
        "device": "cuda" if cuda else "cpu",
        **sizes,
    }
    with tempfile.TemporaryDirectory() as directory:
        multiprocessing.spawn(_rank, args=(directory, run, plans), nprocs=ranks)
        by_rank = [json.loads((Path(directory) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return Comparison(**run, torch=torch.__version__, arms=_summary(plans, by_rank), refused=refused)


@dataclass(kw_only=True)
class _Arm:
    """A model with its optimizers, and this rank's seconds, `step` and `optimizer`, a number a step."""

    name: str
    model: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "optimizer": []})

    def step(self, tokens: Tensor) -> None:
        """One step of training, timed."""
        # Nobody's step begins while another rank still computes the arm before.
        dist.barrier()
        self._wait()
        start = time.perf_counter()
        self.model.zero_grad()
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self._wait()
        clipped = time.perf_counter()
        self._update()
        self._wait()
        done = time.perf_counter()
        self.seconds["step"].append(done - start)
        self.seconds["optimizer"].append(done - clipped)

    def report(self) -> dict[str, Any]:
        """What this rank has seen; steps the optimizer twice more, with the last gradients, to watch it."""
        state = [value for optimizer in self.optimizers for held in optimizer.state.values() for value in held.values()]
        # What watches cannot look into compiled code, and torch.compile(fullgraph=True) would refuse to run.
        with torch.compiler.set_stance("force_eager"):
            with CollectiveCounter() as wire:
                self._update()
            peak = peak_bytes(self._update, device=self.device)
        return {
            "seconds": {key: values[_WARMUP:] for key, values in self.seconds.items()},
            "collectives": wire.collectives,
            "sent_bytes": wire.sent,
            "state_bytes": sum(local(value).nbytes for value in state if isinstance(value, Tensor)),
            "peak_bytes": peak,
        }

    def _update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _rank(rank: int, directory: str, run: Settings, plans: list[_Plan]) -> None:
    device = torch.device(run["device"], rank) if run["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(run["threads"])
    # Each rank seeds its own generator here, so what DTensor has no generator for does no harm.
    warnings.filterwarnings("ignore", message="DTensor random operators")
    store = f"file://{directory}/store"
    dist.init_process_group(run["backend"], init_method=store, rank=rank, world_size=run["ranks"])
    mesh = init_device_mesh(device.type, (run["ranks"],))
    arms = [_arm(plan, run["model"], mesh, device) for plan in plans]
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
    # What would be done on the way out, such as giving back the semaphores that torch.compile's progress bar takes.
    _run_finalizers(0)
    # Gloo's threads can abort a process whose interpreter is torn down (pytorch#190489), and all is written.
    os._exit(0)


def _arm(plan: _Plan, name: str, mesh: DeviceMesh, device: torch.device) -> _Arm:
    """The arm of a plan, on the model of that name."""
    model = shard(build(name, device="meta"), mesh)
    model.to_empty(device=device)
    # Each rank draws its shards by itself: other seeds on other ranks, the same for every arm.
    torch.manual_seed(mesh.get_rank())
    model.init_weights()
    optimizers = [build_optimizer(model, plan.name)] if plan.recipe else build_baseline(plan.name, model)
    return _Arm(name=plan.name, model=model, optimizers=[*optimizers], device=device)


def _summary(plans: list[_Plan], by_rank: list[list[dict[str, Any]]]) -> list[Measured]:
    """The arms, from what every rank reported of them."""
    arms: list[Measured] = []
    for plan, *reports in zip(plans, *by_rank, strict=True):
        step, optimizer = (
            statistics.median(map(max, zip(*(report["seconds"][key] for report in reports), strict=True)))
            for key in ("step", "optimizer")
        )
        first = arms[0] if arms else None
        worst = {
            key: max(report[key] for report in reports)
            for key in ("collectives", "sent_bytes", "state_bytes", "peak_bytes")
        }
        arms.append(
            Measured(
                name=plan.name,
                note=plan.note,
                step_seconds=step,
                step_ratio=step / (first.step_seconds if first else step),
                optimizer_seconds=optimizer,
                optimizer_ratio=optimizer / (first.optimizer_seconds if first else optimizer),
                share=optimizer / step,
                **worst,
            )
        )
    return arms
