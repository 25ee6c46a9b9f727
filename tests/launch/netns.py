"""Nodes of a cluster as namespaces of one machine: a host name and an address each, and a way to lose one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.launch.runs import ROOT, environment, options
from tests.processes import agent_ends_with_parent

MULTINODE = "launch/cluster/multinode.sh"
STEPS = 40
_NUMBERS = count()
# Run inside the network namespace: gives what follows a host name, and the names of the others.
_BOOT = 'echo "$0" >/proc/sys/kernel/hostname && mount --bind "$1" /etc/hosts && shift && exec "$@"'


@dataclass(frozen=True)
class Node:
    """A host of one interface, called `wire0`, in namespaces of its own; `hosts` has the names of all."""

    name: str
    namespace: str
    address: str
    hosts: Path

    def command(self, *words: str | Path) -> list[str]:
        """The command that runs these words there; it keeps its process id."""
        entered = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        return [*entered, "sh", "-c", _BOOT, self.name, str(self.hosts), *map(str, words)]

    def start(self, command: list[str], *, log: Path, variables: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command there, its output appended to `log`."""
        # Below this process in priority, so that on a busy machine a run does not end before it is interfered with.
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command("nice", "-n", "10", *command),
                cwd=ROOT,
                env=environment() | variables,
                stdout=stream,
                stderr=stream,
                preexec_fn=agent_ends_with_parent,
            )

    def processes(self) -> list[int]:
        """All that run there, but those that have ended and are not yet waited for."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(word) for word in listed.stdout.split()]


def lose(*nodes: Node) -> None:
    """Kill everything that runs there, at once and without a word."""
    while running := [process for node in nodes for process in node.processes()]:
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
def network(folder: Path, *, nodes: int = 2) -> Iterator[list[Node]]:
    """So many nodes on one switch, and last the host that is the switch; `folder` holds their table of names."""
    number, hosts = f"{os.getpid()}-{next(_NUMBERS)}", folder / "hosts"
    names = [*(f"node{i}" for i in range(nodes)), "head"]
    made = [Node(name, f"symdist-{number}-{name}", f"10.77.0.{i + 1}", hosts) for i, name in enumerate(names)]
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{node.address} {node.name}\n" for node in made))
    *leaves, head = made
    try:
        for node in made:
            _ip("netns", "add", node.namespace)
            _ip("-n", node.namespace, "link", "set", "lo", "up")
        _ip("-n", head.namespace, "link", "add", "wire0", "type", "bridge")
        for node in leaves:
            ends = ("wire0", "netns", node.namespace, "type", "veth", "peer", "name", node.name)
            _ip("link", "add", *ends, "netns", head.namespace)
            _ip("-n", head.namespace, "link", "set", node.name, "master", "wire0", "up")
        for node in made:
            _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "wire0")
            _ip("-n", node.namespace, "link", "set", "wire0", "up")
        yield made
    finally:
        lose(*made)
        for node in made:
            subprocess.run(["ip", "netns", "delete", node.namespace], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Job:
    """Runs of one small model by multinode.sh, two ranks on each of two nodes, in a folder that both see."""

    def __init__(self, nodes: list[Node], folder: Path, corpus: Path, *, entry: str = "pretrain"):
        self.nodes, self.folder = nodes[:2], folder
        config, stage = folder / "empty.toml", folder / "stage2.json"
        config.write_text("")
        stage.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
        own = {
            "pretrain": (),
            "pretrain_deepspeed": ("--deepspeed", str(stage), "--aux-loss", "0.01"),
            "pretrain_megatron": ("--model", "qwen3-moe-tiny", "--tensor-parallel", "2"),
        }
        self._before, self._after = ["bash", MULTINODE, entry, str(config)], [*own[entry], "--batch", "8"]
        self._corpus = corpus

    def start(self, output: Path, rank: int) -> subprocess.Popen[bytes]:
        """Start one node of a run."""
        words = [*self._before, *options(self._corpus, output, steps=STEPS), *self._after]
        words += ["--checkpoint-every", "5", "--keep", "20", "--resume", "auto"]
        variables = {"NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": self.nodes[0].name, "NPROC": "2"}
        # Two seconds instead of five, so that the test waits less for a lost node to be struck off.
        variables |= {"PYTHON": sys.executable, "RDZV_CONF": "keep_alive_interval=2", "MAX_RESTARTS": "2"}
        return self.nodes[rank].start(words, log=self.log(output, rank), variables=variables)

    def start_all(self, output: Path) -> list[subprocess.Popen[bytes]]:
        """Start a run on both nodes."""
        return [self.start(output, rank) for rank in range(2)]

    def log(self, output: Path, rank: int) -> Path:
        """What a node's script said."""
        return self.folder / f"{output.name}-{rank}.log"

    def said(self, output: Path) -> str:
        """What the scripts of both nodes said."""
        return "".join(self.log(output, rank).read_text() for rank in range(2))

    def wait(self, output: Path, running: list[subprocess.Popen[bytes]], until: Callable[[], object]) -> None:
        """Wait while the run goes on."""
        while not until():
            assert all(process.poll() is None for process in running), self.said(output)
            time.sleep(0.01)

    def await_empty(self, rank: int) -> None:
        """Wait until nothing that was started on a node is left there."""
        deadline = time.monotonic() + 60
        while left := self.nodes[rank].processes():
            assert time.monotonic() < deadline, [Path(f"/proc/{process}/cmdline").read_text() for process in left]
            time.sleep(0.05)

    def finish(self, output: Path, running: list[subprocess.Popen[bytes]]) -> None:
        """Wait until all nodes have ended well."""
        codes = [process.wait(timeout=300) for process in running]
        assert codes == [0, 0], self.said(output)
