"""Replaces parameters by this rank's piece of them, without communication."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

Choose = Callable[[nn.Module, nn.Parameter], tuple[DeviceMesh, int] | None]
Join = Callable[[DeviceMesh, DeviceMesh], DeviceMesh]


def cut_parameters(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a module's own parameters along their first dimension, in place.

    Args:
        module: The module. Parameters of its submodules are left alone.
        mesh: A one-dimensional mesh.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        cut = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def lay_out(model: nn.Module, choose: Choose) -> None:
    """Replace the parameters of a model by the DTensors that FSDP2 would make of them, and do nothing else.

    For large meshes this is much faster than `fully_shard`, which creates a tensor for every rank for each parameter
    (half a minute for a large model on 4,096 ranks). The tests check that the result is the same.

    Args:
        model: The model, changed in place. A parameter that is a DTensor on a one-dimensional mesh already is further
            divided over the data-parallel mesh, whose dimensions come first.
        choose: Returns, for a module and a parameter it holds, the data-parallel mesh and the dimension to shard; None
            to leave the parameter.
    """

    # Cached for this call only: a mesh of a destroyed process group compares equal to a mesh of the next one.
    @cache
    def join(data: DeviceMesh, model: DeviceMesh) -> DeviceMesh:
        return DeviceMesh._concatenate([data, model])

    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in done:
                chosen = choose(module, parameter)
                done[parameter] = parameter if chosen is None else _piece(parameter, *chosen, join)
            module.register_parameter(name, done[parameter])


def _piece(parameter: nn.Parameter, mesh: DeviceMesh, dim: int, join: Join) -> nn.Parameter:
    """Return this rank's piece of a parameter on `mesh`, whose replica dimension, if any, is the first."""
    cut: Placement = Shard(dim)
    full_mesh, local, inner_placements = mesh, parameter.detach(), []
    if isinstance(local, DTensor):
        split = local.device_mesh
        full_mesh, inner_placements, local = join(mesh, split), list(local.placements), local.to_local()
        if inner_placements == [Shard(dim)]:
            cut = _StridedShard(dim, split_factor=split.size())
    if mesh.mesh_dim_names == ("dp_replicate",):
        cut = Replicate()
    else:
        ranks, size = mesh.size(mesh.ndim - 1), local.shape[dim]
        length = -(-size // ranks)
        start = min(mesh.get_local_rank(mesh.ndim - 1) * length, size)
        local = local.narrow(dim, start, min(length, size - start)).clone(memory_format=torch.contiguous_format)
    placements = [*[Replicate()] * (mesh.ndim - 1), cut, *inner_placements]
    piece = DTensor.from_local(
        local, full_mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(piece, requires_grad=parameter.requires_grad)
