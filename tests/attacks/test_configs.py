"""Whatever a recipe, a model, a study or an option holds: it works, or is refused in one line and nothing is left."""

import copy
import functools
import math
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from launch.study import runner
from symdist import build_optimizer, load_recipe, rule_names
from symdist.rules import get_rule
from symdist.rules.registry import ACCUMULATOR_OPTIONS
from symdist.tools import compare
from symdist.tools.cli import main
from symdist.tools.models import build
from tests.attacks.hostile import RAW, as_toml, attack, one_line, outcome, spoilt

ROOT = Path(__file__).resolve().parents[2]
# 12 kinds × 3 batches × 12 cases.
BATCHES, CASES = range(3), 12

RECIPES = ("olmoe", "aro", "scion")
OPTIONS = sorted(
    {option for name in rule_names() for option in get_rule(name).defaults}
    | {option for options in ACCUMULATOR_OPTIONS.values() for option in options}
    | {"lr", "rule", "view", "weight_decay", "padding_rows", "strategy", "rounding_seed", "role", "match", "rules"}
)
MODELS = ("olmoe-tiny", "gpt-oss-tiny", "deepseek-v3-tiny", "gemma3-tiny")
SETTINGS = (
    *("num_experts", "num_local_experts", "head_dim", "layer_types", "sliding_window", "hidden_act", "rope_parameters"),
    *("attention_dropout", "initializer_range", "rms_norm_eps", "pad_token_id", "attn_implementation", "dtype"),
)
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 2, "vocab_size": 32}
ARM = {"model": "olmoe-tiny", "name": "arm", "recipe": "adamw", "override": ["router.lr=0.1"]}
STUDY = {
    "output": "runs",
    "multipliers": [1.0, 2.0],
    "sweep_seed": 1,
    "seeds": [2],
    "run": {"steps": 4, "batch": 4, "data": {"source": "stdlib", "vocabulary": 300}},
    "arms": [ARM],
}


@functools.cache
def small() -> torch.nn.Module:
    return build("olmoe-tiny", overrides=SMALL, seed=0)


def step_once(recipe: Any) -> None:
    """What was accepted steps weights, to numbers."""
    model = copy.deepcopy(small())
    optimizer = build_optimizer(model, recipe)
    model(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    after = list(model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    moved = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert moved or all(group["lr"] == 0 for group in optimizer.param_groups)


def train_once(path: Path) -> None:
    """What was accepted, and is small, has a loss and gradients."""
    if sum(parameter.numel() for parameter in build(path, device="meta").parameters()) > 3_000_000:
        return
    model = build(path, device="cpu", seed=0)
    tokens = torch.arange(8).view(1, 8) % model.config.vocab_size
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert math.isfinite(loss.item())


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RECIPES)
def test_recipes(tmp_path: Path, name: str, batch: int) -> None:
    path = tmp_path / "recipe.toml"

    def check(content: dict[str, Any]) -> None:
        path.write_text(as_toml(content), errors="surrogatepass")
        error = outcome(lambda: main(["route", "--model", "olmoe-tiny", "--recipe", str(path)]), tmp_path)
        one_line(error)
        if not error:
            step_once(load_recipe(path))

    recipe = read_toml(ROOT / f"symdist/routing/recipes/{name}.toml")
    attack(spoilt(recipe, OPTIONS), check, batch=batch, cases=CASES)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path: Path, name: str, batch: int) -> None:
    path = tmp_path / "model.toml"

    def check(content: dict[str, Any]) -> None:
        path.write_text(as_toml(content), errors="surrogatepass")
        error = outcome(lambda: main(["route", "--model", str(path), "--recipe", "adamw"]), tmp_path)
        one_line(error)
        if not error:
            train_once(path)

    model = read_toml(ROOT / f"symdist/tools/models/{name}.toml")
    model["config"]["vocab_size"] = 64
    attack(spoilt(model, SETTINGS), check, batch=batch, cases=CASES)


@pytest.mark.parametrize("batch", BATCHES)
def test_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.toml"

    def check(content: dict[str, Any]) -> None:
        path.write_text(as_toml(content), errors="surrogatepass")
        one_line(outcome(lambda: runner.main(["--config", str(path), "--dry-run"]), tmp_path))

    overridden = st.sampled_from(CHANGES).map(lambda word: STUDY | {"arms": [{**ARM, "override": [word]}]})
    attack(spoilt(STUDY) | overridden, check, batch=batch, cases=2 * CASES)


READERS: dict[str, Callable[[str], Any]] = {
    "recipe": lambda path: main(["route", "--model", "olmoe-tiny", "--recipe", path]),
    "model": lambda path: main(["route", "--model", path]),
    "study": lambda path: runner.main(["--config", path, "--dry-run"]),
}


@pytest.mark.parametrize("content", [*RAW, "pipe", "folder", "loop", "device"])
@pytest.mark.parametrize("kind", READERS)
def test_files_that_are_none(tmp_path: Path, kind: str, content: str) -> None:
    path = tmp_path / "file.toml"
    match content:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop" | "device":
            path.symlink_to(path if content == "loop" else "/dev/zero")
        case _:
            path.write_bytes(RAW[content])
    error = outcome(lambda: READERS[kind](str(path)), tmp_path)
    one_line(error)
    assert str(path) in error or content == "empty"


