"""What ranks run for the resharding tests: a small model on any mesh, its training, its checkpoints."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _world
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from symdist import SymDist, build_optimizer
from symdist.layouts import local
from symdist.tools.models import shard
from symdist.tools.models.pieces import cut_parameters
from tests.models import parallel_ranks

BATCH = 12
BEFORE, AFTER = range(2), range(2, 5)
"""The steps before a checkpoint, and after."""
Weights = dict[str, Tensor]


class Experts(nn.Module):
    """All experts on all tokens, weighted; on a mesh each rank runs those it holds, and what they give is summed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6, 4, dtype=torch.float64) / 3)
        self.back = nn.Parameter(torch.randn(5, 4, 6, dtype=torch.float64) / 3)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        weight, back, mesh = self.weight, self.back, None
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh
            x, mixing = (
                DTensor.from_local(given, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
                for given in (x, mixing)
            )
            size, start = Shard.local_shard_size_and_offset(5, mesh.size(), mesh.get_local_rank())
            mixing = mixing.narrow(-1, start, size)
            weight, back = local(weight), local(back)
        y = torch.einsum("bteh,ehd,bte->btd", torch.einsum("btd,edh->bteh", x, weight).tanh(), back, mixing)
        if mesh is None:
            return y
        return (
            DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
        )


class Model(nn.Module):
    """Sizes divide by nothing: 17 tokens, 6, 10 and 5 features."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(17, 6, dtype=torch.float64)
        self.up = nn.Linear(6, 10, dtype=torch.float64)
        self.down = nn.Linear(10, 6, dtype=torch.float64)
        self.router = nn.Linear(6, 5, bias=False, dtype=torch.float64)
        self.experts = Experts()
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.head = nn.Linear(6, 17, bias=False, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        x = x + self.experts(x, self.router(x).softmax(-1))
        return self.head(self.norm(x))


def groups_of(model: nn.Module, **changed: Any) -> list[dict[str, Any]]:
    """Every rule, a group each; `changed` replaces options of the head's."""
    named = dict(model.named_parameters())
    rules: list[tuple[list[str], dict[str, Any]]] = [
        (["embedding.weight"], {"rule": "row_norm", "lr": 0.1, "skip_zero_grad_rows": True}),
        (["up.weight"], {"rule": "hybrid", "lr": 0.02, "alpha": 0.5, "view": {"sections": (7, 3)}}),
        (["down.weight"], {"rule": "muon", "lr": 0.02, "view": {"heads": 2, "dim": 1}, "weight_decay": 0.1}),
        (["router.weight"], {"rule": "left_spectral", "lr": 0.02}),
        (["experts.weight", "experts.back"], {"rule": "polar", "lr": 0.02}),
        (["head.weight"], {"rule": "right_spectral", "lr": 0.02, "centered": True, "role": "head", **changed}),
        (["up.bias", "down.bias", "norm.weight", "norm.bias"], {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1}),
    ]
    return [{"params": [(name, named[name]) for name in names], **options} for names, options in rules]


def remembering(model: nn.Module) -> list[dict[str, Any]]:
    """Rules with more to remember than a momentum: rotations, shared and not, averages. The names tell of stages."""
    named = dict(model.named_parameters())
    shared = {"rule": "aro", "share": "residual_stage", "lr": 0.02}
    columns = {"view": "transposed"}
    rules: list[tuple[dict[str, str], dict[str, Any]]] = [
        ({"embedding.weight": "embedding.weight"}, {"role": "embedding", **shared, **columns}),
        ({"layers.0.up.weight": "up.weight"}, {"role": "mlp_up", **shared, **columns}),
        ({"layers.0.down.weight": "down.weight"}, {"role": "mlp_down", "base": "adam", **shared}),
        ({"head.weight": "head.weight"}, {"role": "head", "base": "row_norm", **shared, **columns}),
        # Gradients of all experts' rows add up to nothing but rounding: one direction of this one must count as none.
        ({"router.weight": "router.weight"}, {"rule": "aro", "base": "row_norm", "lr": 0.02, **columns}),
        ({name: name for name in ("experts.weight", "experts.back")}, {"rule": "normuon", "lr": 0.02}),
        (
            {name: name for name in ("up.bias", "down.bias", "norm.weight", "norm.bias")},
            {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1, "cautious_weight_decay": True},
        ),
    ]
    return [{"params": [(told, named[name]) for told, name in names.items()], **options} for names, options in rules]


def in_sections(model: nn.Module) -> list[dict[str, Any]]:
    """Rules that remember, on rows that are several matrices. Of the router's the rotation hangs on rounding."""
    groups = remembering(model)
    views = {"up.weight": {"sections": (7, 3)} | TURNED, "head.weight": {"sections": (4, 11, 2)} | TURNED}
    for group in groups:
        names = [name.removeprefix("layers.0.") for name, _ in group["params"]]
        group["view"] = views.get(names[0], group.get("view", "as_stored"))
        if names == ["router.weight"]:
            group.update(rule="normuon", view={"sections": (3, 2)})
            del group["base"]
    return groups


TURNED = {"transposed": True}
RULES = {"usual": groups_of, "remembering": remembering, "in sections": in_sections}


def sharded(mesh: DeviceMesh, kind: str, seed: int = 0, dim: int = 0) -> tuple[nn.Module, DeviceMesh | None]:
    """The model on a mesh, and the data-parallel mesh, None where there is none.

    `kind` is "plain", "fsdp" (over a mesh of one dimension), "hsdp" (the first dimension of two replicates), or "tp"
    (the last dimension splits tensors and experts, the others are fsdp or hsdp). Experts are cut along `dim` by fsdp.
    """
    model = Model(seed)
    if kind == "plain":
        return model, None
    data = mesh
    if kind == "tp":
        names = mesh.mesh_dim_names
        assert names is not None
        inner = mesh[names[-1]]
        cut_parameters(model.experts, inner)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": ColwiseParallel(output_layouts=Replicate())}
        parallelize_module(model, inner, {"embedding": RowwiseParallel(input_layouts=Replicate()), **plan})
        data = mesh[names[:-1]] if len(names) > 2 else mesh[names[0]]
    fully_shard(model.experts, mesh=data, shard_placement_fn=lambda _: Shard(dim))
    fully_shard(model, mesh=data)
    return model, data


def tokens_of(step: int, data: DeviceMesh | None) -> Tensor:
    """This rank's share of a batch."""
    batch = torch.randint(17, (BATCH, 5), generator=torch.Generator().manual_seed(step))
    if data is None:
        return batch
    coordinate = data.get_coordinate()
    assert coordinate is not None
    place = 0
    for size, along in zip(data.shape, coordinate, strict=True):
        place = place * size + along
    return batch.chunk(data.size())[place]


def backward(model: nn.Module, step: int, data: DeviceMesh | None) -> None:
    tokens = tokens_of(step, data)
    nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()


def train(model: nn.Module, optimizer: SymDist, steps: range, data: DeviceMesh | None = None) -> list[Weights]:
    """The whole weights after each step."""
    found = []
    for step in steps:
        backward(model, step, data)
        optimizer.step()
        optimizer.zero_grad()
        found.append(wholes(model))
    return found


def whole(tensor: Tensor) -> Tensor:
    # A copy: of what is replicated, `full_tensor` gives the tensor itself.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def wholes(model: nn.Module) -> Weights:
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def group_of(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Of just these ranks: checkpoints are not for the others of the world."""
    ranks = mesh.mesh.flatten().tolist()
    return next(group for group in _world.pg_group_ranks if dist.get_process_group_ranks(group) == ranks)


def save(mesh: DeviceMesh, directory: str, model: nn.Module, optimizer: SymDist, flat: bool = False) -> None:
    options = states.StateDictOptions(flatten_optimizer_state_dict=flat)
    held = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer, options=options), strict=True))
    dcp.save(held, storage_writer=FileSystemWriter(directory), process_group=group_of(mesh))


def load(mesh: DeviceMesh, directory: str, model: nn.Module, optimizer: SymDist, flat: bool = False) -> None:
    options = states.StateDictOptions(flatten_optimizer_state_dict=flat)
    held = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer, options=options), strict=True))
    dcp.load(held, storage_reader=FileSystemReader(directory), process_group=group_of(mesh))
    states.set_state_dict(
        model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"], options=options
    )


def saving(mesh: DeviceMesh, kind: str, dim: int, directory: str, flat: bool, rules: str = "usual") -> list[Weights]:
    """Train, save, and go on."""
    model, data = sharded(mesh, kind, dim=dim)
    optimizer = SymDist(RULES[rules](model))
    train(model, optimizer, BEFORE, data)
    save(mesh, directory, model, optimizer, flat)
    return train(model, optimizer, AFTER, data)


def loading(mesh: DeviceMesh, kind: str, dim: int, directory: str, flat: bool, rules: str = "usual") -> list[Weights]:
    """Other weights, other state; load, and go on."""
    model, data = sharded(mesh, kind, seed=1, dim=dim)
    optimizer = SymDist(RULES[rules](model))
    train(model, optimizer, range(9, 10), data)
    load(mesh, directory, model, optimizer, flat)
    return train(model, optimizer, AFTER, data)


def alone(rules: str = "usual") -> list[Weights]:
    """The five steps of one process."""
    model = Model()
    return train(model, SymDist(RULES[rules](model)), range(BEFORE.start, AFTER.stop))


def everything(model: nn.Module, optimizer: SymDist) -> list[Any]:
    """Weights, gradients, state and options, as this rank holds them."""
    weights = [local(parameter).detach().clone() for parameter in model.parameters()]
    state = [local(x).clone() for parameter in model.parameters() for x in optimizer.state[parameter].values()]
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return [weights, [parameter.grad for parameter in model.parameters()], state, options]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(map(torch.equal, one[0] + one[2], other[0] + other[2])) and one[1::2] == other[1::2]


def described(model: nn.Module, optimizer: SymDist) -> dict[str, Any]:
    """The keys of a state dict, with the shape of each tensor."""
    held: Any = states.get_optimizer_state_dict(model, optimizer)
    tensors = {f"{name}.{key}": tuple(x.shape) for name, state in held["state"].items() for key, x in state.items()}
    return {"tensors": tensors, "groups": held["param_groups"]}


def fresh_state(mesh: DeviceMesh, kind: str, dim: int) -> tuple[dict[str, Any], bool, bool]:
    """What a new optimizer's state dict has; whether asking changed nothing; whether a step changes the keys."""
    model, data = sharded(mesh, kind, dim=dim)
    optimizer = SymDist(groups_of(model))
    before = everything(model, optimizer)
    found = described(model, optimizer)
    unchanged = same(before, everything(model, optimizer))
    train(model, optimizer, range(1), data)
    return found, unchanged, described(model, optimizer) == found


STAGES = (("embedding", "up", "down"), ("router", "experts", "norm", "head"))


def stage_of(mesh: DeviceMesh) -> tuple[nn.Module, SymDist, DeviceMesh]:
    """The outer mesh dimension are stages of a pipeline, the inner is fsdp."""
    model, data = Model(), mesh["inner"]
    for name in STAGES[1 - mesh.get_local_rank("outer")]:
        delattr(model, name)
    fully_shard(model, mesh=data)
    groups = groups_of(Model())
    named = dict(model.named_parameters())
    for group in groups:
        group["params"] = [(name, named[name]) for name, _ in group["params"] if name in named]
    return model, SymDist([group for group in groups if group["params"]]), data


def pushed(model: nn.Module, optimizer: SymDist, steps: range, data: DeviceMesh | None) -> list[Weights]:
    """As `train`, on gradients that are drawn: of a stage alone there are no others."""
    found = []
    for step in steps:
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient if data is None else distribute_tensor(gradient, data, [Shard(0)])
        optimizer.step()
        found.append(wholes(model))
    return found


def staged(mesh: DeviceMesh, directory: str) -> tuple[dict[str, Any], bool, list[Weights]]:
    """Train stages, save them together, and go on."""
    model, optimizer, data = stage_of(mesh)
    before = everything(model, optimizer)
    found = described(model, optimizer)
    unchanged = same(before, everything(model, optimizer))
    pushed(model, optimizer, BEFORE, data)
    save(mesh, directory, model, optimizer, flat=True)
    return found, unchanged, pushed(model, optimizer, AFTER, data)


def from_stages(mesh: DeviceMesh, directory: str) -> tuple[list[Weights], bool]:
    """What stages saved, in one model: three more steps, and whether the groups still name their own parameters."""
    model, data = sharded(mesh, "fsdp", seed=1)
    optimizer = SymDist(groups_of(model))
    names = [group["param_names"] for group in optimizer.param_groups]
    load(mesh, directory, model, optimizer, flat=True)
    return pushed(model, optimizer, AFTER, data), names == [group["param_names"] for group in optimizer.param_groups]


def stages_alone() -> list[Weights]:
    model = Model()
    return pushed(model, SymDist(groups_of(model)), range(BEFORE.start, AFTER.stop), None)


def refused(mesh: DeviceMesh, kind: str, changes: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """For each change of the head's options: what loading says of it, and whether everything is as before."""
    model, data = sharded(mesh, kind)
    optimizer = SymDist(groups_of(model))
    train(model, optimizer, BEFORE, data)
    _, saved = states.get_state_dict(model, optimizer)
    found = []
    for changed in changes:
        model, data = sharded(mesh, kind, seed=1)
        optimizer = SymDist(groups_of(model, **changed))
        train(model, optimizer, range(9, 10), data)
        before = everything(model, optimizer)
        try:
            states.set_optimizer_state_dict(model, optimizer, saved)
            message = "loaded"
        except ValueError as error:
            message = str(error)
        found.append((message, same(before, everything(model, optimizer))))
    return found


def missing(mesh: DeviceMesh, kind: str, rank: int, directory: str) -> bool:
    """Whether a gradient that one rank has not, after loading, is a gradient of zero there."""
    model, data = sharded(mesh, kind)
    optimizer = SymDist(groups_of(model))
    train(model, optimizer, BEFORE, data)
    save(mesh, directory, model, optimizer)
    found = []
    for absent in (True, False):
        model, data = sharded(mesh, kind, seed=1)
        optimizer = SymDist(groups_of(model))
        load(mesh, directory, model, optimizer)
        backward(model, AFTER.start, data)
        for parameter in model.parameters():
            if dist.get_rank() == rank and absent:
                parameter.grad = None
            elif dist.get_rank() == rank:
                local(parameter.grad).zero_()
        optimizer.step()
        found.append(everything(model, optimizer))
    return same([found[0][0], [], found[0][2], []], [found[1][0], [], found[1][2], []])


def frozen(mesh: DeviceMesh, directory: str, saved: bool, loaded: bool) -> list[Weights]:
    """`saved` and `loaded` say whether one weight is frozen there; the weights after loading, and one step after."""
    model, data = sharded(mesh, "fsdp")
    model.up.weight.requires_grad_(not saved)
    optimizer = SymDist(groups_of(model))
    train(model, optimizer, BEFORE, data)
    save(mesh, directory, model, optimizer)
    model, data = sharded(mesh, "fsdp", seed=1)
    model.up.weight.requires_grad_(not loaded)
    optimizer = SymDist(groups_of(model))
    load(mesh, directory, model, optimizer)
    return [wholes(model), *train(model, optimizer, AFTER[:1], data)]


RECIPE = {
    "embedding": {"rule": "right_spectral", "lr": 0.02},
    "head": {"rule": "hybrid", "centered": True, "lr": 0.02},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "muon", "view": "heads", "lr": 0.01},
    "experts": {"rule": "hybrid", "view": "neurons", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 1e-3},
}


def presets(world: DeviceMesh, shape: dict[str, int], directory: str, loading: bool) -> list[Weights]:
    """OLMoE on a mesh whose dimensions have these names, trained and saved, or loaded; and three steps more."""
    mesh = parallel_ranks.mesh_of(shape)
    model = parallel_ranks.small("olmoe-tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 if loading else 1)
    optimizer = build_optimizer(shard(model, mesh), RECIPE)
    if loading:
        load(mesh, directory, model, optimizer)
    else:
        preset_steps(model, optimizer, BEFORE, mesh)
        save(mesh, directory, model, optimizer)
    return [wholes(model), *preset_steps(model, optimizer, AFTER, mesh)]


def preset_steps(model: nn.Module, optimizer: SymDist, steps: range, mesh: DeviceMesh) -> list[Weights]:
    found = []
    for _ in steps:
        parallel_ranks.backward(model, parallel_ranks.share(mesh))
        optimizer.step()
        optimizer.zero_grad()
        found.append(wholes(model))
    return found
