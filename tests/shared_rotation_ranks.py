"""What ranks run where the matrices of a residual stream's stages share rotations."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.exchange import CountingTransport, TorchTransport
from symdist.layouts import FlatLayout, Group, group_from, local
from symdist.layouts.flat import flat_vector
from tests.flat_ranks import piece
from tests.grids import WAYS

WIDTH = 6
# Name, role, shape, whether the residual stream is the stored rows. Three stages; the second has down's and the first
# of the next layer's; the experts are 3-D; q is narrow, so that a stage's rotation is kept by two matrices.
MATRICES: list[tuple[str, str, tuple[int, ...], bool]] = [
    ("embed", "embedding", (11, WIDTH), False),
    *(
        (f"layers.{i}.{name}", role, shape, rows)
        for i in range(2)
        for name, role, shape, rows in (
            ("q", "attention_q", (4, WIDTH), False),
            ("k", "attention_k", (3, WIDTH), False),
            ("o", "attention_o", (WIDTH, 4), True),
            ("up", "expert_up", (5, 4, WIDTH), False),
            ("down", "mlp_down", (WIDTH, 5), True),
        )
    ),
    ("head", "head", (11, WIDTH), False),
]
BASES = ("sinkhorn", "row_norm", "sign", "adam", "identity")
STEPS = 4
LR = 0.1
Place = Callable[[Tensor], tuple[Tensor, Any]]


def draw(i: int, seed: int) -> Tensor:
    return torch.randn(MATRICES[i][2], generator=torch.Generator().manual_seed(100 * seed + i)).double()


def groups_of(parameters: list[nn.Parameter], layouts: list[Any], names: list[tuple[int, str]], **options: Any) -> Any:
    """One param group a role and view, as a recipe makes them."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for parameter, layout, (i, name) in zip(parameters, layouts, names, strict=True):
        _, role, _, rows = MATRICES[i]
        group = groups.setdefault(
            (role, rows),
            {"params": [], "layouts": [], "rule": "aro", "share": "residual_stage", "lr": LR, "role": role, **options}
            | {"view": "as_stored" if rows else "transposed"},
        )
        group["params"].append((name, parameter))
        group["layouts"].append(layout)
    return list(groups.values())


def train(place: Callable[[Tensor], Tensor], more: dict[str, Any], **options: Any) -> tuple[list[Tensor], SymDist]:
    """Weights after some steps, and their optimizer; `place` puts a matrix where it belongs."""
    parameters = [nn.Parameter(place(draw(i, 0))) for i in range(len(MATRICES))]
    names = [(i, name) for i, (name, *_) in enumerate(MATRICES)]
    optimizer = SymDist(groups_of(parameters, [None] * len(parameters), names, **options), **more)
    for step in range(1, STEPS + 1):
        for i, parameter in enumerate(parameters):
            parameter.grad = place(draw(i, step))
        optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer


def sharded(
    mesh: DeviceMesh, way: str, options: dict[str, Any], more: dict[str, Any]
) -> tuple[list[Tensor], dict[str, str], bool]:
    """This rank's pieces, where they were stepped, and whether a step took the collectives that were foretold."""
    counting = CountingTransport(inner=TorchTransport())
    weights, optimizer = train(lambda t: WAYS[way].place(t, mesh), {"transport": counting, **more}, **options)
    foretold = optimizer.trace_collectives().log
    same = counting.log == foretold * STEPS
    return [local(weight) for weight in weights], optimizer.strategies(), same


def replicated(mesh: DeviceMesh, options: dict[str, Any]) -> tuple[list[Tensor], dict[str, str]]:
    """The same in plain tensors, whole on all ranks."""
    weights, optimizer = train(torch.clone, {"replicate_group": mesh}, **options)
    return weights, optimizer.strategies()


def flat(mesh: DeviceMesh, options: dict[str, Any], more: dict[str, Any]) -> list[Tensor]:
    """The same with all matrices in one vector that ranks have equal parts of; experts one by one. Pieces here."""
    ranks = group_from(mesh)
    names, wholes = flat_units()
    layouts = flat_layouts(ranks)
    parameters = [nn.Parameter(piece(wholes[0][j], layouts[j])) for j in range(len(names))]
    optimizer = SymDist(groups_of(parameters, layouts, names, **options), process_group=mesh, **more)
    for step in range(1, STEPS + 1):
        for j, parameter in enumerate(parameters):
            parameter.grad = piece(wholes[step][j], layouts[j])
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def flat_units() -> tuple[list[tuple[int, str]], list[list[Tensor]]]:
    """Every matrix, experts one by one, by its index in MATRICES and name; and of the weights and each step's draws."""
    names = [
        (i, f"{name}[{expert}]" if len(shape) == 3 else name)
        for i, (name, _, shape, _) in enumerate(MATRICES)
        for expert in range(shape[0] if len(shape) == 3 else 1)
    ]
    drawn = []
    for step in range(STEPS + 1):
        wholes = [draw(i, step) for i in range(len(MATRICES))]
        drawn.append([unit for whole in wholes for unit in (whole if whole.dim() == 3 else [whole])])
    return names, drawn


def flat_layouts(ranks: Group) -> list[FlatLayout]:
    shapes = [tuple(unit.shape) for unit in flat_units()[1][0]]
    bounds = flat_vector([math.prod(shape) for shape in shapes], ranks=ranks.size)
    return [FlatLayout(shape=shape, group=ranks, bounds=of) for shape, of in zip(shapes, bounds, strict=True)]


def on_a_stage(mesh: DeviceMesh) -> str:
    """What is said where the outer mesh dimension are stages of a pipeline."""
    weight = nn.Parameter(WAYS["shard0 on 2"].place(draw(3, 0), mesh["inner"]))
    group = {"rule": "aro", "share": "residual_stage", "lr": LR, "role": "attention_o"}
    try:
        SymDist([{"params": [("layers.0.o", weight)], **group}])
    except ValueError as error:
        return str(error)
    return ""
