"""A real Slurm on the nodes of netns.py: munge and a controller on the head, and slurmd on the others."""

import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launch import netns
from tests.launch.netns import Node, network
from tests.launch.node_stubs import clean
from tests.launch.runs import ROOT

_PATH = f"{os.environ['PATH']}:/usr/sbin"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun", "scancel")
_PATIENCE_SECONDS = 300.0
# Nodes have the cores that job.sbatch wants, though the machine has not, and one GPU. Without control groups a signal
# goes to every process of a task, not only to the first: the harder case for what a job starts. A credential's five
# seconds are what a requeued job waits at least.
_CONF = """
ClusterName=symdist
SlurmctldHost={head.name}({head.address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
SlurmdParameters=config_overrides
SlurmdTimeout=10
ReturnToService=2
NodeName=DEFAULT CPUs=64 Gres=gpu:1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def unavailable() -> str:
    """Why no Slurm can be started here; empty where one can."""
    missing = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"there is no {', '.join(missing)}; apt-get install slurm-wlm munge"
    return netns.unavailable()


@dataclass(frozen=True)
class Cluster:
    """Nodes that wait for jobs, and the host from which jobs are submitted."""

    folder: Path
    nodes: list[Node]
    head: Node

    def call(self, *words: str | Path, **variables: str | Path) -> str:
        """What a command of Slurm's prints."""
        done = subprocess.run(
            self.head.command(*words), cwd=ROOT, env=self._variables() | {k: str(v) for k, v in variables.items()},
            capture_output=True, text=True, timeout=_PATIENCE_SECONDS,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *words: str | Path, **variables: str | Path) -> int:
        """Submit a job, and return its number; `variables` are the user's."""
        return int(
            self.call(
                "sbatch", "--parsable", "--gpus-per-node=1", f"--output={self.folder}/job-%j", *words, **variables
            )
        )

    def said(self, job: int) -> str:
        """What a job and its steps have printed."""
        path = self.folder / f"job-{job}"
        return path.read_text() if path.exists() else ""

    def job(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job, by Slurm's own names."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", str(job), "--oneliner")))

    def wait(self, job: int, until: Callable[[], object]) -> None:
        """Wait while a job goes on; fails if it ends, or nothing comes of it."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not until():
            assert time.monotonic() < deadline, self.said(job)
            assert self.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), self.said(job)
            time.sleep(0.2)

    def end(self, job: int) -> dict[str, str]:
        """Wait for a job's end, and return what Slurm knows of it then."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (state := self.job(job))["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < deadline, self.said(job)
            time.sleep(0.5)
        return state

    def boot(self, node: Node, *command: str) -> None:
        """Start a daemon, slurmd unless another is named, on a node."""
        words = list(command) or ["slurmd", "-D"]
        node.start(words, log=self.folder / f"{node.name}-{words[0]}.log", variables=self._variables())

    def await_nodes(self) -> None:
        """Wait until all nodes can be given jobs."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while (states := self._states()) != {"idle"}:
            assert time.monotonic() < deadline, (states, *self.folder.glob("*.log"))
            time.sleep(0.2)

    def _states(self) -> set[str]:
        done = subprocess.run(
            self.head.command("sinfo", "--Node", "--noheader", "--format=%T"), env=self._variables(),
            capture_output=True, text=True,
        )  # fmt: skip
        return {*done.stdout.split()}

    def _variables(self) -> dict[str, str]:
        return clean() | {"PATH": _PATH, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}


@contextmanager
def cluster(folder: Path, *, nodes: int) -> Iterator[Cluster]:
    """A Slurm of so many nodes, whose files are in `folder`; it ends with all that it runs."""
    with network(folder, nodes=nodes) as (*workers, head):
        made = Cluster(folder, workers, head)
        lines = "\n".join(f"NodeName={node.name} NodeAddr={node.address}" for node in workers)
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, head=head, nodes=lines))
        os.mknod(folder / "gpu", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu\n")
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
        paths = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
        made.boot(head, "munged", "--foreground", "--force", *paths)
        made.boot(head, "slurmctld", "-D")
        for node in workers:
            made.boot(node)
        made.await_nodes()
        yield made
