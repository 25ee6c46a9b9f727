"""DeepSpeed engines in test ranks: a model whose gradients are given, and what a step makes of its weights."""

import gc
import importlib
import logging
import os
import random
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import symdist_deepspeed
from symdist import SymDist
from symdist_deepspeed.transport import Staged
from tests.cases import CASES

# It would compile C++ for a minute, and speeds up nothing here.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel(logging.ERROR)

LR = 0.125
Config = dict[str, Any]


def connect() -> None:
    """Let DeepSpeed use the ranks that are there."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    os.environ["RANK"] = str(dist.get_rank())
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    os.environ["DS_ACCELERATOR"] = "cpu"
    symdist_deepspeed.register()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def over_ranks(loss: Tensor) -> float:
    """The mean over all ranks."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


@dataclass(frozen=True, kw_only=True)
class How:
    """What a run does beside its config."""

    accumulation: int = 1
    frozen: tuple[str, ...] = ()
    """Cases whose parameters do not move."""
    groups: bool = False
    """The user gives param groups of their own, the last parameters first, half of them at another rate and decay."""
    zero_init: bool = False
    staged: bool = False
    """Collectives run on copies, as where state is on the CPU and groups only know GPUs."""
    steps: int = 3


class Given(nn.Module):
    """Parameters of some cases; the gradient of each is what `forward` is given, whatever the weights."""

    def __init__(self, cases: list[str]):
        super().__init__()
        self.names = {f"p{i}": case for i, case in enumerate(cases)}
        for name, case in self.names.items():
            self.register_parameter(name, nn.Parameter(weight(name, case)))

    def forward(self, step: int, share: float) -> Tensor:
        """`share` is what part of the gradient this rank contributes."""
        total = torch.zeros(())
        for name, case in self.names.items():
            parameter = getattr(self, name)
            total = total + (parameter * (gradient(name, case, step) * share).to(parameter)).sum().float()
        return total


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that bfloat16 has, and three times as well."""
    source = random.Random(key)
    size = torch.Size(shape).numel()
    return torch.tensor([source.randint(-15, 15) / 8 for _ in range(size)]).view(shape)


def weight(name: str, case: str) -> Tensor:
    return draw(f"{name} {case}", CASES[case][0])


def gradient(name: str, case: str, step: int) -> Tensor:
    given = draw(f"{name} {case} gradient {step}", CASES[case][0])
    if CASES[case][1].get("skip_zero_grad_rows") and step:
        (given.mT if CASES[case][1].get("view") == "transposed" else given)[1::3] = 0
    return given


def recipe(cases: list[str], frozen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Each parameter by its name to the rule of its case."""
    patterns = [
        {"match": f"p{i}", "role": "matrix", "lr": LR, **CASES[case][1]}
        for i, case in enumerate(cases)
        if case not in frozen
    ]
    return {"patterns": patterns, "matrix": {"rule": "muon", "lr": LR}}


def config(cases: list[str], frozen: tuple[str, ...] = (), **more: Any) -> Config:
    base = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SymDist", "params": {"recipe": recipe(cases, frozen)}},
        "gradient_clipping": 0.0,
        "steps_per_print": 1000000,
    }
    return {**base, **more}


def engine_of(model: nn.Module, settings: Config, **more: Any) -> Any:
    connect()
    # Finalizers of engines import, and in CPython 3.11 an import that the collector interrupts with another raises
    # KeyError (gh-106176): here, on one rank alone, while DeepSpeed looks for fairseq.
    gc.collect()
    gc.disable()
    try:
        return deepspeed.initialize(model=model, config=settings, **more)[0]
    finally:
        gc.enable()


