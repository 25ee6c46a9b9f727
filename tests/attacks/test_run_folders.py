"""Folders of runs in which something is not as a run left it: the run goes on to the same losses, or says why not."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launch.runs import options, trained, warm, write_corpus

STEPS, EVERY, LAST = 6, 2, 4
NESTED = b'{"a":' * 50_000
Fault = Callable[[Path], object]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    own = ("--checkpoint-every", str(EVERY), "--keep", "9", "--accumulation", "1", "--no-background-checkpoints")
    return warm("launch.pretrain", *options(corpus, output, steps=STEPS), *own, *more, ranks=1)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run(corpus, output)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def lost(whole: Path, tmp_path: Path) -> Path:
    """A run that was lost after its fourth step's checkpoint."""
    output = Path(shutil.copytree(whole, tmp_path / "lost"))
    (output / "summary.json").unlink()
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    return output


def holds(name: str, content: bytes) -> Fault:
    return lambda output: (output / name).write_bytes(content)


def ends_with(name: str, content: bytes) -> Fault:
    def append(output: Path) -> None:
        with open(output / name, "ab") as stream:
            stream.write(content)

    return append


def instead(name: str, make: Callable[[Path], object]) -> Fault:
    """Something else in the place of a file or folder."""

    def change(output: Path) -> None:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        make(path)

    return change


def nothing(path: Path) -> None:
    pass


def link(to: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(to)


def manifest(step: int) -> str:
    return f"checkpoints/step-{step:08d}/manifest.json"


def second_as_ninth(output: Path) -> None:
    shutil.copytree(output / "checkpoints" / "step-00000002", output / "checkpoints" / "step-00000009")


def elsewhere(output: Path) -> None:
    (output / "checkpoints").rename(output.parent / "elsewhere")
    (output / "checkpoints").symlink_to(output.parent / "elsewhere")


LOG, EVENTS, BACK, SUMMARY, LAUNCH = "log.jsonl", "events.jsonl", "rollback.json", "summary.json", ".launch"
NINTH = "checkpoints/step-00000009"
KINDS: dict[str, Callable[[Path], object]] = {
    "directory": Path.mkdir,
    "fifo": os.mkfifo,
    "dangling link": link("nowhere"),
    "endless link": link("step-00000009"),
}
TEXTS = {"empty": b"", "NULs": b"\0" * 64, "nested": NESTED, "list": b"[1]", "no UTF-8": b"\xff\xfe{}"}
GOES_ON: dict[str, Fault] = {
    **{f"{name} {kind}": instead(name, make) for name in (LOG, EVENTS, BACK) for kind, make in KINDS.items()},
    **{f"{name} {kind}": instead(name, KINDS[kind]) for name in (SUMMARY, LAUNCH) for kind in ("directory", "fifo")},
    **{f"{name} {kind}": holds(name, text) for name in (BACK, SUMMARY, LAUNCH) for kind, text in TEXTS.items()},
    **{
        f"{name} {kind}": ends_with(name, b"\n" + text + b"\n")
        for name in (LOG, EVENTS)
        for kind, text in TEXTS.items()
    },
    **{f"{name} missing": instead(name, nothing) for name in (LOG, EVENTS, "run.json")},
    "log cut": ends_with(LOG, b'{"step": 9, "ki'),
    "log of texts": ends_with(LOG, b'\n{"step": "9", "kind": 3}\n{"step": 99, "kind": "train", "loss": 1}\n'),
    "rollback below zero": holds(BACK, b'{"count": -1, "step": 4, "position": 0}'),
    "summary of texts": holds(SUMMARY, b'{"steps": "many"}'),
    "run.json directory": instead("run.json", Path.mkdir),
    **{f"stray {kind}": instead(NINTH, make) for kind, make in KINDS.items()},
    "stray file": holds(NINTH, b"x"),
    "stray name": holds("checkpoints/step-x", b"x"),
    "file half-written": holds(f"{NINTH}.writing", b"x"),
    "link half-written": instead(f"{NINTH}.writing", link("/")),
    "link half-removed": instead(f"{NINTH}.removing", link("..")),
    "manifest missing": instead(manifest(LAST), nothing),
    **{f"manifest {kind}": instead(manifest(LAST), make) for kind, make in KINDS.items()},
    **{f"manifest {kind}": holds(manifest(LAST), text) for kind, text in TEXTS.items()},
    "second as ninth": second_as_ninth,
    "checkpoints elsewhere": elsewhere,
    "link to a checkpoint": instead(NINTH, link("step-00000004")),
}
# What is added to a log, each between lines that are whole.
GOES_ON |= {
    f"{name} {kind}": ends_with(name, b"\n" + text + b"\n") for name in (LOG, EVENTS) for kind, text in TEXTS.items()
}


def test_there_are_sixty() -> None:
    assert len(GOES_ON) >= 60


@pytest.mark.parametrize("fault", GOES_ON)
def test_the_run_goes_on(corpus: Path, whole: Path, lost: Path, fault: str) -> None:
    GOES_ON[fault](lost)
    done = run(corpus, lost, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    resumed = 2 if fault.startswith("manifest") else LAST
    assert f"resumed at step {resumed}" in done.stderr
    expected = {step: values for step, values in trained(whole).items() if step > resumed}
    assert {step: values for step, values in trained(lost).items() if step > resumed} == expected
    assert json.loads((lost / SUMMARY).read_text())["steps"] == STEPS


REFUSED: dict[str, tuple[Fault, str]] = {
    "checkpoints gone": (instead("checkpoints", nothing), "no whole checkpoint, but"),
    "checkpoints a file": (instead("checkpoints", Path.touch), "no whole checkpoint, but"),
    "all damaged": (
        lambda output: [file.write_bytes(b"") for file in output.glob("checkpoints/step-*/manifest.json")],
        "no whole checkpoint, but",
    ),
    "only the log is left": (
        lambda output: [instead("checkpoints", nothing)(output), instead(EVENTS, nothing)(output)],
        "comes to step",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_no_step_is_repeated_in_silence(corpus: Path, whole: Path, lost: Path, fault: str) -> None:
    change, words = REFUSED[fault]
    change(lost)
    before = trained(lost)
    done = run(corpus, lost, "--resume", "auto")
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert trained(lost) == before
    if fault == "checkpoints a file":
        (lost / "checkpoints").unlink()
    done = run(corpus, lost, "--resume", "auto", "--start-over")
    assert done.returncode == 0, done.stderr
    assert trained(lost) == trained(whole)
