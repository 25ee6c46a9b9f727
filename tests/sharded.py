"""What ranks run for the tests of sharded behaviour."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from symdist import SymDist, build_optimizer, clip_grad_norm_
from symdist.exchange import CountingTransport, TorchTransport
from symdist.exchange.collectives.reduce import answer_shared
from symdist.layouts import layout_of
from symdist.rules import Numerics, Root
from tests import parity

Group = dict[str, Any]

# Local, reduced, owned and plain; uneven, with empty pieces on four ranks, and one weight whole on every rank.
MIXED: list[tuple[tuple[int, ...], Group]] = [
    ((17, 6), {"rule": "row_norm", "centered": True}),
    ((29, 6), {"rule": "right_spectral", "alpha": 1.0}),
    ((3, 8), {"rule": "muon"}),
    ((9, 5), {"rule": "hybrid", "skip_zero_grad_rows": True}),
    ((5, 4, 6), {"rule": "polar"}),
    ((3,), {"rule": "adamw"}),
    ((7, 4), {"rule": "muon", "strategy": "local"}),
]
WHOLE = len(MIXED) - 1


def draw(i: int, seed: int) -> Tensor:
    return torch.randn(MIXED[i][0], generator=torch.Generator().manual_seed(100 * seed + i)).double()


def mixed(mesh: DeviceMesh | None, **options: Any) -> tuple[list[nn.Parameter], SymDist]:
    """One parameter a group of MIXED, sharded over `mesh` where it is given, and their optimizer."""
    parameters = [nn.Parameter(place(mesh, draw(i, 0)) if i != WHOLE else draw(i, 0)) for i in range(len(MIXED))]
    groups = [
        {"params": [(f"p{i}", parameter)], "lr": 0.1, "weight_decay": 0.1, **MIXED[i][1]}
        for i, parameter in enumerate(parameters)
    ]
    return parameters, SymDist(groups, **options)


def place(mesh: DeviceMesh | None, tensor: Tensor) -> Tensor:
    return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach().clone()


def missing_on(mesh: DeviceMesh, rank: int) -> list[Tensor]:
    """Two steps; in the second, `rank` has no gradient for its pieces."""
    parameters, optimizer = mixed(mesh)
    for step in (1, 2):
        for i, parameter in enumerate(parameters):
            parameter.grad = place(mesh if i != WHOLE else None, draw(i, step))
            if step == 2 and i != WHOLE and mesh.get_local_rank() == rank:
                parameter.grad = None
        optimizer.step()
    return [full(parameter) for parameter in parameters]


def broken_on(mesh: DeviceMesh, rank: int, which: int, nonfinite: str) -> tuple[str, int, bool, list[Tensor]]:
    """One good step, then one with a NaN in the piece of `rank`: the error, skipped steps, anything moved, weights."""
    parameters, optimizer = mixed(mesh, nonfinite=nonfinite)
    message = ""
    held: list[Tensor] = []
    for step in (1, 2):
        for i, parameter in enumerate(parameters):
            parameter.grad = place(mesh if i != WHOLE else None, draw(i, step))
        if step == 2:
            if mesh.get_local_rank() == rank:
                gradient = parameters[which].grad
                assert isinstance(gradient, DTensor)
                gradient.to_local().view(-1)[0] = float("nan")
            held = [full(x) for p in parameters for x in (p, *optimizer.state[p].values())]
        try:
            optimizer.step()
        except FloatingPointError as error:
            message = str(error)
    now = [full(x) for p in parameters for x in (p, *optimizer.state[p].values())]
    moved = not all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
    return message, optimizer.skipped_steps, moved, [full(parameter) for parameter in parameters]


def clipped(mesh: DeviceMesh, max_norm: float, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Norm and gradients after clipping the mix; the second has no gradient anywhere, the third none on rank 0."""
    parameters, _ = mixed(mesh)
    for i, parameter in enumerate(parameters):
        where = mesh if i != WHOLE else None
        parameter.data = place(where, draw(i, 0).to(dtype))
        parameter.grad = place(where, draw(i, 1).to(dtype))
    parameters[1].grad = None
    missing = full(parameters[2].grad)
    if mesh.get_local_rank() == 0:
        parameters[2].grad = None
    norm = clip_grad_norm_(parameters, max_norm)
    gradient = parameters[2].grad
    if gradient is None:
        gradient = distribute_tensor(torch.zeros_like(missing), mesh, [Shard(0)], src_data_rank=None)
    return norm, [full(gradient if i == 2 else p.grad) for i, p in enumerate(parameters) if i != 1]


