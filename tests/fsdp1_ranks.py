"""What ranks run for the tests of FSDP1: `FullyShardedDataParallel` with `use_orig_params=True`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecision, ShardingStrategy, StateDictType

from symdist import SymDist, build_optimizer, clip_grad_norm_
from symdist.exchange import TorchTransport
from symdist.layouts import Group
from symdist.layouts.fsdp1 import read_units
from tests.cases import CASES, LR, STEPS, tensors

STRATEGIES = {
    "full": ShardingStrategy.FULL_SHARD,
    "grad_op": ShardingStrategy.SHARD_GRAD_OP,
    "hybrid": ShardingStrategy.HYBRID_SHARD,
    "none": ShardingStrategy.NO_SHARD,
}
Key = tuple[str, str]


class Weights(nn.Module):
    """Weights by number, whose gradients are whatever the forward is given: its result is linear in them."""

    def __init__(self, weights: dict[int, Tensor]):
        super().__init__()
        self.weights = nn.ParameterDict({f"w{i}": nn.Parameter(weight) for i, weight in weights.items()})

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return sum(
            ((weight * gradients[int(name[1:])]).sum() for name, weight in self.weights.items()), torch.zeros(())
        )


class Halves(nn.Module):
    """Two modules of weights, the second for a unit of its own, and some beside them."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        numbered = dict(enumerate(weights))
        self.first = Weights({i: weight for i, weight in numbered.items() if i % 3 == 0})
        self.second = Weights({i: weight for i, weight in numbered.items() if i % 3 == 1})
        self.rest = Weights({i: weight for i, weight in numbered.items() if i % 3 == 2})

    def forward(self, gradients: list[Tensor]) -> Tensor:
        return self.first(gradients) + self.second(gradients) + self.rest(gradients)

    def numbered(self) -> dict[int, nn.Parameter]:
        found = {int(name.rsplit("w", 1)[1]): weight for name, weight in self.named_parameters()}
        return dict(sorted(found.items()))


def wrapped(model: nn.Module, place: Any, strategy: str, **options: Any) -> FSDP:
    """A model as one unit, on the process groups of `on`."""
    return FSDP(
        model,
        **{"use_orig_params": True} | options,
        process_group=place,
        sharding_strategy=STRATEGIES[strategy],
        device_id=torch.device("cpu"),
    )


def on(mesh: DeviceMesh, strategy: str) -> Any:
    """The process group for a strategy; of hybrid sharding, which has two copies on four ranks, that of each way."""
    if strategy != "hybrid":
        return mesh.get_group()
    copies = 2 if mesh.size() == 4 else 1
    numbers = mesh.mesh.view(copies, -1)
    shard = next(row for row in numbers.tolist() if dist.get_rank() in row)
    replicate = next(column for column in numbers.T.tolist() if dist.get_rank() in column)
    return _group_of(shard), _group_of(replicate)


def _group_of(ranks: list[int]) -> Any:
    """A process group of these ranks alone: the others take no part in a test."""
    group = Group(ranks=tuple(ranks), index=ranks.index(dist.get_rank()), through=(dist.group.WORLD,))
    transport = TorchTransport()
    transport.prepare([group])
    return transport._handle(group) if len(ranks) > 1 else dist.new_group(ranks, use_local_synchronization=True)


KINDS = [(case, strategy) for case in CASES for strategy in ("auto", "owner", "reduce")]


