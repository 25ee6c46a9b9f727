"""Real gloo ranks for tests: one set of processes that many cases share, in subgroups of any size.

`Ranks(4)` starts four processes. `ranks.run(3, function, *args)` calls `function(mesh, *args)` on the first three, with
a mesh over just those, and returns their results in rank order. `function` must be importable: a module-level function
of a module under `tests`.
"""

import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

TIMEOUT = 300


class Ranks:
    """A set of rank processes; a failure on any rank is raised here with that rank's traceback."""

    def __init__(self, size: int):
        self.size = size
        self._directory = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        store = f"file://{self._directory.name}/store"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run on the first `world` ranks."""
        where = (function.__module__, function.__qualname__)
        for pipe in self._pipes[:world]:
            pipe.send((world, where, args))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes[:world]):
            assert pipe.poll(TIMEOUT), f"rank {rank} did not answer within {TIMEOUT} s"
            fine, value = pipe.recv()
            results.append(value)
            if not fine:
                errors.append(f"rank {rank} of {world}:\n{value}")
        assert not errors, "\n".join(errors)
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()
        self._directory.cleanup()


def _serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT))
    groups = [dist.new_group(list(range(world))) for world in range(1, size + 1)]
    meshes: dict[int, DeviceMesh] = {}
    while (message := pipe.recv()) is not None:
        world, (module, name), args = message
        try:
            if world not in meshes:
                meshes[world] = DeviceMesh.from_group(groups[world - 1], "cpu", mesh_dim_names=("shard",))
            function = getattr(importlib.import_module(module), name)
            pipe.send((True, function(meshes[world], *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


def start(size: int) -> Ranks:
    """Ranks that import this repository's tests."""
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    return Ranks(size)
