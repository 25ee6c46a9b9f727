"""Initial weights that are the same at any layout: each rank takes its part of a whole transformers model."""

import re
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional

from launch.engines.megatron.shape import Shape

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"experts\.(?:local_experts\.(\d+)\.linear_fc([12])\.weight|linear_fc([12])\.weight(\d+))$")
_ROWS = ("word_embeddings", "output_layer", "linear_qkv", "linear_fc1")
_COLUMNS = ("linear_proj", "linear_fc2")


def take_weights(model: nn.Module, whole: Any, shape: Shape) -> None:
    """Copy this rank's part of a whole transformers model's weights into a Megatron model.

    Norms stay at one, which is also their initial value in transformers; rows that pad the vocabulary become zero.

    Args:
        model: This rank's part of the Megatron model.
        whole: The transformers model of the same preset.
        shape: The model's sizes.

    Raises:
        ValueError: If a parameter has no counterpart.
    """
    layers = {name: module for name, module in model.named_modules() if re.fullmatch(r"decoder\.layers\.\d+", name)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            layer = _LAYER.match(name)
            if layer is None:
                rows = whole.get_input_embeddings() if "embedding" in name else whole.get_output_embeddings()
                parts = _tensor_parallel()
                full = functional.pad(rows.weight, (0, 0, 0, parameter.shape[0] * parts[1] - rows.weight.shape[0]))
            else:
                number: Any = layers[layer[0].removesuffix(".")].layer_number
                block = whole.base_model.layers[number - 1]
                full = _of_layer(name.removeprefix(layer[0]), block, shape)
            parameter.copy_(_part(name, full))


def _of_layer(name: str, block: Any, shape: Shape) -> Tensor:
    """Return the whole weight of a layer in Megatron's layout."""
    attention, mlp = block.self_attn, block.mlp
    if name == "self_attention.linear_qkv.weight":
        # Megatron stores each group's queries, key and value next to each other.
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return torch.cat([part.weight.view(shape.groups, -1, shape.hidden) for part in parts], 1).flatten(0, 1)
    if name == "self_attention.linear_proj.weight":
        return attention.o_proj.weight
    if name == "mlp.router.weight":
        return (mlp.router if hasattr(mlp, "router") else mlp.gate).weight
    if name == "mlp.linear_fc1.weight":
        return torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    if name == "mlp.linear_fc2.weight":
        return mlp.down_proj.weight
    match = _EXPERT.search(name)
    if match is None:
        raise ValueError(
            f"{name} of the Megatron layer has no counterpart in the transformers model to copy initial weights from; "
            "give --initialize sharded"
        )
    experts_per_rank = shape.experts // parallel_state.get_expert_model_parallel_world_size()
    expert = parallel_state.get_expert_model_parallel_rank() * experts_per_rank + int(match[1] or match[4])
    if (match[2] or match[3]) == "2":
        down = mlp.experts.down_proj[expert]
        return down.T if _transposed(mlp.experts) else down
    fused = mlp.experts.gate_up_proj[expert]
    return torch.cat([fused[:, ::2], fused[:, 1::2]], 1).T if _transposed(mlp.experts) else fused


def _transposed(experts: Any) -> bool:
    """Return whether experts are stored as [in, out] with interleaved gate and up columns, as in gpt-oss."""
    return type(experts).__name__ == "GptOssExperts"


def _part(name: str, full: Tensor) -> Tensor:
    """Return this rank's tensor-parallel part of a weight."""
    if ".experts." in name:
        rank = parallel_state.get_expert_tensor_parallel_rank()
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
    else:
        rank, ranks = _tensor_parallel()
    if "linear_fc1" in name:
        return torch.cat([half.chunk(ranks)[rank] for half in full.chunk(2)])
    if any(word in name for word in _ROWS):
        return full.chunk(ranks)[rank]
    return full.chunk(ranks, 1)[rank] if any(word in name for word in _COLUMNS) else full


def _tensor_parallel() -> tuple[int, int]:
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