def trained(mesh: DeviceMesh, strategy: str, bucket_bytes: int) -> tuple[dict[Key, Tensor], dict[str, str]]:
    """Whole weights after three steps of every case, with each strategy that it may have, and where rules ran."""
    inner = Halves([tensors(case)[0] for case, _ in KINDS])
    place = on(mesh, strategy)
    for name in ("first", "second"):
        setattr(inner, name, wrapped(getattr(inner, name), place, strategy))
    model = wrapped(inner, place, strategy)
    read_units(model)
    groups = {i: _group(i, weight) for i, weight in inner.numbered().items()}
    groups = {i: group for i, group in groups.items() if _fits(group)}
    optimizer = SymDist(list(groups.values()), exchange={"bucket_bytes": bucket_bytes})
    for step in range(STEPS):
        model([tensors(case)[1][step] for case, _ in KINDS]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with FSDP.summon_full_params(model):
        found = {KINDS[i]: inner.numbered()[i].detach().clone() for i in groups}
    return found, optimizer.strategies()


def _group(i: int, weight: nn.Parameter) -> dict[str, Any]:
    case, strategy = KINDS[i]
    return {"params": [(f"{case}/{strategy}", weight)], "lr": LR, "strategy": strategy, **CASES[case][1]}


def _fits(group: dict[str, Any]) -> bool:
    try:
        SymDist([dict(group)])
    except ValueError as error:
        if "cannot run with strategy" not in str(error):
            raise
        return False
    return True


class Block(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width)
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(width, hidden, bias=False)
        self.mlp.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp.down_proj(nn.functional.silu(self.mlp.up_proj(self.input_layernorm(x))))


class Language(nn.Module):
    """Small enough that ranks hold nothing of some weights."""

    def __init__(self, *, tied: bool = False, frozen: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block(6, 9) for _ in range(2))
        self.norm = nn.RMSNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        if frozen:
            self.layers[0].mlp.up_proj.weight.requires_grad_(False)
            self.norm.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), tokens.flatten())


def language(*, dtype: torch.dtype = torch.float64, **kind: bool) -> Language:
    torch.manual_seed(0)
    return Language(**kind).to(dtype)


def batch(step: int) -> Tensor:
    return torch.randint(11, (12, 5), generator=torch.Generator().manual_seed(step))


def steps(
    model: nn.Module, optimizer: SymDist, mesh: DeviceMesh | None, first: int, last: int, clip: Any
) -> list[float]:
    """The norms of gradients that `clip` says; each rank takes its share of each batch."""
    norms = []
    for step in range(first, last):
        tokens = batch(step)
        model(tokens if mesh is None else tokens.chunk(mesh.size())[mesh.get_rank()]).backward()
        norms.append(float(clip(model)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def ours(model: nn.Module) -> Tensor:
    return clip_grad_norm_(model.parameters(), 0.3)


def fsdps(model: nn.Module) -> Tensor:
    return model.clip_grad_norm_(0.3) if isinstance(model, FSDP) else nn.utils.clip_grad_norm_(model.parameters(), 0.3)


CLIPS: dict[str, Callable[[nn.Module], Tensor]] = {"ours": ours, "FSDP's": fsdps}
UNCLIPPED: dict[str, Callable[[nn.Module], Tensor]] = {"none": lambda model: torch.zeros(())}


def whole(model: nn.Module) -> dict[str, Tensor]:
    with FSDP.summon_full_params(model):
        return {
            name.replace("_fsdp_wrapped_module.", ""): weight.detach().clone()
            for name, weight in model.named_parameters()
        }


def wrapped_language(mesh: DeviceMesh, strategy: str, **kind: Any) -> FSDP:
    options = {key: kind.pop(key) for key in ("mixed_precision", "use_orig_params") if key in kind}
    model, place = language(**kind), on(mesh, strategy)
    for i, layer in enumerate(model.layers):
        model.layers[i] = wrapped(layer, place, strategy, **options)
    return wrapped(model, place, strategy, **options)


def learned(
    mesh: DeviceMesh, strategy: str, clip: str, late: bool, kind: dict[str, Any]
) -> tuple[list[float], dict[str, Tensor]]:
    """Norms and weights of three steps; `late` where the optimizer is there before the model is wrapped."""
    if late:
        model: Any = language(**kind)
        optimizer = build_optimizer(model, "small-moe")
        # In place: its root stays what the optimizer knows.
        for i, layer in enumerate(model.layers):
            model.layers[i] = wrapped(layer, on(mesh, strategy), strategy)
        for name in ("embed_tokens", "norm", "lm_head"):
            setattr(model, name, wrapped(getattr(model, name), on(mesh, strategy), strategy))
    else:
        model = wrapped_language(mesh, strategy, **kind)
        optimizer = build_optimizer(model, "small-moe")
    norms = steps(model, optimizer, mesh, 0, 3, (CLIPS | UNCLIPPED)[clip])
    return norms, whole(model)


def alone(
    clip: str, kind: dict[str, bool], *, dtype: torch.dtype = torch.float64
) -> tuple[list[float], dict[str, Tensor]]:
    model = language(**kind)
    norms = steps(model, build_optimizer(model, "small-moe"), None, 0, 3, (CLIPS | UNCLIPPED)[clip])
    return norms, {name: weight.detach() for name, weight in model.named_parameters()}


def in_low_precision(mesh: DeviceMesh) -> dict[str, float]:
    """How far float32 masters get from those of one process, where forward and backward are in bfloat16."""
    policy = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = wrapped_language(mesh, "full", mixed_precision=policy, dtype=torch.float32)
    steps(model, build_optimizer(model, "small-moe"), mesh, 0, 3, CLIPS["ours"])
    expected, start = alone("ours", {"dtype": torch.float32})[1], dict(language(dtype=torch.float32).named_parameters())
    return {
        name: float((weight - expected[name]).norm() / (expected[name] - start[name].detach()).norm())
        for name, weight in whole(model).items()
    }


def options_of(way: str) -> dcp.StateDictOptions:
    # Not with cpu_offload: on CPUs FSDP1 then hands out its buffer, and overwrites it.
    return dcp.StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=way == "flat")


def saved(mesh: DeviceMesh, strategy: str, way: str) -> tuple[dict[str, Tensor], Any]:
    """Weights after two steps, and the whole state."""
    model = wrapped_language(mesh, strategy)
    optimizer = build_optimizer(model, "small-moe")
    steps(model, optimizer, mesh, 0, 2, CLIPS["ours"])
    return whole(model), dcp.get_optimizer_state_dict(model, optimizer, options=options_of(way))


def with_weights(mesh: DeviceMesh, strategy: str, weights: dict[str, Tensor]) -> FSDP:
    model = wrapped_language(mesh, strategy)
    with FSDP.summon_full_params(model), torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name.replace("_fsdp_wrapped_module.", "")])
    return model


