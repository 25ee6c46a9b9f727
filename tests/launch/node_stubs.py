"""Stand-ins on the PATH for what a node's script calls, so that the script's own doing is tested in no time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.launch.runs import ROOT

# What starts ranks is replaced, and so is the entry; all other Python is Python.
_PYTHON = """#!/bin/bash
case "$*" in
    *torch.distributed.run*) echo "torchrun $*"; export | grep -E 'IFNAME|OMP|CUDA|TORCH_DIS'; {torchrun} ;;
    *pretrain*--dry-run*) echo "checked NNODES=$NNODES NPROC=$NPROC: $*" ;;
    *) exec {python} "$@" ;;
esac
"""
# Of the shell's commands these are what the scripts need at least.
_COMMANDS = ("awk", "basename", "bash", "cat", "dirname", "env", "getent", "grep", "nproc", "sed", "sleep", "timeout")


def python(folder: Path, *, torchrun: str = "true") -> Path:
    """An interpreter that runs the shell commands `torchrun` in place of torchrun."""
    path = folder / "python-with-stubs"
    path.write_text(_PYTHON.format(torchrun=torchrun, python=sys.executable))
    path.chmod(0o755)
    return path


def without_ip(folder: Path) -> str:
    """A PATH of the commands that the scripts need, and no others."""
    folder.mkdir()
    for name in (*_COMMANDS, "uname"):
        found = shutil.which(name)
        assert found is not None, name
        (folder / name).symlink_to(found)
    return str(folder)


def call(*words: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/ to its end, with these variables and none that would tell it where it is."""
    return subprocess.run(
        ["bash", *map(str, words)], cwd=ROOT, env=clean() | {key: str(value) for key, value in variables.items()},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def clean() -> dict[str, str]:
    """The environment without what a scheduler, or a user, may have said in it."""
    said = ("SLURM", "NNODES", "NODE_", "MASTER_", "NPROC", "IFACE", "OMP_", "NCCL_", "GLOO_", "CUDA_", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(said)}
    return kept | {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
