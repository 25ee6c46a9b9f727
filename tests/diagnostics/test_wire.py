"""Collectives that pass through torch.distributed are noted once each, with the bytes that a rank sends."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from symdist.diagnostics import collective_counter
from symdist.diagnostics.collective_counter import CollectiveCounter, Passed
from symdist.exchange import CountingTransport, TorchTransport
from symdist.layouts import Group
from tests.ranks import Ranks

Noted = list[tuple[str, int, float, tuple[int, ...]]]

N = 48
"""Bytes of a rank's buffer of 12 numbers: one that 2, 3 and 4 ranks can share."""


def noted(log: list[Passed]) -> Noted:
    return [(passed.kind, passed.size, passed.sent, passed.ranks) for passed in log]


def sums(group: Any, rank: int, size: int) -> None:
    x = torch.ones(12)
    dist.all_reduce(x, group=group)
    dist.all_reduce(x, group=group, async_op=True).wait()
    dist.all_reduce_coalesced([x, x], group=group)
    dist.reduce(x, group=group, group_dst=1)
    functional.all_reduce(x, "sum", group) + 1
    functional.all_reduce_coalesced([x, x], "sum", group)[0] + 1
    piece = torch.empty(12 // size)
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce_scatter(piece, x, group=group, async_op=True).wait()
    dist.reduce_scatter(piece, list(x.chunk(size)), group=group)
    functional.reduce_scatter_tensor(x, "sum", 0, group) + 1


def sums_sent(rank: int, w: int) -> list[tuple[str, float]]:
    ring, part = 2 * N * (w - 1) / w, N * (w - 1) / w
    reduced = [("all_reduce", ring), ("all_reduce", ring), ("all_reduce", 2 * ring), ("reduce", 0 if rank == 1 else N)]
    return [*reduced, ("all_reduce", ring), ("all_reduce", 2 * ring), *[("reduce_scatter", part)] * 3]


def gathers(group: Any, rank: int, size: int) -> None:
    x = torch.ones(12)
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(torch.empty(12 * size), x, group=group, async_op=True).wait()
    dist.all_gather([torch.empty(12) for _ in range(size)], x, group=group)
    functional.all_gather_tensor(x, 0, group) + 1
    pieces = [torch.empty(12) for _ in range(size)] if rank == 1 else None
    dist.gather(x, pieces, group=group, group_dst=1)
    dist.scatter(x, pieces, group=group, group_src=1)
    dist.broadcast(x, group=group, group_src=1)
    functional.broadcast(x, 1, group) + 1


def gathers_sent(rank: int, w: int) -> list[tuple[str, float]]:
    root = rank == 1
    ends = [("gather", 0 if root else N), ("scatter", N * (w - 1) if root else 0)]
    return [*[("all_gather", N * (w - 1))] * 3, *ends, *[("broadcast", N if root else 0)] * 2]


def exchanges(group: Any, rank: int, size: int) -> None:
    x = torch.ones(12, 2)
    # To rank i go rank + i rows, to the last one what is left.
    dist.all_to_all_single(torch.empty(12, 2), x, group=group)
    sent, received = uneven(rank, size), [uneven(other, size)[rank] for other in range(size)]
    rows, out = torch.ones(sum(sent), 2), torch.empty(sum(received), 2)
    dist.all_to_all_single(out, rows, received, sent, group=group, async_op=True).wait()
    functional.all_to_all_single(rows, received, sent, group) + 1
    dist.all_to_all(list(torch.empty(12, 2).chunk(size)), list(x.chunk(size)), group=group)
    to, by = (rank + 1) % size, (rank - 1) % size
    posted = [dist.isend(x, group=group, group_dst=to), dist.irecv(torch.empty(12, 2), group=group, group_src=by)]
    for work in posted:
        assert work is not None
        work.wait()


def uneven(rank: int, size: int) -> list[int]:
    """Rows to each rank, none to the first from the first."""
    return [rank + 2 * i for i in range(size)]


def exchanges_sent(rank: int, w: int) -> list[tuple[str, float]]:
    rows = uneven(rank, w)
    even, odd = 2 * N * (w - 1) / w, 8 * (sum(rows) - rows[rank])
    moved = [("all_to_all", even), ("all_to_all", odd), ("all_to_all", odd), ("all_to_all", even)]
    return [*moved, ("send", 2 * N), ("recv", 0)]


def silence(group: Any, rank: int, size: int) -> None:
    dist.barrier(group=group)
    dist.barrier(group=group, async_op=True).wait()
    dist.monitored_barrier(group=group)
    torch.ones(3).add_(1).sum()


def redistributions(group: Any, rank: int, size: int) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    whole = torch.ones(12, 2)
    shards = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    shards.full_tensor()
    shards.redistribute(mesh, [Replicate()]).redistribute(mesh, [Shard(1)])
    shards.norm().full_tensor()
    partial = DTensor.from_local(whole, mesh, [Partial()])
    partial.redistribute(mesh, [Shard(0)])
    partial.redistribute(mesh, [Replicate()])


def redistributions_sent(rank: int, w: int) -> list[tuple[str, float]]:
    part = 2 * N * (w - 1) / w
    norm = ("all_reduce", 2 * 4 * (w - 1) / w)
    return [("all_gather", part), ("all_gather", part), norm, ("reduce_scatter", part), ("all_reduce", 2 * part)]


def wrappers(group: Any, rank: int, size: int) -> None:
    """FSDP2 and DDP, whose collectives of the backward autograd starts."""
    mesh = DeviceMesh.from_group(group, "cpu")
    fsdp = fully_shard(nn.Linear(1, 12, bias=False), mesh=mesh)
    fsdp(torch.ones(2, 1)).sum().backward()
    ddp = nn.parallel.DistributedDataParallel(nn.Linear(1, 12, bias=False), process_group=group, init_sync=False)
    ddp(torch.ones(2, 1)).sum().backward()


def wrappers_sent(rank: int, w: int) -> list[tuple[str, float]]:
    part = N * (w - 1) / w
    return [("all_gather", part), ("reduce_scatter", part), ("all_reduce", 2 * part)]


CASES: dict[str, tuple[Callable[..., None], Callable[[int, int], list[tuple[str, float]]]]] = {
    "sums": (sums, sums_sent),
    "gathers": (gathers, gathers_sent),
    "exchanges": (exchanges, exchanges_sent),
    "silence": (silence, lambda rank, w: []),
    "redistributions": (redistributions, redistributions_sent),
    "wrappers": (wrappers, wrappers_sent),
}


def watched(mesh: DeviceMesh, case: str) -> Noted:
    with CollectiveCounter() as seen:
        CASES[case][0](mesh.get_group(), mesh.get_local_rank(), mesh.size())
    assert seen.collectives == len(seen.log)
    assert seen.sent == sum(passed.sent for passed in seen.log)
    return noted(seen.log)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_each_collective_is_noted_once(ranks: Ranks, case: str, world: int) -> None:
    everyone = tuple(range(world))
    for rank, log in enumerate(ranks.run(world, watched, case)):
        expected = [(kind, world, pytest.approx(sent), everyone) for kind, sent in CASES[case][1](rank, world)]
        assert log == expected, rank


def in_pairs(mesh: DeviceMesh) -> Noted:
    """Ranks 1 and 2 among themselves, and the outer two, where the second's place in the group is not its rank."""
    rank = mesh.get_local_rank()
    # Both on all ranks, as torch.distributed wants it.
    pairs = {(1, 2): dist.new_group([1, 2]), (0, 3): dist.new_group([0, 3])}
    (mine,) = (pair for pair in pairs if rank in pair)
    splits = [4, 1] if rank == mine[0] else [1, 4]
    with CollectiveCounter() as seen:
        dist.broadcast(torch.ones(12), src=mine[1], group=pairs[mine])
        dist.all_to_all_single(torch.empty(5), torch.ones(5), splits, splits, group=pairs[mine])
    return noted(seen.log)


def test_a_rank_is_counted_by_its_place_in_the_group(ranks: Ranks) -> None:
    results = ranks.run(4, in_pairs)
    for pair in ((1, 2), (0, 3)):
        for rank in pair:
            sent = N if rank == pair[1] else 0
            assert results[rank] == [("broadcast", 2, sent, pair), ("all_to_all", 2, 4, pair)]


def beside_the_counting_transport(mesh: DeviceMesh) -> tuple[Noted, Noted]:
    size, index = mesh.size(), mesh.get_local_rank()
    group = Group(ranks=tuple(range(size)), index=index, handle=mesh.get_group())
    transport = CountingTransport(inner=TorchTransport())
    sent, received = uneven(index, size), [uneven(other, size)[index] for other in range(size)]
    buffer = torch.ones(12)
    with CollectiveCounter() as seen:
        transport.all_reduce(buffer, group=group).wait()
        transport.reduce_scatter(torch.empty(12 // size), buffer, group=group).wait()
        transport.all_gather(torch.empty(12 * size), buffer, group=group).wait()
        out, rows = torch.empty(sum(received)), torch.ones(sum(sent))
        transport.all_to_all(out, rows, received=received, sent=sent, group=group).wait()
    return noted(seen.log), [(moved.kind, moved.size, moved.sent, group.ranks) for moved in transport.log]


def test_the_counting_transport_counts_the_same(ranks: Ranks) -> None:
    for seen, counted in ranks.run(3, beside_the_counting_transport):
        assert seen == counted
        assert len(seen) == 4


def test_every_collective_of_this_pytorch_is_known() -> None:
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    spaces = ("c10d::", "_c10d_functional::", "_dtensor::")
    assert {
        name for name in names if name.startswith(spaces)
    } <= collective_counter._KNOWN.keys() | collective_counter._NOTHING_SENT


def test_what_is_not_known_is_refused_before_it_runs() -> None:
    with CollectiveCounter() as seen, pytest.raises(RuntimeError, match=r"cannot count symm_mem::one_shot_all_reduce"):
        torch.ops.symm_mem.one_shot_all_reduce(torch.ones(2), "sum", "0")
    assert seen.log == []


def test_a_fake_tensor_moves_nothing() -> None:
    with FakeTensorMode():
        fake: Tensor = torch.ones(4)
    with CollectiveCounter() as seen:
        assert (fake + fake).shape == (4,)
    assert seen.log == []


def test_it_takes_up_where_it_left_off(ranks: Ranks) -> None:
    assert ranks.run(2, opened_twice) == [(1, 1, 2)] * 2


def opened_twice(mesh: DeviceMesh) -> tuple[int, int, int]:
    seen, counts = CollectiveCounter(), []
    for watching in (True, False, True):
        if watching:
            with seen:
                dist.all_reduce(torch.ones(2), group=mesh.get_group())
        else:
            dist.all_reduce(torch.ones(2), group=mesh.get_group())
        counts.append(seen.collectives)
    return counts[0], counts[1], counts[2]


def test_parameters_are_tensors_like_any_other() -> None:
    weight, other = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.ones(3))
    with CollectiveCounter() as wire:
        weight.data = other.data
        weight.detach().add_(1)
    assert weight.tolist() == [2.0, 2.0, 2.0]
    assert wire.log == []
