"""The pretraining entry on two real ranks: learning, exact resumption, clean stops, and refusals."""

import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launch.engines.fsdp.config import FsdpRun, Mesh
from launch.loop.config import Config, parse_as
from launch.loop.job import run
from launch.records.run_log import check_folder
from launch.runtime import folder_lock
from symdist import build_optimizer
from symdist.routing.recipes import load_recipe
from symdist.tools import cli
from symdist.tools.models import build
from symdist.tools.run_log import read_run
from tests.launch.runs import ROOT, environment, finished, options, run_fsdp, stop, torchrun, trained, write_corpus

STEPS = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files with something to learn."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


command, pretrain = partial(torchrun, steps=STEPS), partial(run_fsdp, steps=STEPS)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end, by torchrun."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = finished(command(corpus, output, "--checkpoint-every", "10"))
    assert done.returncode == 0, done.stderr
    return output


def test_it_learns_and_reports(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = trained(whole)
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS][0] < losses[1][0] - 0.5
    summary: dict[str, Any] = read_run(whole).summary
    assert summary["validation_loss"] < losses[1][0] - 0.5
    assert 0 < summary["optimizer_share"] < 1
    assert summary["tokens"] == STEPS * 4 * 32
    assert 0 < summary["validation_router_load_cv"] < 3
    cli.main(["report", str(whole), str(whole), "--output", f"{whole}/report.html", "--picture", f"{whole}/curves.png"])
    assert f"{summary['validation_loss']:.3f}" in capsys.readouterr().out
    page = (whole / "report.html").read_text()
    assert all(name in page for name in ("RMS of updates", "Largest logit", "model.embed_tokens.weight", "saved "))
    assert (whole / "curves.png").stat().st_size > 10_000
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [
        f"step-{step:08}" for step in (10, 20, 30)
    ]
    assert any(path.name.startswith("events.out") for path in whole.iterdir())


def test_resuming_repeats_every_step_exactly(corpus: Path, whole: Path, tmp_path: Path) -> None:
    done = pretrain(corpus, tmp_path / "again", "--resume", str(whole / "checkpoints" / "step-00000010"))
    assert done.returncode == 0, done.stderr
    expected = {step: loss for step, loss in trained(whole).items() if step > 10}
    assert len(expected) == 20
    assert trained(tmp_path / "again") == expected
    assert read_run(tmp_path / "again").summary["validation_loss"] == read_run(whole).summary["validation_loss"]


