"""What ranks run for the tests of gradients that lie otherwise than their weights, and of dealt-out shards."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from symdist import SymDist, clip_grad_norm_
from symdist.exchange import CountingTransport, TorchTransport
from symdist.layouts import local

Group = dict[str, Any]

SHAPES = {"even": (12, 12), "uneven": (7, 5), "empty pieces": (2, 5), "experts": (5, 4, 6)}
GROUPS: list[Group] = [
    {"rule": "row_norm", "centered": True, "lr": 0.1},
    {"rule": "muon", "lr": 0.1},
    {"rule": "adamw", "lr": 0.1, "eps": 1e-3},
]
STEPS = 2
Placements = list[Placement]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def place(tensor: Tensor, mesh: DeviceMesh, placements: Placements) -> DTensor:
    """A tensor that every rank has whole, placed: of a partial sum each rank has an unequal part."""
    piece, coordinate = tensor, mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(placements):
        size, index = mesh.size(axis), coordinate[axis]
        if isinstance(placement, Partial):
            share = (index + 1) / sum(range(size + 1))
            piece = piece * (share if placement.reduce_op == "sum" else share * size)
        elif isinstance(placement, _StridedShard):
            # Its parts, one after the other.
            parts = piece.tensor_split(placement.split_factor, placement.dim)
            piece = torch.cat([part.tensor_split(size, placement.dim)[index] for part in parts], placement.dim)
        elif isinstance(placement, Shard):
            step = -(-piece.shape[placement.dim] // size)
            start = min(index * step, piece.shape[placement.dim])
            piece = piece.narrow(placement.dim, start, min(step, piece.shape[placement.dim] - start))
    return DTensor.from_local(
        piece.contiguous().clone(), mesh, placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )


def other(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks in another order of axes."""
    names = mesh.mesh_dim_names or ()
    return DeviceMesh("cpu", mesh.mesh.T.contiguous(), mesh_dim_names=names)


def trained(
    mesh: DeviceMesh, size: str, weight: Placements, gradient: Placements, how: dict[str, Any]
) -> tuple[list[Tensor], list[float], list[int]]:
    """This rank's pieces after steps with gradients placed so, norms, and collectives of a step.

    `how` may say that a rank is `missing` its gradients, that they are `turned` to a mesh of another order, or that
    they are `clipped` to this norm.
    """
    shape = SHAPES[size]
    parameters = [nn.Parameter(place(draw(shape, i), mesh, weight)) for i in range(len(GROUPS))]
    there = other(mesh) if how.get("turned") else mesh
    counting = CountingTransport(inner=TorchTransport())
    optimizer = SymDist(
        [{"params": [(f"w{i}", p)], **group} for i, (p, group) in enumerate(zip(parameters, GROUPS, strict=True))],
        transport=counting,
    )
    norms, collectives = [], []
    for step in range(1, STEPS + 1):
        for i, parameter in enumerate(parameters):
            given = place(draw(shape, 10 * step + i), there, gradient)
            parameter.grad = None if how.get("missing") == mesh.get_rank() else given
        if "clipped" in how:
            norms.append(float(clip_grad_norm_(parameters, how["clipped"])))
        counting.log.clear()
        optimizer.step()
        collectives.append(counting.collectives)
    return [local(parameter).detach() for parameter in parameters], norms, collectives


