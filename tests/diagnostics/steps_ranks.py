"""What ranks run for the tests of single steps: one step of OLMoE-tiny measured, slowed down or broken off."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from symdist import build_optimizer
from symdist.diagnostics import StepMonitor
from symdist.exchange import ExchangeError, TorchTransport
from symdist.exchange.collectives.transport import Handle
from symdist.layouts import Group
from symdist.tools.models import shard
from tests.models.parallel_ranks import Mesh
from tests.training_ranks import batches, mesh_over, small


def prepared(recipe: Any, mesh: DeviceMesh | None = None, **options: Any) -> tuple[Any, Any]:
    """The model with gradients of one batch, the same on all ranks, and its optimizer."""
    model = small(2, torch.float64)
    if mesh is not None:
        model = shard(model, mesh)
    optimizer = build_optimizer(model, recipe, **options)
    tokens = batches()[0]
    model(input_ids=tokens, labels=tokens).loss.backward()
    return model, optimizer


def measured(world: DeviceMesh, shape: Mesh, recipe: Any) -> dict[str, float]:
    """The measures of a step, as a rank sees them."""
    _, optimizer = prepared(recipe, mesh_over(world, shape))
    monitor = StepMonitor(optimizer)
    monitor.arm()
    optimizer.step()
    optimizer.step()

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * world.size()
        dist.all_gather_object(values, value, group=world.get_group())
        return values

    return monitor.summary(gather)


def waited_for(world: DeviceMesh, recipe: Any) -> list[str]:
    """What a rank says of its step while the other stands still in an all_to_all until it has said so."""
    transport = _Late() if world.get_rank() == 1 else TorchTransport()
    _, optimizer = prepared(recipe, mesh_over(world, {"dp_shard": 2}), transport=transport)
    store = dist.distributed_c10d._get_default_store()
    seen: list[str] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            where = optimizer.progress()
            if where and where not in seen:
                seen.append(where)
                if "gather over ranks " in where:
                    store.set("symdist/test/seen", "yes")
            time.sleep(0.005)

    watching = threading.Thread(target=look)
    if world.get_rank() == 0:
        watching.start()
    optimizer.step()
    done.set()
    if world.get_rank() == 0:
        watching.join()
    return [*seen, optimizer.progress()]


def broken_off(world: DeviceMesh, recipe: Any) -> str:
    """What is said of a collective that fails."""
    _, optimizer = prepared(recipe, mesh_over(world, {"dp_shard": 2}), transport=_Broken())
    try:
        optimizer.step()
    except ExchangeError as error:
        return str(error)
    return "nothing"


class _Late(TorchTransport):
    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        dist.distributed_c10d._get_default_store().wait(["symdist/test/seen"])
        return super().all_to_all(out, buffer, received=received, sent=sent, group=group)


@dataclass
class _Lost:
    inner: Handle

    def wait(self) -> object:
        self.inner.wait()
        raise RuntimeError("connection closed by peer")


class _Broken(TorchTransport):
    def prepare(self, groups: Iterable[Group]) -> None:
        super().prepare(groups)

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        return _Lost(super().all_to_all(out, buffer, received=received, sent=sent, group=group))
