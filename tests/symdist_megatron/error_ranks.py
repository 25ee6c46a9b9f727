"""In test ranks: what is refused, what is skipped, and what Megatron's own functions and arguments make."""

import argparse
import sys
import types
from typing import Any

from tests.symdist_megatron.how import How
from tests.symdist_megatron.models import build, optimizer_config, parameters

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import symdist_megatron
from symdist.routing.roles import FALLBACK, roles_up
from symdist_megatron import get_symdist_optimizer
from symdist_megatron.wrappers import SymDistChain

LR = 0.05
RECIPE: dict[str, Any] = {
    "default": {"rule": "muon", "lr": LR},
    "embedding": {"rule": "row_norm", "lr": 0.1},
    "head": {"rule": "row_norm", "centered": True, "lr": 0.1},
    "other": {"rule": "adamw", "lr": 0.01},
}


def refused(mesh: DeviceMesh, how: How, recipe: Any, config: dict[str, Any], options: dict[str, Any]) -> str:
    """What the error says, the same on all ranks."""
    _, chunks = build(how)
    if ddp := options.pop("ddp", None):
        for name, value in ddp.items():
            setattr(chunks[0].ddp_config, name, value)
    if options.pop("bare", False):
        chunks = [chunks[0].module]
    try:
        get_symdist_optimizer(optimizer_config(how, **config), chunks, recipe=recipe, **options)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def unlike(mesh: DeviceMesh, how: How, on: int) -> str:
    """What all ranks say where a name is of no recipe on one rank only, and where one has nothing to train."""
    _, chunks = build(how)
    if mesh.get_rank() == on:
        for parameter in chunks[0].parameters():
            parameter.requires_grad_(False)
    try:
        get_symdist_optimizer(optimizer_config(how), chunks, recipe=RECIPE)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _given(how: How, *, bad: bool, **options: Any) -> tuple[SymDistChain, list[Any], list[torch.Tensor]]:
    config, chunks = build(how)
    scale = options.pop("loss_scale", None)
    optimizer = get_symdist_optimizer(optimizer_config(how, loss_scale=scale), chunks, recipe=RECIPE, **options)
    known = list(parameters(chunks, config))
    for _, parameter, _ in known:
        parameter.main_grad.fill_(0.25)
    if bad:
        # Expert gradients are not reduced over the ranks of expert parallelism: one rank's alone is not finite.
        name, parameter, _ = next(each for each in known if "experts" in each[0])
        assert name
        parameter.main_grad.view(-1)[0] = float("nan")
    return optimizer, chunks, [parameter.detach().clone() for _, parameter, _ in known]


def not_finite(mesh: DeviceMesh, how: How, policy: str, loss_scale: float | None) -> tuple[str, bool, int]:
    """A NaN on the last rank: what the step says there and elsewhere, whether anything moved, and what was counted."""
    optimizer, chunks, before = _given(
        how, bad=mesh.get_rank() == mesh.size() - 1, nonfinite=policy, loss_scale=loss_scale
    )
    try:
        said = str(optimizer.step()[0])
    except FloatingPointError as error:
        said = str(error)
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    moved = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return said, moved, optimizer.skipped_steps


