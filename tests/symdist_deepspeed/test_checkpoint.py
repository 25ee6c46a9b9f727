"""Checkpoints of DeepSpeed: resumed at the same world size, and as universal ones at another."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from packaging import version

from tests.ranks import Ranks
from tests.symdist_deepspeed import language
from tests.symdist_deepspeed.language import Run

Worlds = Callable[[int], Ranks]
BF16 = {"enabled": True}
WAYS: dict[str, dict[str, Any]] = {
    "stage 0": language.config(0),
    "stage 1": language.config(1),
    "stage 1, round robin": language.config(1) | {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
    "stage 1, bfloat16, accumulated in fp32": language.config(1, bf16=BF16, data_types={"grad_accum_dtype": "fp32"}),
    "stage 2, offloaded": language.config(2)
    | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "stage 3": language.config(3) | {"zero_optimization": {"stage": 3, "sub_group_size": 9000}},
}
TURN, END, AFTER = 5, 25, 28


def convert(folder: Path) -> Path:
    """The universal form of a checkpoint, by DeepSpeed's own converter."""
    latest = (folder / "latest").read_text()
    there = folder.with_name(folder.name + "-universal")
    words = ["--input_folder", folder / latest, "--output_folder", there / "universal", "--num_extract_workers", "1"]
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        *map(str, words),
        "--num_merge_workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (there / "latest_universal").write_text("universal")
    (there / "latest").write_text("universal")
    return there


@pytest.mark.parametrize("way", WAYS)
def test_resumed_runs_go_on_as_if_nothing_was(worlds: Worlds, tmp_path: Path, way: str) -> None:
    settings = WAYS[way]
    folder = tmp_path / "run"
    four = worlds(4)
    straight = four.run(4, language.run, settings, Run(last=AFTER))[0]
    assert straight[0] - straight[-1] > 0.3
    before = four.run(4, language.run, settings, Run(last=TURN, save=str(folder)))[0]
    assert before == pytest.approx(straight[:TURN], abs=1e-6)
    # Into an engine that has trained on something else meanwhile.
    resume = Run(first=TURN, last=END, load=str(folder), again=2)
    assert four.run(4, language.run, settings, resume)[0] == pytest.approx(straight[TURN:END], abs=1e-5)
    if way == "stage 3" and version.parse(deepspeed.__version__) < version.parse("0.19"):
        pytest.skip("this DeepSpeed's converter fails on several sub-groups")
    folders = str(folder), str(tmp_path / "again")
    if way == "stage 0":
        # Nothing is partitioned, so nothing needs converting.
        first = settings
    else:
        first = settings | {"checkpoint": {"load_universal": True}}
        folders = str(convert(folder)), folders[1]
    two = worlds(2)
    at_two = two.run(2, language.run, first, Run(first=TURN, last=END, load=folders[0], save=folders[1]))[0]
    # What was saved after that is an ordinary checkpoint again.
    at_two += two.run(2, language.run, settings, Run(first=END, last=AFTER, load=folders[1]))[0]
    assert at_two == pytest.approx(straight[TURN:], abs=1e-2 if "bf16" in settings else 1e-4)
