"""Runs that go on beside a test, which watches them and does them harm."""

import json
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.launch.runs import ROOT, environment
from tests.processes import agent_ends_with_parent

TIMELY = 240.0


class Running:
    """A run under a launcher; what it says goes to a file, which never fills up."""

    def __init__(self, command: list[str], output: Path, stderr: Path):
        with open(stderr, "ab") as stream:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stderr=stream, preexec_fn=agent_ends_with_parent
            )
        self._output, self._stderr = output, stderr

    def said(self) -> str:
        """What the launcher and the ranks have said."""
        return self._stderr.read_text()

    def furthest(self) -> int:
        """The last step of the log."""
        path = self._output / "log.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return json.loads(whole[-1])["step"] if whole else 0

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait while the run goes on."""
        end = time.monotonic() + TIMELY
        while not condition():
            assert self.launcher.poll() is None, self.said()
            assert time.monotonic() < end, "the run does not come on"
            time.sleep(0.002)

    def ranks(self, *, but: Collection[int] = ()) -> list[int]:
        """The processes of the ranks, once there are two that are not among those known to be gone."""
        found: list[int] = []

        def look() -> bool:
            children = psutil.Process(self.launcher.pid).children()
            found[:] = [child.pid for child in children if child.pid not in but and _is_rank(child)]
            return len(found) == 2

        self.wait_for(look)
        return found

    def kill_launcher(self) -> None:
        """Kill it, and wait until none of what it and the ranks have started is left."""
        started = psutil.Process(self.launcher.pid).children(recursive=True)
        self.launcher.kill()
        self.launcher.wait()
        _, left = psutil.wait_procs(started, timeout=TIMELY)
        for process in left:
            process.kill()
        assert not left


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(word.startswith("launch.pretrain") for word in process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def started(command: list[str], output: Path, stderr: Path) -> Iterator[Running]:
    """A run that ends with the test."""
    running = Running(command, output, stderr)
    try:
        yield running
    finally:
        if running.launcher.poll() is None:
            running.launcher.terminate()
            running.launcher.wait(60)


def events(output: Path) -> list[dict]:
    """The events of a run."""
    return [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
