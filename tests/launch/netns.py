"""Nodes of a cluster as network namespaces of one machine: an address each, and a way to lose one."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.launch.runs import ROOT, environment
from tests.processes import agent_ends_with_parent


@dataclass(frozen=True)
class Node:
    """A network namespace that has one interface, called `wire0`, and one address."""

    namespace: str
    address: str

    def start(self, command: list[str], *, log: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command there, its output appended to `log`."""
        # Below this process in priority, so that on a busy machine a run does not end before it is interfered with.
        words = ["ip", "netns", "exec", self.namespace, "nice", "-n", "10", *command]
        with log.open("ab") as stream:
            return subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment() | variables,
                stdout=stream,
                stderr=stream,
                preexec_fn=agent_ends_with_parent,
            )

    def processes(self) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(word) for word in listed.stdout.split()]

    def lose(self) -> None:
        """Kill everything that runs there, at once and without a word."""
        while running := self.processes():
            for process in running:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)


def unavailable() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command, of iproute2"
    name = f"symdist-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return tried.stderr.strip()


@contextmanager
def two_nodes(number: int) -> Iterator[tuple[Node, Node]]:
    """Two nodes on one wire; `number` tells those of one test process apart."""
    nodes = tuple(Node(f"symdist-{os.getpid()}-{number}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    try:
        for node in nodes:
            _ip("netns", "add", node.namespace)
        first, second = (node.namespace for node in nodes)
        _ip("link", "add", "wire0", "netns", first, "type", "veth", "peer", "name", "wire0", "netns", second)
        for node in nodes:
            _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "wire0")
            _ip("-n", node.namespace, "link", "set", "wire0", "up")
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.lose()
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
