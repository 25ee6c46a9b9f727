"""What ranks run for the tests of mixed meshes: weights on submeshes of one mesh, and on stages of a pipeline."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from symdist import SymDist, clip_grad_norm_
from symdist.layouts import local
from tests.grids import Way

Options = dict[str, Any]


@dataclass(frozen=True)
class Weight:
    """A weight on the submesh of the axes `on`, cut as a `Way` over it says; without axes, a plain tensor.

    With a `stage` it is only on ranks at that index of the mesh's first axis. With `parts` its gradient, on a mesh that
    does not cut it, comes as a sum in parts.
    """

    shape: tuple[int, ...]
    options: Options
    on: tuple[int, ...] = ()
    cuts: tuple[tuple[int, int], ...] = ()
    stage: int | None = None
    parts: bool = False

    def way(self, mesh: tuple[int, ...]) -> Way:
        return Way(tuple(mesh[axis] for axis in self.on), self.cuts)

    def here(self, coordinate: tuple[int, ...]) -> bool:
        return self.stage in (None, coordinate[0])

    def piece(self, tensor: Tensor, mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> Tensor:
        """What the rank at a coordinate of the whole mesh holds."""
        return self.way(mesh).piece(tensor, tuple(coordinate[axis] for axis in self.on)) if self.on else tensor


ROW = {"rule": "row_norm", "lr": 0.1}
RIGHT = {"rule": "right_spectral", "lr": 0.1}
MUON = {"rule": "muon", "lr": 0.1}
HYBRID = {"rule": "hybrid", "lr": 0.1, "alpha": 1.0}
POLAR = {"rule": "polar", "lr": 0.1}
ADAMW = {"rule": "adamw", "lr": 0.1}
DECAY = {"weight_decay": 0.1}

GRID = {
    "column-wise": Weight((17, 6), ROW | {"centered": True}, (0, 1), ((1, 0), (0, 0))),
    "row-wise": Weight((29, 6), MUON | DECAY, (0, 1), ((1, 1), (0, 0))),
    "experts": Weight((5, 4, 6), POLAR, (0, 1), ((1, 0), (0, 1))),
    "tall": Weight((29, 6), RIGHT | {"strategy": "reduce", "alpha": 1.0}, (0,), ((0, 0),)),
    "owned": Weight((3, 8), MUON | {"strategy": "owner"}, (0,), ((0, 0),)),
    "inner": Weight((9, 5), HYBRID | {"skip_zero_grad_rows": True} | DECAY, (1,), ((0, 1),)),
    "replicated": Weight((8, 3), RIGHT | {"strategy": "owner"}, (0, 1), ((1, 0),)),
    "bias": Weight((7,), ADAMW | {"centered": True}, (0, 1), ((1, 0), (0, 0))),
    "norm": Weight((5,), ADAMW | DECAY, (0,), ((0, 0),)),
    "scale": Weight((6,), ADAMW, (1,), parts=True),
    "gain": Weight((6, 4), ROW, (0, 1), parts=True),
    "plain": Weight((7, 4), MUON),
    "plain bias": Weight((4,), ADAMW),
}
CUBE = {
    "hsdp x tp": Weight((17, 6), ROW | {"centered": True}, (0, 1, 2), ((2, 0), (1, 0))),
    "hsdp": Weight((29, 6), MUON | {"strategy": "owner"}, (0, 1), ((1, 0),)),
    "fsdp over tp": Weight((9, 10), HYBRID | {"strategy": "owner"}, (1, 2), ((1, 1), (0, 0))),
    "skew": Weight((8, 12), POLAR | {"strategy": "owner"}, (0, 2), ((1, 1), (0, 0))),
    "skew rows": Weight((9, 4), ROW | {"centered": True, "strategy": "reduce"}, (0, 2), ((1, 0), (0, 0))),
    "all": Weight((5, 6, 7), POLAR | {"alpha": 1.0}, (0, 1, 2), ((1, 0), (2, 1), (0, 2))),
    "one axis": Weight((29, 6), RIGHT | {"strategy": "reduce"}, (2,), ((0, 0),)),
    "norm": Weight((5,), ADAMW, (0, 1), ((1, 0),)),
    "scale": Weight((6,), ADAMW, (2,), parts=True),
    "gain": Weight((6, 4), ROW, (1, 2), parts=True),
    "plain": Weight((7, 4), MUON),
}
# Stages of a pipeline along the first axis: the second has no matrix, and fewer weights.
PIPELINE = {
    "head": Weight((17, 6), ROW | {"centered": True}, (1,), ((0, 0),), stage=0),
    "tall": Weight((29, 6), RIGHT | {"strategy": "reduce"}, (1,), ((0, 0),), stage=0),
    "owned": Weight((9, 5), MUON | {"strategy": "owner"}, (1,), ((0, 0),), stage=0),
    "more": Weight((5, 4, 6), POLAR, (1,), ((0, 1),), stage=0),
    "plain": Weight((3, 4), MUON, stage=0),
    "first norm": Weight((3,), ADAMW, (1,), ((0, 0),), stage=1),
    "second norm": Weight((6,), ADAMW | {"centered": True}, (1,), ((0, 0),), stage=1),
}
# The second stage lies on one axis only, in other shapes; the last holds nothing but plain tensors.
DEEP = {
    "tp": Weight((17, 6), ROW | {"centered": True}, (1, 2), ((1, 0), (0, 0)), stage=0),
    "rows": Weight((29, 6), MUON | {"strategy": "owner"}, (1, 2), ((1, 1), (0, 0)), stage=0),
    "owned": Weight((9, 5), MUON | {"strategy": "owner"}, (1,), ((0, 0),), stage=1),
    "summed": Weight((30, 4), RIGHT | {"strategy": "reduce"}, (2,), ((0, 0),), stage=1),
    "norm": Weight((3,), ADAMW, (1,), ((0, 0),), stage=1),
}
PLAIN_STAGE = {
    "tall": Weight((29, 6), RIGHT | {"strategy": "reduce"}, (1,), ((0, 0),), stage=0),
    "owned": Weight((9, 5), MUON | {"strategy": "owner"}, (1,), ((0, 0),), stage=0),
    "plain": Weight((4, 6), MUON, stage=1),
    "bias": Weight((6,), ADAMW, stage=1),
}
# The first is summed over planes that the second is owned by, and only some ranks have the third's wave in between.
CROSSED = {
    "summed": Weight((17, 6), ROW | {"centered": True}, (0, 1, 2), ((2, 0), (1, 0))),
    "owned": Weight((9, 10), HYBRID | {"strategy": "owner"}, (1, 2), ((1, 1), (0, 0))),
    "between": Weight((29, 6), RIGHT | {"strategy": "reduce"}, (2,), ((0, 0),)),
}
MODELS = {
    "grid": ((2, 2), GRID),
    "cube": ((2, 2, 2), CUBE),
    "crossed": ((2, 2, 2), CROSSED),
    "pipeline": ((2, 2), PIPELINE),
    "deep": ((2, 2, 2), DEEP),
    "plain stage": ((2, 2), PLAIN_STAGE),
}
Step = dict[str, Any]
"""What is special about a step: `hole`, a rank that has no gradients (nor have the ranks with copies of its pieces);
`gone` and `zero`, names of weights whose gradient is missing everywhere, or zero."""


def coordinate_of(rank: int, mesh: tuple[int, ...]) -> tuple[int, ...]:
    return list(itertools.product(*map(range, mesh)))[rank]


def draw(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * sum(map(ord, name)) + step)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient(model: str, name: str, number: int, step: Step) -> Tensor | None:
    """The whole gradient of a step, as all ranks have it together."""
    mesh, weights = MODELS[model]
    weight = weights[name]
    found = draw(name, weight.shape, number) * (name not in step.get("zero", ()))
    if "hole" in step and weight.cuts and weight.here(coordinate_of(step["hole"], mesh)):
        weight.piece(found, mesh, coordinate_of(step["hole"], mesh)).zero_()
    return None if name in step.get("gone", ()) else found


class HeldModel:
    """A model as this rank holds it, or as one process does, and its optimizer."""

    def __init__(self, mesh: DeviceMesh | None, model: str, names: list[str] | None = None, **options: Any):
        self.mesh, self.model = mesh, model
        self.shape, weights = MODELS[model]
        at = None if mesh is None else mesh.get_coordinate()
        self.coordinate = None if at is None else tuple(at)
        self.weights = {
            name: weight
            for name, weight in weights.items()
            if (self.coordinate is None or weight.here(self.coordinate)) and (names is None or name in names)
        }
        self.parameters = {
            name: nn.Parameter(self.place(weight, draw(name, weight.shape, 0))) for name, weight in self.weights.items()
        }
        if "plain stage" in model and mesh is not None:
            options["process_group"] = mesh
        groups = [{"params": [(name, self.parameters[name])], **self.weights[name].options} for name in self.weights]
        for group in groups if mesh is None else ():
            group.pop("strategy", None)
        self.optimizer = SymDist(groups, **options)

    def on(self, weight: Weight) -> DeviceMesh:
        assert self.mesh is not None
        names = tuple((self.mesh.mesh_dim_names or ())[axis] for axis in weight.on)
        return self.mesh if len(names) == self.mesh.ndim else self.mesh[names]

    def place(self, weight: Weight, tensor: Tensor) -> Tensor:
        if self.coordinate is None or not weight.on:
            return tensor.clone()
        return weight.way(self.shape).place(tensor, self.on(weight))

    def give(self, number: int, step: Step) -> None:
        """Every weight its gradient."""
        for name, weight in self.weights.items():
            found = gradient(self.model, name, number, step)
            parameter = self.parameters[name]
            parameter.grad = None if found is None else self.place(weight, found)
            if found is None or self.coordinate is None:
                continue
            if "hole" in step and weight.cuts and self.like(weight, step["hole"]):
                parameter.grad = None
            if weight.parts:
                placements = [*[Replicate()] * (len(weight.on) - 1), Partial()]
                size, index = self.shape[weight.on[-1]], self.coordinate[weight.on[-1]]
                part = found * (index + 1) / sum(range(size + 1))
                parameter.grad = DTensor.from_local(part, self.on(weight), placements, run_check=False)

    def like(self, weight: Weight, rank: int) -> bool:
        """Whether a rank holds the same piece as this one, of the weight or of the parts of its gradient."""
        assert self.coordinate is not None
        there = coordinate_of(rank, self.shape)
        cutting = {weight.on[axis] for axis, _ in weight.cuts} | set(weight.on[-1:] if weight.parts else ())
        return weight.here(there) and all(self.coordinate[axis] == there[axis] for axis in cutting)

    def pieces(self) -> dict[str, Tensor]:
        return {name: local(parameter).detach().clone() for name, parameter in self.parameters.items()}

    def state(self) -> list[Tensor]:
        return [local(x).clone() for p in self.parameters.values() for x in self.optimizer.state[p].values()]


def trained(mesh: DeviceMesh, model: str, steps: list[Step], options: Options) -> dict[str, Tensor]:
    """This rank's pieces after steps."""
    held = HeldModel(mesh, model, **options)
    for number, step in enumerate(steps, 1):
        held.give(number, step)
        held.optimizer.step()
    return held.pieces()


