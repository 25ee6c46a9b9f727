"""What ranks run for the tests of parameters that are replaced after the optimizer was made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from symdist import SymDist, build_optimizer
from tests.fsdp1_ranks import batch, language

STEPS = 4


def full(parameter: Tensor) -> Tensor:
    return parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach().clone()


def step(model: nn.Module, optimizer: SymDist, mesh: DeviceMesh | None, number: int) -> None:
    tokens = batch(number)
    model(tokens if mesh is None else tokens.chunk(mesh.size())[mesh.get_rank()]).backward()
    optimizer.step()
    optimizer.zero_grad()


def alone(recipe: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    model = language(dtype=dtype)
    optimizer = build_optimizer(model, recipe)
    for number in range(STEPS):
        step(model, optimizer, None, number)
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def sharded(model: Any, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def swapped(optimizer: SymDist, before: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Put the parameters of a model into the groups, as a trainer does."""
    now = {id(before[name]): parameter for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [now[id(parameter)] for parameter in group["params"]]


def followed(mesh: DeviceMesh, recipe: str, after: int, by: str) -> dict[str, Tensor]:
    """Weights after steps of a model that is sharded `after` some of them, `by` the trainer's swap or by none."""
    model = language()
    optimizer = build_optimizer(model, recipe)
    for number in range(after):
        # Not sharded yet: all ranks take the whole batch.
        step(model, optimizer, None, number)
    before = dict(model.named_parameters())
    sharded(model, mesh)
    if by == "trainer":
        swapped(optimizer, before, model)
    if by == "state dict":
        # Any public call finds out.
        optimizer.state_dict()
    if by == "plan":
        optimizer.plan()
    if by == "checkpoint":
        state = dcp.get_optimizer_state_dict(model, optimizer)
        dcp.set_optimizer_state_dict(model, optimizer, state)
    for number in range(after, STEPS):
        step(model, optimizer, mesh, number)
    assert all(
        parameter in set(model.parameters()) for group in optimizer.param_groups for parameter in group["params"]
    )
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def other_values(mesh: DeviceMesh, rank: int, used: bool) -> tuple[str, bool]:
    """What is said where `rank` has other values in its new pieces, and whether anything moved."""
    weights = [nn.Parameter(torch.arange(15.0).view(5, 3) + 1) for _ in range(2)]
    optimizer = SymDist(
        [{"params": [("a", weights[0]), ("b", weights[1])], "rule": "muon", "lr": 0.1}], process_group=mesh
    )
    if used:
        for weight in weights:
            weight.grad = torch.ones(5, 3)
        optimizer.step()
    new = [nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)) for weight in weights]
    if mesh.get_rank() == rank:
        with torch.no_grad():
            new[1].to_local().add_(1)
    optimizer.param_groups[0]["params"] = new
    for weight in new:
        weight.grad = torch.ones_like(weight)
    before = [full(weight) for weight in new]
    try:
        optimizer.step()
        said = ""
    except ValueError as error:
        said = str(error)
    return said, not all(map(torch.equal, before, map(full, new)))


def laid_out_again(mesh: DeviceMesh) -> str:
    """What is said where shards that were stepped are cut anew."""
    weight = nn.Parameter(distribute_tensor(torch.ones(6, 6), mesh, [Shard(0)], src_data_rank=None))
    weight.grad = torch.ones_like(weight)
    optimizer = SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1}])
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = nn.Parameter(weight.detach().redistribute(mesh, [Shard(1)]))
    return message(optimizer.state_dict)


def without_gradients(mesh: DeviceMesh, where: str, nonfinite: Any) -> tuple[str, str]:
    """A first step without gradients on all ranks, or but one; and the next, with some."""
    weight = nn.Parameter(distribute_tensor(torch.ones(5, 4), mesh, [Shard(0)], src_data_rank=None))
    optimizer = SymDist([{"params": [("w", weight)], "rule": "muon", "lr": 0.1}], nonfinite=nonfinite)
    if where == "one rank" and mesh.get_rank() == 1:
        weight.grad = torch.ones_like(weight)
    first = message(optimizer.step)
    weight.grad = torch.ones_like(weight)
    return first, message(optimizer.step)


def message(act: Callable[[], Any]) -> str:
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""
