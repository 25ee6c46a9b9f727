"""The Megatron counterpart of a preset's model: its configuration, its modules on this rank, and their wrappers."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch import Tensor, nn
from torch.nn import functional

from launch.engines.megatron.config import MegatronRun
from launch.engines.megatron.shape import Shape
from launch.engines.megatron.weights import take_weights

TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
"""Whether layers are Transformer Engine's, which has kernels for the experts' grouped matmuls, or else torch's."""


def transformer_config(shape: Shape, run: MegatronRun, dtype: torch.dtype) -> TransformerConfig:
    """Return Megatron's configuration of a model.

    Auxiliary losses have the same weight as in the other jobs: those average them over layers while Megatron sums, so
    the weights are divided by the number of layers with experts.

    Args:
        shape: The model's sizes.
        run: The run's configuration.
        dtype: The parameters' dtype.
    """
    normal = init_method_normal(shape.deviation)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.groups,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=shape.epsilon,
        qk_layernorm=shape.head_norms,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=normal,
        output_layer_init_method=normal,
        use_cpu_initialization=not torch.cuda.is_available(),
        tensor_model_parallel_size=run.tensor_parallel,
        pipeline_model_parallel_size=run.pipeline_parallel,
        expert_model_parallel_size=run.expert_parallel,
        expert_tensor_parallel_size=run.expert_tensor,
        sequence_parallel=run.tensor_parallel > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **(_experts(shape, run) if shape.experts else {}),
    )


def build_chunk(
    shape: Shape, run: MegatronRun, dtype: torch.dtype, *, vocabulary: int, whole: Callable[[], Any] | None
) -> DistributedDataParallel:
    """Build this rank's part of the model, wrapped in DistributedDataParallel, on its device; all ranks must call it.

    Args:
        shape: The model's sizes.
        run: The run's configuration.
        dtype: The parameters' dtype.
        vocabulary: Number of token ids, without padding.
        whole: Makes the whole transformers model from which the initial weights are taken; if None, every rank
            initializes its own part.

    Raises:
        ValueError: If tensor parallelism is used on GPUs without Transformer Engine.
    """
    if run.tensor_parallel > 1 and torch.cuda.is_available() and not TRANSFORMER_ENGINE:
        raise ValueError(
            f"--tensor-parallel {run.tensor_parallel} needs the norms of Transformer Engine, since torch's do not "
            "support sequence parallelism: pip install 'transformer-engine[pytorch]', or leave the option out"
        )
    # Pipeline stages need different seeds; within a stage, replicated weights need the same seed on all ranks, and
    # Megatron itself varies the seed of split weights.
    torch.manual_seed(run.seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(run.seed)
    config = transformer_config(shape, run, dtype)
    model: Any = GPTModel(
        config,
        get_gpt_decoder_block_spec(config, use_transformer_engine=TRANSFORMER_ENGINE),
        run.padded(vocabulary),
        run.sequence,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.theta,
    )
    if whole is not None:
        # Megatron initializes first all the same, because only then does it mark how each weight is split.
        take_weights(model, whole(), shape)
    _leave_out_padding(model, vocabulary)
    model.cuda()
    if dtype == torch.bfloat16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype == torch.bfloat16,
        use_distributed_optimizer=run.distributed_optimizer,
        overlap_grad_reduce=run.overlap,
        overlap_param_gather=run.overlap,
    )
    chunk = DistributedDataParallel(config, ddp, model)
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = chunk.no_sync if run.overlap else None
    return chunk


def bare(model: nn.Module) -> Any:
    """Return the GPTModel inside its wrappers."""
    while not isinstance(model, GPTModel):
        model = model.module  # type: ignore[assignment]
    return model


def count_parameters(model: nn.Module, *, padding: int) -> tuple[int, int]:
    """Count this rank's parameters so that the sum over all ranks counts every parameter of the model once.

    Args:
        model: This rank's part of the model.
        padding: Number of rows that only pad the vocabulary, which are not counted.

    Returns:
        The number of all parameters, and of those in experts.
    """
    tensor, data = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    total = of_experts = 0
    module = bare(model)
    copied = module.shared_embedding_or_output_weight() if not module.pre_process and module.post_process else None
    for name, parameter in module.named_parameters():
        if parameter is copied and module.share_embeddings_and_output_weights:
            continue
        if ".experts." in name:
            counted = parallel_state.get_expert_data_parallel_rank() == 0
            of_experts += counted * parameter.numel()
        else:
            counted = data == 0 and (tensor == 0 or bool(getattr(parameter, "tensor_model_parallel", False)))
        total += counted * parameter.numel()
        if counted and tensor == 0 and any(word in name for word in ("word_embeddings", "output_layer")):
            total -= padding * parameter.shape[1]
    return total, of_experts


def _experts(shape: Shape, run: MegatronRun) -> dict[str, Any]:
    layers = sum(shape.moe_layers)
    return {
        "num_moe_experts": shape.experts,
        "moe_layer_freq": [int(moe) for moe in shape.moe_layers],
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_router_topk": shape.top_k,
        "moe_router_pre_softmax": not shape.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss" if run.aux_loss else "none",
        "moe_aux_loss_coeff": run.aux_loss / layers,
        "moe_z_loss_coeff": run.z_loss / layers if run.z_loss else None,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": TRANSFORMER_ENGINE,
    }


def _leave_out_padding(model: Any, vocabulary: int) -> None:
    """Mask the logits of padding rows, since Megatron's cross-entropy would count them."""
    if not model.post_process:
        return
    rows = model.output_layer.output_size_per_partition
    real = vocabulary - parallel_state.get_tensor_model_parallel_rank() * rows
    if real >= rows:
        return
    padding = torch.arange(rows) >= real
    model.output_layer.register_forward_hook(partial(_masked, padding))


def _masked(padding: Tensor, module: nn.Module, inputs: Any, outputs: Any) -> Any:
    logits, bias = outputs
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(padding.to(logits.device), lowest), bias
