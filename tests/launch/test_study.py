"""A study end to end: a sweep, further seeds at its best, stopping and going on, tables, refusals."""

import json
import math
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.study import runner
from launch.study.plan import RECORD, parse
from launch.study.report import ArmOutcome, Outcome
from tests.launch.runs import ROOT, environment, lines, write_corpus
from tests.processes import agent_ends_with_parent

MULTIPLIERS = (0.5, 1.0)
SEEDS = (1, 2)
ARMS = """
[[arms]]
model = "olmoe-tiny"
name = "adamw"
recipe = "adamw"

[[arms]]
model = "olmoe-tiny"
name = "stack"
recipe = "small-moe"
label = "row-norm stack, AdamW router"
override = ["router.rule=adamw", "router.lr=8e-3"]
"""


def write_config(folder: Path, *, arms: str = ARMS) -> Path:
    path = folder / "study.toml"
    path.write_text(
        f"""
output = "{folder}/study"
multipliers = {list(MULTIPLIERS)}
sweep_seed = 7
seeds = {list(SEEDS)}

[run]
steps = 4
batch = 4
sequence = 32
log_every = 1
validation_sequences = 8

[run.model_overrides]
num_hidden_layers = 2
hidden_size = 32
intermediate_size = 32

[run.data]
source = "{folder}/corpus"
vocabulary = 300
cache = "{folder}/cache"
{arms}"""
    )
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The file and the folder of a study that was stopped after its first run, and started again."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "corpus").mkdir()
    write_corpus(folder / "corpus")
    config, output = write_config(folder), folder / "study"
    command = [sys.executable, "-m", "launch.study", "--config", str(config)]

    running = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, preexec_fn=agent_ends_with_parent
    )
    while not (ended := list(output.glob("runs/*/*/*/summary.json"))):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    error = running.communicate()[1]
    assert running.returncode == 128 + signal.SIGTERM, error
    assert "the same command continues the study" in error
    assert not (output / "study.md").exists()
    written = {path: path.stat().st_mtime_ns for path in ended}

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        assert runner.main(command[3:]) == 0
    assert {path: path.stat().st_mtime_ns for path in ended} == written
    return config, output


def last_validation(output: Path, arm: str, multiplier: float, seed: int) -> dict[str, Any]:
    run = lines(output / "runs/olmoe-tiny" / arm / f"x{multiplier:g}-seed{seed}")
    assert [line["step"] for line in run if line["kind"] == "train"] == [1, 2, 3, 4]
    [validation] = [line for line in run if line["kind"] == "validation"]
    return validation


