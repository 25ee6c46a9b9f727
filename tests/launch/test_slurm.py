"""Jobs under Slurm: nodes start and finish, warnings become checkpoints and requeues, exit codes come through."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import slurm_cluster
from tests.launch.netns import lose
from tests.launch.node_stubs import call, python
from tests.launch.runs import lines, options, trained, validated, write_corpus
from tests.launch.slurm_cluster import Cluster
from tests.launch.slurm_fakes import Slurm

OLMOE = "launch/configs/olmoe-tiny.toml"
JOB = "launch/cluster/job.sbatch"
STEPS = 40
# Where some are made while Slurm's commands run.
MORE_STEPS = 100
# A rank that leaves well when told to.
RANK = """
import pathlib, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit())
pathlib.Path(sys.argv[1]).touch()
time.sleep(200)
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    folder = tmp_path / "slurm"
    folder.mkdir()
    return Slurm(folder)


def output_of(job: subprocess.Popen[str]) -> str:
    return job.communicate(timeout=300)[0]


def test_two_nodes_are_warned_requeued_resumed_and_finish(slurm: Slurm, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_corpus(corpus)
    output, config = tmp_path / "run", tmp_path / "empty.toml"
    config.write_text("")
    words: tuple[str | Path, ...] = (config, *options(corpus, output, steps=STEPS))
    place = {"NPROC": "1", "PYTHON": sys.executable, "MAX_RESTARTS": "1"}

    job = slurm.sbatch(JOB, "pretrain", *words, nodes=2, variables=place)
    log = output / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert job.poll() is None, output_of(job)
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    said = output_of(job)
    assert job.returncode == 0, said
    assert "stopped by a signal: saved" in said
    assert "not at its last step: requeued" in said
    assert slurm.requeues() == 1
    assert not (output / "summary.json").exists()
    stopped = max(trained(output))
    assert 3 <= stopped < STEPS
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{stopped:08}"]

    job = slurm.sbatch(JOB, "pretrain", *words, nodes=2, start=1, variables=place)
    said = output_of(job)
    assert job.returncode == 0, said
    assert f"resumed at step {stopped}" in said
    assert json.loads((output / "summary.json").read_text())["ranks"] == 2
    assert sorted(trained(output)) == list(range(1, STEPS + 1))
    assert slurm.requeues() == 1
    assert len(list((output / "logs").iterdir())) == 2
    assert all("--kill-on-bad-exit=1" in step and "--cpus-per-task=1" in step for step in slurm.steps())


def test_a_failure_ends_the_job_with_its_code(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.sbatch(
        JOB, "pretrain", OLMOE, "--output", tmp_path, nodes=1, variables={"PYTHON": python(tmp_path, torchrun="exit 7")}
    )
    said = output_of(job)
    assert (job.returncode, slurm.requeues()) == (7, 0), said
    job = slurm.sbatch(JOB, "pretrain", "missing.toml", nodes=1, variables={"PYTHON": python(tmp_path)})
    assert "missing.toml" in output_of(job)
    assert job.returncode == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [((OLMOE,), f"the first word is '{OLMOE}', not pretrain"), (("pretrain",), "give a CONFIG")],
)
def test_words_that_are_missing_are_named(slurm: Slurm, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    job = slurm.sbatch(JOB, *words, nodes=1, variables={"PYTHON": python(tmp_path)})
    said = output_of(job)
    assert (job.returncode, slurm.requeues()) == (2, 0), said
    assert message in said
    assert "Traceback" not in said


def test_a_finished_run_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    place: dict[str, str | Path] = {"PYTHON": python(tmp_path), "NPROC": "1"}
    words = (JOB, "pretrain", OLMOE, "--output", tmp_path, "--steps", "7")
    for steps, requeues in ((7, 0), (5, 1)):
        # The second is the summary of a run that has since been given more steps.
        (tmp_path / "summary.json").write_text(json.dumps({"steps": steps}))
        job = slurm.sbatch(*words, nodes=1, variables=place)
        said = output_of(job)
        assert (job.returncode, slurm.requeues()) == (0, requeues), said


def test_requeues_have_a_limit(slurm: Slurm, tmp_path: Path) -> None:
    place: dict[str, str | Path] = {"PYTHON": python(tmp_path), "NPROC": "1", "MAX_REQUEUES": "2"}
    for start, code, requeues in ((1, 0, 1), (2, 1, 1)):
        job = slurm.sbatch(JOB, "pretrain", OLMOE, "--output", tmp_path, nodes=1, start=start, variables=place)
        said = output_of(job)
        assert (job.returncode, slurm.requeues()) == (code, requeues), said
    assert "requeued MAX_REQUEUES=2 times already" in said


@pytest.mark.parametrize(("number", "requeues"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_a_warned_job_is_requeued_and_a_cancelled_one_is_not(
    slurm: Slurm, tmp_path: Path, number: signal.Signals, requeues: int
) -> None:
    ready, rank = tmp_path / "ready", tmp_path / "rank.py"
    rank.write_text(RANK)
    place: dict[str, str | Path] = {
        "PYTHON": python(tmp_path, torchrun=f"{sys.executable} {rank} {ready}; exit"),
        "NPROC": "1",
    }
    job = slurm.sbatch(JOB, "pretrain", OLMOE, "--output", tmp_path, nodes=1, variables=place)
    while not ready.exists():
        assert job.poll() is None, output_of(job)
        time.sleep(0.02)
    job.send_signal(number)
    said = output_of(job)
    assert (job.returncode, slurm.requeues()) == (0, requeues), said
    assert "told to stop: the ranks save" in said


def test_outside_slurm_it_shows_what_it_would_run(tmp_path: Path) -> None:
    done = call(JOB, "pretrain", OLMOE, "--dry-run", PYTHON=python(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is_host=") == 1
    assert "--nproc-per-node=8" in done.stdout
    assert "checked NNODES=1 NPROC=8" in done.stdout
    assert call(JOB, "pretrain", OLMOE, "--dry-run", NNODES="5", PYTHON=python(tmp_path)).stdout.count("is_host=") == 5
    done = call(JOB, "pretrain", OLMOE, PYTHON=python(tmp_path))
    assert done.returncode == 2
    assert "submit this with sbatch" in done.stderr
    elsewhere = call(JOB, "pretrain", OLMOE, SLURM_SUBMIT_DIR=tmp_path)
    assert elsewhere.returncode == 2
    assert "submit from the repository's folder" in elsewhere.stderr


needs_slurm = pytest.mark.skipif(bool(slurm_cluster.unavailable()), reason=slurm_cluster.unavailable())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Slurm: a job takes two of its three nodes."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as made:
        yield made


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What is submitted: ENTRY, CONFIG and all options but the output."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "corpus").mkdir()
    (folder / "empty.toml").write_text("")
    _, _, *more = options(write_corpus(folder / "corpus"), folder, steps=MORE_STEPS)
    more += ["--checkpoint-every", "5", "--keep", "20"]
    return "--nodes=2", JOB, "pretrain", str(folder / "empty.toml"), *more


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that nothing happens to; its nodes have a GPU each, and so a rank."""
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    job = cluster.submit(*words, "--output", output, PYTHON=sys.executable)
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.said(job)
    assert json.loads((output / "summary.json").read_text())["ranks"] == 2
    assert {path.name for path in (output / "logs").iterdir()} == {"node0-0", "node1-1"}
    return output


def submit_and_await_steps(cluster: Cluster, words: tuple[str, ...], output: Path) -> int:
    """Submit the job, and wait until it has a checkpoint."""
    job = cluster.submit(*words, "--output", output, PYTHON=sys.executable)
    cluster.wait(job, (output / "checkpoints" / "step-00000005").exists)
    return job


def assert_same(output: Path, undisturbed: Path) -> None:
    assert trained(output) == trained(undisturbed)
    assert validated(output) == validated(undisturbed)
    assert len(lines(output)) == len(lines(undisturbed))


@needs_slurm
def test_slurm_requeues_a_warned_job_which_goes_on_beside_a_drained_node(
    cluster: Cluster, words: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    job = submit_and_await_steps(cluster, words, tmp_path)
    cluster.call("scontrol", "update", "nodename=node1", "state=drain", "reason=test")
    assert cluster.job(job)["JobState"] == "RUNNING"
    cluster.call("scancel", "--batch", "--signal=USR1", str(job))
    ended = cluster.end(job)
    cluster.call("scontrol", "update", "nodename=node1", "state=resume")
    found = ended["JobState"], ended["Restarts"], ended["NodeList"]
    assert found == ("COMPLETED", "1", "node[0,2]"), cluster.said(job)
    assert "stopped by a signal: saved" in cluster.said(job)
    assert "not at its last step: requeued" in cluster.said(job)
    assert "resumed at step" in cluster.said(job)
    assert_same(tmp_path, undisturbed)


@needs_slurm
def test_scancel_saves_and_the_job_goes_on_when_it_is_submitted_again(
    cluster: Cluster, words: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    job = submit_and_await_steps(cluster, words, tmp_path)
    cluster.call("scancel", str(job))
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.said(job)
    cluster.await_nodes()
    stopped = max(trained(tmp_path))
    assert stopped < MORE_STEPS
    assert (tmp_path / "checkpoints" / f"step-{stopped:08}").is_dir(), cluster.said(job)
    assert "ended from outside: not requeued" in cluster.said(job)
    job = cluster.submit(*words, "--output", tmp_path, PYTHON=sys.executable)
    assert cluster.end(job)["JobState"] == "COMPLETED", cluster.said(job)
    assert f"resumed at step {stopped}" in cluster.said(job)
    assert_same(tmp_path, undisturbed)


@needs_slurm
def test_slurm_requeues_a_job_that_loses_a_node(
    cluster: Cluster, words: tuple[str, ...], undisturbed: Path, tmp_path: Path
) -> None:
    job = submit_and_await_steps(cluster, words, tmp_path)
    lose(cluster.nodes[1])
    ended = cluster.end(job)
    found = ended["JobState"], ended["Restarts"], ended["NodeList"]
    assert found == ("COMPLETED", "1", "node[0,2]"), cluster.said(job)
    assert "resumed at step" in cluster.said(job)
    assert_same(tmp_path, undisturbed)
    cluster.boot(cluster.nodes[1])
    cluster.await_nodes()


@needs_slurm
def test_slurm_warns_before_the_time_is_over(cluster: Cluster, tmp_path: Path) -> None:
    summary, rank = tmp_path / "summary.json", tmp_path / "rank.py"
    rank.write_text(RANK)
    # The second start finishes at once.
    agent = f"""
        if [ "$SLURM_RESTART_COUNT" ]; then echo '{{"steps": 7}}' >{summary}; exit; fi
        {sys.executable} {rank} {tmp_path}/ready; exit"""
    job = cluster.submit(
        *("--nodes=1", "--time=1", "--signal=B:USR1@40", JOB, "pretrain", OLMOE, "--steps", "7", "--output", tmp_path),
        PYTHON=python(tmp_path, torchrun=agent),
    )
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.said(job)
    assert "not at its last step: requeued" in cluster.said(job)


@needs_slurm
def test_a_failure_is_the_jobs_in_slurm_too(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit(
        *("--nodes=2", JOB, "pretrain", OLMOE, "--output", tmp_path), PYTHON=python(tmp_path, torchrun="exit 7")
    )
    ended = cluster.end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), cluster.said(job)
    assert "task 0: Exited with exit code 7" in cluster.said(job)
