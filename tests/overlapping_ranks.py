"""What ranks run where groups of ranks overlap: lanes that share ranks, in other orders, slowed down at random."""

import functools
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.exchange import TorchTransport
from symdist.exchange.collectives.transport import Handle
from symdist.layouts import Group, local
from tests.grids import Way

Lane = tuple[int, ...]
STEPS = 3
# Owned, summed once, summed twice and by Grams, in stacks of several and alone: what a rank does between a wave's
# first collective and its last is never the same.
WEIGHTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((9, 5), {"rule": "muon", "strategy": "owner"}),
    ((17, 6), {"rule": "row_norm", "centered": True, "strategy": "reduce"}),
    ((29, 4), {"rule": "right_spectral", "centered": True, "strategy": "reduce"}),
    ((9, 5), {"rule": "muon", "strategy": "owner"}),
    ((7, 3, 4), {"rule": "polar"}),
    ((6, 12), {"rule": "hybrid", "view": "transposed", "strategy": "owner"}),
    ((5,), {"rule": "adamw"}),
]


@dataclass
class Slow:
    """Collectives that some ranks come late to."""

    inner: TorchTransport
    random: random.Random
    seconds: float

    def prepare(self, groups: Iterable[Group]) -> None:
        self.inner.prepare(groups)

    def _late(self) -> TorchTransport:
        time.sleep(self.random.random() * self.seconds if self.random.random() < 0.3 else 0)
        return self.inner

    def gather_objects(self, value: Any, *, group: Group) -> list[Any]:
        return self._late().gather_objects(value, group=group)

    def all_reduce(self, buffer: Tensor, *, group: Group) -> Handle:
        return self._late().all_reduce(buffer, group=group)

    def reduce_scatter(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        return self._late().reduce_scatter(out, buffer, group=group)

    def all_gather(self, out: Tensor, buffer: Tensor, *, group: Group) -> Handle:
        return self._late().all_gather(out, buffer, group=group)

    def all_to_all(self, out: Tensor, buffer: Tensor, *, received: list[int], sent: list[int], group: Group) -> Handle:
        return self._late().all_to_all(out, buffer, received=received, sent=sent, group=group)

    def broadcast(self, buffer: Tensor, *, group: Group) -> Handle:
        return self._late().broadcast(buffer, group=group)


@functools.cache
def mesh_of(lane: Lane) -> DeviceMesh | None:
    """The mesh of a lane; all ranks of the world must ask for the same ones in the same order."""
    group = dist.new_group(list(lane))
    if dist.get_rank() not in lane:
        return None
    return DeviceMesh.from_group(group, "cpu", mesh_dim_names=("lane",))


def draw(lane: Lane, number: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * sum(2**rank for rank in lane) + 10 * number + step)
    return torch.randn(WEIGHTS[number][0], generator=generator, dtype=torch.float64)


def train(weights: dict[tuple[Lane, int], nn.Parameter], place: Any, optimizer: SymDist) -> None:
    for step in range(1, STEPS + 1):
        for (lane, number), weight in weights.items():
            weight.grad = place(lane, draw(lane, number, step))
        optimizer.step()


def options_of(number: int, mesh: bool) -> dict[str, Any]:
    options = {"lr": 0.1, **WEIGHTS[number][1]}
    return options if mesh else {key: value for key, value in options.items() if key != "strategy"}


def overlapped(
    world: DeviceMesh, lanes: list[Lane], bucket_bytes: int, seed: int, seconds: float
) -> dict[tuple[Lane, int], Tensor]:
    """This rank's pieces of every lane's weights after some steps. Lanes interleave otherwise on every rank."""
    rank = dist.get_rank()
    meshes = {lane: mesh for lane in lanes if (mesh := mesh_of(lane)) is not None}

    def place(lane: Lane, tensor: Tensor) -> Tensor:
        return Way((len(lane),), ((0, 0),)).place(tensor, meshes[lane])

    mine = random.Random(100 * seed + rank)
    # Each lane's weights stay in their order, and the lanes are dealt like cards.
    queues = {lane: list(range(len(WEIGHTS))) for lane in meshes}
    dealt: list[tuple[Lane, int]] = []
    while queues:
        lane = mine.choice(list(queues))
        dealt.append((lane, queues[lane].pop(0)))
        queues = {lane: queue for lane, queue in queues.items() if queue}
    weights = {(lane, number): nn.Parameter(place(lane, draw(lane, number, 0))) for lane, number in dealt}
    groups = [{"params": [weight], **options_of(number, True)} for (_, number), weight in weights.items()]
    # For ranks that are in no lane: an optimizer needs something.
    groups.append({"params": [nn.Parameter(torch.ones(2))], "rule": "adamw", "lr": 0.1})
    transport = Slow(TorchTransport(), mine, seconds)
    optimizer = SymDist(groups, process_group=world, exchange={"bucket_bytes": bucket_bytes}, transport=transport)
    train(weights, place, optimizer)
    return {key: local(weight).detach() for key, weight in weights.items()}


def alone(lanes: list[Lane]) -> dict[tuple[Lane, int], Tensor]:
    """The whole weights of one process."""
    keys = [(lane, number) for lane in lanes for number in range(len(WEIGHTS))]
    weights = {(lane, number): nn.Parameter(draw(lane, number, 0)) for lane, number in keys}
    optimizer = SymDist([{"params": [weight], **options_of(number, False)} for (_, number), weight in weights.items()])
    train(weights, lambda lane, tensor: tensor, optimizer)
    return {key: weight.detach() for key, weight in weights.items()}