def refused(mesh: DeviceMesh, kind: str) -> str:
    """The message for a weight whose layout is not supported."""
    grid = init_device_mesh("cpu", (2, 2))
    placements: dict[str, list[Placement]] = {
        "partial": [Replicate(), Partial()],
        "strided by too much": [_StridedShard(0, split_factor=4), Shard(0)],
        "another piece": [Shard(0), Replicate()],
    }
    shape = (8, 4) if kind != "another piece" else (10, 4)
    piece = torch.ones(4, 4)
    weight = DTensor.from_local(piece, grid, placements[kind], run_check=False, shape=torch.Size(shape), stride=(4, 1))
    try:
        SymDist([{"params": [("some.weight", nn.Parameter(weight))], "rule": "muon", "lr": 0.1}])
    except ValueError as error:
        return str(error)
    return "accepted"


def on_grid(mesh: DeviceMesh, axis: int) -> dict:
    """The parity cases on 2 × 2 ranks, sharded along one mesh dimension and replicated along the other."""
    grid = init_device_mesh("cpu", (2, 2))
    placements: list[Placement] = [Replicate(), Replicate()]
    placements[axis] = Shard(0)
    weights, _ = parity.train(lambda tensor: distribute_tensor(tensor, grid, placements), torch.float64, ("auto",))
    return {key: full(weight) for key, weight in weights.items()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(17, 6, dtype=torch.float64)
        self.inner = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)).double()
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.head = nn.Linear(6, 17, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.inner(x)))


def groups_of(model: nn.Module) -> list[Group]:
    named = list(model.named_parameters())
    return [
        {
            "params": [x for x in named if "embedding" in x[0]],
            "rule": "row_norm",
            "lr": 0.1,
            "skip_zero_grad_rows": True,
        },
        {"params": [x for x in named if "head" in x[0]], "rule": "right_spectral", "centered": True, "lr": 0.02},
        {"params": [x for x in named if x[1].ndim == 2 and "inner" in x[0]], "rule": "muon", "lr": 0.02},
        {"params": [x for x in named if x[1].ndim == 1], "rule": "adamw", "lr": 0.01, "weight_decay": 0.1},
    ]


