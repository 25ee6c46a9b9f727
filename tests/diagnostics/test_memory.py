"""Peak memory of a call, on tensors whose sizes are known."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from symdist.diagnostics.memory import peak_bytes

N = 1000
"""Numbers in a tensor, of four bytes each."""


def test_nothing_made() -> None:
    before = torch.ones(N)
    assert peak_bytes(lambda: before.mul_(2).view(10, -1).add_(1)) == 0


def test_a_tensor_that_is_returned() -> None:
    assert peak_bytes(lambda: torch.ones(N)) == 4 * N


def test_views_count_once() -> None:
    kept: list[Tensor] = []

    def call() -> None:
        made = torch.ones(N)
        kept.extend([made.view(10, -1), made[5:], made.detach(), made.mul_(2)])

    assert peak_bytes(call) == 4 * N


def test_a_view_keeps_its_storage() -> None:
    def call() -> None:
        head = torch.ones(N)[:1]
        torch.ones(N)
        head.add_(1)

    assert peak_bytes(call) == 8 * N


def test_what_was_freed_makes_room() -> None:
    def call() -> None:
        for _ in range(5):
            torch.ones(N)
        two = torch.ones(N), torch.ones(N)
        del two
        torch.ones(N)

    assert peak_bytes(call) == 8 * N


def test_memory_of_old_tensors_used_again_counts() -> None:
    held = [torch.ones(N)]
    held[0].add_(1)

    def call() -> None:
        held.pop().add_(1)
        # Most likely at the address just freed.
        held.append(torch.ones(N))

    assert peak_bytes(call) == 4 * N


def test_lists_and_backward() -> None:
    weight = torch.ones(N, requires_grad=True)
    assert peak_bytes(lambda: torch._foreach_add([torch.ones(N)] * 2, 1.0)) == 12 * N
    assert peak_bytes(lambda: weight.exp().sum().backward()) >= 8 * N
    assert weight.grad is not None


def test_fused_adamw_needs_nothing_and_the_foreach_one_a_copy() -> None:
    def peak(**how: bool) -> int:
        weight = torch.nn.Parameter(torch.ones(N))
        weight.grad = torch.ones(N)
        optimizer = torch.optim.AdamW([weight], **how)
        optimizer.step()
        return peak_bytes(optimizer.step)

    assert peak(fused=True) < 100
    assert peak(foreach=True) >= 4 * N


def test_a_dtensor_is_its_piece() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        piece = DTensor.from_local(torch.ones(N), init_device_mesh("cpu", (2,)), [Shard(0)])
        assert piece.shape == (2 * N,)
        assert peak_bytes(lambda: (piece + piece) * 2) == 8 * N
    finally:
        dist.destroy_process_group()
