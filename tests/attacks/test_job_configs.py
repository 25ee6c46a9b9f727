"""Whatever a job's TOML file or options hold: it is accepted, or refused in one line, and nothing is left."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from launch.engines.deepspeed.config import DeepSpeedRun
from launch.engines.fsdp.config import FsdpRun
from launch.engines.megatron.config import MegatronRun
from launch.loop.config import Config, parse_as
from launch.loop.job import run
from tests.attacks.hostile import RAW, as_toml, attack, one_line, outcome, spoilt
from tests.attacks.test_configs import CHANGES, NAMES, ODD, PATHS, RATES, SIZES

# 7 kinds × 3 batches × 12 cases.
BATCHES, CASES = range(3), 12

RUNS: dict[str, type[Config]] = {"fsdp": FsdpRun, "deepspeed": DeepSpeedRun, "megatron": MegatronRun}
TABLE = {
    "model": "olmoe-tiny",
    "recipe": "small-moe",
    "steps": 4,
    "batch": 4,
    "sequence": 32,
    "clip": 1.0,
    "aux_loss": 0.01,
    "timeout": 600.0,
    "seed": 1,
    "override": ["router.lr=0.1"],
    "model_overrides": {"num_hidden_layers": 1},
    "data": {"source": "corpus", "vocabulary": 300, "cache": "cache"},
}
KEYS = {
    "fsdp": ("mesh", "background_checkpoints", "spike_sigma", "output", "resume", "from_weights", "peak_tflops"),
    "deepspeed": ("deepspeed", "trust_checkpoints", "rollback_after", "checkpoint_every", "keep", "precision"),
    "megatron": ("tensor_parallel", "expert_parallel", "overlap", "make_vocab_size_divisible_by", "initialize"),
}


def start(*given: Any) -> Any:
    raise AssertionError("a dry run starts nothing")


def checked(kind: str, words: list[str], folder: Path) -> str:
    """What comes of a job with these words, which is to check everything and start nothing."""
    program: Callable[[], int] = lambda: run(lambda: parse_as(RUNS[kind], [*words, "--dry-run"]), start)  # noqa: E731
    return outcome(program, folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("words of a text\n" * 4000)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", RUNS)
def test_files(place: Path, kind: str, batch: int) -> None:
    path = place / "job.toml"
    path.touch()

    def check(content: dict[str, Any]) -> None:
        path.write_text(as_toml(content), errors="surrogatepass")
        one_line(checked(kind, ["--config", str(path)], place))

    attack(spoilt(TABLE, KEYS[kind]), check, batch=batch, cases=CASES)


@pytest.mark.parametrize("content", [*RAW, "pipe", "folder", "loop"])
def test_files_that_are_none(place: Path, content: str) -> None:
    path = place / "job.toml"
    match content:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path)
        case _:
            path.write_bytes(RAW[content])
    words = ["--config", str(path), "--data.source", "corpus", "--data.vocabulary", "300", "--data.cache", "cache"]
    error = checked("fsdp", words, place)
    one_line(error)
    assert str(path) in error or content == "empty"


COUNTS = (
    *("steps", "batch", "sequence", "accumulation", "validate-every", "validation-sequences", "log-every", "keep"),
    *("checkpoint-every", "keep-every", "rollback-after", "rollbacks", "seed", "data.vocabulary", "data.max-tokens"),
)
WORDS = {
    **dict.fromkeys(COUNTS, SIZES),
    **dict.fromkeys(("lr", "clip", "aux-loss", "z-loss", "spike-sigma", "timeout", "peak-tflops"), RATES),
    **dict.fromkeys(("model", "recipe", "precision", "initialize", "nonfinite", "data.text-column"), NAMES),
    **dict.fromkeys(("output", "resume", "from-weights", "data.source", "data.cache", "data.tokenizer"), PATHS),
    "override": CHANGES,
}
OWN = {
    "fsdp": dict.fromkeys(("mesh.tp", "mesh.ep", "mesh.dp-shard", "mesh.dp-replicate"), SIZES),
    "deepspeed": {"deepspeed": PATHS},
    "megatron": dict.fromkeys(("tensor-parallel", "pipeline-parallel", "make-vocab-size-divisible-by"), SIZES),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", RUNS)
def test_options(place: Path, kind: str, batch: int) -> None:
    def check(options: list[tuple[str, str]]) -> None:
        words = [word for name, value in options for word in (f"--{name}", value)]
        usual = ["--data.source", "corpus", "--data.vocabulary", "300", "--data.cache", "cache", "--output", "new"]
        error = checked(kind, [*usual, *words], place)
        # What cannot be a value of an option is told by the parser, at some length.
        if "helptext" not in error:
            one_line(error)

    options = [(name, word) for name, values in (WORDS | OWN[kind]).items() for word in values]
    attack(st.lists(st.sampled_from(options), min_size=1, max_size=2), check, batch=batch, cases=CASES)


def test_what_looks_like_nothing_is_refused(place: Path) -> None:
    for words in (["--output", ""], ["--aux-loss", "nan"], ["--timeout", "inf"], ["--seed", "-1"], ["--resume", ""]):
        error = checked("fsdp", ["--data.source", "corpus", *words], place)
        assert error.startswith(f"error: {words[0]} is ")
        one_line(error)


def test_odd_texts_are_among_the_words() -> None:
    assert set(ODD) <= {word for values in WORDS.values() for word in values}
