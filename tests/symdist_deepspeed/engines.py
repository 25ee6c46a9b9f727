"""DeepSpeed engines in test ranks: a model whose gradients are given, and what a step makes of its weights."""

import logging
import os
import random
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import symdist_deepspeed  # noqa: F401  It registers the type.
from symdist import SymDist
from tests.cases import CASES

# It would compile C++ for a minute, and speeds up nothing here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

LR = 0.125
STEPS = 3
Config = dict[str, Any]


def connect() -> None:
    """Let DeepSpeed use the ranks that are there."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["DS_ACCELERATOR"] = "cpu"
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


class Given(nn.Module):
    """Parameters of some cases; the gradient of each is what `forward` is given, whatever the weights."""

    def __init__(self, cases: list[str]):
        super().__init__()
        self.names = {f"p{i}": case for i, case in enumerate(cases)}
        for name, case in self.names.items():
            self.register_parameter(name, nn.Parameter(weight(name, case)))

    def forward(self, step: int, share: float) -> Tensor:
        """`share` is what part of the gradient this rank contributes."""
        return sum(
            (getattr(self, name) * (gradient(name, case, step) * share).to(getattr(self, name))).sum()
            for name, case in self.names.items()
        )


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that bfloat16 has, and three times as well."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.randint(-15, 16, shape, generator=generator).float() / 8


def weight(name: str, case: str) -> Tensor:
    return draw(f"{name} {case}", CASES[case][0])


def gradient(name: str, case: str, step: int) -> Tensor:
    given = draw(f"{name} {case} gradient {step}", CASES[case][0])
    if CASES[case][1].get("stale_rows") == "hold" and step:
        (given.mT if CASES[case][1].get("view") == "columns" else given)[1::3] = 0
    return given


def recipe(cases: list[str]) -> dict[str, Any]:
    """Each parameter by its name to the rule of its case."""
    patterns = [{"match": f"p{i}", "role": "matrix", "lr": LR, **CASES[case][1]} for i, case in enumerate(cases)]
    return {"patterns": patterns, "matrix": {"rule": "muon", "lr": LR}}


def config(cases: list[str], **more: Any) -> Config:
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SymDist", "params": {"recipe": recipe(cases)}},
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000,
    }
    return {**base, **more}


def shuffled(seed: int, count: int) -> list[str]:
    source = random.Random(seed)
    return source.sample(list(CASES), count)


def engine_of(model: nn.Module, settings: Config, **more: Any) -> Any:
    connect()
    return deepspeed.initialize(model=model, config=settings, **more)[0]


def stepped(mesh: DeviceMesh, cases: list[str], settings: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The full weights, in fp32, and first moments after some steps."""
    engine = engine_of(Given(cases), settings)
    for step in range(STEPS):
        # All of the gradient from one rank, so that the mean over ranks is exact.
        share = dist.get_world_size() if dist.get_rank() == step % dist.get_world_size() else 0.0
        engine.backward(engine(step, share))
        engine.step()
    weights, moments = {}, {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter) if engine.zero_optimization_stage() else parameter.detach()
        weights[name] = full.clone().view(weight(name, engine.module.names[name]).shape)
        if engine.zero_optimization_stage():
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
            moments[name] = moment.clone().view(weights[name].shape)
    engine.destroy()
    return weights, moments


def alone(cases: list[str], steps: int = STEPS) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same in one process, in float64, without DeepSpeed."""
    parameters = {f"p{i}": nn.Parameter(weight(f"p{i}", case).double()) for i, case in enumerate(cases)}
    optimizer = SymDist(
        [{"params": [(f"p{i}", parameters[f"p{i}"])], "lr": LR, **CASES[case][1]} for i, case in enumerate(cases)]
    )
    for step in range(steps):
        for (name, parameter), case in zip(parameters.items(), cases, strict=True):
            parameter.grad = gradient(name, case, step).double()
        optimizer.step()
    first = {
        name: optimizer.state[parameter].get("momentum", optimizer.state[parameter].get("exp_avg"))
        for name, parameter in parameters.items()
    }
    return {name: parameter.detach() for name, parameter in parameters.items()}, first
