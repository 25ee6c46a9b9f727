"""Runs that lose ranks, disks, checkpoints or patience: what they end with, and what they say."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from launch.data import write_shard
from launch.loop.loss_spikes import SpikeJudge
from tests.launch.running import TIMELY, events, started
from tests.launch.runs import mounted, run_fsdp, torchrun, trained, write_corpus

STEPS = 30


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


pretrain = partial(run_fsdp, steps=STEPS)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to, with checkpoints every five steps, all of them kept."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = pretrain(corpus, output, *("--checkpoint-every", "5", "--keep", "2", "--keep-every", "10"))
    assert done.returncode == 0, done.stderr
    return output


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_the_newest_and_every_tenth_are_kept(whole: Path) -> None:
    kept = {*range(10, STEPS, 10), STEPS - 5, STEPS}
    assert names(whole) == [f"step-{step:08}" for step in sorted(kept)]


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """The uninterrupted run as it would lie there had it been lost right after its last checkpoint."""
    output = tmp_path / "stopped"
    shutil.copytree(whole, output)
    (output / "summary.json").unlink()
    return output


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_auto_takes_the_newest_that_is_whole_and_says_so(corpus: Path, whole: Path, stopped: Path) -> None:
    checkpoints = stopped / "checkpoints"
    flip(checkpoints / f"step-{STEPS:08}" / "__1_0.distcp")
    (checkpoints / f"step-{STEPS - 5:08}" / "__0_0.distcp").unlink()
    with open(stopped / "log.jsonl", "a") as stream:
        stream.write('{"step": 30, "ki')
    done = pretrain(corpus, stopped, "--resume", "auto", "--checkpoint-every", "100")
    assert done.returncode == 0, done.stderr
    fallbacks = [event["text"] for event in events(stopped) if event["event"] == "fallback"]
    assert f"step-{STEPS:08} is damaged: __1_0.distcp does not match its checksum" in fallbacks[0]
    assert f"step-{STEPS - 5:08} is damaged: __0_0.distcp is missing" in fallbacks[1]
    assert f"resumed at step {STEPS - 10} on 2 ranks" in done.stderr
    assert trained(stopped) == trained(whole)
    aside = [f"step-{step:08}.damaged" for step in (STEPS - 5, STEPS)]
    assert [name for name in names(stopped) if name.endswith("damaged")] == aside


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(corpus: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy" / f"step-{STEPS:08}"
    shutil.copytree(whole / "checkpoints" / path.name, path)
    flip(path / ".metadata")
    done = pretrain(corpus, tmp_path / "out", "--resume", str(path))
    assert done.returncode != 0
    assert f"error: checkpoint {path} is damaged: .metadata does not match its checksum" in done.stderr
    assert path.is_dir()


@pytest.mark.parametrize(("ranks", "more"), [(2, ()), (4, ("--mesh.tp", "2"))], ids=["2", "2 × tp 2"])
def test_four_ranks_go_on_as_two_and_under_tensor_parallelism(
    four: Path, corpus: Path, tmp_path: Path, ranks: int, more: tuple[str, ...]
) -> None:
    done = pretrain(
        corpus,
        tmp_path / "on",
        *("--accumulation", "1", "--resume", str(four / "checkpoints" / "step-00000010"), *more),
        ranks=ranks,
    )
    assert done.returncode == 0, done.stderr
    expected, found = trained(four), trained(tmp_path / "on")
    assert sorted(found) == list(range(11, STEPS + 1))
    assert [found[step][0] for step in range(11, 31)] == pytest.approx(
        [expected[step][0] for step in range(11, 31)], abs=1e-4
    )


@pytest.fixture(scope="module")
def four(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on four ranks, with a checkpoint after ten steps."""
    output = tmp_path_factory.mktemp("runs") / "four"
    done = pretrain(corpus, output, "--accumulation", "1", "--checkpoint-every", "10", ranks=4)
    assert done.returncode == 0, done.stderr
    return output