RULES_FILES = {
    "that exits": "import sys\nsys.exit(0)",
    "that exits with a text": "raise SystemExit('\\x1b[31mbye\\nbye')",
    "that is no Python": "def (",
    "that imports nothing there is": "import nothing_there_is",
    "that recurses": "def f(): f()\nf()",
    "that asserts": "assert False, 'line 1\\nline 2'",
    "that registers nothing": "x = 1",
    "that registers a rule there is": "import symdist\n@symdist.rule('muon', splits=())\ndef muon(matrix):\n    yield",
    "that is binary": "\0\1\2",
}


@pytest.mark.parametrize("case", [*RULES_FILES, "that is a folder", "that is not there", "that is a pipe"])
def test_rules_files(tmp_path: Path, case: str) -> None:
    path, recipe = tmp_path / "rules.py", tmp_path / "recipe.toml"
    if case in RULES_FILES:
        path.write_text(RULES_FILES[case])
    elif case == "that is a folder":
        path.mkdir()
    elif case == "that is a pipe":
        os.mkfifo(path)
    recipe.write_text("rules = ['rules.py']\n[default]\nrule = 'adamw'\nlr = 0.1\n")
    error = outcome(lambda: main(["route", "--model", "olmoe-tiny", "--recipe", str(recipe)]), tmp_path)
    one_line(error)
    assert str(path) in error


ODD = ("", " ", "abc", "[/x]", "\x1b[31m", "\u202e", "nan", "9" * 400, "[" * 3000)
SIZES = (*ODD, *("0", "-1", "1", "2", "3", "256", "99999999999", "²", "1_0", "1e3", "1.5"))
RATES = (*ODD, *("0", "-0.0", "-1", "1e-320", "1e308", "1e999", "-inf", "0.5", "1e3", "99999999999"))
NAMES = (*ODD, *("olmoe-tiny", "adamw", "small-moe", "dion", "cpu", "float32", "here", "file", "/dev/zero", "no.toml"))
MESHES = (
    *(*ODD, "dp=2", "dp=0", "dp=-1", "dp=²", "dp=2,dp=2", "dp=2,tp=3", "dp=99999999999", "dp=256,tp=1024", "tp=2,dp=4"),
    *("tp=2,pp=2,dp=2", "pp=99,dp=2", "tp=0", "ep=2,dp=2", "ep=3,dp=3", "etp=2,dp=2", "a=b", "dp=3,", ",", "dp", "=2"),
)
PATHS = (
    *ODD,
    *("here", "here/none/new.png", "file", "file/x.png", "/proc/none.png", "/dev/full", "new.svg", "\udc80.png"),
)
CHANGES = (
    *(
        *ODD,
        "router.lr=nan",
        "router.lr=[1]",
        "router.rule=5",
        "router.rule=muon",
        "head.view={heads=0, dim=9}",
        "=",
        ".",
    ),
    *(
        "matrix.ns_steps=99999999",
        "router.lr=" + "[" * 3000,
        "x.y=1",
        "a.b.c=1",
        "router.lr=1\n[head]",
        "head.lr=1e999",
    ),
    *(
        "default.strategy=owner",
        "head.padding_rows=-1",
        "head.padding_rows=4095",
        "embedding.centered=true",
        "other.lr=0",
    ),
)
WORDS = {
    **dict.fromkeys(("ranks", "steps", "batch", "sequence", "tokens", "zero"), SIZES),
    **dict.fromkeys(("lr", "bucket-mb", "bandwidth", "tflops", "half-tflops", "model-tflops", "every"), RATES),
    **dict.fromkeys(("model", "recipe", "recipes", "against", "communication-dtype", "hardware", "device"), NAMES),
    **dict.fromkeys(("mesh", "megatron"), MESHES),
    **dict.fromkeys(("json", "picture", "output"), PATHS),
    "override": CHANGES,
}
OPTIONS_OF = {
    "route": ("model", "recipe", "ranks", "lr", "override"),
    "plan": (
        *(
            "model",
            "recipe",
            "mesh",
            "megatron",
            "zero",
            "lr",
            "override",
            "communication-dtype",
            "bucket-mb",
            "tokens",
        ),
        *("hardware", "bandwidth", "tflops", "half-tflops", "model-tflops", "json", "picture"),
    ),
    "compare": ("model", "recipes", "against", "ranks", "steps", "batch", "sequence", "device", "json"),
    "report": ("output", "picture", "every"),
}
USUAL = {
    "route": ("--model", "olmoe-tiny"),
    "plan": ("--model", "olmoe-tiny"),
    "compare": (),
    "report": ("run",),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("command", OPTIONS_OF)
def test_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, batch: int) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')

    def started(*given: Any) -> None:
        raise SystemExit(0)

    # What is accepted would start processes.
    monkeypatch.setattr(compare, "_run", started)

    def check(options: list[tuple[str, str]]) -> None:
        mesh = () if command != "plan" or {"mesh", "megatron"} & dict(options).keys() else (("mesh", "dp=2"),)
        words = [word for name, value in (*options, *mesh) for word in (f"--{name}", value)]
        error = outcome(lambda: main([command, *USUAL[command], *words]), tmp_path)
        # What cannot be a value of an option is told by the parser, at some length.
        if "helptext" not in error:
            one_line(error)

    options = [(name, word) for name in OPTIONS_OF[command] for word in WORDS[name]]
    attack(st.lists(st.sampled_from(options), min_size=1, max_size=2), check, batch=batch, cases=CASES)
