"""Other optimizers that `compare` measures beside recipes.

Each gets a model under FSDP2, steps the hidden matrices that the recipe `muon` steps by Muon, and leaves the rest to
AdamW.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from symdist.layouts import local
from symdist.routing.route import route
from symdist.rules.linalg.inverse_root import Numerics, polar_as_published

Name: TypeAlias = Literal["torch.optim.Muon", "muon-fsdp2", "dion", "all-gather-muon"]

ADAMW = "torch.optim.AdamW"
NAMES: tuple[Name, ...] = get_args(Name)
_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model's parameters by name, by how Muon optimizers treat them.

    Attributes:
        matrices: Hidden matrices.
        stacks: Stacks of hidden matrices, such as the experts.
        others: All other parameters.
    """

    matrices: dict[str, nn.Parameter]
    stacks: dict[str, nn.Parameter]
    others: dict[str, nn.Parameter]

    @property
    def hidden(self) -> dict[str, nn.Parameter]:
        """Matrices and stacks together."""
        return {**self.matrices, **self.stacks}


def parts(model: nn.Module) -> Parts:
    """Divide a model's parameters into those that the recipe `muon` steps by Muon, and the rest.

    Args:
        model: The model, sharded or not.

    Returns:
        The parameters.

    Raises:
        ValueError: If a matrix has no known role.
    """
    divided = Parts(matrices={}, stacks={}, others={})
    for group in route(model, "muon"):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if group["rule"] != "muon":
                divided.others[name] = parameter
            elif parameter.dim() == 2:
                divided.matrices[name] = parameter
            else:
                divided.stacks[name] = parameter
    return divided


