"""A test run that is killed leaves none of its ranks behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
from tests.ranks import Ranks

if __name__ == "__main__":
    Ranks(2).run(2, "tests.test_processes:busy", sys.argv[1])
"""
TIMELY = 60.0


def busy(mesh: DeviceMesh, folder: str) -> None:
    """Leave the ids of this rank and of what it was forked from in a folder, and stay."""
    (Path(folder) / str(mesh.get_rank())).write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(600)


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_run_leaves_no_rank_behind(tmp_path: Path) -> None:
    end = time.monotonic() + TIMELY
    with subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        try:
            while len(words := [word for path in tmp_path.iterdir() for word in path.read_text().split()]) < 4:
                assert time.monotonic() < end, "the ranks do not start"
                time.sleep(0.05)
        finally:
            running.kill()
    end = time.monotonic() + TIMELY
    while left := [pid for pid in map(int, words) if lives(pid)]:
        assert time.monotonic() < end, f"processes {left} live on"
        time.sleep(0.05)
