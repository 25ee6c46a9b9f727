"""What ranks run for the tests of parallel models."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from symdist.layouts import local
from symdist.tools.models import build, shard

Mesh = dict[str, int]
Settings = dict[str, Any]
# Loss, and full weights and gradients by name.
Trained = tuple[float, dict[str, Tensor], dict[str, Tensor]]

SMALL: Settings = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
DENSE: Settings = SMALL | {"head_dim": 8, "intermediate_size": 32}
# transformers' grouped products know no float64.
EXPERTS: Settings = SMALL | {"experts_implementation": "eager"}
LATENT: Settings = {
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
}
WINDOWS: Settings = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Settings] = {
    "deepseek-v3-tiny": EXPERTS | LATENT,
    "gemma3-tiny": DENSE | WINDOWS,
    "gpt-oss-tiny": EXPERTS | WINDOWS | {"head_dim": 8, "intermediate_size": 16},
    "olmoe-tiny": EXPERTS | {"intermediate_size": 16},
    "qwen3-moe-tiny": EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16},
    "qwen3-tiny": DENSE,
}


def small(name: str, *, favoured: bool = False, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A small model of the family, the same weights wherever it is built.

    No two weights are alike, and the ones and zeros of norms and biases are gone: they would hide which is whose.
    `favoured` gives the first two experts of gpt-oss all tokens.
    """
    model = build(name, overrides=MODELS[name] | changes, dtype=dtype, seed=1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
            if favoured and key.endswith("router.bias"):
                parameter[:2] += 50
    return model


def batch() -> Tensor:
    """Eight sequences of ten tokens."""
    return torch.randint(48, (8, 10), generator=torch.Generator().manual_seed(0))


def mesh_of(shape: Mesh) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))


def share(mesh: DeviceMesh) -> Tensor:
    """The sequences of this rank; ranks of `tp` have the same."""
    ranks, index = 1, 0
    for name in (name for name in mesh.mesh_dim_names or () if name != "tp"):
        size = mesh[name].size()
        ranks, index = ranks * size, index * size + mesh.get_local_rank(name)
    return batch().chunk(ranks)[index]


def backward(model: nn.Module, tokens: Tensor) -> float:
    """The loss, after one backward."""
    logits = model(input_ids=tokens[:, :-1]).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def alone(name: str, **settings: Any) -> Trained:
    """Loss, weights and gradients of the model that is nowhere sharded."""
    return trained(small(name, **settings), batch())


def together(
    world: DeviceMesh,
    name: str,
    shape: Mesh,
    settings: Settings,
    policy: MixedPrecisionPolicy | None = None,
    checkpointing: bool = False,
) -> Trained:
    """The same on a mesh, with this rank's loss on its share of the batch."""
    mesh = mesh_of(shape)
    model = shard(small(name, **settings), mesh, policy=policy)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return trained(model, share(mesh))


def trained(model: nn.Module, tokens: Tensor) -> Trained:
    weights = {key: full(parameter) for key, parameter in model.named_parameters()}
    loss = backward(model, tokens)
    return loss, weights, {key: full(parameter.grad) for key, parameter in model.named_parameters()}


def unequal(world: DeviceMesh, name: str) -> Tensor:
    """Logits where each rank has one sequence more than the one before."""
    mesh = mesh_of({"ep": 4})
    return shard(small(name), mesh)(input_ids=batch()[: mesh.get_rank() + 1]).logits.detach()


def filled(world: DeviceMesh, name: str, shape: Mesh) -> tuple[float, bool]:
    """Built on the meta device and drawn after sharding: the loss, and whether every weight got a finite gradient."""
    mesh = mesh_of(shape)
    model = shard(build(name, device="meta", overrides=MODELS[name]), mesh)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            local(tensor).fill_(1e6)
    torch.manual_seed(0)
    model.init_weights()
    loss = backward(model, share(mesh))
    return loss, all(p.grad is not None and bool(local(p.grad).isfinite().all()) for p in model.parameters())


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach().clone()