def offloaded(mesh: DeviceMesh, how: How) -> bool:
    """Whether a step after state and masters were moved, as Megatron does between phases, is like one without."""
    found = []
    for moved in (False, True):
        optimizer, chunks, _ = _given(how, bad=False)
        for _ in range(2):
            if moved:
                for each in optimizer.chained_optimizers:
                    for state in each.optimizer.state.values():
                        state.update({key: value.clone() for key, value in state.items()})
            optimizer.step()
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.main_grad.fill_(0.5)
        found.append([parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def registered(mesh: DeviceMesh, how: How) -> dict[str, Any]:
    """What Megatron's own function makes after `register`, and what is said where no recipe is named."""
    early = megatron_optimizer.get_megatron_optimizer
    sys.modules["somebodys_script"] = script = types.ModuleType("somebodys_script")
    script.get_megatron_optimizer = early  # type: ignore[attr-defined]
    symdist_megatron.register()
    symdist_megatron.register()
    _, chunks = build(how)
    config = optimizer_config(how, lr=2 * LR)
    try:
        megatron_optimizer.get_megatron_optimizer(config, chunks)
        said = ""
    except ValueError as error:
        said = str(error)
    config.symdist = {"recipe": RECIPE, "overrides": {"head": {"lr": 0.3}}}
    made = script.get_megatron_optimizer(config, chunks)  # type: ignore[attr-defined]
    made.step()
    adam = megatron_optimizer.get_megatron_optimizer(optimizer_config(how, optimizer="adam", lr=0.1), chunks)
    return {
        "said": said,
        "kind": type(made).__name__,
        "rates": {group["role"]: group["lr"] for group in made.joint_step.symdist.param_groups},
        "groups": [group["lr"] for group in made.param_groups],
        "adam": type(adam.chained_optimizers[0].optimizer).__name__,
        "registry": "symdist" in getattr(megatron_optimizer, "_EMERGING_OPTIMIZERS", {"symdist": None}),
    }


def norms(mesh: DeviceMesh, how: How) -> dict[str, str]:
    """Roles of a model's norms by their names, where the recipe tells all kinds apart."""
    _, chunks = build(how)
    kinds = {role: RECIPE["other"] for role in ("input_norm", "output_norm", "qk_norm")}
    made = get_symdist_optimizer(optimizer_config(how), chunks, recipe=RECIPE | kinds)
    groups = made.joint_step.symdist.param_groups
    return {name: group["role"] for group in groups for name in group["param_names"] if "norm" in name}


def roles(mesh: DeviceMesh, how: How) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The role and the shape of every matrix and vector, where the recipe has a section for each role."""
    _, chunks = build(how)
    recipe = {role: RECIPE["default"] for role in FALLBACK if role not in ("attention_qkv", "mlp_gate_up")}
    recipe |= {role: RECIPE["other"] for role in FALLBACK if "other" in roles_up(role)}
    made = get_symdist_optimizer(optimizer_config(how), chunks, recipe=recipe)
    shapes = {shard.name: shard.unit.shape for bound in made.joint_step._bound for shard in bound.shards}
    groups = made.joint_step.symdist.param_groups
    return {name: (group["role"], shapes[name]) for group in groups for name in group["param_names"]}


def extended(mesh: DeviceMesh, how: How, recipe: Any, names: list[str]) -> Any:
    """The roles of weights that are no part of Megatron's models, by their names; or what the error says."""
    _, chunks = build(how, extend=lambda config, model: setattr(model.decoder, "extra", Extra(config, names)))
    try:
        made = get_symdist_optimizer(optimizer_config(how), chunks, recipe=recipe)
    except ValueError as error:
        return str(error)
    groups = made.joint_step.symdist.param_groups
    return {name: group["role"] for group in groups for name in group["param_names"] if "extra" in name}


class Extra(nn.Module):
    """Some of: a layer that reads the residual stream, one that might read or write it, a gate, a bare weight."""

    def __init__(self, config: Any, names: list[str]):
        super().__init__()
        width = config.hidden_size
        shared: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": False}
        if "reads" in names:
            self.reads = ColumnParallelLinear(width, 6, **shared)
        if "square" in names:
            self.square = RowParallelLinear(width, width, input_is_parallel=True, skip_bias_add=False, **shared)
        if "gate" in names:
            self.gate = nn.Linear(width, 1, bias=False)
        if "bare" in names:
            self.bare = nn.Parameter(torch.ones(6, width))


def command_line(mesh: DeviceMesh, words: list[str]) -> dict[str, Any]:
    """What Megatron's parser, checks and configuration make of a command line: stand-ins of the same form as theirs."""
    training = _training_package()
    symdist_megatron.register()
    parser = training["arguments"].add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args(words)
    training["arguments"].validate_args(args)
    try:
        config, _ = training["training"].get_megatron_optimizer_config(args)
    except ValueError as error:
        return {"said": str(error)}
    return {
        "optimizer": config.optimizer,
        "distributed": config.use_distributed_optimizer,
        "symdist": getattr(config, "symdist", None),
        "seen": args.seen,
    }


def _training_package() -> dict[str, Any]:
    """Megatron's training package, as far as registration looks at it: megatron-core does not come with it."""
    from importlib.machinery import ModuleSpec

    found = {}
    for name in ("", "arguments", "training", "global_vars"):
        full = f"megatron.training{'.' if name else ''}{name}"
        module = sys.modules.setdefault(full, types.ModuleType(full))
        module.__spec__ = ModuleSpec(full, None, is_package=not name)
        module.__path__ = []
        found[name] = module

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.add_argument("--optimizer", type=str, default="adam", choices=["adam", "sgd", "muon"])
        parser.add_argument("--use-distributed-optimizer", action="store_true")
        parser.add_argument("--lr", type=float, default=None)
        return parser

    def validate_args(args: Any) -> None:
        args.seen = args.optimizer
        if args.optimizer not in ("adam", "sgd") and args.use_distributed_optimizer:
            args.use_distributed_optimizer = False

    def get_megatron_optimizer_config(args: Any) -> Any:
        if args.optimizer not in ("adam", "sgd", "muon"):
            raise ValueError("Invalid optimizer type!")
        config = megatron_optimizer.OptimizerConfig(
            optimizer=args.optimizer, lr=args.lr, use_distributed_optimizer=args.use_distributed_optimizer
        )
        return config, {}

    if not hasattr(found["arguments"], "add_megatron_arguments"):
        found["arguments"].add_megatron_arguments = add_megatron_arguments
        found["arguments"].validate_args = validate_args
        found["training"].get_megatron_optimizer_config = get_megatron_optimizer_config
        found["global_vars"]._GLOBAL_TOKENIZER = types.SimpleNamespace(vocab_size=37)
        # As if nothing had been registered yet.
        for module in list(sys.modules.values()):
            for name in ("get_megatron_optimizer", "_get_megatron_emerging_optimizer"):
                known = getattr(module, "__dict__", {}).get(name)
                if getattr(known, "knows_symdist", False):
                    setattr(module, name, known.__wrapped__)
    return found
