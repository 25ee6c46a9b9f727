"""Megatron models whose full weights and gradients are given by name, cut here by what Megatron documents."""

import functools
import multiprocessing
import random
import re
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from typing import Any

from launch.engines.megatron import on_cpu
from tests.processes import end_with_parent
from tests.symdist_megatron import kernels
from tests.symdist_megatron.how import How

kernels.install()
on_cpu.install()

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.symdist_megatron.kinds import SETTINGS, config_class, model_of, rows
from torch import Tensor, nn

Full = dict[str, Tensor]


def build(how: How, extend: Callable[[Any, Any], None] | None = None) -> tuple[TransformerConfig, list[Any]]:
    """The configuration and this rank's model chunks, in DistributedDataParallel, with the weights of `full`.

    `extend` puts more into the model, of which the weights stay as they are.
    """
    dtype = getattr(torch, how.dtype)
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=how.tp,
        pipeline_model_parallel_size=how.pp,
        expert_model_parallel_size=how.ep,
        expert_tensor_parallel_size=how.etp,
    )
    moe = how.moe if how.moe is not None else tuple(i % 2 for i in range(how.layers))
    config = config_class(how)(
        num_layers=how.layers,
        hidden_size=how.hidden,
        num_attention_heads=how.heads,
        num_query_groups=how.groups,
        kv_channels=how.kv_channels,
        ffn_hidden_size=how.ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=how.tp,
        pipeline_model_parallel_size=how.pp,
        expert_model_parallel_size=how.ep,
        expert_tensor_parallel_size=how.etp,
        sequence_parallel=how.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        num_moe_experts=how.experts if any(moe) else None,
        moe_layer_freq=list(moe),
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=how.grouped,
        moe_aux_loss_coeff=0.0,
        moe_router_load_balancing_type="none",
        moe_ffn_hidden_size=how.ffn // 2 if any(moe) else None,
        moe_shared_expert_intermediate_size=how.ffn if how.shared else None,
        mtp_num_layers=how.mtp or None,
        **({"moe_use_legacy_grouped_gemm": True} if how.grouped else {}),
        **SETTINGS[how.kind],
    )
    model = model_of(
        config,
        how,
        first=parallel_state.is_pipeline_first_stage(),
        last=parallel_state.is_pipeline_last_stage(),
    )
    if dtype == torch.float64:
        model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full_name = name_of(name, model)
            full = weight(full_name, full_shape(full_name, parameter, config))
            parameter.copy_(part_of(full_name, full, config).reshape(parameter.shape))
    if extend is not None:
        extend(config, model)
    if dtype == torch.bfloat16:
        model = Float16Module(config, model)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype == torch.bfloat16,
        use_distributed_optimizer=how.distributed,
        overlap_grad_reduce=how.overlap,
        overlap_param_gather=how.overlap and how.distributed,
        bucket_size=how.bucket,
    )
    return config, [DistributedDataParallel(config, ddp, model)]


def keep_written_results() -> None:
    """Start the process in which Megatron's writers leave their results, one that ends with this one."""
    if filesystem_async._results_queue is None:
        # What a daemon may not do.
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()


def optimizer_config(how: How, **more: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{
            "optimizer": "symdist",
            "lr": None,
            "weight_decay": 0.0,
            "clip_grad": 0.0,
            "bf16": how.dtype == "bfloat16",
            "params_dtype": getattr(torch, how.dtype),
            "use_distributed_optimizer": how.distributed,
            "overlap_param_gather": how.overlap and how.distributed,
            **more,
        }
    )


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers that bfloat16 has."""
    return _drawn(key, shape).clone()


@functools.cache
def _drawn(key: str, shape: tuple[int, ...]) -> Tensor:
    source = random.Random(key)
    return torch.tensor([source.randint(-15, 15) / 64 for _ in range(torch.Size(shape).numel())]).view(shape).double()


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    return draw(f"weight {name}", shape)


def name_of(name: str, model: nn.Module) -> str:
    """A parameter's name in the whole model: layers and experts by their numbers there."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    if name == "output_layer.weight" and any(
        getattr(each, "share_embeddings_and_output_weights", False) for each in model.modules()
    ):
        return "embedding.word_embeddings.weight"
    for module_name, module in model.named_modules():
        if re.fullmatch(r"(module\.)*decoder\.layers\.\d+", module_name):
            here = re.sub(r"^(module\.)*", "", module_name)
            if name.startswith(here + "."):
                name = f"decoder.layers.{module.layer_number - 1}{name.removeprefix(here)}"
                break
    if found := re.search(r"local_experts\.(\d+)\.", name):
        experts = next(m for n, m in model.named_modules() if n.endswith("mlp.experts"))
        first = parallel_state.get_expert_model_parallel_rank() * len(experts.local_experts)
        name = name.replace(found[0], f"local_experts.{first + int(found[1])}.")
    return name


def full_shape(name: str, parameter: Tensor, config: TransformerConfig) -> tuple[int, ...]:
    """Of what this rank's `parameter` is a part of."""
    hidden = config.hidden_size
    if name.endswith("experts.weight1"):
        return config.num_moe_experts, hidden, 2 * config.moe_ffn_hidden_size
    if name.endswith("experts.weight2"):
        return config.num_moe_experts, config.moe_ffn_hidden_size, hidden
    ranks = _ranks(name)[1]
    if _rows(name):
        return parameter.shape[0] * ranks, *parameter.shape[1:]
    return (parameter.shape[0], parameter.shape[1] * ranks) if _columns(name) else tuple(parameter.shape)


def part_of(name: str, full: Tensor, config: TransformerConfig) -> Tensor:
    """This rank's part of a full weight, or of anything like it."""
    rank, ranks = _ranks(name)
    if "experts.weight" in name:
        count = config.num_moe_experts // config.expert_model_parallel_size
        full = full[parallel_state.get_expert_model_parallel_rank() * count :][:count]
    if name.endswith("experts.weight1"):
        return torch.cat([half.chunk(ranks, 2)[rank] for half in full.chunk(2, 2)], 2)
    if name.endswith("experts.weight2"):
        return full.chunk(ranks, 1)[rank]
    if sections := rows(name, config):
        return torch.cat([part.chunk(ranks)[rank] for part in full.split([size for size, _ in sections])])
    if "linear_fc1" in name:
        return torch.cat([half.chunk(ranks)[rank] for half in full.chunk(2)])
    if _rows(name):
        return full.chunk(ranks)[rank]
    return full.chunk(ranks, 1)[rank] if _columns(name) else full


def parameters(chunks: list[Any], config: TransformerConfig) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Every parameter of this rank by its name in the whole model, and the full shape."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            full_name = name_of(name, chunk)
            yield full_name, parameter, full_shape(full_name, parameter, config)


def _ranks(name: str) -> tuple[int, int]:
    if ".experts." in name:
        return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


# Of a model's own modules: which weights tensor parallelism cuts along rows, and which along columns.
_CUT_ROWS = (
    r"word_embeddings|output_layer|linear_qkv|linear_fc1|linear_(q|[qkv]_up|kv_up|q_down)_proj|eh_proj|in_proj|conv1d|"
    r"A_log|dt_bias|mixer\.D$|mixer\.norm|softmax_offset"
)
_CUT_COLUMNS = r"\.linear_proj|linear_fc2|out_proj"


def _rows(name: str) -> bool:
    return bool(re.search(_CUT_ROWS, name))


def _columns(name: str) -> bool:
    return bool(re.search(_CUT_COLUMNS, name))
