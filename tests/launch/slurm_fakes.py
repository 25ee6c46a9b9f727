"""Slurm's commands as far as launch/cluster/job.sh uses them, for tests on a machine that has no Slurm."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.launch.node_stubs import clean
from tests.launch.runs import ROOT
from tests.processes import agent_ends_with_parent

# One process a node, told which node it is; signals go on to all; one that fails ends the others, if so asked.
_SRUN = """#!{python}
import os, signal, subprocess, sys, time
words = sys.argv[1:]
start = next(i for i, word in enumerate(words) if not word.startswith("--"))
flags, command = words[:start], words[start:]
nodes = int(next(flag for flag in flags if flag.startswith("--ntasks=")).partition("=")[2])
tasks = []
def forward(number, frame):
    for task in tasks:
        if task.poll() is None:
            task.send_signal(number)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, forward)
for node in range(nodes):
    tasks.append(subprocess.Popen(command, env=os.environ | {{"SLURM_NODEID": str(node)}}))
while any(task.poll() is None for task in tasks):
    if "--kill-on-bad-exit=1" in flags and any(task.poll() for task in tasks):
        forward(signal.SIGTERM, None)
        time.sleep(2)
        forward(signal.SIGKILL, None)
    time.sleep(0.05)
codes = [task.returncode for task in tasks]
open("{folder}/steps", "a").write(" ".join(flags) + "\\n")
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
_SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") for ((i = 0; i < $3; i++)); do echo localhost; done ;;
    "requeue $SLURM_JOB_ID") echo "$2" >>{folder}/requeued ;;
    *) echo "scontrol: what is $*?" >&2; exit 1 ;;
esac
"""


@dataclass(frozen=True)
class Slurm:
    """A cluster whose nodes are all this machine."""

    folder: Path

    def __post_init__(self) -> None:
        for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
            path = self.folder / name
            path.write_text(text.format(python=sys.executable, folder=self.folder))
            path.chmod(0o755)

    def sbatch(
        self, batch_file: str, *words: str | Path, nodes: int, variables: Mapping[str, str | Path], start: int = 0
    ) -> subprocess.Popen[str]:
        """Start a job's script as Slurm does, from a copy elsewhere; `start` counts its requeues."""
        copy = self.folder / "slurm_script"
        shutil.copy(ROOT / batch_file, copy)
        job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": str(nodes), "SLURM_SUBMIT_DIR": str(ROOT)}
        job |= {"SLURM_RESTART_COUNT": str(start), "SLURM_CPUS_PER_TASK": "1", "MASTER_PORT": str(_free_port())}
        job |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["bash", str(copy), *map(str, words)],
            cwd=ROOT, env=clean() | job | {key: str(value) for key, value in variables.items()},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=agent_ends_with_parent,
        )  # fmt: skip

    def requeues(self) -> int:
        """How often a job asked to be requeued."""
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def steps(self) -> list[str]:
        """The options of every step that srun ran to its end."""
        return (self.folder / "steps").read_text().splitlines()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