def resumed(mesh: DeviceMesh, strategy: str, way: str, weights: dict[str, Tensor], state: Any) -> dict[str, Tensor]:
    """The weights a third step leads to."""
    model = with_weights(mesh, strategy, weights)
    optimizer = build_optimizer(model, "small-moe")
    dcp.set_optimizer_state_dict(model, optimizer, state, options=options_of(way))
    steps(model, optimizer, mesh, 2, 3, CLIPS["ours"])
    return whole(model)


def resumed_by_fsdp(mesh: DeviceMesh, strategy: str) -> dict[str, Tensor]:
    """The same by FSDP's own functions, on the same ranks.

    In pieces: of whole state, on CPUs, `FSDP.optim_state_dict` overwrites one tensor with the next, AdamW's too.
    """
    model = wrapped_language(mesh, strategy)
    optimizer = build_optimizer(model, "small-moe")
    steps(model, optimizer, mesh, 0, 2, CLIPS["ours"])
    again = with_weights(mesh, strategy, whole(model))
    another = build_optimizer(again, "small-moe")
    with FSDP.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = FSDP.optim_state_dict(model, optimizer, group=mesh.get_group())
    with FSDP.state_dict_type(again, StateDictType.SHARDED_STATE_DICT):
        another.load_state_dict(FSDP.optim_state_dict_to_load(again, another, state, group=mesh.get_group()))
    steps(again, another, mesh, 2, 3, CLIPS["ours"])
    return whole(again)


def refused(mesh: DeviceMesh) -> list[str]:
    """What is said of flat parameters, and of pieces that nothing tells of."""
    said = []
    flat = wrapped_language(mesh, "full", use_orig_params=False)
    unknown = wrapped_language(mesh, "full")
    for build in (
        lambda: build_optimizer(flat, "small-moe"),
        lambda: SymDist([{"params": list(flat.parameters()), "rule": "adamw", "lr": 0.1}]),
        lambda: SymDist([{"params": list(unknown.parameters()), "rule": "adamw", "lr": 0.1}]),
        lambda: clip_grad_norm_(unknown.parameters(), 1.0),
    ):
        try:
            build()
            said.append("accepted")
        except ValueError as error:
            said.append(str(error))
    return said
