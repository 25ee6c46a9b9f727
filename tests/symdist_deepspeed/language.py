"""A small mixture of experts under DeepSpeed: what ranks run to train, save and resume it."""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist.exchange import CountingTransport
from symdist.tools.models import build
from tests.symdist_deepspeed.engines import Config, connect, engine_of, over_ranks

VOCABULARY = 96
BATCH = 12
OVERRIDES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 16, "num_experts": 4}
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""What DeepSpeed's converter wants to find."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Steps `first` to `last`; from a checkpoint folder, and into one after."""

    first: int = 0
    last: int = 20
    load: str | None = None
    save: str | None = None
    again: int = 0
    """Steps of another run that are trained before loading."""


def model() -> nn.Module:
    return build("olmoe-tiny", vocabulary=VOCABULARY, overrides=OVERRIDES, seed=7)


def meta_model() -> nn.Module:
    return build("olmoe-tiny", vocabulary=VOCABULARY, overrides=OVERRIDES, device="meta")


def config(stage: int, recipe: Any = "small-moe", **more: Any) -> Config:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SymDist", "params": {"recipe": recipe}},
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
        **more,
    }


def tokens(step: int, rank: int, world: int) -> Tensor:
    drawn = torch.randint(0, 8, (BATCH, 17), generator=torch.Generator().manual_seed(step))
    # A pattern that can be learnt: each token is the sum of what came before.
    return (drawn.cumsum(1) % VOCABULARY).chunk(world)[rank]


def loss_of(engine: Any, step: int) -> Tensor:
    batch = tokens(step, dist.get_rank(), dist.get_world_size())
    logits = engine(input_ids=batch[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(engine: Any, steps: range) -> list[float]:
    """The losses, mean over ranks."""
    losses = []
    for step in steps:
        loss = loss_of(engine, step)
        engine.backward(loss)
        engine.step()
        losses.append(over_ranks(loss))
    return losses


def run(mesh: DeviceMesh, settings: Config, how: Run) -> list[float]:
    """The losses of a run."""
    engine = engine_of(model(), settings)
    train(engine, range(100, 100 + how.again))
    if how.load is not None:
        path, state = engine.load_checkpoint(how.load)
        assert path is not None
        assert state["step"] == how.first
    losses = train(engine, range(how.first, how.last))
    if how.save is not None:
        engine.save_checkpoint(how.save, client_state={"step": how.last, **UNIVERSAL})
    engine.destroy()
    return losses


def counted(mesh: DeviceMesh, settings: Config) -> list[tuple[str, int, float]]:
    """The collectives of the second step: kind, ranks, and bytes that this rank sends."""
    engine = engine_of(model(), settings)
    train(engine, range(1))
    optimizer = engine.basic_optimizer.symdist
    counting = CountingTransport(inner=optimizer.transport)
    optimizer.transport = counting
    train(engine, range(1, 2))
    engine.destroy()
    return [(moved.kind, moved.size, moved.sent) for moved in counting.log]


def labelled(mesh: DeviceMesh, settings: Config, steps: int) -> list[float]:
    """The losses as transformers computes them from labels."""
    engine = engine_of(model(), settings)
    losses = []
    for step in range(steps):
        batch = tokens(step, dist.get_rank(), dist.get_world_size())
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(over_ranks(loss))
    engine.destroy()
    return losses


def printed(mesh: DeviceMesh, code: str, settings: Config) -> tuple[list[float], dict[str, str]]:
    """Code that makes an engine of `model` and `config`: losses of three steps, and the rule of every parameter."""
    connect()
    names: dict[str, Any] = {"deepspeed": deepspeed, "model": model(), "config": settings}
    exec(code, names)
    engine = names["engine"]
    losses = train(engine, range(3))
    inner = engine.basic_optimizer.symdist
    rules = {name: group["rule"] for group in inner.param_groups for name in group["param_names"]}
    engine.destroy()
    return losses, rules


def tied(mesh: DeviceMesh, settings: Config) -> tuple[list[float], dict[str, str]]:
    """A model whose head is its embedding: losses, and the role of every parameter."""
    whole = build("olmoe-tiny", vocabulary=VOCABULARY, overrides=OVERRIDES | {"tie_word_embeddings": True}, seed=7)
    engine = engine_of(whole, settings)
    losses = train(engine, range(8))
    inner = engine.basic_optimizer.symdist
    roles = {name: group["role"] for group in inner.param_groups for name in group["param_names"]}
    engine.destroy()
    return losses, roles
