"""A full disk costs a run checkpoints and nothing else, under each engine: the same losses, and it goes on later."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.launch.runs import lines, mounted, options, trained, warm, write_corpus

STEPS, EVERY = 12, 4
ENGINES = {
    "deepspeed": ("deepspeed", "launch.pretrain_deepspeed"),
    "megatron": ("megatron.core", "launch.pretrain_megatron"),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_full_disk_loses_no_step_under(engine: str, tmp_path: Path) -> None:
    package, module = ENGINES[engine]
    if importlib.util.find_spec(package.partition(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    (tmp_path / "corpus").mkdir()
    corpus = write_corpus(tmp_path / "corpus")
    own: tuple[str, ...] = ("--checkpoint-every", str(EVERY))
    if engine == "deepspeed":
        (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        own += ("--deepspeed", str(tmp_path / "zero.json"))

    def run(output: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return warm(module, *options(corpus, output, steps=STEPS), *own, *more)

    whole, output = tmp_path / "whole", tmp_path / "full"
    done = run(whole)
    assert done.returncode == 0, done.stderr
    newest = whole / "checkpoints" / f"step-{STEPS:08d}"
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    with mounted(tmp_path / "disk", size=str(size * 3 // 2)) as small:
        output.mkdir()
        (output / "checkpoints").symlink_to(small)
        done = run(output)
        # The last one could not be written either, and that is not to go unnoticed.
        assert done.returncode != 0
        # A line for each rank that could not write.
        said = re.search(r"error: cannot write .*; \S+ [kM]?B were free there", done.stderr, re.DOTALL)
        assert said, done.stderr[-3000:]
        assert trained(output) == trained(whole)
        events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
        assert len([event for event in events if event["event"] == "save_failed"]) == STEPS // EVERY - 1
        assert [path.name for path in small.glob("step-*")] == [f"step-{EVERY:08d}"]
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        done = run(output, "--resume", "auto")
        assert done.returncode == 0, done.stderr
        assert f"resumed at step {EVERY}" in done.stderr
        assert trained(output) == trained(whole)
        assert [line["step"] for line in lines(output) if line["kind"] == "train"] == list(range(1, STEPS + 1))
