"""Data that change between two runs, and under a run."""

import os
import subprocess
import time
from pathlib import Path

from tests.launch.runs import ROOT, environment, run_fsdp, torchrun, trained, write_corpus
from tests.processes import agent_ends_with_parent


def test_a_flipped_bit_in_the_cache_changes_no_loss(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    corpus = write_corpus(tmp_path / "corpus")
    first = run_fsdp(corpus, tmp_path / "first", steps=3)
    assert first.returncode == 0, first.stderr
    (shard,) = (tmp_path / "cache").glob("*/train-*.bin")
    # The lowest bit of every id.
    data = shard.read_bytes()
    shard.write_bytes(data[:1024] + bytes(byte ^ (index % 2 == 0) for index, byte in enumerate(data[1024:])))
    second = run_fsdp(corpus, tmp_path / "second", steps=3)
    assert second.returncode == 0, second.stderr
    assert f"{shard}: changed since it was prepared" in second.stdout + second.stderr
    assert trained(tmp_path / "second") == trained(tmp_path / "first")


def test_a_shard_cut_under_a_job_ends_it_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    corpus = write_corpus(tmp_path / "corpus")
    command = torchrun(corpus, tmp_path / "run", steps=100_000)
    running = subprocess.Popen(
        ["nice", "-n", "5", *command],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=agent_ends_with_parent,
    )
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)
    (shard,) = (tmp_path / "cache").glob("*/train-*.bin")
    os.truncate(shard, 1024)
    error = running.communicate(timeout=300)[1]
    assert running.returncode not in (0, None)
    assert f"{shard}: cut or changed since the run opened it" in error
    assert "Signal 7" not in error, "SIGBUS"
    assert "Traceback" not in error.partition("elastic")[0]