def train(model: nn.Module, optimizer: SymDist, steps: range, *, rank: int = 0, world: int = 1) -> None:
    """Each rank sees its share of a batch of twelve rows."""
    for step in steps:
        tokens = torch.randint(17, (12, 5), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def sharded_model(mesh: DeviceMesh) -> tuple[nn.Module, SymDist]:
    model = Model()
    fully_shard(model.inner, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, SymDist(groups_of(model))


def fsdp(mesh: DeviceMesh) -> tuple[dict[str, Tensor], list[str], dict[str, Any], bool]:
    """Weights after three steps; state keys at construction; the whole state; whether a reload continues alike."""
    mine = {"rank": mesh.get_local_rank(), "world": mesh.size()}
    model, optimizer = sharded_model(mesh)
    options = dcp.StateDictOptions(full_state_dict=True)
    state = dcp.get_optimizer_state_dict(model, optimizer)["state"]
    keys = sorted(f"{name}.{key}" for name, held in state.items() for key in held)  # type: ignore[union-attr]
    train(model, optimizer, range(3), **mine)
    weights = {name: full(parameter) for name, parameter in model.named_parameters()}
    saved = dcp.get_state_dict(model, optimizer, options=options)
    other, resumed = sharded_model(mesh)
    train(other, resumed, range(7, 8), **mine)
    dcp.set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=options)
    train(model, optimizer, range(3, 5), **mine)
    train(other, resumed, range(3, 5), **mine)
    alike = all(torch.equal(full(a), full(b)) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    whole = {f"{name}.{key}": x for name, held in saved[1]["state"].items() for key, x in held.items()}  # type: ignore[union-attr]
    return weights, keys, whole, alike


def counted(
    mesh: DeviceMesh, shape: tuple[int, ...], group: Group, copies: int, communication_dtype: torch.dtype | None = None
) -> tuple[float, list[str]]:
    """Bytes this rank sends in a step over some float32 copies of a parameter, and the collectives it takes."""
    counting = CountingTransport(inner=TorchTransport())
    parameters = [nn.Parameter(place(mesh, torch.ones(shape))) for _ in range(copies)]
    optimizer = SymDist(
        [{"params": parameters, "lr": 0.1, **group}],
        transport=counting,
        exchange={"communication_dtype": communication_dtype},
    )
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # The first is the agreement on gradients.
    (agreement, *log) = counting.log
    assert agreement.kind == "all_reduce"
    return sum(moved.sent for moved in log), [moved.kind for moved in log]


def counted_mixed(mesh: DeviceMesh, copies: int) -> list[str]:
    """The collectives of a step over some copies of the mix."""
    counting = CountingTransport(inner=TorchTransport())
    groups = [
        {"params": [nn.Parameter(place(mesh, draw(i, copy))) for copy in range(copies)], "lr": 0.1, **group}
        for i, (_, group) in enumerate(MIXED[:WHOLE])
    ]
    optimizer = SymDist(groups, transport=counting)
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return [moved.kind for moved in counting.log]


def roots(mesh: DeviceMesh, grams: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[str], bool]:
    """Roots of Grams of which rank i holds `grams[i]`, the collectives it took, and whether a Gram was written to."""
    group = layout_of(place(mesh, torch.ones(8, 2)), name="").group
    assert group is not None
    mine = grams[dist.get_rank()]
    counting = CountingTransport(inner=TorchTransport())
    requests = [Root(gram=gram.clone(), across="rows", numerics=Numerics(steps=12)) for gram in mine]
    answering = answer_shared(requests, group=group, transport=counting)
    while True:
        try:
            next(answering).wait()
        except StopIteration as finished:
            answers = finished.value
            break
    written = not all(torch.equal(request.gram, gram) for request, gram in zip(requests, mine, strict=True))
    return [[a.matrix, a.nuclear, a.frobenius] for a in answers], [moved.kind for moved in counting.log], written


def gradients_in_parts(mesh: DeviceMesh, missing: int | None) -> tuple[list[Tensor], Tensor, list[str]]:
    """Weights whole on every rank whose gradients are left as sums or means in parts, the way tensor parallelism leaves
    norms: what the step makes of them, what clipping measures, and the collectives of the step.

    The third weight's gradient is whole already; rank `missing` has no gradient for the first.
    """
    counting = CountingTransport(inner=TorchTransport())
    rank = mesh.get_local_rank()
    parts: list[tuple[Placement, Tensor]] = [
        (Partial(), torch.full((3, 4), float(rank + 1)).double()),
        (Partial("avg"), torch.full((5,), float(rank + 1)).double()),
        (Replicate(), torch.ones(2, 3).double()),
    ]
    weights = [nn.Parameter(DTensor.from_local(torch.ones_like(part), mesh, [Replicate()])) for _, part in parts]
    for i, (weight, (placement, part)) in enumerate(zip(weights, parts, strict=True)):
        weight.grad = None if i == 0 and rank == missing else DTensor.from_local(part, mesh, [placement])
    norm = clip_grad_norm_(weights, float("inf"))
    for weight, (placement, part) in zip(weights, parts, strict=True):
        weight.grad = DTensor.from_local(part * (rank != missing), mesh, [placement])
        if placement == Replicate():
            weight.grad = DTensor.from_local(part, mesh, [placement])
    optimizer = SymDist(
        [{"params": [weight], "rule": "row_norm", "lr": 0.1} for weight in weights[::2]]
        + [{"params": [weights[1]], "rule": "adamw", "lr": 0.1}],
        transport=counting,
    )
    optimizer.step()
    return [full(weight.grad) for weight in weights], norm, [moved.kind for moved in counting.log]


def trained_by(mesh: DeviceMesh | None, recipe: str) -> list[list[Tensor]]:
    """Whole weights before and after each of three steps of a small model by a recipe's file."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.up_proj, model.down_proj = nn.Linear(7, 11).double(), nn.Linear(11, 7).double()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, recipe)
    found = [[full(parameter) for parameter in model.parameters()]]
    for step in range(3):
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(step)).double()
        # The same on all ranks: their mean is what one process has.
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append([full(parameter) for parameter in model.parameters()])
    return found
