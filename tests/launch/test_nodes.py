"""The scripts that nodes run: what they start and with what, and that a run survives the loss of a node."""

import importlib.util
import sys
from pathlib import Path

import pytest

from launch.engines.deepspeed.config import DeepSpeedRun
from launch.loop.config import Config, parse_as
from symdist.tools.run_log import read_run
from tests.launch import netns
from tests.launch.netns import MULTINODE, STEPS, Job, lose, network
from tests.launch.node_stubs import call, python, without_ip
from tests.launch.runs import ROOT, trained, validated, write_corpus

OLMOE = "launch/configs/olmoe-tiny.toml"
PLACE = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "NPROC": "2"}
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/cluster/*")])
MODELS = ("olmoe-1b-7b", "qwen3-0.6b", "gemma3-1b", "gpt-oss-small")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    assert call("-n", script).returncode == 0


@pytest.mark.parametrize("model", MODELS)
def test_configs_of_the_paper(model: str) -> None:
    tokens = {"olmoe-1b-7b": 163_840, "qwen3-0.6b": 229_376, "gemma3-1b": 147_456, "gpt-oss-small": 65_536}
    words = ["--config", str(ROOT / f"launch/configs/{model}.toml")]
    config = parse_as(Config, words)
    assert config.batch * config.sequence == tokens[model]
    for ranks in (8, 16):
        config.check(ranks=ranks)
        for stage in (1, 3):
            path = ROOT / f"launch/configs/deepspeed/{model}-stage{stage}.json"
            parse_as(DeepSpeedRun, [*words, "--deepspeed", str(path)]).check(ranks=ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NNODES": ""}, "set NNODES"),
        ({"NODE_RANK": ""}, "set NODE_RANK"),
        ({"MASTER_ADDR": ""}, "set MASTER_ADDR"),
        ({"NNODES": "two"}, "NNODES is 'two', not a whole number"),
        ({"NODE_RANK": "2"}, "the last of 2 nodes is 1"),
        ({"NPROC": "0"}, "NPROC is 0; it must be at least 1"),
        ({"MASTER_PORT": "70000"}, "the highest port is 65535"),
        ({"PYTHON": "no-such-python"}, "there is no no-such-python"),
    ],
)
def test_what_is_missing_or_wrong_is_said(change: dict[str, str], message: str, tmp_path: Path) -> None:
    done = call(MULTINODE, "pretrain", OLMOE, **({"PYTHON": python(tmp_path)} | PLACE | change))
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("steps =")
    for config, message in (("missing.toml", "no config missing.toml"), (broken, f"config {broken}:")):
        done = call(MULTINODE, "pretrain", config, **PLACE, PYTHON=python(tmp_path))
        assert done.returncode == 2
        assert message in done.stderr
    assert "give a CONFIG" in call(MULTINODE, "pretrain", **PLACE).stderr
    assert "the first word is 'pretrain_deepsped', not pretrain, " in call(MULTINODE, "pretrain_deepsped").stderr
    assert "MAX_RESTARTS" in call(MULTINODE, "--help").stdout


@pytest.mark.parametrize("entry", ["pretrain", "pretrain_deepspeed", "pretrain_megatron"])
def test_dry_run_prints_every_node_and_starts_nothing(entry: str, tmp_path: Path) -> None:
    output = tmp_path / "out put"
    words = (MULTINODE, entry, OLMOE, "--output", output, "--dry-run", "--steps", "7")
    done = call(*words, NNODES="3", NPROC="8", MASTER_ADDR="no.such.host", PYTHON=python(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not output.exists()
    assert "torchrun" not in done.stdout
    for rank in range(3):
        block = done.stdout.split(f"node {rank}:")[1].split(f"node {rank + 1}:")[0]
        assert f"is_host={'true' if rank == 0 else 'false'},join_timeout=1800" in block
        assert "--nnodes=3 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=no.such.host:29500" in block
        assert f"-{rank} --redirects=3 --tee=0:3" in block
        assert f"-m launch.{entry} --config {OLMOE} --output" in block
        assert ("CUDA_DEVICE_MAX_CONNECTIONS=1" in block) == (entry == "pretrain_megatron")
    assert f"checked NNODES=3 NPROC=8: -m launch.{entry} --dry-run --config {OLMOE}" in done.stdout
    assert "cannot tell how to reach no.such.host" in done.stderr


def test_options_find_the_output_and_resuming_is_added_once(tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text('output = "of the file"')
    for words, folder, resumes in (
        ([plain], r"of\ the\ file/logs", 1),
        ([plain, "--output=given"], "given/logs", 1),
        ([plain, "--resume", "there", "--output", "given"], "given/logs", 0),
        ([OLMOE], "runs/olmoe-tiny/logs", 0),
    ):
        done = call(MULTINODE, "pretrain", *words, **PLACE, DRY_RUN="1", PYTHON=python(tmp_path))
        command = done.stdout.split("node 0:")[1].split("node 1:")[0]
        assert f"--log-dir={folder}" in command
        assert command.count("--resume auto") == resumes


def test_network_choice_is_left_alone_where_it_is_made_or_cannot_be(tmp_path: Path) -> None:
    words = (MULTINODE, "pretrain", OLMOE, "--output", tmp_path / "run")
    given = {"IFACE": "ib0", "NODE_ADDR": "10.9.9.9", "GLOO_SOCKET_IFNAME": "eth7"}
    done = call(*words, **PLACE, **given, OMP_NUM_THREADS="3", PYTHON=python(tmp_path))
    assert done.returncode == 0, done.stderr
    for said in ("--local-addr=10.9.9.9", 'NCCL_SOCKET_IFNAME="=ib0"', 'GLOO_SOCKET_IFNAME="eth7"', 'THREADS="3"'):
        assert said in done.stdout
    done = call(*words, **PLACE, PYTHON=python(tmp_path), PATH=without_ip(tmp_path / "bin"))
    assert "no ip command, so address and interface are left to torch and NCCL" in done.stderr
    assert done.returncode == 0
    assert "IFNAME" not in done.stdout
    assert "--local-addr" not in done.stdout


# Of a rank in a session of its own, which says that it is there when the script asks it to stop.
RANK = """
import os, pathlib, signal, sys, time
os.setsid()
signal.signal(signal.SIGUSR1, lambda *_: pathlib.Path(sys.argv[1]).touch())
while True:
    time.sleep(1)
"""


def test_exit_codes_and_leftover_ranks(tmp_path: Path) -> None:
    words = (MULTINODE, "pretrain", OLMOE, "--output", tmp_path / "run")
    place = PLACE | {"NNODES": "1"}
    assert call(*words, **place, PYTHON=python(tmp_path, torchrun="exit 7")).returncode == 7
    # An agent that is killed leaves ranks behind, of which the script knows once it has passed on a signal.
    program, told = tmp_path / "rank.py", tmp_path / "told"
    program.write_text(RANK)
    rank = f"{sys.executable} {program} {told} & echo $! >{tmp_path}/rank"
    agent = f"{rank}; kill -USR1 $PPID; until [ -e {told} ]; do sleep 0.1; done; kill -KILL $$"
    assert call(*words, **place, PYTHON=python(tmp_path, torchrun=agent)).returncode == 137
    assert not alive(int((tmp_path / "rank").read_text()))


def test_torchrun_ends_with_the_script(tmp_path: Path) -> None:
    agent = f"echo $$ >{tmp_path}/agent; kill -KILL $PPID; exec sleep 600"
    done = call(
        *(MULTINODE, "pretrain", OLMOE, "--output", tmp_path / "run"),
        **PLACE | {"NNODES": "1", "PYTHON": python(tmp_path, torchrun=agent)},
    )
    assert done.returncode == -9
    assert not alive(int((tmp_path / "agent").read_text()))


def alive(process: int) -> bool:
    """Whether it runs; one that has ended and is not yet waited for does not."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


needs_namespaces = pytest.mark.skipif(bool(netns.unavailable()), reason=netns.unavailable())


@needs_namespaces
@pytest.mark.parametrize(
    ("entry", "engine"),
    [("pretrain", "torch"), ("pretrain_deepspeed", "deepspeed"), ("pretrain_megatron", "megatron")],
)
def test_a_run_on_two_nodes_survives_the_loss_of_one(entry: str, engine: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(engine) is None:
        pytest.skip(f"{engine} is not installed")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    with network(tmp_path) as nodes:
        job = Job(nodes, tmp_path, corpus, entry=entry)
        job.finish(whole, job.start_all(whole))

        first, second = job.start_all(lost)
        job.wait(lost, [first], (lost / "checkpoints" / "step-00000010").exists)
        lose(nodes[1])
        second.wait()
        assert not (lost / "summary.json").exists()
        job.finish(lost, [first, job.start(lost, 1)])

    assert read_run(whole).summary["ranks"] == 4
    assert sorted(trained(whole)) == list(range(1, STEPS + 1))
    assert trained(lost) == trained(whole)
    assert validated(lost) == validated(whole)
    assert "resumed at step" in job.log(lost, 0).read_text()
    assert "resumed at step" not in job.log(whole, 0).read_text()
    # Every rank of every node has its log, and a rank's console shows the first of its node.
    for rank in range(2):
        assert len(list((whole / "logs" / f"node{rank}-{rank}").glob("whole_*/attempt_0/*/stderr.log"))) == 2
        assert "[default1]" not in job.log(whole, rank).read_text()


@needs_namespaces
def test_address_and_interface_are_those_that_reach_node_0(tmp_path: Path) -> None:
    with network(tmp_path) as (*nodes, _):
        for rank, node in enumerate(nodes):
            log = tmp_path / f"{rank}.log"
            variables = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": nodes[0].name, "NPROC": "1"}
            words = ["bash", MULTINODE, "pretrain", OLMOE, "--dry-run"]
            started = node.start(words, log=log, variables=variables | {"PYTHON": str(python(tmp_path))})
            assert started.wait(timeout=120) == 0, log.read_text()
            block = log.read_text().split(f"node {rank}:")[1].split("node ")[0]
            assert f"--local-addr={node.address} " in block
            assert "NCCL_SOCKET_IFNAME==wire0\n" in block
            assert "GLOO_SOCKET_IFNAME=wire0\n" in block
