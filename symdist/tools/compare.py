"""Compares recipes with other optimizers in one run, in which each has its own copy of the model.

The optimizers take turns step by step, so that other load on the machine affects all of them alike. Numbers from
different runs are not comparable.
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
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

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
from symdist.tools.output import write_whole
from symdist.tools.preview import preview
from symdist.tools.simulate import simulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Settings: TypeAlias = dict[str, Any]
Device: TypeAlias = Literal["auto", "cpu", "cuda"]

_WARMUP = 2
# Beyond what one machine measures in a day.
_MOST = {"ranks": 256, "steps": 100_000, "batch": 4096, "sequence": 2**20}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured for one optimizer.

    Times are in seconds: the slowest rank of each step, and the median over the steps. Bytes and counts are those of
    the rank with the most. A step is forward, backward, gradient clipping and the optimizer's step.

    Attributes:
        name: The recipe, or the other optimizer.
        note: Which parameters it steps and how.
        step_seconds: The time of a step.
        step_ratio: `step_seconds` relative to that of torch.optim.AdamW.
        optimizer_seconds: The time of the optimizer's step.
        optimizer_ratio: `optimizer_seconds` relative to that of torch.optim.AdamW.
        share: The optimizer's share of a step.
        collectives: The number of collectives in one optimizer step, see `CollectiveCounter`; measured uncompiled.
        sent_bytes: The bytes they send.
        state_bytes: The size of the optimizer's state.
        peak_bytes: The temporary memory of one optimizer step, measured uncompiled; see `peak_bytes`.
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
    """The results on one number of ranks.

    Attributes:
        model: The name of the model.
        ranks: The number of ranks.
        threads: The number of CPU threads per rank.
        backend: The backend of torch.distributed.
        device: "cuda" or "cpu".
        torch: The version of PyTorch.
        steps: The number of measured steps.
        batch: Sequences per rank and step.
        sequence: Tokens per sequence.
        arms: The results of each optimizer; torch.optim.AdamW is the first.
        refused: By name of optimizer, why others could not be run.
    """

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
    """Write comparisons to a file as a JSON list.

    Args:
        path: The file.
        comparisons: The comparisons.
    """
    write_whole(path, json.dumps([asdict(comparison) for comparison in comparisons], indent=2) + "\n")


def compare(
    model: str,
    recipes: Sequence[str],
    *,
    against: Sequence[str] = NAMES,
    ranks: Sequence[int] = (2,),
    steps: int = 12,
    batch: int = 8,
    sequence: int = 128,
    device: Device = "auto",
) -> Iterator[Comparison]:
    """Measure recipes and other optimizers side by side, on random tokens.

    For each number of ranks, new processes are started when its result is requested. They use NCCL on GPUs, one each,
    or gloo on the CPU, whose cores are divided among them. No process group may be open in this process.

    Args:
        model: A preset, or the path of a TOML file; see `symdist.tools.models.build`.
        recipes: Names of recipes, or paths of TOML files.
        against: Other optimizers, beside torch.optim.AdamW, which is always measured; all of `NAMES` by default. One
            that is not installed or cannot step the model's shards is skipped and listed in `refused`.
        ranks: The numbers of processes; `(2,)` by default.
        steps: The number of measured steps, after two steps of warm-up; 12 by default.
        batch: Sequences per rank and step; 8 by default.
        sequence: Tokens per sequence; 128 by default.
        device: "cuda" for GPUs, "cpu", or "auto" (default) for GPUs where there is one for each process.

    Returns:
        An iterator with one result for each number of ranks.

    Raises:
        ValueError: If a model, recipe or optimizer is unknown or cannot be run, a count is below 1, or `device` is
            "cuda" and there are fewer GPUs than ranks. It is raised by the call itself, before any process is started.

    Example:
        >>> if __name__ == "__main__":  # processes are spawned
        ...     for result in compare("olmoe-tiny", ["small-moe", "muon"], ranks=(1, 2)):
        ...         print(result.ranks, [(arm.name, arm.optimizer_seconds) for arm in result.arms])
    """
    sizes = {"steps": steps, "batch": batch, "sequence": sequence}
    for name, count in [*(("ranks", count) for count in ranks), *sizes.items()]:
        if count < 1:
            raise ValueError(f"{name}={count} must be 1 or more")
        if count > _MOST[name]:
            raise ValueError(f"{name}={count} must be at most {_MOST[name]:,}")
    if batch * sequence > _MOST["sequence"]:
        raise ValueError(f"batch={batch} × sequence={sequence} must be at most {_MOST['sequence']:,} tokens")
    if not ranks:
        raise ValueError("ranks is empty: give one or more numbers of processes")
    devices = [_device_type(device, count) for count in ranks]
    if unknown := sorted(set(against) - set(NAMES)):
        raise ValueError(f"against: there is no baseline {unknown[0]!r}; choose from {', '.join(NAMES)}")
    # Checked in this process, which takes seconds, so that the user sees the message and not the traceback of a rank.
    plans = [(count, *_plan(model, recipes, against, count)) for count in ranks]
    return (
        _run(model, count, kind, sizes, arms, refused)
        for kind, (count, arms, refused) in zip(devices, plans, strict=True)
    )


def _device_type(device: Device, ranks: int) -> str:
    """Return the type of device that processes run on, "cuda" or "cpu"; ValueError if there are too few of them."""
    if device not in get_args(Device):
        raise ValueError(f"device={device!r} is not one of {', '.join(map(repr, get_args(Device)))}")
    cards = torch.cuda.device_count()
    if device == "cuda" and cards < ranks:
        fewer = f"give at most --ranks {cards}, or " if cards else ""
        raise ValueError(
            f"device='cuda' with ranks={ranks} needs a GPU for each rank, and PyTorch finds {cards} here; {fewer}run "
            "on the CPU with --device cpu"
        )
    return "cuda" if device == "cuda" or (device == "auto" and cards >= ranks) else "cpu"


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """An optimizer to measure: a recipe or a baseline."""

    name: str
    note: str
    recipe: bool


def _plan(model: str, recipes: Sequence[str], against: Sequence[str], ranks: int) -> tuple[list[_Plan], dict[str, str]]:
    """Return the optimizers to measure, and why others cannot run; decided from shapes, so alike for all ranks."""
    with simulate(model, "muon", mesh={"dp_shard": ranks}) as simulated:
        refused = {name: reason for name in against if (reason := refusal(name, simulated.model, ranks))}
        arms = [
            _Plan(name=name, note=describe_baseline(name, simulated.model), recipe=False)
            for name in (ADAMW, *against)
            if name not in refused
        ]
    for recipe in recipes:
        rules = Counter(parameter.rule for parameter in preview(model, recipe, mesh={"dp_shard": ranks}).parameters)
        counts = ", ".join(f"{count} by {rule}" for rule, count in rules.items())
        arms.append(_Plan(name=recipe, note=f"symdist: {counts}", recipe=True))
    return arms, refused


def _run(
    model: str, ranks: int, device: str, sizes: dict[str, int], plans: list[_Plan], refused: dict[str, str]
) -> Comparison:
    run: Settings = {
        "model": model,
        "ranks": ranks,
        "threads": max(1, (os.cpu_count() or 1) // ranks),
        "backend": "nccl" if device == "cuda" else "gloo",
        "device": device,
        **sizes,
    }
    with tempfile.TemporaryDirectory() as directory:
        try:
            multiprocessing.spawn(_rank, args=(directory, run, plans), nprocs=ranks)
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"{model} on {ranks} ranks: {reason}; if that is for lack of memory, give a smaller batch or sequence"
            ) from error
        by_rank = [json.loads((Path(directory) / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    return Comparison(**run, torch=torch.__version__, arms=_summary(plans, by_rank), refused=refused)


@dataclass(kw_only=True)
class _Arm:
    """A model with its optimizers, and the seconds of each step on this rank, by "step" and "optimizer"."""

    name: str
    model: PreTrainedModel
    optimizers: list[torch.optim.Optimizer]
    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"step": [], "optimizer": []})

    def step(self, tokens: Tensor) -> None:
        """Run and time one training step. All ranks must call it."""
        # Start no step while another rank still runs the optimizer before.
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
        """Return this rank's measurements.

        Steps the optimizer twice more with the last gradients, to count collectives and memory. All ranks must call it.
        """
        state = [value for optimizer in self.optimizers for held in optimizer.state.values() for value in held.values()]
        # The counters do not see into compiled code, and torch.compile(fullgraph=True) would refuse to run inside them.
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
    # DTensor warns that it has no random generator for the device; here each rank seeds its own generator instead.
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
    # Do what a normal exit would do, such as releasing the semaphores of torch.compile's progress bar.
    _run_finalizers(0)
    # Exit hard, now that everything is written: gloo's threads can abort a process at interpreter shutdown
    # (pytorch#190489).
    os._exit(0)


def _arm(plan: _Plan, name: str, mesh: DeviceMesh, device: torch.device) -> _Arm:
    """Build the model of that name and the optimizers of a plan."""
    model = shard(build(name, device="meta"), mesh)
    model.to_empty(device=device)
    # Each rank draws its own shards: the seed differs between ranks, and is the same for every optimizer.
    torch.manual_seed(mesh.get_rank())
    model.init_weights()
    optimizers = [build_optimizer(model, plan.name)] if plan.recipe else build_baseline(plan.name, model)
    return _Arm(name=plan.name, model=model, optimizers=[*optimizers], device=device)


def _summary(plans: list[_Plan], by_rank: list[list[dict[str, Any]]]) -> list[Measured]:
    """Combine the measurements of all ranks."""
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