def alone(size: str, how: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    shape = SHAPES[size]
    parameters = [nn.Parameter(draw(shape, i)) for i in range(len(GROUPS))]
    optimizer = SymDist([{"params": [p], **group} for p, group in zip(parameters, GROUPS, strict=True)])
    norms = []
    for step in range(1, STEPS + 1):
        for i, parameter in enumerate(parameters):
            parameter.grad = draw(shape, 10 * step + i)
        if "clipped" in how:
            norms.append(float(clip_grad_norm_(parameters, how["clipped"])))
        optimizer.step()
    return [parameter.detach() for parameter in parameters], norms


DEALT: dict[str, tuple[tuple[int, ...], int, Group]] = {
    # Shape, dimension that is dealt out, and the group; two parts of it, gate and up.
    "row": ((24, 7), 0, {"rule": "row_norm", "centered": True}),
    "row_pairs": ((24, 7), 0, {"rule": "row_norm", "view": "gate_up_stacked"}),
    "muon": ((24, 7), 0, {"rule": "muon"}),
    "muon_pairs": ((24, 7), 0, {"rule": "muon", "view": "gate_up_stacked"}),
    "left": ((24, 7), 0, {"rule": "left_spectral", "view": "transposed", "method": "exact"}),
    "polar_columns": ((5, 24), 1, {"rule": "polar"}),
    "column_pairs": ((5, 24), 1, {"rule": "hybrid", "view": {"gate_up": 1, "dim": 1}}),
    "heads": ((6, 24), 1, {"rule": "muon", "view": {"heads": 3, "dim": 0}}),
    "experts": ((3, 24, 5), 1, {"rule": "muon"}),
    "experts_pairs": ((3, 24, 5), 1, {"rule": "normuon", "view": "gate_up_stacked"}),
    "experts_hold": ((3, 24, 5), 1, {"rule": "row_norm", "skip_zero_grad_rows": True}),
    "aurora": ((24, 7), 0, {"rule": "aurora"}),
    "scion": ((24, 7), 0, {"rule": "scion"}),
    "adamw": ((24, 7), 0, {"rule": "adamw"}),
    "bias": ((24,), 0, {"rule": "adamw", "centered": True}),
}


def dealt(mesh: DeviceMesh, whole_gradients: bool) -> dict[str, Tensor]:
    """Pieces after steps of weights whose gate and up a mesh axis deals out, beside FSDP's axis where there is one."""
    parameters = {}
    for seed, (name, (shape, dim, _)) in enumerate(DEALT.items()):
        placements = [Shard(0) if dim else Replicate()] * (mesh.ndim - 1) + [_StridedShard(dim, split_factor=2)]
        parameters[name] = nn.Parameter(place(draw(shape, seed), mesh, placements))
    optimizer = SymDist([{"params": [(name, parameters[name])], "lr": 0.1, **DEALT[name][2]} for name in DEALT])
    for step in range(1, STEPS + 1):
        for seed, (name, parameter) in enumerate(parameters.items()):
            gradient = draw(DEALT[name][0], 100 * step + seed)
            placements = [Replicate()] * mesh.ndim if whole_gradients else list(parameter.placements)
            parameter.grad = place(gradient, mesh, placements)
        optimizer.step()
    return {name: local(parameter).detach() for name, parameter in parameters.items()}


def dealt_alone() -> dict[str, Tensor]:
    parameters = {name: nn.Parameter(draw(shape, seed)) for seed, (name, (shape, _, _)) in enumerate(DEALT.items())}
    optimizer = SymDist([{"params": [(name, parameters[name])], "lr": 0.1, **DEALT[name][2]} for name in DEALT])
    for step in range(1, STEPS + 1):
        for seed, parameter in enumerate(parameters.values()):
            parameter.grad = draw(tuple(parameter.shape), 100 * step + seed)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def dealt_piece(name: str, whole: Tensor, mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> Tensor:
    """What a rank must hold, said without the library: its share of FSDP's axis, then of gate and of up."""
    dim = DEALT[name][1]
    if len(mesh) > 1 and dim:
        whole = whole.tensor_split(_ends(whole.shape[0], mesh[0]), 0)[coordinate[0]]
    gate, up = whole.chunk(2, dim)
    return torch.cat([half.chunk(mesh[-1], dim)[coordinate[-1]] for half in (gate, up)], dim)


def _ends(size: int, ranks: int) -> list[int]:
    block = -(-size // ranks)
    return [min(block * i, size) for i in range(1, ranks)]


REFUSED: dict[str, tuple[tuple[int, ...], Group]] = {
    "view 'gate_up_interleaved'": ((8, 8), {"rule": "muon", "view": "gate_up_interleaved"}),
    "'heads': 2": ((8, 8), {"rule": "muon", "view": {"heads": 2, "dim": 0}}),
    "view 'transposed'": ((8, 8), {"rule": "aro", "view": "transposed"}),
    "with padding rows": ((8, 8), {"rule": "muon", "padding_rows": 2}),
    "does not divide evenly into 2 parts for 2 ranks": ((6, 8), {"rule": "muon"}),
}


def refused(mesh: DeviceMesh) -> list[str]:
    said = []
    for shape, group in REFUSED.values():
        piece = torch.ones(shape[0] // 2, shape[1])
        weight = DTensor.from_local(
            piece,
            mesh,
            [_StridedShard(0, split_factor=2)],
            shape=torch.Size(shape),
            stride=(shape[1], 1),
            run_check=False,
        )
        try:
            SymDist([{"params": [("w", nn.Parameter(weight))], "lr": 0.1, **group}])
            said.append("accepted")
        except ValueError as error:
            said.append(str(error))
    return said


def on_other_ranks(mesh: DeviceMesh, inner: tuple[str, ...]) -> list[str]:
    """A gradient on a part of the ranks that hold its weight."""
    weight = nn.Parameter(place(draw((8, 4), 0), mesh, [Replicate(), Shard(0)]))
    part = mesh[inner]
    weight.grad = DTensor.from_local(torch.ones(4, 4).double(), part, [Shard(0)], run_check=False)
    optimizer = SymDist([{"params": [("weight", weight)], "rule": "muon", "lr": 0.1}])
    said = []
    for act in (optimizer.step, lambda: clip_grad_norm_([weight], 1.0)):
        try:
            act()
        except ValueError as error:
            said.append(str(error).replace("parameter 0", "weight"))
    return said