def test_a_rank_that_stands_still_ends_the_run_with_what_it_was_at(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "hung"
    with started(torchrun(corpus, output, "--timeout", "10", steps=STEPS), output, tmp_path / "stderr") as running:
        ranks = running.ranks()
        running.wait_for(lambda: running.furthest() >= 3)
        os.kill(ranks[1], signal.SIGSTOP)
        running.wait_for(lambda: "made no progress for 10 s in step" in running.said())
        # torchrun waits half a minute for it to leave in order.
        os.kill(ranks[1], signal.SIGKILL)
        assert running.launcher.wait(TIMELY) != 0
    text = running.said()
    assert re.search(
        r"error: rank 0 has made no progress for 10 s in step \d+, (forward and backward|optimizer|optimizer, .*): "
        "a rank is lost or hung, or --timeout is too short for this",
        text,
    )
    # The stack of the thread that waits.
    assert "training.py" in text
    assert [event["event"] for event in events(output)] == ["start", "timeout"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for one checkpoint, but not for two."""
    with mounted(tmp_path / "disk", size="1600k") as folder:
        yield folder


@pytest.mark.parametrize("more", [(), ("--no-background-checkpoints",)], ids=["background", "foreground"])
def test_a_full_disk_does_not_end_the_run(
    corpus: Path, whole: Path, tmp_path: Path, small_disk: Path, more: tuple[str, ...]
) -> None:
    output = tmp_path / "full"
    output.mkdir()
    (output / "checkpoints").symlink_to(small_disk)
    done = pretrain(corpus, output, "--checkpoint-every", "5", *more)
    # The last one could not be written either, and that is not to go unnoticed.
    assert done.returncode != 0
    assert re.search(r"error: cannot write .*; \S+ k?B were free there", done.stderr)
    assert trained(output) == trained(whole)
    failed = [event for event in events(output) if event["event"] == "save_failed"]
    assert len(failed) == STEPS // 5 - 1
    assert all("earlier checkpoints are unchanged" in event["text"] for event in failed)
    assert names(output) == ["step-00000005"]
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    done = pretrain(corpus, output, "--checkpoint-every", "5", "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 5" in done.stderr
    assert trained(output) == trained(whole)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of the same eight tokens over and over, with a sequence of noise here and there."""
    folder = tmp_path_factory.mktemp("noisy")
    draw = np.random.default_rng(3)
    windows = [draw.integers(0, 300, 32) if i % 25 == 7 else np.arange(32) % 8 + 8 * (i % 4) for i in range(2000)]
    write_shard(folder / "train.bin", np.concatenate(windows), vocabulary=300)
    write_shard(folder / "val.bin", np.concatenate(windows[:50]), vocabulary=300)
    return folder


SPIKY = (
    *("--steps", "60", "--batch", "2", "--accumulation", "1", "--spike-sigma", "0.1"),
    *("--rollback-after", "1", "--checkpoint-every", "4", "--rollbacks"),
)


@pytest.fixture(scope="module")
def spiky(noisy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that leaves out steps whose loss jumps, and goes back after each."""
    output = tmp_path_factory.mktemp("runs") / "spiky"
    done = pretrain(noisy, output, "--data.source", f"bin:{noisy}/*.bin", *SPIKY, "50")
    assert done.returncode == 0, done.stderr
    return output


def test_spikes_are_left_out_and_counted(spiky: Path) -> None:
    spikes = [event for event in events(spiky) if event["event"] == "spike"]
    assert len(spikes) >= 2
    assert all("is a spike; the step was skipped" in event["text"] for event in spikes)
    summary = json.loads((spiky / "summary.json").read_text())
    assert summary["spikes"] == summary["skipped_steps"] == len(spikes)


def test_the_run_goes_back_and_on_with_other_data(spiky: Path) -> None:
    backs = [
        re.fullmatch(r"step (\d+): back to step (\d+), to continue with other data", event["text"]).groups()  # type: ignore[union-attr]
        for event in events(spiky)
        if event["event"] == "rollback"
    ]
    assert len(backs) == len([event for event in events(spiky) if event["event"] == "spike"])
    assert sorted(trained(spiky)) == list(range(1, 61))
    again = sum(int(came) - int(back) for came, back in backs)
    state = json.loads((spiky / "checkpoints" / "step-00000060" / "state.json").read_text())
    # Nothing was read twice, and nothing but what was left out is lost.
    assert state["trainer"]["data"]["position"] == 2 * (60 + again)


def test_it_goes_back_only_so_often(noisy: Path, tmp_path: Path) -> None:
    done = pretrain(noisy, tmp_path / "often", "--data.source", f"bin:{noisy}/*.bin", *SPIKY, "1")
    assert done.returncode != 0
    assert re.search(
        r"error: step \d+: 1 steps in a row were skipped, and the run was rolled back 1 times already", done.stderr
    )


def test_a_run_that_only_ever_leaves_out_steps_ends(corpus: Path, tmp_path: Path) -> None:
    done = pretrain(
        corpus,
        tmp_path / "lost",
        *("--model-overrides", "num_hidden_layers", "2", "hidden_size", "32", "intermediate_size", "32"),
        *("rms_norm_eps", "nan", "--rollback-after", "3", "--checkpoint-every", "2", "--rollbacks", "1"),
    )
    assert done.returncode != 0
    assert "error: step 3: 3 steps in a row were skipped before there was any checkpoint to return to" in done.stderr
    assert not (tmp_path / "lost" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("losses", "spike"),
    [([2.0, 2.1] * 16 + [2.06], False), ([2.0, 2.1] * 16 + [2.9], True), ([2.0, 2.1] * 15 + [9.9], False)],
    ids=["usual", "jump", "too early to tell"],
)
def test_what_counts_as_a_spike(losses: list[float], spike: bool) -> None:
    judge = SpikeJudge(6.0)
    assert not any(judge.judge(loss) for loss in losses[:-1])
    again = SpikeJudge(6.0)
    again.load_state_dict(json.loads(json.dumps(judge.state_dict())))
    assert judge.judge(losses[-1]) is spike
    assert again.judge(losses[-1]) is spike
    assert not SpikeJudge(0.0).judge(math.inf)
    assert judge.judge(math.nan)
