"""SIGKILL of ranks, launchers, scripts and nodes: the losses of a run that loses nothing, and nobody left behind."""

import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.checkpoints.directory import newest_first, verify_sizes
from tests.launch import netns
from tests.launch.netns import Job, Node, lose, network
from tests.launch.running import TIMELY, Running, events, started
from tests.launch.runs import ROOT, environment, lines, options, run_fsdp, torchrun, trained, validated, write_corpus

# How many kills one run is to survive; twenty take some minutes.
KILLS = int(os.environ.get("SYMDIST_TEST_KILLS", "2"))
STEPS = max(30, 5 * KILLS)
ENGINES = {"launch.pretrain_deepspeed": "deepspeed", "launch.pretrain_megatron": "megatron"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run_fsdp(corpus, output, "--validate-every", "3", steps=STEPS)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def bereaved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, which loses a rank or torchrun again and again: in steps, validations, checkpoints and starts."""
    output = tmp_path_factory.mktemp("runs") / "bereaved"
    more = ("--checkpoint-every", "2", "--validate-every", "3", "--keep", "2", "--resume", "auto")
    command = torchrun(corpus, output, *more, steps=STEPS, restarts=KILLS)
    draw, kill = random.Random(7), 0
    while True:
        with started(command, output, output.parent / "stderr") as running:
            dead: set[int] = set()
            while kill < KILLS:
                ranks = running.ranks(but=dead)
                kill += 1
                if kill % 6:  # Each sixth, a launcher's, comes while its ranks start.
                    await_moment(running, output, draw, in_checkpoint=kill % 2 == 0)
                if kill % 3 == 2 or kill % 6 == 0:
                    running.kill_launcher()
                    break
                os.kill(draw.choice(ranks), signal.SIGKILL)
                dead |= set(ranks)
            else:
                assert running.launcher.wait(TIMELY) == 0, running.said()
                return output


def await_moment(running: Running, output: Path, draw: random.Random, *, in_checkpoint: bool) -> None:
    """Wait for some steps and milliseconds after a start, or for a checkpoint that is being written."""
    base = running.furthest()
    ahead = draw.randrange(0, 3) if base + 4 < STEPS else 0
    running.wait_for(lambda: running.furthest() >= base + ahead)
    if in_checkpoint and base + 4 < STEPS:
        # So that the run goes on from a checkpoint, wait for one.
        running.wait_for(lambda: list(output.glob("checkpoints/step-????????")))
        # Those of the background show for milliseconds; if none shows, the run has come to its end.
        running.wait_for(lambda: list(output.glob("checkpoints/*.writing")) or running.furthest() + 2 >= STEPS)
    else:
        time.sleep(draw.random() * 0.3)
    assert running.launcher.poll() is None, "the run ended before all were killed"


def test_a_run_that_loses_ranks_and_launchers_ends_as_if_it_had_not(whole: Path, bereaved: Path) -> None:
    assert trained(bereaved) == trained(whole)
    assert validated(bereaved) == validated(whole)
    assert steps_logged(bereaved) == steps_logged(whole)
    assert any(event["event"] == "resume" and event["step"] > 0 for event in events(bereaved))


def test_no_checkpoint_of_it_is_damaged(bereaved: Path) -> None:
    for path in newest_first(bereaved / "checkpoints"):
        verify_sizes(path)
    assert not any(event["event"] == "fallback" for event in events(bereaved))


def steps_logged(output: Path) -> list[tuple[str, int]]:
    """Kind and step of every line of the log, in its order."""
    return [(line["kind"], line["step"]) for line in lines(output)]


@pytest.mark.parametrize("module", ENGINES)
def test_none_is_left_of_an_engine_whose_launcher_is_killed(corpus: Path, tmp_path: Path, module: str) -> None:
    if importlib.util.find_spec(ENGINES[module]) is None:
        pytest.skip(f"{ENGINES[module]} is not installed")
    output, config = tmp_path / "run", tmp_path / "stage2.json"
    config.write_text('{"zero_optimization": {"stage": 2}}')
    own = {"deepspeed": ("--deepspeed", str(config)), "megatron": ("--model", "qwen3-moe-tiny")}[ENGINES[module]]
    command = torchrun(corpus, output, "--checkpoint-every", "2", *own, steps=10_000)
    start = command.index("launch.pretrain")
    command[start] = module
    if ENGINES[module] == "deepspeed":
        from tests.launch.test_pretrain_deepspeed import deepspeeds_launcher

        command[:start] = [*deepspeeds_launcher(), "--module"]
    with started(command, output, tmp_path / "stderr") as running:
        running.wait_for(lambda: list(output.glob("checkpoints/step-????????")))
        running.kill_launcher()


@pytest.mark.parametrize("patience", [0, 1], ids=["before a rank has begun", "while a rank imports"])
def test_a_rank_whose_launcher_is_gone_does_not_begin(corpus: Path, tmp_path: Path, patience: int) -> None:
    words = [sys.executable, "-m", "launch.pretrain", *options(corpus, tmp_path / "run", steps=1)]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    launcher = ["sh", "-c", f'"$@" & echo $!; sleep {patience}', "sh", *words]
    variables = environment() | place | {"MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "one"}
    with psutil.Popen(launcher, cwd=ROOT, env=variables, stdout=-1, text=True) as shell:
        rank = psutil.Process(int(shell.stdout.readline()))
        shell.wait()
    assert not psutil.wait_procs([rank], timeout=TIMELY)[1]
    assert not (tmp_path / "run").exists()


needs_namespaces = pytest.mark.skipif(bool(netns.unavailable()), reason=netns.unavailable())


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with network(tmp_path_factory.mktemp("nodes")) as made:
        yield made


@pytest.fixture(scope="module")
def whole_on_nodes(nodes: list[Node], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes that nothing happens to."""
    folder = tmp_path_factory.mktemp("on-nodes")
    job = Job(nodes, folder, corpus)
    job.finish(folder / "whole", job.start_all(folder / "whole"))
    return folder / "whole"


@needs_namespaces
@pytest.mark.parametrize("victim", ["agent of 0", "agent of 1", "script of 0", "script of 1", "node 0", "both nodes"])
def test_a_run_on_two_nodes_that_loses(
    nodes: list[Node], whole_on_nodes: Path, corpus: Path, tmp_path: Path, victim: str
) -> None:
    output = tmp_path / "run"
    job = Job(nodes, tmp_path, corpus)
    running = job.start_all(output)
    job.wait(output, running, (output / "checkpoints" / "step-00000010").exists)
    kind, _, number = victim.rpartition(" ")
    if kind == "agent of":
        (agent,) = [child for child in psutil.Process(running[int(number)].pid).children() if child.name() != "sleep"]
        agent.kill()
    elif kind == "script of":
        running[int(number)].kill()
    else:
        lose(*(nodes[:1] if victim == "node 0" else nodes[:2]))
    # Node 0 has the list of nodes: without it the other one ends too.
    ended = [1] if victim.endswith("of 1") else [0, 1]
    for rank in ended:
        assert running[rank].wait(timeout=TIMELY) != 0
        job.await_empty(rank)
    for rank in ended:
        running[rank] = job.start(output, rank)
    job.finish(output, running)
    assert trained(output) == trained(whole_on_nodes)
    assert validated(output) == validated(whole_on_nodes)
    assert steps_logged(output) == steps_logged(whole_on_nodes)
    assert "resumed at step" in job.said(output)
