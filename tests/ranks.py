"""Real gloo ranks for tests: one set of processes that many cases share, in subgroups of any size.

`Ranks(4)` starts four processes. `ranks.run(3, function, *args)` calls `function(mesh, *args)` on the first three, with
a mesh over just those, and returns their results in rank order; `ranks.run((2, 3), …)` does so on a mesh of two
dimensions. `function` must be importable: a module-level function of a module under `tests`.
"""

import importlib
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh

from tests.processes import end_with_parent, print_to, warm_start

TIMEOUT = 300
NAMES = {1: ("shard",), 2: ("outer", "inner"), 3: ("replicate", "outer", "inner")}

Shape = tuple[int, ...]


class Ranks:
    """A set of rank processes; a failure on any rank is raised here with that rank's traceback."""

    def __init__(self, size: int, grids: tuple[Shape, ...] = ()):
        self.size, self._grids = size, grids
        self._start()

    def _start(self) -> None:
        self._groups = 0
        self._directory = tempfile.TemporaryDirectory()
        context = warm_start()
        store = f"file://{self._directory.name}/store"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            place = rank, self.size, self._grids, store
            process = context.Process(target=_serve, args=(*place, theirs, self._output(rank)), daemon=True)
            process.start()
            theirs.close()  # So that the end of the process ends the pipe.
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world: int | Shape, function: Callable[..., Any] | str, *args: Any) -> list[Any]:
        """Run on the first ranks, as many as `world` says or as the mesh of that shape has.

        `function` may be "module:name", where this process had better not import the module.
        """
        shape = (world,) if isinstance(world, int) else world
        pipes = self._pipes[: math.prod(shape)]
        if isinstance(function, str):
            module, _, name = function.partition(":")
            where = (module, name)
        else:
            where = (function.__module__, function.__qualname__)
        for pipe in pipes:
            pipe.send((shape, where, args, self._groups))
        results: dict[int, Any] = {}
        errors, ended = [], False
        while len(results) < len(pipes):
            # After a failure the others may wait for the one that failed: they get a moment to fail too.
            ready = wait([pipe for i, pipe in enumerate(pipes) if i not in results], 10 if errors else TIMEOUT)
            if not ready:
                break
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    fine, results[rank], groups = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    self._processes[rank].join()
                    fine, groups, ended = False, self._groups, True
                    results[rank] = f"ended with {self._processes[rank].exitcode}\n{self._printed(rank)}"
                self._groups = max(self._groups, groups)
                if not fine:
                    errors.append(f"rank {rank} of {shape}:\n{results[rank]}")
        silent = [rank for rank in range(len(pipes)) if rank not in results]
        printed = "\n".join(self._printed(rank) for rank in silent)
        if silent or ended:  # Left as they are, they would cost every later test its whole timeout.
            self._end(patience=0)
            self._start()
        assert not errors, "\n".join(errors)
        assert not silent, f"no answer from ranks {silent}; the others said {results!r:.4000}\n{printed}"
        return [results[rank] for rank in range(len(pipes))]

    def _output(self, rank: int) -> str:
        return f"{self._directory.name}/rank-{rank}"

    def _printed(self, rank: int) -> str:
        """The end of what a rank has printed, which it does not show otherwise."""
        return Path(self._output(rank)).read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):  # Of a rank that has ended since its last answer.
                pipe.send(None)
        self._end(patience=10)

    def _end(self, patience: float) -> None:
        for process in self._processes:
            process.join(patience)
            process.kill()
        for pipe in self._pipes:
            pipe.close()
        self._directory.cleanup()


def _serve(rank: int, size: int, grids: tuple[Shape, ...], store: str, pipe: Connection, output: str) -> None:
    end_with_parent()
    print_to(output)
    torch.set_num_threads(1)
    distributed_c10d.ProcessGroupGloo = _GlooOnOneDevice  # type: ignore[misc]
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    meshes: dict[Shape, DeviceMesh] = {}
    for world in range(1, size + 1):
        groups = [dist.new_group(list(range(world))), dist.new_group(list(range(world, size)) or None)]
        if rank < world:
            meshes[world,] = DeviceMesh.from_group(groups[0], "cpu", mesh_dim_names=NAMES[1])
    for shape in grids:
        # Every rank is in as many groups as every other, as in programs where all build the same meshes.
        ranks = torch.arange(math.prod(shape))
        meshes[shape] = DeviceMesh("cpu", ranks.view(shape), mesh_dim_names=NAMES[len(shape)])
        rest = torch.arange(len(ranks), size)
        if len(rest):
            DeviceMesh("cpu", rest.view([1] * (len(shape) - 1) + [-1]), mesh_dim_names=NAMES[len(shape)])
    while (message := pipe.recv()) is not None:
        shape, (module, name), args, groups = message
        # PyTorch names a group by how many this process has heard of. Where the ranks of a smaller mesh have made some,
        # the others count on from there: names that differ would let the next group that all make wait for ever.
        named = distributed_c10d._world
        named.group_count = max(named.group_count, groups)
        try:
            function = getattr(importlib.import_module(module), name)
            answer = True, function(meshes[shape], *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send((*answer, named.group_count))
    dist.destroy_process_group()


class _GlooOnOneDevice(dist.ProcessGroupGloo):
    """Gloo's groups, all on one device of this process.

    A device has a thread that looks for work a hundred times a second. Groups of their own devices are told to end and
    are kept, by PyTorch's caches and by models: hundreds of idle ones would take most of the processor.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        options = dist.ProcessGroupGloo._Options()
        options._devices, options._timeout = [_device()], timeout
        super().__init__(store, rank, size, options)


_device = cache(dist.ProcessGroupGloo.create_default_device)


@contextmanager
def sets_of_ranks() -> Iterator[Callable[[int], Ranks]]:
    """Ranks by how many there are, each set started when first asked for, all ended with the context."""
    started: dict[int, Ranks] = {}

    def world(size: int) -> Ranks:
        if size not in started:
            started[size] = Ranks(size)
        return started[size]

    try:
        yield world
    finally:
        for ranks in started.values():
            ranks.close()
