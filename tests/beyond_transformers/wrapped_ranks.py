"""What ranks run for wrapped models: the same model in everything that trainers put around it, and how it is routed."""

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config, OlmoeConfig

from symdist import route
from symdist.param_names import class_name
from tests.beyond_transformers import by_hand
from tests.beyond_transformers.matrices import RECIPE

Routing = dict[str, tuple[str, str, str]]
SIZES: dict[str, Any] = {"vocab_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def experts() -> nn.Module:
    return by_hand.Transformer(lambda: by_hand.Stacked(by_hand.InOutExperts))


def alternating() -> nn.Module:
    """How it stores gates and ups, only its code tells."""
    return by_hand.Transformer(lambda: by_hand.Stacked(by_hand.AlternatingExperts))


def gpt2() -> nn.Module:
    """Its `Conv1D` is known by its class."""
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=80, n_embd=24, n_layer=2, n_head=4, n_positions=16))


def olmoe() -> nn.Module:
    """Its router is known by the experts beside it."""
    return AutoModelForCausalLM.from_config(
        OlmoeConfig(**SIZES, hidden_size=24, intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "nanoGPT": by_hand.GPT,
    "nanochat": by_hand.Chat,
    "experts apart": lambda: by_hand.Transformer(by_hand.Mixture),
    "experts": experts,
    "alternating": alternating,
    "declared head": by_hand.Declared,
    "mamba": by_hand.Mamba,
    "vision": by_hand.Seeing,
    "gpt2": gpt2,
    "olmoe": olmoe,
}


def compiled(module: nn.Module) -> Any:
    # Ranks are told not to compile, because it takes long; that is for the first call.
    with mock.patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "0"}):
        wrapped = torch.compile(module, backend="eager")
    assert wrapped is not module
    return wrapped


def layers(model: nn.Module, wrap: Callable[[nn.Module], Any]) -> nn.Module:
    """Wrap the blocks of a model: what its longest lists hold."""
    for holder in [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]:
        for i, block in enumerate(holder):
            holder[i] = wrap(block)
    return model


def leaves(model: nn.Module, wrap: Callable[[nn.Module], Any]) -> nn.Module:
    """Wrap each module that holds weights of its own and no other module, but for those that share theirs."""
    weights = [weight for _, weight in model.named_parameters(remove_duplicate=False)]
    shared = {id(weight) for weight in weights if sum(other is weight for other in weights) > 1}
    for holder in list(model.modules()):
        for attribute, module in list(holder.named_children()):
            own = [id(weight) for weight in module.parameters()]
            if own and not list(module.children()) and not shared.intersection(own):
                setattr(holder, attribute, wrap(module))
    return model


def ddp(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group())


def fsdp1(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return FullyShardedDataParallel(
        module, process_group=mesh.get_group(), use_orig_params=True, device_id=torch.device("cpu")
    )


def fsdp2(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(module, mesh=mesh)  # type: ignore[return-value]


Wrap = Callable[[nn.Module, DeviceMesh], nn.Module]
WRAPPERS: dict[str, Wrap] = {
    "compiled": lambda model, mesh: compiled(model),
    "compiled in place": lambda model, mesh: layers(model, lambda block: (block.compile(), block)[1]),
    "compiled layers": lambda model, mesh: layers(model, compiled),
    "compiled leaves": lambda model, mesh: leaves(model, compiled),
    "checkpointed": lambda model, mesh: checkpoint_wrapper(model),
    "checkpointed layers": lambda model, mesh: layers(model, checkpoint_wrapper),
    "DDP": ddp,
    "DDP of compiled": lambda model, mesh: ddp(compiled(model), mesh),
    "compiled DDP of checkpointed layers": lambda model, mesh: compiled(ddp(layers(model, checkpoint_wrapper), mesh)),
    "FSDP1": fsdp1,
    "FSDP1 of layers": lambda model, mesh: fsdp1(layers(model, lambda block: fsdp1(block, mesh)), mesh),
    "compiled FSDP1 of checkpointed, compiled layers": lambda model, mesh: compiled(
        fsdp1(layers(model, lambda block: fsdp1(checkpoint_wrapper(compiled(block)), mesh)), mesh)
    ),
    "FSDP2": fsdp2,
    "FSDP2 of layers": lambda model, mesh: fsdp2(layers(model, lambda block: fsdp2(block, mesh)), mesh),
    "FSDP2 of leaves": lambda model, mesh: fsdp2(leaves(model, lambda leaf: fsdp2(leaf, mesh)), mesh),
    "compiled FSDP2 of compiled, checkpointed layers": lambda model, mesh: compiled(
        fsdp2(layers(model, lambda block: fsdp2(compiled(checkpoint_wrapper(block)), mesh)), mesh)
    ),
}


def described(model: nn.Module) -> Routing:
    """By a parameter's name: its role, rule and view."""
    return {
        name: (group["role"], group["rule"], str(group["view"]))
        for group in route(model, RECIPE)
        for name in group["param_names"]
    }


def classes(model: nn.Module) -> set[str]:
    return {class_name(module) for module in model.modules()}


def routed(mesh: DeviceMesh, wrapper: str) -> dict[str, tuple[list[str], set[str], Routing]]:
    """By model: the names of its parameters once it is wrapped, those of its modules' classes, and how it is routed."""
    found = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = WRAPPERS[wrapper](make(), mesh)
        names = [parameter for parameter, _ in nn.Module.named_parameters(model)]
        found[name] = names, classes(model), described(model)
    return found
