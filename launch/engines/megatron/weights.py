"""First weights that are the same at any layout: drawn whole as transformers draws them, each rank taking its part."""

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
    """Give this rank's part of a Megatron model the weights of a whole model of transformers, of the same preset.

    Norms stay at one, as both have them; rows that fill up the vocabulary are zero. Raises ValueError for a parameter
    that has no counterpart.
    """
    layers = {name: module for name, module in model.named_modules() if re.fullmatch(r"decoder\.layers\.\d+", name)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            found = _LAYER.match(name)
            if found is None:
                rows = whole.get_input_embeddings() if "embedding" in name else whole.get_output_embeddings()
                parts = _tensor_parallel()
                full = functional.pad(rows.weight, (0, 0, 0, parameter.shape[0] * parts[1] - rows.weight.shape[0]))
            else:
                number: Any = layers[found[0].removesuffix(".")].layer_number
                block = whole.base_model.layers[number - 1]
                full = _of_layer(name.removeprefix(found[0]), block, shape)
            parameter.copy_(_part(name, full))


def _of_layer(name: str, block: Any, shape: Shape) -> Tensor:
    """A weight of a layer, whole and laid out as Megatron has it."""
    attention, mlp = block.self_attn, block.mlp
    if name == "self_attention.linear_qkv.weight":
        # Group by group: its queries, its key, its value.
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
    found = _EXPERT.search(name)
    if found is None:
        raise ValueError(
            f"the Megatron layer's {name} has no counterpart to take its first weights from; --initialize sharded"
        )
    here = shape.experts // parallel_state.get_expert_model_parallel_world_size()
    expert = parallel_state.get_expert_model_parallel_rank() * here + int(found[1] or found[4])
    if (found[2] or found[3]) == "2":
        down = mlp.experts.down_proj[expert]
        return down.T if _transposed(mlp.experts) else down
    fused = mlp.experts.gate_up_proj[expert]
    return torch.cat([fused[:, ::2], fused[:, 1::2]], 1).T if _transposed(mlp.experts) else fused


def _transposed(experts: Any) -> bool:
    """Whether experts are kept [in, out], with the columns of gate and up in turn, as gpt-oss has them."""
    return type(experts).__name__ == "GptOssExperts"


def _part(name: str, full: Tensor) -> Tensor:
    """What tensor parallelism leaves of a weight on this rank."""
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
