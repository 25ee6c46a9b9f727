"""The job under DeepSpeed: the losses of the FSDP2 job, exact resumption, conversion, and refusals."""

import base64
import importlib.util
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import symdist
from launch.checkpoints import directory
from launch.checkpoints.directory import describe_files
from launch.checkpoints.manifest import CheckpointError, DamagedCheckpointError
from launch.engines.deepspeed import checkpoint, entry
from launch.engines.deepspeed.checkpoint import JOB
from launch.engines.deepspeed.config import DeepSpeedRun, precision, zero_stage
from symdist.routing.recipes import load_recipe
from symdist.tools.models import build, names
from symdist.tools.report import report
from symdist.tools.run_log import read_run
from tests.launch.runs import ROOT, environment, finished, options, stop, trained, validated, warm, write_corpus

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("DeepSpeed is not installed", allow_module_level=True)

STEPS = 50
CONFIGS = sorted((ROOT / "launch" / "configs" / "deepspeed").glob("*.json"))
MODEL_STATES = "mp_rank_00_model_states.pt"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def job(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The arguments of a run at a stage, with a DeepSpeed config of its own."""
    folder = tmp_path_factory.mktemp("configs")

    def arguments(output: Path, *more: str, stage: int, **settings: Any) -> list[str]:
        content = {"zero_optimization": {"stage": stage}, **settings}
        path = folder / f"{len(list(folder.iterdir()))}.json"
        path.write_text(json.dumps(content))
        own = ("--deepspeed", str(path), "--aux-loss", "0.01", *more)
        return ["-m", "launch.pretrain_deepspeed", *options(corpus, output, steps=STEPS), *own]

    return arguments


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FSDP2 job, from start to end."""
    output = tmp_path_factory.mktemp("runs") / "fsdp"
    own = ("--aux-loss", "0.01", "--keep", "1")
    done = warm("launch.pretrain", *options(corpus, output, steps=STEPS), *own)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def whole(job: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The job under DeepSpeed at a stage, from start to end, run once."""
    folder = tmp_path_factory.mktemp("whole")

    def run(stage: int) -> Path:
        output = folder / str(stage)
        if not output.exists():
            words = job(output, "--checkpoint-every", "20", "--keep", "2", stage=stage)
            # By one launcher each way; DeepSpeed's has another word for -m.
            by_launcher = {
                1: (*TORCHRUN, "--nproc_per_node=2", *words),
                2: (*deepspeeds_launcher(), "--module", *words[1:]),
            }
            done = finished([*by_launcher[stage]]) if stage in by_launcher else warm(*words[1:])
            assert done.returncode == 0, done.stderr
        return output

    return run


def deepspeeds_launcher() -> tuple[str, ...]:
    """What `deepspeed --num_gpus 2` starts on each machine: it adds --local_rank, and sets no LOCAL_WORLD_SIZE."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    return (
        *(sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={machines}"),
        *("--master_addr=127.0.0.1", f"--master_port={port}"),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_are_those_of_fsdp2(reference: Path, whole: Callable[[int], Path], stage: int) -> None:
    output = whole(stage)
    ours, theirs = trained(output), trained(reference)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    # Rounding may send a token to another expert, which the norm of the gradient shows more than the loss.
    for step, (loss, norm) in theirs.items():
        assert ours[step] == (pytest.approx(loss, abs=1e-3), pytest.approx(norm, rel=2e-2))
    assert validated(output) == pytest.approx(validated(reference), abs=1e-3)
    assert theirs[STEPS][0] < theirs[1][0] - 0.5


def test_reports_and_checkpoints(reference: Path, whole: Callable[[int], Path]) -> None:
    output = whole(3)
    mine, theirs = read_run(output).summary, read_run(reference).summary
    assert set(theirs) < set(mine)
    for name in ("model", "recipe", "tokens", "parameters", "active_parameters", "ranks"):
        assert mine[name] == theirs[name]
    assert (mine["optimizer"], mine["zero_stage"], mine["precision"]) == ("SymDist", 3, "float32")
    assert 0 < mine["optimizer_share"] < 1
    report([output, reference], output=output / "report.html", picture=output / "curves.png")
    folder = output / "checkpoints"
    assert (folder / "latest").read_text() == "step-00000050"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000040", "step-00000050"]
    assert any(path.name.startswith("events.out") for path in output.iterdir())


def test_sigterm_saves_and_auto_resume_repeats_every_step_exactly(
    job: Callable[..., list[str]], whole: Callable[[int], Path], tmp_path: Path
) -> None:
    arguments = job(tmp_path / "stopped", "--resume", "auto", "--checkpoint-every", "2", stage=3)
    command = [*TORCHRUN, "--nproc_per_node=2", *arguments]
    stop(command, tmp_path / "stopped", nice=5)
    assert 3 <= max(trained(tmp_path / "stopped")) < STEPS
    newest = max((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    next(newest.glob("*optim_states.pt")).unlink()
    done = finished(command)
    assert done.returncode == 0, done.stderr
    assert f"{newest} is damaged" in done.stderr
    assert trained(tmp_path / "stopped") == trained(whole(3))
    assert validated(tmp_path / "stopped") == validated(whole(3))


def test_another_number_of_ranks_needs_a_conversion(
    job: Callable[..., list[str]], whole: Callable[[int], Path], tmp_path: Path
) -> None:
    path = whole(1) / "checkpoints" / "step-00000040"
    more = ("--accumulation", "4", "--resume")
    done = warm(*job(tmp_path / "alone", *more, str(path), stage=1)[1:], ranks=1)
    assert done.returncode != 0
    assert "was saved by 2 ranks, this run has 1; convert it by" in done.stderr
    told = done.stderr.split("`")[1].split()
    converted = subprocess.run(
        [sys.executable, *told[1:]], env=environment() | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True
    )
    assert converted.returncode == 0, converted.stderr
    universal = {"checkpoint": {"load_universal": True}}
    done = warm(*job(tmp_path / "alone", *more, f"{path}_universal", stage=1, **universal)[1:], ranks=1)
    assert done.returncode == 0, done.stderr
    there, here = trained(whole(1)), trained(tmp_path / "alone")
    assert sorted(here) == list(range(41, STEPS + 1))
    assert {step: here[step][0] for step in here} == pytest.approx({step: there[step][0] for step in here}, abs=1e-3)


JOB_STATE: dict[str, Any] = {
    "step": 10,
    "elapsed": 1.0,
    "data": {"position": 40, "fingerprint": "abc", "seed": 1},
    "counts": {"skipped_steps": 0, "spikes": 0},
    "spikes": {"seen": []},
    "skipped_in_a_row": 0,
    "unvalidated": False,
    "settings": {},
}


def test_checkpoints_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    def save(name: str, **job: Any) -> Path:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        content = JOB_STATE | {"identity": {"seed": 1}, "stage": 1, "ranks": 1} | job
        torch.save({JOB: content}, path / MODEL_STATES)
        return path

    def publish(name: str, **job: Any) -> Path:
        path = save(f"{name}.writing", **job)
        final = tmp_path / name
        files = describe_files([path / MODEL_STATES])
        directory.publish(path, final, world=1, identity={"seed": 1}, files=files)
        checkpoint.point_to(final)
        return final

    def check(path: Path, *, stage: int = 1, universal: bool = False, seed: int = 1) -> None:
        asked = {"directory": tmp_path, "identity": {"seed": seed}, "rank": 0, "world": 1}
        checkpoint.checked_job(path, stage=stage, universal=universal, **asked)

    assert checkpoint.newest_universal(tmp_path) is None
    with pytest.raises(DamagedCheckpointError, match="was never finished"):
        check(save("step-00000010.writing"))
    path = publish("step-00000010")
    with pytest.raises(CheckpointError, match="says load_universal, but no checkpoint in"):
        checkpoint.newest_universal(tmp_path)
    check(path)
    for asked, message in (
        ({"seed": 2}, "seed is 1 in the checkpoint but 2 in this run"),
        ({"stage": 3}, "was saved at ZeRO stage 1, this run has stage 3"),
        ({"universal": True}, "step-00000010 is not universal; convert it by"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check(path, **asked)
    universal = save("converted")
    (universal / "zero").mkdir()
    (tmp_path / "latest_universal").write_text("converted")
    assert checkpoint.newest_universal(tmp_path) == universal
    check(universal, universal=True)
    with pytest.raises(CheckpointError, match="is a universal checkpoint; add "):
        check(universal)
    newer = publish("step-00000030", step=30)
    with pytest.raises(CheckpointError, match=r"newer checkpoint step-00000030, .* with those of a run from converted"):
        check(universal, universal=True)
    (newer / MODEL_STATES).write_bytes(b"")
    with pytest.raises(DamagedCheckpointError, match=r"mp_rank_00_model_states\.pt has 0 bytes instead of"):
        check(newer)
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="is not a DeepSpeed checkpoint"):
        checkpoint.read_job(tmp_path / "other")
    torch.save({}, tmp_path / "other" / MODEL_STATES)
    with pytest.raises(CheckpointError, match=r"was not written by launch\.pretrain_deepspeed"):
        checkpoint.read_job(tmp_path / "other")


def refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the job says before it leaves with code 2."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(sys, "argv", arguments[1:])
    assert entry.main() == 2
    return capsys.readouterr().err


def test_contradictions_end_with_code_2(
    job: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(job(tmp_path, stage=1, gradient_clipping=0.5), monkeypatch, capsys)
    assert "gradient_clipping is 0.5, but the run has --clip 1.0" in error


def test_without_deepspeed_it_says_what_to_install(
    job: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "symdist_deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    error = refused(job(tmp_path, "--steps", "1", stage=1), monkeypatch, capsys)
    assert "pip install 'symdist[deepspeed]'" in error


@pytest.mark.parametrize(
    ("content", "run", "message"),
    [
        ({"train_batch_size": 8}, {}, "train_batch_size is 8, but the run has --batch 16"),
        ({"train_micro_batch_size_per_gpu": 8}, {"accumulation": 2}, "per_gpu is 8, .*--batch 16 over 2 ranks × 2"),
        ({"gradient_accumulation_steps": 4}, {}, "steps is 4, but the run has --accumulation 1"),
        ({"bf16": {"enabled": True}}, {"precision": "float32"}, "is 'bfloat16', but the run has --precision float32"),
        ({"optimizer": {"params": {"recipe": "olmoe"}}}, {}, "the recipe is 'olmoe', but the run has --recipe small"),
        ({"optimizer": {"params": {"nonfinite": "raise"}}}, {}, "nonfinite is 'raise', but .*--nonfinite skip"),
        (
            {"optimizer": {"params": {"overrides": {"router": {"lr": 1.0}}}}},
            {"override": ("router.lr=2.0",)},
            "the override of router.lr is 1.0, but the run has --override router.lr=2.0",
        ),
        ({"optimizer": {"type": "AdamW"}}, {"override": ("router.lr=2.0",)}, "optimizer is AdamW, which has no recipe"),
        ({"optimizer": {"type": "AdamW"}}, {"lr": 0.1}, "which has no recipe that --lr 0.1 could change"),
        ({"optimizer": {"params": {"lr": 0.2}}}, {"lr": 0.1}, "lr is 0.2, but the run has --lr 0.1"),
        ({"optimizer": {"params": {"lr": -1}}}, {}, "lr is -1; it must be a positive number"),
        ({}, {"lr": -1.0}, "--lr is -1.0: input should be greater than 0"),
        ({"sequence_parallel_size": 2}, {}, "sequence_parallel_size is 2, but this job splits data"),
        ([], {}, "holds no table of settings"),
    ],
)
def test_what_contradicts_is_refused(content: Any, run: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        DeepSpeedRun(deepspeed=path, **run).check(ranks=2)


def test_the_default_config_is_there_and_agrees() -> None:
    run = DeepSpeedRun()
    assert run.deepspeed.is_file()
    run.check(ranks=2)
    assert zero_stage(run.settings(ranks=2)) == 1


def test_what_is_left_out_is_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    params = {"recipe": "auto", "lr": "auto", "overrides": {"head": {"lr": 1.0}}}
    path.write_text(
        json.dumps({"train_batch_size": "auto", "optimizer": {"params": params}, "bf16": {"enabled": "auto"}})
    )
    run = DeepSpeedRun(deepspeed=path, clip=0.0, precision="bfloat16", accumulation=2, override=("router.lr=2.0",))
    settings = run.settings(ranks=4)
    assert settings["gradient_clipping"] == 0.0
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == 2
    assert settings["optimizer"] == {
        "type": "SymDist",
        "params": {
            "recipe": "small-moe",
            "nonfinite": "skip",
            "overrides": {"head": {"lr": 1.0}, "router": {"lr": 2.0}},
        },
    }
    assert run.adjusted_recipe().options("head")["lr"] == 1.0
    scaled = replace(run, lr=0.5)
    assert scaled.settings(ranks=4)["optimizer"]["params"]["lr"] == 0.5
    assert scaled.adjusted_recipe().options("matrix")["lr"] == 0.5
    path.write_text(json.dumps({"optimizer": {"params": {"lr": 0.5}}}))
    assert replace(run, lr=0.5).adjusted_recipe() == run.adjusted_recipe()
    assert run.adjusted_recipe().options("matrix")["lr"] == 0.5
    assert precision(settings) == "bfloat16"
    assert precision({"torch_autocast": {"enabled": True, "dtype": "torch.float16"}}) == "float16"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    from symdist_deepspeed.options import Options

    model, _, stage = path.stem.rpartition("stage")
    recipe = json.loads(path.read_text())["optimizer"]["params"]["recipe"]
    recipe = "small-moe" if recipe == "auto" else recipe
    settings = DeepSpeedRun(deepspeed=path, recipe=recipe).settings(ranks=1)
    accepted = DeepSpeedConfig(settings)
    assert accepted.zero_optimization_stage == zero_stage(settings) == int(stage)
    assert accepted.optimizer_name == "SymDist"
    assert accepted.gradient_clipping == 1.0
    routed, _ = Options.from_params(settings["optimizer"]["params"]).scaled()
    assert routed.sections == load_recipe(recipe).sections
    assert precision(settings) == ("bfloat16" if model else "float32")
    if model:
        assert model.rstrip("-") in names()
        assert symdist.route(build(model.rstrip("-"), device="meta"), routed)


def test_local_rank_is_taken_from_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that what the entry sets goes with the test.
    monkeypatch.setenv("LOCAL_RANK", "")
    monkeypatch.delenv("LOCAL_RANK")
    given = ["--local_rank=1", "--steps", "3", "--local-rank", "2"]
    assert list(entry._without_local_rank(given)) == ["--steps", "3"]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert list(entry._without_local_rank(given)) == ["--steps", "3"]
