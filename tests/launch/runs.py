"""What tests of whole pretraining runs share: a corpus, an environment, and reading logs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launch.warm_ranks import run_warm
from tests.processes import agent_ends_with_parent

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("rows", "columns", "shards", "ranks", "grams", "heads", "experts", "routers", "layouts", "views", "rules")


def write_corpus(folder: Path) -> Path:
    """Small text files with something to learn."""
    for i in range(60):
        lines = [" ".join(WORDS[(i * j + k * k) % len(WORDS)] for k in range(12)) for j in range(40)]
        (folder / f"{i:02}.txt").write_text(f"file {i}\n" + "\n".join(lines))
    return folder


def options(corpus: Path, output: Path, *, steps: int) -> list[str]:
    """Of a run of a model that takes seconds."""
    return [
        *("--output", str(output), "--data.source", str(corpus), "--data.vocabulary", "300"),
        *("--data.cache", str(corpus.parent / "cache"), "--steps", str(steps), "--batch", "4", "--sequence", "32"),
        *("--log-every", "1", "--validate-every", "15", "--validation-sequences", "8", "--accumulation", "2"),
        *("--model-overrides", "num_hidden_layers", "2", "hidden_size", "32", "intermediate_size", "32"),
    ]


def torchrun(corpus: Path, output: Path, *more: str, steps: int, ranks: int = 2, restarts: int = 0) -> list[str]:
    """The command of a run under FSDP2."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
        *(f"--max-restarts={restarts}", "--monitor-interval=0.05"),
        *("-m", "launch.pretrain", *options(corpus, output, steps=steps), *more),
    ]


def finished(command: list[str]) -> subprocess.CompletedProcess[str]:
    """What a run says, once it has ended."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=agent_ends_with_parent
    )


def run_fsdp(corpus: Path, output: Path, *more: str, steps: int, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """A run under FSDP2, from start to end, on ranks that need not import anything anew."""
    return warm("launch.pretrain", *options(corpus, output, steps=steps), *more, ranks=ranks)


def warm(module: str, *arguments: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """What `torchrun -m module arguments` says and ends with, by ranks that need not import anything anew."""
    return run_warm(module, list(arguments), ranks=ranks, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}


@contextmanager
def mounted(folder: Path, *, size: str) -> Iterator[Path]:
    """A disk of a size, at a new folder; the test is skipped where none can be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk can be made here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def trained(output: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every training step."""
    return {line["step"]: (line["loss"], line["gradient_norm"]) for line in lines(output) if line["kind"] == "train"}


def validated(output: Path) -> dict[int, float]:
    """Loss of every validation."""
    return {line["step"]: line["loss"] for line in lines(output) if line["kind"] == "validation"}


def stop(command: list[str], output: Path, *, nice: int) -> None:
    """Start a run and tell it to stop after three lines of log, which it must say it does."""
    # Below this process in priority, so that on a busy machine the run does not end before it is told to.
    running = subprocess.Popen(
        ["nice", "-n", str(nice), *command],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=agent_ends_with_parent,
    )
    log = output / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    error = running.communicate()[1]
    assert "stopped by a signal: saved" in error, error


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