def build_baseline(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a baseline, to be stepped one after another.

    Args:
        name: One of `NAMES`, or `ADAMW`.
        model: The model, sharded already.

    Returns:
        The optimizers.

    Raises:
        KeyError: If the name is unknown.
    """
    if name == ADAMW:
        return [_adamw(dict(model.named_parameters()))]
    return _BASELINES[name].build(parts(model))


def describe_baseline(name: str, model: nn.Module) -> str:
    """Describe which parameters a baseline steps and how.

    Args:
        name: One of `NAMES`, or `ADAMW`.
        model: The model.

    Returns:
        The description.

    Raises:
        KeyError: If the name is unknown.
    """
    if name == ADAMW:
        return "all parameters by torch.optim.AdamW, fused"
    return _BASELINES[name].describe(parts(model))


def refusal(name: str, model: nn.Module, ranks: int) -> str | None:
    """Return why a baseline cannot step a model, or None if it can.

    This is checked before any rank starts, since a rank that fails in the middle of a step leaves the others waiting.

    Args:
        name: One of `NAMES`.
        model: The model on meta tensors, sharded over `ranks`.
        ranks: The number of ranks.

    Returns:
        The reason, or None.

    Raises:
        KeyError: If the name is unknown.
    """
    return _BASELINES[name].refuse(parts(model), ranks)


class AllGatherMuon(torch.optim.Optimizer):
    """The simplest Muon for shards: every rank gathers each momentum whole, computes its update, and keeps its piece.

    The polar factor is computed in bfloat16 by the code of symdist's own rule, with five quintic steps.

    Args:
        params: DTensors of two dimensions, or of three for stacks of matrices, sharded in any way.
        lr: The learning rate; 1e-3 by default.
        momentum: The factor of the Nesterov momentum; 0.95 by default.

    Example:
        >>> optimizer = AllGatherMuon([layer.weight for layer in model.layers], lr=1e-3)
    """

    def __init__(self, params: Any, *, lr: float = _LR, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step every parameter that has a gradient. All ranks must call it, with gradients for the same parameters.

        Args:
            closure: Computes the loss anew, if given.

        Returns:
            What `closure` returned, or None.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: DTensor, group: dict[str, Any]) -> None:
        mesh, placements = parameter.device_mesh, parameter.placements
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        # Elementwise work on local tensors, since every operation on a DTensor has some overhead.
        grad, momentum = local(cast(Tensor, parameter.grad)), local(state["momentum_buffer"])
        momentum.lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(momentum, group["momentum"])
        whole = DTensor.from_local(
            nesterov, mesh, placements, shape=parameter.shape, stride=parameter.stride()
        ).full_tensor()
        update = polar_as_published(whole, Numerics(normalise="matrix"))
        # Replicate to Shard sends nothing: each rank takes its own piece.
        piece = DTensor.from_local(update, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, placements)
        scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
        local(parameter).add_(local(piece), alpha=-group["lr"] * scale)


@dataclass(frozen=True, kw_only=True)
class _Baseline:
    """How to build a baseline, what it steps and how, and why it cannot run, if so."""

    build: Callable[[Parts], list[torch.optim.Optimizer]]
    describe: Callable[[Parts], str]
    refuse: Callable[[Parts, int], str | None]


def _adamw(parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters.values(), lr=_LR, fused=True)


def _torch_muon(divided: Parts) -> list[torch.optim.Optimizer]:
    return [torch.optim.Muon(divided.matrices.values(), lr=_LR), _adamw(divided.stacks | divided.others)]


def _refuse_torch_muon(divided: Parts, ranks: int) -> str | None:
    """Return why torch.optim.Muon cannot step a matrix. DTensor decides it from shapes, so alike on all ranks."""
    tried: set[torch.Size] = set()
    for name, parameter in divided.matrices.items():
        if parameter.shape in tried:
            continue
        tried.add(parameter.shape)
        trial = nn.Parameter(torch.empty_like(parameter))
        trial.grad = torch.empty_like(parameter)
        try:
            torch.optim.Muon([trial]).step()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            return f"{name} {list(parameter.shape)} cannot be stepped on {ranks} ranks: {reason}"
    return None


def _muon_fsdp2(divided: Parts) -> list[torch.optim.Optimizer]:
    muon = _import_compiled("muon_fsdp2").Muon
    # rms_scale off, to scale by the ratio of the last two dimensions: the package's other scale would use the number of
    # experts as the number of rows.
    hidden = {"params": list(divided.hidden.values()), "lr": _LR, "use_muon": True, "rms_scale": False}
    return [muon([hidden, {"params": list(divided.others.values()), "lr": _LR, "use_muon": False}])]


def _refuse_muon_fsdp2(divided: Parts, ranks: int) -> str | None:
    if reason := _refuse_compiled("muon_fsdp2", install="muon-fsdp2"):
        return reason
    for name, parameter in divided.hidden.items():
        if parameter.shape[0] % ranks:
            return f"it gathers equal shards only, and {name} {list(parameter.shape)} is uneven on {ranks} ranks"
    return None


def _dion(divided: Parts) -> list[torch.optim.Optimizer]:
    muon = _import_compiled("dion").Muon
    # It compiles its functions anew for each shape, and fails where that is more often than torch allows.
    dynamo = importlib.import_module("torch._dynamo.config")
    shapes = {parameter.shape for parameter in divided.hidden.values()}
    dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * len(shapes))  # type: ignore[attr-defined]
    # It accepts a mesh only if that is the very one that the parameters are sharded on.
    mesh = cast(DTensor, next(iter(divided.hidden.values()))).device_mesh
    # adjust_lr and flatten are the package's defaults, stated since the comparison depends on them. "spectral_norm" is
    # √(m/n), the nearest to √max(1, m/n) that it has: alike for square and tall matrices, smaller for wide ones.
    # Unflattened, a stack is a batch of matrices, not one matrix with a row for each expert.
    options = {"lr": _LR, "nesterov": True, "adjust_lr": "spectral_norm", "flatten": False}
    groups = [
        {"params": list(divided.hidden.values())},
        {"params": list(divided.others.values()), "algorithm": "adamw"},
    ]
    return [muon(groups, distributed_mesh=mesh, **options)]


def _import_compiled(module: str) -> Any:
    """Import a package whose optimizer runs under torch.compile."""
    # It compiles only a few small functions. Do without a pool of compile processes, which would outlive this rank.
    importlib.import_module("torch._inductor.config").compile_threads = 1  # type: ignore[attr-defined]
    return importlib.import_module(module)


def _refuse_compiled(module: str, *, install: str) -> str | None:
    """Return why a package whose optimizer runs under torch.compile cannot be used, or None if it can."""
    if importlib.util.find_spec(module) is None:
        return f"not installed: pip install {install}"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None and os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        return f"it runs under torch.compile, which finds no {compiler}: install one, or set TORCHDYNAMO_DISABLE=1"
    return None


def _counted(divided: Parts) -> str:
    stacks = f" and {len(divided.stacks)} stacks of experts" if divided.stacks else ""
    return f"{len(divided.matrices)} hidden matrices{stacks}"


_BASELINES: dict[str, _Baseline] = {
    "torch.optim.Muon": _Baseline(
        build=_torch_muon,
        describe=lambda divided: (
            f"{len(divided.matrices)} hidden matrices by torch.optim.Muon on DTensors; the other "
            f"{len(divided.stacks) + len(divided.others)}, {'experts included, ' if divided.stacks else ''}"
            "by torch.optim.AdamW, fused"
        ),
        refuse=_refuse_torch_muon,
    ),
    "muon-fsdp2": _Baseline(
        build=_muon_fsdp2,
        describe=lambda divided: (
            f"{_counted(divided)} by the package's Muon, each gathered to one rank, rms_scale off; "
            f"the other {len(divided.others)} by its AdamW"
        ),
        refuse=_refuse_muon_fsdp2,
    ),
    "dion": _Baseline(
        build=_dion,
        describe=lambda divided: (
            f"{_counted(divided)} by the package's Muon in bfloat16, those of one shape sent together, each to one rank"
            f"{', the experts where they are' if divided.stacks else ''}; the other {len(divided.others)} by its AdamW"
        ),
        # It pads uneven shards, and takes empty ones.
        refuse=lambda divided, ranks: _refuse_compiled("dion", install="git+https://github.com/microsoft/dion"),
    ),
    "all-gather-muon": _Baseline(
        build=lambda divided: [AllGatherMuon(divided.hidden.values()), _adamw(divided.others)],
        describe=lambda divided: (
            f"{_counted(divided)} by Muon in bfloat16, each gathered to all ranks; "
            f"the other {len(divided.others)} by torch.optim.AdamW, fused"
        ),
        refuse=lambda divided, ranks: None,
    ),
}
