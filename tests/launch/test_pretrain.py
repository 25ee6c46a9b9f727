"""The pretraining entry on two real ranks: learning, exact resumption, clean stops, and refusals."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.config import Config, parse_as
from launch.fsdp_config import FsdpRun
from launch.runlog import check_folder
from symdist import cli
from symdist.commands.runs import read_run
from tests.launch.runs import ROOT, environment, options, stop, trained, write_corpus

STEPS = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files with something to learn."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def command(corpus: Path, output: Path, *more: str, ranks: int = 2) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"),
        *("launch/pretrain.py", *options(corpus, output, steps=STEPS), *more),
    ]


def pretrain(corpus: Path, output: Path, *more: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(corpus, output, *more, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = pretrain(corpus, output, "--checkpoint-every", "10")
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
    assert all(name in page for name in ("update_rms/router", "logit_max", "model.embed_tokens.weight", "saved "))
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
        (Config(clip=-1.0), 1, "must not be negative"),
        (Config(recipe="nothing"), 1, "there is no recipe 'nothing'"),
        (Config(set=("router",)), 1, "should be role.option=value"),
        (Config(set=("gate.lr=1",)), 1, "which is no role"),
    ],
)
def test_what_cannot_run_is_refused(config: Config, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(ranks=ranks)


def test_toml_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'steps = 7\nset = ["router.lr=0.5"]\n[data]\nvocabulary = 512\n'
        "[model_overrides]\nhidden_size = 64\ntie_word_embeddings = true\n"
    )
    given = ["--config", str(path), "--steps", "9", "--data.source", "texts", "--set", "head.lr=1"]
    config = parse_as(FsdpRun, given)
    assert (config.steps, config.data.vocabulary, config.data.source) == (9, 512, "texts")
    assert config.overrides() == {"router": {"lr": 0.5}, "head": {"lr": 1}}
    assert config.model_overrides == {"hidden_size": "64", "tie_word_embeddings": "true"}
    assert parse_as(FsdpRun, [f"--config={path}"]).steps == 7
    for text, message in (("stepz = 1", "stepz"), ('steps = "many"', "--steps"), ('precision = "fp8"', "--precision")):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            parse_as(FsdpRun, ["--config", str(path)])
        assert message in capsys.readouterr().err
    path.write_text("steps =")
    with pytest.raises(ValueError, match="not valid TOML"):
        parse_as(FsdpRun, ["--config", str(path)])
    with pytest.raises(ValueError, match="cannot be read"):
        parse_as(FsdpRun, ["--config", str(tmp_path / "missing.toml")])
    with pytest.raises(ValueError, match="needs a file"):
        parse_as(FsdpRun, ["--config"])


def test_a_finished_run_stays_as_it_is(corpus: Path, whole: Path) -> None:
    before = (whole / "log.jsonl").read_text()
    done = pretrain(corpus, whole, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "come to its 30 steps already" in done.stderr
    assert (whole / "log.jsonl").read_text() == before
    done = pretrain(corpus, whole, "--resume", str(whole / "checkpoints" / "step-00000010"))
    assert "goes on to step-00000030" in done.stderr
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