def shuffled(mesh: DeviceMesh, model: str, steps: list[Step]) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """This rank's coordinate and pieces on a mesh that numbers ranks in no order, and whose planes have no groups."""
    numbers = torch.tensor([[[6, 3], [0, 5]], [[1, 4], [7, 2]]])
    grid = DeviceMesh("cpu", numbers, mesh_dim_names=mesh.mesh_dim_names)
    coordinate = grid.get_coordinate()
    assert coordinate is not None
    return tuple(coordinate), trained(grid, model, steps, {})


def alone(model: str, steps: list[Step]) -> dict[str, Tensor]:
    """The whole weights of one process."""
    held = HeldModel(None, model)
    for number, step in enumerate(steps, 1):
        held.give(number, step)
        held.optimizer.step()
    return held.pieces()


def broken(
    mesh: DeviceMesh, model: str, rank: int, name: str, value: float, nonfinite: str
) -> tuple[str, int, bool, dict[str, Tensor]]:
    """A good step, then one where `rank` has `value` in its piece of a gradient, and so have those with the same piece
    where it is to be zeroed: the error, skipped steps, whether anything moved, and the pieces."""
    held = HeldModel(mesh, model, nonfinite=nonfinite)
    held.give(1, {})
    held.optimizer.step()
    held.give(2, {})
    if name in held.weights:
        weight = held.weights[name]
        alike = nonfinite == "zero" and held.like(weight, rank)
        if alike or mesh.get_rank() == rank:
            given = held.parameters[name].grad
            assert given is not None
            local(given)[(0,) * given.dim()] = value
    before = held.pieces(), held.state()
    message = ""
    try:
        held.optimizer.step()
    except FloatingPointError as error:
        message = str(error)
    moved = not all(map(torch.equal, [*before[0].values(), *before[1]], [*held.pieces().values(), *held.state()]))
    return message, held.optimizer.skipped_steps, moved, held.pieces()


def zeroed(model: str, rank: int, name: str) -> dict[str, Tensor]:
    """What one process makes of such a gradient with zero in its place."""
    held = HeldModel(None, model)
    held.give(1, {})
    held.optimizer.step()
    held.give(2, {})
    given = held.parameters[name].grad
    assert given is not None
    weight = held.weights[name]
    weight.piece(given, held.shape, coordinate_of(rank, held.shape))[(0,) * given.dim()] = 0
    held.optimizer.step()
    return held.pieces()


def clipped(mesh: DeviceMesh, model: str, max_norm: float, step: Step) -> tuple[float, dict[str, Tensor | None]]:
    """The norm, and this rank's pieces of the gradients after clipping."""
    held = HeldModel(mesh, model)
    held.give(1, step)
    first = (mesh.mesh_dim_names or ())[0]
    stages = mesh[first] if any(weight.stage is not None for weight in MODELS[model][1].values()) else None
    norm = clip_grad_norm_(held.parameters.values(), max_norm, pipeline_group=stages)
    return float(norm), {name: None if p.grad is None else local(p.grad) for name, p in held.parameters.items()}