def test_sigterm_saves_and_auto_resume_completes_the_log(corpus: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    stop(command(corpus, output), output, nice=15)
    assert not (output / "summary.json").exists()
    assert 3 <= max(trained(output)) < STEPS
    done = pretrain(corpus, output, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert trained(output) == trained(whole)


def test_world_size_changes_only_the_rounding(corpus: Path, whole: Path, tmp_path: Path) -> None:
    done = pretrain(corpus, tmp_path / "alone", "--accumulation", "4", ranks=1)
    assert done.returncode == 0, done.stderr
    one, two = trained(tmp_path / "alone"), trained(whole)
    assert all(abs(one[step][0] - two[step][0]) < 1e-3 for step in two)


def test_a_checkpoint_of_another_recipe_is_refused(corpus: Path, whole: Path, tmp_path: Path) -> None:
    path = whole / "checkpoints" / "step-00000010"
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    done = pretrain(corpus, tmp_path / "other", "--recipe", "adamw", "--resume", str(path))
    assert done.returncode != 0
    assert "error:" in done.stderr
    assert "recipe" in done.stderr
    assert "Traceback" not in done.stderr.split("error:")[0]
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        (Config(batch=6), 4, "--batch 6 does not split over 4 ranks × 1 micro-batches"),
        (Config(steps=0), 1, "--steps is 0"),
        (Config(clip=-1.0), 1, r"--clip is -1\.0: input should be greater than or equal to 0"),
        (Config(recipe="nothing"), 1, "there is no recipe 'nothing'"),
        (Config(lr=0.0), 1, r"--lr is 0\.0: input should be greater than 0"),
        (Config(lr=float("inf")), 1, "--lr is inf: input should be a finite number"),
        (Config(lr=float("nan")), 1, "--lr is nan: input should be a finite number"),
        (Config(override=("router",)), 1, "should be role.option=value"),
        (Config(override=("gates.lr=1",)), 1, "which is no role"),
    ],
)
def test_what_cannot_run_is_refused(config: Config, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(ranks=ranks)


def test_toml_and_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'steps = 7\noverride = ["router.lr=0.5"]\n[data]\nvocabulary = 512\n'
        "[model_overrides]\nhidden_size = 64\ntie_word_embeddings = true\n"
    )
    given = ["--config", str(path), "--steps", "9", "--data.source", "texts", "--override", "head.lr=1", "--lr", "0.25"]
    config = parse_as(FsdpRun, given)
    assert (config.steps, config.data.vocabulary, config.data.source) == (9, 512, "texts")
    assert config.lr == 0.25
    (tmp_path / "run.json").write_text(json.dumps(asdict(config), default=str))
    assert parse_as(FsdpRun, ["--config", str(tmp_path / "run.json")]) == config
    assert config.overrides() == {"router": {"lr": 0.5}, "head": {"lr": 1}}
    assert config.model_overrides == {"hidden_size": "64", "tie_word_embeddings": "true"}
    assert parse_as(FsdpRun, [f"--config={path}"]).steps == 7
    assert parse_as(FsdpRun, [*given, "--model-overrides", "num_heads", "2"]).model_overrides == {"num_heads": "2"}
    for text, message in (
        ("stepz = 1", r"run\.toml: stepz is 1: "),
        ("[mesh]\npp = 2", r"mesh\.pp is 2: "),
        ('steps = "many"', "steps is 'many': .*integer"),
        ('precision = "fp8"', "precision is 'fp8': .*'bfloat16'"),
        ("steps =", "not valid TOML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse_as(FsdpRun, ["--config", str(path)])
    with pytest.raises(ValueError, match="does not exist"):
        parse_as(FsdpRun, ["--config", str(tmp_path / "missing.toml")])
    for words in (["--config"], ["--stepz", "1"], ["--steps", "many"]):
        with pytest.raises(SystemExit, match="2"):
            parse_as(FsdpRun, words)


def test_lr_scales_the_rates_and_overrides_stand() -> None:
    def rates(config: Config) -> dict[str, float]:
        groups = build_optimizer(build("olmoe-tiny", seed=0), config.adjusted_recipe()).param_groups
        return {group["role"]: group["lr"] for group in groups}

    recipe, scaled = rates(Config()), rates(Config(lr=0.5, override=("router.lr=7.0",)))
    matrix = load_recipe("small-moe").options("matrix")["lr"]
    assert scaled.pop("router") == 7.0
    assert scaled == pytest.approx({role: lr * 0.5 / matrix for role, lr in recipe.items() if role != "router"})


def test_a_dry_run_shows_the_rates_of_the_run(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = previewed(capsys, *options(corpus, tmp_path / "new", steps=STEPS), "--lr", "0.0123")
    assert "0.0123" in out


def test_a_finished_run_stays_as_it_is(corpus: Path, whole: Path) -> None:
    before = (whole / "log.jsonl").read_text()
    done = pretrain(corpus, whole, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "has finished its 30 steps already" in done.stderr
    assert (whole / "log.jsonl").read_text() == before
    done = pretrain(corpus, whole, "--resume", str(whole / "checkpoints" / "step-00000010"))
    assert "already has the newer checkpoint step-00000030" in done.stderr
    assert (whole / "log.jsonl").read_text() == before


def test_weights_drawn_in_shards_train_too(corpus: Path, tmp_path: Path) -> None:
    done = pretrain(corpus, tmp_path / "sharded", "--initialize", "sharded")
    assert done.returncode == 0, done.stderr
    losses = trained(tmp_path / "sharded")
    assert losses[STEPS][0] < losses[1][0] - 0.5


def test_an_earlier_run_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        check_folder(whole, resume=None)
    check_folder(whole, resume="auto")


@pytest.mark.parametrize(
    ("told", "ranks", "message"),
    [
        ({"mesh": Mesh(tp=3)}, 4, "tp 3 needs a multiple of 3 ranks, there are 4"),
        ({"mesh": Mesh(tp=2, dp_shard=3)}, 4, "tp 2 × dp_shard 3 is 6 ranks, there are 4; leave out --mesh.dp-shard"),
        ({"mesh": Mesh(dp_shard=2)}, 4, "dp_shard 2 is 2 ranks, there are 4"),
        ({"mesh": Mesh(ep=0)}, 4, "--mesh.ep is 0: input should be greater than or equal to 1"),
        ({"mesh": Mesh(tp=8)}, 8, "olmoe: tp=8 does not divide the number of attention heads, 4"),
        ({"mesh": Mesh(ep=3), "batch": 6}, 3, "olmoe: ep=3 does not divide 8 experts"),
        ({"mesh": Mesh(ep=2), "model": "qwen3-tiny"}, 2, "qwen3 has no stacked experts to split over ep=2"),
        ({"mesh": Mesh(tp=2), "batch": 6}, 8, "does not split over 4 data-parallel ranks × 1 micro-batches"),
        ({"timeout": 0.0}, 1, "--timeout is 0.0: input should be greater than 0"),
        ({"keep_every": -1}, 1, "--keep-every is -1: input should be greater than or equal to 0"),
        ({"rollback_after": 2}, 1, "--rollback-after 2 returns to checkpoints; give --checkpoint-every"),
    ],
)
def test_meshes_and_values_that_cannot_be_are_refused(told: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FsdpRun(**told).check(ranks=ranks)


def test_a_mesh_takes_what_is_left_for_dp_shard() -> None:
    config = FsdpRun(mesh=Mesh(dp_replicate=2, ep=2, tp=2), batch=16)
    config.check(ranks=32)
    assert config.mesh.sizes(32) == {"dp_replicate": 2, "dp_shard": 4, "ep": 2, "tp": 2}
    assert config.data_ranks(32) == 16


def test_losses_are_the_same_with_replicas_and_experts_apart(corpus: Path, whole: Path, tmp_path: Path) -> None:
    mesh = ("--mesh.dp-replicate", "2", "--mesh.ep", "2")
    done = pretrain(corpus, tmp_path / "mesh", "--accumulation", "1", *mesh, ranks=4)
    assert done.returncode == 0, done.stderr
    one, two = trained(whole), trained(tmp_path / "mesh")
    assert all(abs(one[step][0] - two[step][0]) < 1e-3 for step in one)


def previewed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a dry run prints."""
    config = parse_as(FsdpRun, [*arguments, "--dry-run"])
    assert run(lambda: config, never) == 0
    return capsys.readouterr().out


def never(*arguments: Any) -> Any:
    raise AssertionError("a dry run starts nothing")


def test_a_dry_run_shows_routing_plan_data_and_disk(
    corpus: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NPROC", "4")
    given = [*options(corpus, tmp_path / "new", steps=STEPS), "--mesh.tp", "2", "--accumulation", "1"]
    out = previewed(capsys, *given, "--resume", "auto")
    assert "on 8 ranks: 4 data-parallel, 1 micro-batches of 1" in out
    assert "tokenized in" in out
    assert "the run starts from the beginning" in out
    assert "model.layers.*.mlp.gate.weight" in out
    assert "dp_shard 4 × tp 2" in out
    assert "nothing was started" in out
    assert not (tmp_path / "new").exists()
    given[1] = str(whole)
    assert "has finished its 30 steps already" in previewed(capsys, *given, "--resume", "auto")
    assert "continues from" in previewed(capsys, *given, "--resume", "auto", "--steps", "40")
    assert run(lambda: parse_as(FsdpRun, [*given, "--dry-run"]), never) == 2
    assert "already holds a run" in capsys.readouterr().err
    given[1] = "/proc/nothing"
    assert run(lambda: parse_as(FsdpRun, [*given, "--dry-run"]), never) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_a_dry_run_looks_at_the_newest_checkpoint(
    corpus: Path, whole: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    (tmp_path / "cut" / "checkpoints" / "step-00000030" / "__1_0.distcp").write_bytes(b"")
    out = previewed(capsys, *options(corpus, tmp_path / "cut", steps=STEPS), "--resume", "auto")
    assert "step-00000030 is damaged: __1_0.distcp has 0 bytes instead of" in out
    assert "take the one before" in out


def test_a_start_again_goes_on_without_being_told(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """As ranks that torchrun starts again, which have the command line of the first start."""
    output = tmp_path / "again"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints" / "step-00000030")
    lost = "import os, sys; os.environ['TORCHELASTIC_RESTART_COUNT'] = '1'; sys.argv = sys.argv[1:]; import runpy; "
    start = [sys.executable, "-c", lost + "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "mine"}
    alone["GROUP_WORLD_SIZE"] = "2"
    dead = {"lock": "x", "place": folder_lock._place(), "pid": 1, "started": -1}
    (output / ".launch").write_text(json.dumps({"launch": "mine", "begun": True, **dead}))
    done = subprocess.run(
        [*start, "launch.pretrain", *options(corpus, output, steps=STEPS), "--accumulation", "4"],
        cwd=ROOT,
        env=environment() | alone,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "resumed at step 20 on 1 ranks, after 1 restarts" in done.stderr
    assert sorted(trained(output)) == list(range(1, STEPS + 1))


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def test_a_start_that_was_refused_is_refused_again(corpus: Path, whole: Path) -> None:
    before = (whole / "log.jsonl").read_text()
    done = finished(command(corpus, whole, restarts=1))
    assert done.returncode != 0
    assert done.stderr.count("already holds a run; pass --resume auto") == 2
    assert (whole / "log.jsonl").read_text() == before


def test_a_run_that_was_lost_before_its_summary_ends_with_one(corpus: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "late")
    (tmp_path / "late" / "summary.json").unlink()
    done = pretrain(corpus, tmp_path / "late", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    late, first = read_run(tmp_path / "late").summary, read_run(whole).summary
    assert late is not None
    assert first is not None
    assert late["validation_loss"] == first["validation_loss"]
