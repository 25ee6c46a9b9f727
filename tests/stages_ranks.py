"""What ranks run where they do not all hold the same parameters: pipeline stages, and groups that overlap."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from symdist import SymDist, clip_grad_norm_
from symdist.layouts import local

Group = dict[str, Any]

# Shape and group of every parameter, stage by stage: other counts, other shapes, other rules; the third has no matrix.
STAGES: list[list[tuple[tuple[int, ...], Group]]] = [
    [((17, 6), {"rule": "row_norm", "centered": True}), ((9, 5), {"rule": "muon", "strategy": "owner"})],
    [
        ((29, 6), {"rule": "right_spectral", "strategy": "reduce"}),
        ((3, 8), {"rule": "muon"}),
        ((5, 4, 6), {"rule": "polar"}),
        ((7,), {"rule": "adamw"}),
    ],
    [((5,), {"rule": "adamw"})],
]
STEPS = 3


def draw(stage: int, i: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + 10 * stage + i)
    return torch.randn(STAGES[stage][i][0], generator=generator).double()


def where_it_lies(group: Group, parameter: Tensor) -> Group:
    """The group, without a strategy that a whole tensor cannot have."""
    return group if isinstance(parameter, DTensor) else {key: group[key] for key in group if key != "strategy"}


def built(stage: int, place: Any, **options: Any) -> tuple[list[nn.Parameter], SymDist]:
    """The parameters of a stage and their optimizer."""
    parameters = [nn.Parameter(place(draw(stage, i, 0))) for i in range(len(STAGES[stage]))]
    groups = [
        {"params": [(f"stage {stage}, {i}", parameter)], "lr": 0.1, **where_it_lies(group, parameter)}
        for i, (parameter, (_, group)) in enumerate(zip(parameters, STAGES[stage], strict=True))
    ]
    return parameters, SymDist(groups, **options)


def pipeline(
    mesh: DeviceMesh, nonfinite: str, broken: tuple[int, int, int] | None, missing: int | None
) -> tuple[int, list[Tensor], list[float], str, int]:
    """Train a stage sharded over the inner axis: its number, weights, norms when clipping, error, steps skipped.

    In the second step the rank of coordinates `broken[:2]` has a NaN in parameter `broken[2]`; rank `missing` has no
    gradient at all.
    """
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    stage, data = coordinate[0], mesh["inner"]
    parameters, optimizer = built(
        stage, lambda tensor: distribute_tensor(tensor, data, [Shard(0)], src_data_rank=None), nonfinite=nonfinite
    )
    norms: list[float] = []
    message = ""
    for step in range(1, STEPS + 1):
        for i, parameter in enumerate(parameters):
            parameter.grad = distribute_tensor(draw(stage, i, step), data, [Shard(0)], src_data_rank=None)
            if step == 2 and dist.get_rank() == missing:
                parameter.grad = None
        norms.append(float(clip_grad_norm_(parameters, 1.0, pipeline_group=mesh["outer"])))
        if step == 2 and broken is not None and (coordinate[0], coordinate[1]) == broken[:2]:
            gradient = parameters[broken[2]].grad
            assert gradient is not None
            local(gradient).view(-1)[0] = float("nan")
        try:
            optimizer.step()
        except FloatingPointError as error:
            message = str(error)
    return stage, [p.detach().full_tensor() for p in parameters], norms, message, optimizer.skipped_steps  # type: ignore[attr-defined]


RINGS = [(0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1), (2, 3), (0, 3), (1, 2)]
RULES: list[Group] = [
    {"rule": "right_spectral", "strategy": "reduce", "centered": True},
    {"rule": "muon", "strategy": "owner"},
    {"rule": "hybrid", "strategy": "reduce", "order": "polar_then_row"},
    {"rule": "row_norm", "centered": True},
]


def overlapping(mesh: DeviceMesh, bucket_bytes: int) -> dict[str, Tensor]:
    """Weights on groups of ranks that overlap in rings, which every rank goes through in another order."""
    meshes = {}
    for ring in RINGS:
        # All ranks make all groups, in the same order.
        handle = dist.new_group(list(ring))
        if dist.get_rank() in ring:
            meshes[ring] = DeviceMesh.from_group(handle, "cpu", mesh_dim_names=("ring",))
    mine = list(meshes) if dist.get_rank() % 2 else list(reversed(meshes))
    parameters, optimizer = on_rings(
        mine,
        lambda tensor, ring: distribute_tensor(tensor, meshes[ring], [Shard(0)], src_data_rank=None),
        exchange={"bucket_bytes": bucket_bytes},
        process_group=dist.group.WORLD,
    )
    for _ in range(2):
        optimizer.step()
    return {name: parameter.detach().full_tensor() for name, parameter in sorted(parameters.items())}  # type: ignore[attr-defined]


def on_rings(rings: list[tuple[int, ...]], place: Any, **options: Any) -> tuple[dict[str, nn.Parameter], SymDist]:
    """A parameter of each rule on each ring, with gradients, and their optimizer."""
    groups, parameters = [], {}
    for ring in rings:
        for i, rule in enumerate(RULES):
            generator = torch.Generator().manual_seed(10 * RINGS.index(ring) + i)
            weight, gradient = (torch.randn(19, 6, generator=generator).double() for _ in range(2))
            name = f"{ring} {rule['rule']}"
            parameters[name] = nn.Parameter(place(weight, ring))
            parameters[name].grad = place(gradient, ring)
            group = {"params": [(name, parameters[name])], "lr": 0.1}
            groups.append({**group, **where_it_lies(rule, parameters[name])})
    return parameters, SymDist(groups, **options)


def frozen(mesh: DeviceMesh) -> list[Tensor]:
    """Weights after a step with the second frozen, one with the first frozen too late, and one with a third added."""
    shapes = [(9, 5), (8, 6), (7, 4)]
    weights = [nn.Parameter(distribute_tensor(torch.ones(s).double(), mesh, [Shard(0)])) for s in shapes]
    weights[1].requires_grad_(False)
    options = {"rule": "muon", "lr": 0.1, "weight_decay": 0.5}
    optimizer = SymDist([{"params": weights[:2], **options}])
    found = []
    for step in range(3):
        if step == 1:
            weights[0].requires_grad_(False)
            weights[1].requires_grad_(True)
        if step == 2:
            optimizer.add_param_group({"params": weights[2:], **options})
        for weight in weights:
            weight.grad = torch.ones_like(weight) if weight.requires_grad else None
        optimizer.step()
        found.append([weight.detach().full_tensor().mean() for weight in weights])  # type: ignore[attr-defined]
    return [torch.stack(means) for means in found]