def user_groups(named: list[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """The parameters of `How.groups`, and what their groups say."""
    backwards = [parameter for _, parameter in reversed(named)]
    half = len(backwards) // 2
    return [
        {"params": backwards[:half], "lr": 2 * LR, "weight_decay": 0.25},
        {"params": backwards[half:]},
    ]


def made(cases: list[str], settings: Config, how: How) -> Any:
    """An engine on a model of the cases."""
    connect()
    settings = {**settings, "gradient_accumulation_steps": how.accumulation}
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=how.zero_init):
        model = Given(cases)
    named = [(name, parameter) for name, parameter in model.named_parameters()]
    for name, parameter in named:
        parameter.requires_grad_(model.names[name] not in how.frozen)
    given = user_groups([(n, p) for n, p in named if p.requires_grad]) if how.groups else None
    return engine_of(model, settings, model_parameters=given)


def train(engine: Any, how: How, steps: range) -> None:
    """All of a gradient comes from one rank, so that the mean over ranks is exact."""
    for step in steps:
        share = dist.get_world_size() if dist.get_rank() == step % dist.get_world_size() else 0.0
        for _ in range(how.accumulation):
            engine.backward(engine(step, share))
            engine.step()


def read(engine: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The full weights, in fp32, and first moments of what moves."""
    weights, moments = {}, {}
    masters = {}
    if hasattr(engine.optimizer, "fp32_groups"):
        for of_group, copies in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
            masters.update({id(p): copy for p, copy in zip(of_group, copies, strict=True)})
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = CASES[engine.module.names[name]][0]
        # Older releases partition the masters of bfloat16 at stage 0 too.
        if engine.zero_optimization_stage() or hasattr(parameter, "_hp_mapping"):
            weights[name] = safe_get_full_fp32_param(parameter).view(shape).clone()
            moments[name] = safe_get_full_optimizer_state(parameter, "exp_avg").view(shape).clone()
        else:
            tensor = masters.get(id(parameter), parameter)
            weights[name] = tensor.detach().clone()
            moments[name] = engine.basic_optimizer.state[tensor]["exp_avg"].clone()
    return weights, moments


def stepped(mesh: DeviceMesh, cases: list[str], settings: Config, how: How) -> tuple[dict, dict]:
    """The full weights and first moments after some steps."""
    engine = made(cases, settings, how)
    if how.staged:
        engine.basic_optimizer.symdist.transport = Staged(torch.device("cpu"))
    train(engine, how, range(how.steps))
    found = read(engine)
    engine.destroy()
    return found


def alone(cases: list[str], how: How, clip: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same in one process, in float64, without DeepSpeed."""
    named = [(f"p{i}", nn.Parameter(weight(f"p{i}", case).double())) for i, case in enumerate(cases)]
    moving = [(name, p) for (name, p), case in zip(named, cases, strict=True) if case not in how.frozen]
    own: dict[int, dict[str, Any]] = {}
    if how.groups:
        for group in user_groups(moving):
            told = {key: value for key, value in group.items() if key != "params"}
            own.update({id(parameter): told for parameter in group["params"]})
    case_of = {name: case for (name, _), case in zip(named, cases, strict=True)}
    optimizer = SymDist(
        [{"params": [(n, p)], "lr": LR, **CASES[case_of[n]][1], **own.get(id(p), {})} for n, p in moving]
    )
    for step in range(how.steps):
        for name, parameter in moving:
            parameter.grad = gradient(name, case_of[name], step).double()
        if clip:
            nn.utils.clip_grad_norm_([parameter for _, parameter in moving], clip)
        optimizer.step()
    state = optimizer.state
    first = {name: state[p]["momentum"] if "momentum" in state[p] else state[p]["exp_avg"] for name, p in moving}
    return {name: parameter.detach() for name, parameter in moving}, first


def refused(mesh: DeviceMesh, cases: list[str], settings: dict[str, Config]) -> dict[str, str]:
    """What `deepspeed.initialize` raises with each config."""
    found = {}
    for name, each in settings.items():
        try:
            made(cases, each, How())
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"
    return found


def strange_parameter(mesh: DeviceMesh, cases: list[str]) -> str:
    """What is said of a parameter that is not the model's."""
    try:
        engine_of(Given(cases), config(cases), model_parameters=[nn.Parameter(torch.zeros(2, 3))])
    except ValueError as error:
        return str(error)
    return "nothing"


def another_deepspeed(mesh: DeviceMesh) -> tuple[str, str]:
    """What registering says where something is missing, and whether the type is still there after."""
    registration: Any = importlib.import_module("symdist_deepspeed.register")

    there = getattr(torch.optim, registration.TYPE)
    needed = dict(registration._NEEDED)
    stage_3 = next(owner for owner in needed if owner.__name__ == "DeepSpeedZeroOptimizer_Stage3")
    message = "nothing"
    try:
        delattr(torch.optim, registration.TYPE)
        registration._NEEDED[stage_3] = (*needed[stage_3], "no_such_attribute")
        registration.register()
    except ImportError as error:
        message = f"ImportError: {error}"
    finally:
        registration._NEEDED.update(needed)
        setattr(torch.optim, registration.TYPE, there)
    registration.register()
    return message, "registered" if getattr(torch.optim, registration.TYPE) is there else "gone"


def other_type(mesh: DeviceMesh) -> str:
    """The optimizer of a config with another type."""
    settings = config([]) | {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = engine_of(Given(["row"]), settings)
    return type(engine.basic_optimizer).__name__


def overflowing(mesh: DeviceMesh, cases: list[str], settings: Config) -> tuple[list[float], list[bool], list[float]]:
    """Steps whose loss is too large for float16 on one rank only: scales, whether a weight moved, and first moments."""
    engine = made(cases, settings, How())
    scales, moved, steps = [], [], []
    for step in range(4):
        before, _ = read(engine)
        large = 6e4 if step == 1 and dist.get_rank() == dist.get_world_size() - 1 else 1.0
        engine.backward(engine(step, large))
        engine.step()
        after, _ = read(engine)
        scales.append(float(engine.optimizer.loss_scale))
        moved.append(any(not torch.equal(before[name], after[name]) for name in before))
        state = next(iter(engine.basic_optimizer.state.values()))
        steps.append(float(state["step"]))
    engine.destroy()
    return scales, moved, steps


def nonfinite(mesh: DeviceMesh, cases: list[str], settings: Config) -> tuple[str, bool, bool, int]:
    """A gradient that is NaN on one rank, which this configuration lets through.

    What is raised, whether weights stay, whether the next step moves them, and how many steps were skipped.
    """
    engine = made(cases, settings, How())
    before, _ = read(engine)
    message = ""
    try:
        engine.backward(engine(0, float("nan") if dist.get_rank() == 0 else 1.0))
        engine.step()
    except FloatingPointError as error:
        message = str(error)
        engine.optimizer.zero_grad()
    between, _ = read(engine)
    engine.backward(engine(0, 1.0))
    engine.step()
    after, _ = read(engine)
    skipped = engine.basic_optimizer.skipped_steps
    engine.destroy()
    still = all(torch.equal(before[name], between[name]) for name in before)
    return message, still, any(not torch.equal(between[name], after[name]) for name in before), skipped


def scheduled(mesh: DeviceMesh, cases: list[str], settings: Config) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The rates of each step, and the weights."""
    engine = made(cases, settings, How())
    rates = []
    for step in range(4):
        train(engine, How(), range(step, step + 1))
        rates.append([float(group["lr"]) for group in engine.basic_optimizer.symdist.param_groups])
    found = read(engine)[0]
    engine.destroy()
    return rates, found


def broken_off(
    mesh: DeviceMesh, cases: list[str], settings: Config
) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """A step that fails before anything moves, the same on all ranks; then the steps as if it had not been."""
    engine = made(cases, settings, How())
    optimizer = engine.basic_optimizer
    rules, optimizer._rules = optimizer._rules, [{"matrix": "another"} for _ in optimizer._rules]
    message = ""
    try:
        train(engine, How(), range(1))
    except ValueError as error:
        message = str(error)
    engine.optimizer.zero_grad()
    optimizer._rules = rules
    train(engine, How(), range(3))
    weights, moments = read(engine)
    engine.destroy()
    return message, weights, moments


def moved_away(mesh: DeviceMesh, cases: list[str], settings: Config) -> tuple[list[bool], dict, dict]:
    """Steps with masters and state offloaded and reloaded between them.

    Whether the model computes with its masters after each, and the weights and first moments.
    """
    engine = made(cases, settings, How(groups=True))
    alike = []
    for step in range(3):
        train(engine, How(), range(step, step + 1))
        alike.append(
            all(
                torch.equal(parameter.detach().float(), safe_get_full_fp32_param(parameter).to(parameter).float())
                for parameter in engine.module.parameters()
            )
        )
        engine.offload_states(pin_memory=False)
        engine.reload_states()
    weights, moments = read(engine)
    engine.destroy()
    return alike, weights, moments
