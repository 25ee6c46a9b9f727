"""Runs that go on otherwise than they began, and runs that begin with another run's weights, under each engine."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.loop.training import Training
from symdist.routing.recipes import Recipe
from tests.launch.runs import options, trained, warm, write_corpus

STEPS, FIRST = 12, 4
MODULES = {
    "fsdp": ("torch", "launch.pretrain"),
    "deepspeed": ("deepspeed", "launch.pretrain_deepspeed"),
    "megatron": ("megatron.core", "launch.pretrain_megatron"),
}


class Job:
    """Runs of one engine on one corpus."""

    def __init__(self, engine: str, folder: Path):
        (folder / "corpus").mkdir()
        self.module, self.folder = MODULES[engine][1], folder
        self.corpus = write_corpus(folder / "corpus")
        (folder / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
        self.own = ("--deepspeed", str(folder / "zero.json")) if engine == "deepspeed" else ()

    def __call__(self, name: str, *more: str, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
        own = ("--checkpoint-every", str(FIRST), "--validate-every", "100", *self.own)
        return warm(self.module, *options(self.corpus, self.folder / name, steps=steps), *own, *more)


@pytest.fixture(scope="module", params=MODULES)
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    package, _ = MODULES[request.param]
    if importlib.util.find_spec(package.partition(".")[0]) is None or importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    job = Job(request.param, tmp_path_factory.mktemp(request.param))
    done = job("whole")
    assert done.returncode == 0, done.stderr
    return job


def checkpoint(job: Job, step: int) -> str:
    return str(job.folder / "whole" / "checkpoints" / f"step-{step:08d}")


def rates(output: Path) -> dict[str, float]:
    return {entry["name"]: entry["lr"] for entry in json.loads((output / "routing.json").read_text())}


def test_another_rate_is_used_and_said(job: Job) -> None:
    same, other = ("--resume", checkpoint(job, FIRST)), ("--lr", "0.002", "--batch", "8")
    for name, more in (("as it was", ()), ("otherwise", other)):
        done = job(name, *same, *more)
        assert done.returncode == 0, done.stderr
        assert ("batch: 4 there, 8 here" in done.stderr) == (more == other)
        assert ("recipe.matrix.lr: 0.01 there, 0.002 here" in done.stderr) == (more == other)
        assert " there, " in done.stderr if more else " there, " not in done.stderr
    whole, before, now = (job.folder / name for name in ("whole", "as it was", "otherwise"))
    assert trained(before) == {step: values for step, values in trained(whole).items() if step > FIRST}
    assert trained(now).keys() == trained(before).keys()
    was, are = rates(before), rates(now)
    # Megatron gives symdist the rates with each step, so that these are zero before.
    assert all(are[name] == pytest.approx(was[name] / 5) for name in was)
    assert trained(now)[STEPS][0] > trained(before)[STEPS][0] + 0.2


def test_patterns_count_like_roles() -> None:
    """What may change in a role may change in a pattern, and all else is compared."""
    pattern = {"match": "layers.*.weird.weight", "role": "head", "lr": 0.1, "centered": True}
    run = SimpleNamespace(
        recipe=Recipe(name="own", sections={"head": {"rule": "muon", "lr": 0.2}}, patterns=(pattern,))
    )
    kept = {"head": {"rule": "muon"}, "patterns[0]": {key: pattern[key] for key in ("match", "role", "centered")}}
    assert Training._recipe_options(run, wanted=True) == {"head": {"lr": 0.2}, "patterns[0]": {"lr": 0.1}}
    assert Training._recipe_options(run, wanted=False) == kept


def test_another_rule_is_refused_and_the_value_named(job: Job) -> None:
    done = job("refused", "--resume", checkpoint(job, FIRST), "--override", "router.centered=false")
    assert done.returncode == 2, done.stderr
    assert "recipe.router.centered is " in done.stderr
    assert done.stderr.count(" in the checkpoint but ") == 1
    assert not (job.folder / "refused").exists()


def test_a_run_begins_with_the_weights_of_another(job: Job) -> None:
    done = job("begins", "--from-weights", checkpoint(job, STEPS), "--recipe", "adamw", steps=2)
    assert done.returncode == 0, done.stderr
    assert f"the weights are those of step {STEPS}" in done.stderr
    losses, first = trained(job.folder / "begins"), trained(job.folder / "whole")
    assert losses.keys() == {1, 2}
    assert losses[1][0] < first[1][0] - 0.3
    done = job("begins", "--from-weights", checkpoint(job, STEPS), "--recipe", "adamw", "--resume", "auto", steps=3)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stderr


def test_weights_of_another_shape_are_refused(job: Job) -> None:
    more = ("--from-weights", checkpoint(job, STEPS), "--model-overrides", "num_hidden_layers", "1")
    done = job("other", *more, steps=2)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