def test_numbers_are_those_of_the_logs(done: tuple[Path, Path]) -> None:
    output = done[1]
    told = json.loads((output / "study.json").read_text())
    assert [arm["name"] for arm in told["arms"]] == ["adamw", "stack"]
    rows = [line.split(" | ") for line in (output / "study.md").read_text().splitlines() if line.startswith("| ")][2:]
    for arm, row in zip(told["arms"], rows, strict=True):
        swept = {m: last_validation(output, arm["name"], m, 7)["loss"] for m in MULTIPLIERS}
        best = min(swept, key=lambda m: swept[m])
        assert arm["best"] == best
        assert {run["multiplier"]: run["loss"] for run in arm["sweep"]} == swept
        runs = [last_validation(output, arm["name"], best, seed) for seed in SEEDS]
        for measure, name in (("loss", "loss"), ("load_cv", "router_load_cv"), ("dead", "router_dead")):
            values = [run[name] for run in runs]
            assert arm[measure]["mean"] == pytest.approx(sum(values) / 2, rel=1e-12)
            # Of two values the sample standard deviation is their distance over √2.
            assert arm[measure]["standard_deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-12)
        losses = [run["loss"] for run in runs]
        assert len(set(losses)) == 2
        assert row[0] == f"| {arm['label']}"
        assert row[1] == f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
        assert row[4] == f"× {best:g}"
        assert "edge of the grid" in row[-1]
    assert (output / "study.png").stat().st_size > 10_000
    assert not list(output.glob("runs/*/*/*/checkpoints"))


def test_runs_had_the_multiplied_rates_and_nothing_else_differed(done: tuple[Path, Path]) -> None:
    folder = done[1] / "runs/olmoe-tiny/stack"
    half, whole = (json.loads((folder / f"x{m:g}-seed7" / RECORD).read_text()) for m in MULTIPLIERS)
    sections = whole["recipe"]["sections"]
    assert sections["router"] == {"rule": "adamw", "centered": True, "lr": 8e-3}
    for role, options in half["recipe"]["sections"].items():
        assert options == sections[role] | {"lr": sections[role]["lr"] / 2}
    assert {key for key in whole if whole[key] != half[key]} == {"override", "recipe"}
    assert whole["steps"] == whole["validate_every"] == 4


def test_reported_again_and_refused_when_edited(done: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config, output = done
    (output / "study.md").unlink()
    assert runner.main(["--config", str(config), "--report"]) == 0
    assert "row-norm stack" in capsys.readouterr().out
    assert (output / "study.md").exists()
    assert runner.main(["--config", str(config), "--run.steps", "5"]) == 2
    assert "holds a run of another configuration (steps was 4, is 5" in capsys.readouterr().err
    assert runner.main(["--config", str(config), "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("  done") == 8
    assert "2 arms × (2 + 2) = 8 runs" in listed


def test_a_failed_run_is_told_and_the_others_go_on(
    done: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "fails.py"
    script.write_text("print('no luck'); raise SystemExit(3)")
    monkeypatch.setattr(runner, "_ENTRY", "fails")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["--config", str(done[0]), "--output", str(tmp_path / "study"), "--multipliers", "1"]
    assert runner.main(words) == 1
    error = capsys.readouterr().err
    for arm in ("adamw", "stack"):
        log = tmp_path / f"study/runs/olmoe-tiny/{arm}/x1-seed7/output.log"
        assert f"failed: olmoe-tiny/{arm}/x1-seed7, see {log}" in error
        assert "no luck" in log.read_text()
    assert "0 of 1 runs of the sweep done" in (tmp_path / "study/study.md").read_text()


def outcome(multiplier: float, loss: float) -> Outcome:
    return Outcome(multiplier=multiplier, seed=1, loss=loss, load_cv=None, dead=None, seconds=1.0)


@pytest.mark.parametrize(
    ("losses", "best", "note"),
    [
        ((3.0, 2.0, math.nan), 1.0, ""),
        ((math.inf, 2.0, 1.0), 2.0, "best at the upper edge of the grid"),
        ((math.nan, math.inf, 1e9), 2.0, "best at the upper edge of the grid"),
        ((math.nan, math.inf, math.nan), 0.5, "diverged at every rate"),
        ((1.0, 2.0), None, "2 of 3 runs of the sweep done"),
    ],
)
def test_a_diverged_run_is_the_worst(losses: tuple[float, ...], best: float | None, note: str) -> None:
    grid = (0.5, 1.0, 2.0)
    sweep = tuple(outcome(multiplier, loss) for multiplier, loss in zip(grid, losses, strict=False))
    arm = ArmOutcome(model="m", name="a", label="a", grid=grid, seeds=(), sweep=sweep, further=())
    assert arm.best == best
    assert arm.note == note


@pytest.mark.parametrize(
    ("arm", "words", "message"),
    [
        ('model = "olmoe-tiny"\nrecipe = "adamv"', (), "arm olmoe-tiny/a: there is no recipe 'adamv'"),
        ('model = "olmo-tiny"\nrecipe = "adamw"', (), "arm olmo-tiny/a: "),
        ('model = "olmoe-tiny"\nrecipe = "adamw"\noverride = ["rooter.lr=1"]', (), "'rooter', which is no role"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"\noverride = ["head.rate=1"]', (), "knows no option 'rate'"),
        ('model = "olmoe-tiny"', (), "arms.0.recipe is "),
        ('model = "olmoe-tiny"\nrecipe = "adamw"\nlr = 1', (), "arms.0.lr is 1: unexpected"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"', ("--seeds", "7"), "none of them the sweep's 7"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"', ("--multipliers", "1", "1"), "has a value twice"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"', ("--multipliers", "0"), "must be positive"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"', ("--run.seed", "3"), "run.seed cannot be set in a study"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"', ("--run.lr", "0.1"), "run.lr cannot be set in a study"),
        ('model = "olmoe-tiny"\nrecipe = "adamw"', ("--nproc", "3"), "does not split over 3 ranks"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arm: str, words: tuple[str, ...], message: str
) -> None:
    config = write_config(tmp_path, arms=f'[[arms]]\nname = "a"\n{arm}\n')
    assert runner.main(["--config", str(config), *words]) == 2
    assert re.search(re.escape(message), capsys.readouterr().err)
    assert not (tmp_path / "study").exists()


def test_the_shipped_study_is_valid() -> None:
    shipped = parse(["--config", str(ROOT / "launch/configs/study.toml")], description=None)
    shipped.check()
    shipped.check_stacks()
    assert len({arm.key for arm in shipped.arms}) == 13
