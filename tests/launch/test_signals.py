"""Signals that ask a run to stop are answered wherever it is."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from launch.runtime.signals import STOP_SIGNALS
from tests.launch.runs import ROOT, environment, run_fsdp, torchrun, trained, validated, write_corpus
from tests.processes import agent_ends_with_parent

# Before the training the main thread waits in C, where Python calls no handler.
PROGRAM = """
import ctypes, os, sys, time
from launch.runtime.signals import StopSignals
said = []
def say(text):
    os.write(1, f"{text}\\n".encode())
    said.append(text)
signals = StopSignals(say)
signals.training = sys.argv[1] == "training"
signals.before_leaving = lambda: say("leaving")
signals.listen()
print("waiting", flush=True)
if not signals.training:
    mutex = (ctypes.c_char * 64)()
    for _ in "twice":
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
while not (signals.requested and said):
    time.sleep(0.01)
print("requested", flush=True)
"""


def start(when: str) -> subprocess.Popen[str]:
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, when],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        # These tests may be run under nohup, which has it ignored.
        preexec_fn=partial(signal.signal, signal.SIGHUP, signal.SIG_DFL),
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "waiting\n"
    return running


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_there_is_anything_to_save_the_process_leaves(number: int) -> None:
    running = start("before")
    running.send_signal(number)
    said, _ = running.communicate()
    assert running.returncode == 0
    assert said.splitlines() == [
        f"stopped by {signal.Signals(number).name} before there was anything to save",
        "leaving",
    ]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_in_training_it_is_noted_and_said_once(number: int) -> None:
    running = start("training")
    running.send_signal(number)
    said, _ = running.communicate()
    assert running.returncode == 0
    assert said.splitlines() == [
        f"{signal.Signals(number).name}: the run saves a checkpoint after this step, and ends",
        "requested",
    ]


STEPS = 3
command, pretrain = partial(torchrun, steps=STEPS), partial(run_fsdp, steps=STEPS)


def test_a_validation_is_left_and_done_when_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    corpus, more = write_corpus(tmp_path / "corpus"), ("--validate-every", "1")
    # Many short sequences, so that a validation takes seconds.
    more += ("--sequence", "8", "--validation-sequences", "9999")
    done = pretrain(corpus, tmp_path / "whole", *more)
    assert done.returncode == 0, done.stderr
    output = tmp_path / "stopped"
    running = subprocess.Popen(
        command(corpus, output, *more),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=agent_ends_with_parent,
    )
    # The line of a step is written before its validation begins.
    while not ((output / "log.jsonl").exists() and "train" in (output / "log.jsonl").read_text()):
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.002)
    for tasks in Path(f"/proc/{running.pid}/task").glob("*/children"):
        for rank in tasks.read_text().split():
            os.kill(int(rank), signal.SIGUSR1)
    _, said = running.communicate()
    assert running.returncode == 0, said
    assert "SIGUSR1: the run saves a checkpoint" in said
    assert "stopped by a signal: saved step 1" in said
    done = pretrain(corpus, output, *more, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert validated(output) == validated(tmp_path / "whole")
    assert trained(output) == trained(tmp_path / "whole")
