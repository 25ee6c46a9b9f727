"""What processes on cards of their own run for test_steps.py: a step of a recipe on a model that FSDP2 shards."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from symdist import SymDist, clip_grad_norm_

BACKEND, DEVICE = "nccl", "cuda"
# Every strategy: rules that sum over ranks, that need whole matrices, and that need neither. Some sizes do not divide.
SIZES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "embedding": ((301, 96), {"rule": "right_spectral", "alpha": 1.0}),
    "query": ((96, 160), {"rule": "muon"}),
    "value": ((96, 160), {"rule": "muon", "strategy": "owner"}),
    "experts": ((6, 64, 96), {"rule": "muon", "strategy": "owner"}),
    "router": ((16, 96), {"rule": "left_spectral"}),
    "output": ((96, 96), {"rule": "aro"}),
    "head": ((301, 96), {"rule": "row_norm", "centered": True}),
    "norm": ((96,), {"rule": "adamw"}),
}


class Layer(nn.Module):
    """Weights of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        for i, (name, (shape, _)) in enumerate(SIZES.items()):
            self.register_parameter(name, nn.Parameter(draw(shape, i)))


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def built(model: nn.Module, precision: str) -> SymDist:
    groups = []
    for name, parameter in model.named_parameters():
        rule = dict(SIZES[name][1])
        if not isinstance(parameter, DTensor):
            rule.pop("strategy", None)
        takes_root = rule["rule"] in ("right_spectral", "left_spectral", "muon")
        own = {"precision": precision} if takes_root else {}
        groups.append({"params": [(name, parameter)], "lr": 0.1, **rule, **own})
    return SymDist(groups)


def grow(model: nn.Module, seed: int) -> None:
    """Give all parameters the gradients of `seed`, placed as they are."""
    for i, parameter in enumerate(model.parameters()):
        gradient = draw(tuple(parameter.shape), 100 * (seed + 1) + i).to(parameter.device)
        if isinstance(parameter, DTensor):
            parameter.grad = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
        else:
            parameter.grad = gradient


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu().clone()
        for name, weight in model.named_parameters()
    }


def change(model: nn.Module, optimizer: SymDist, seed: int, *, waits: bool = True) -> dict[str, Tensor]:
    """How a step changes every weight; unless `waits`, an error where the host would wait for the card."""
    grow(model, seed)
    before = weights(model)
    if not waits:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    finally:
        if not waits:
            torch.cuda.set_sync_debug_mode("default")
    return {name: after - before[name] for name, after in weights(model).items()}


def changes_alone(precision: str) -> dict[str, Tensor]:
    """The changes of two steps, summed, in one process on the CPU."""
    model = Layer()
    optimizer = built(model, precision)
    first, second = (change(model, optimizer, seed) for seed in range(2))
    return {name: first[name] + second[name] for name in first}


def on_ranks(folder: Path, world: int, precision: str) -> dict[str, Tensor]:
    """The changes of the same steps on ranks, as the first rank has them."""
    multiprocessing.spawn(_rank, args=(world, str(folder), precision), nprocs=world)
    found: dict[str, Tensor] = torch.load(folder / "changes.pt")
    return found


def _rank(rank: int, world: int, folder: str, precision: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(BACKEND, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    mesh: DeviceMesh = init_device_mesh(DEVICE, (world,))
    model = Layer().to(DEVICE)
    fully_shard(model, mesh=mesh)
    optimizer = built(model, precision)
    # In the first step, kernels are compiled and communicators are made.
    first = change(model, optimizer, 0)
    second = change(model, optimizer, 1, waits=DEVICE == "cpu")
    if rank == 0:
        torch.save({name: first[name] + second[name] for name in first}, f"{folder}/changes.pt")
    dist.barrier()
    dist.destroy_process_group()
