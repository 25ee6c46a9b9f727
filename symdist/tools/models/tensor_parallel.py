"""Tensor parallelism for decoders: how each weight is split, and what keeps the gradients right.

Between the split layers, all ranks of `tp` have the same activations, as plain tensors. The layers there (layer norms,
routers, stacked experts, latent projections) are computed alike on all ranks from whole weights that are not part of
`tp`. DTensor sums the gradients that leave a split layer, so the gradients of these layers are complete, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from symdist.tools.models.build import blocks
from symdist.tools.models.pieces import cut_parameters
from symdist.tools.models.stand_in import forward_with

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEED_FORWARD = ("mlp", "mlp.shared_experts")
_COLUMNS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj")),
    *(f"{place}.{name}" for place in _FEED_FORWARD for name in ("gate_proj", "up_proj")),
)
_ROWS = ("self_attn.o_proj", *(f"{place}.down_proj" for place in _FEED_FORWARD))


def check_tensors(model: PreTrainedModel, tp: int) -> None:
    """Check that the forward works on split weights.

    Args:
        model: The model; it may be on the meta device.
        tp: The number of ranks of tensor parallelism.

    Raises:
        ValueError: If `tp` does not divide the number of heads or the rows or columns of a weight, or OLMoE's
            `clip_qkv` is set.
    """
    if getattr(model.config, "clip_qkv", None) is not None:
        raise ValueError(
            f"{model.config.model_type}: clip_qkv clamps in place, which tensors on tp={tp} do not allow: "
            "leave clip_qkv out, or use a mesh without tp"
        )
    sizes = {
        "the number of attention heads": model.config.num_attention_heads,
        "the number of key/value heads": model.config.num_key_value_heads,
        "the vocabulary": cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0],
    }
    for block in blocks(model):
        for name, style in _plan(block).items():
            if isinstance(style, ColwiseParallel | RowwiseParallel):
                weight = cast(nn.Linear, block.get_submodule(name)).weight
                sizes[f"the width of {name}"] = weight.shape[isinstance(style, RowwiseParallel)]
        for quantity, size in sizes.items():
            if size % tp:
                raise ValueError(
                    f"{model.config.model_type}: tp={tp} does not divide {quantity}, {size}: "
                    "use a tp that does, or more of dp_shard instead"
                )


def split_tensors(model: PreTrainedModel, tp: DeviceMesh) -> None:
    """Split the weights of a model over the ranks of `tp`, in place. Each rank keeps its piece of the weights it has.

    Args:
        model: The model, with equal weights on all ranks.
        tp: The mesh of tensor parallelism.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = embedding.weight is head.weight
    parallelize_module(embedding, tp, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
    parallelize_module(head, tp, ColwiseParallel(), src_data_rank=None)
    head.register_forward_hook(lambda module, inputs, logits: _Gathered.apply(logits, tp))
    if tied:
        head.weight = embedding.weight
    # DTensor leaves the gradient of an embedding whole on every rank. FSDP2 would shard it, but is not always used.
    cast(nn.Parameter, embedding.weight).register_post_accumulate_grad_hook(_cut_gradient)
    for block in blocks(model):
        parallelize_module(block, tp, _plan(block), src_data_rank=None)


def _plan(block: nn.Module) -> dict[str, ParallelStyle]:
    """Return the parallel styles of a decoder layer's modules, by name."""
    modules = dict(block.named_modules())
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in _COLUMNS if name in modules}
    plan |= {name: RowwiseParallel() for name in _ROWS if name in modules}
    attention = modules.get("self_attn")
    if attention is None:
        return plan
    for name in ("self_attn.q_norm", "self_attn.k_norm"):
        if name in modules:
            per_head = cast(Tensor, modules[name].weight).shape == (attention.head_dim,)
            plan[name] = _HeadNorm() if per_head else _WideNorm()
    if "sinks" in attention._parameters:
        plan["self_attn"] = _Sinks()
    if "self_attn.kv_a_proj_with_mqa" in modules:
        plan["self_attn.kv_a_proj_with_mqa"] = _Latent(cast(int, attention.kv_lora_rank))
    return plan


def _cut_gradient(weight: Tensor) -> None:
    """Shard the gradient of a split weight like the weight."""
    weight.grad = cast(DTensor, weight.grad).redistribute(placements=cast(DTensor, weight).placements)


class _HeadNorm(ParallelStyle):
    """A norm that applies the same weight to every head: whole on each rank, its gradient summed over the ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        forward_with(module, lambda: {"weight": _summed(cast(Tensor, module.weight), device_mesh)})
        return module


class _WideNorm(ParallelStyle):
    """A norm over all heads together: its weight is split with the heads, and its mean is taken over all ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return tuple(DTensor.from_local(x, mesh, [Shard(-1)], run_check=False) for x in inputs)

        def leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
            return output.redistribute(placements=[Shard(-1)]).to_local()

        cut_parameters(module, device_mesh)
        return distribute_module(module, device_mesh, input_fn=enter, output_fn=leave)


class _Sinks(ParallelStyle):
    """Attention with one sink per head; the sinks are split with the heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        cut_parameters(module, device_mesh)
        forward_with(module, lambda: {"sinks": cast(DTensor, module.sinks).to_local()})
        return module


class _Latent(ParallelStyle):
    """The projection to the latent of keys and values, and to a rotary key that all heads share.

    The latent is the input of a split layer, which sums its gradient. The rotary key is used on each rank for that
    rank's heads only, so its gradient must be summed here.
    """

    def __init__(self, latent: int):
        super().__init__()
        self.latent = latent

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def leave(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return torch.cat([output[..., : self.latent], _summed(output[..., self.latent :], device_mesh)], dim=-1)

        module.register_forward_hook(leave)
        return module


class _Gathered(torch.autograd.Function):
    """Concatenates the pieces of the last dimension on every rank; all ranks compute alike from there on.

    Used instead of DTensor, which returns a view: FSDP2 warns of views as outputs of a model.
    """

    @staticmethod
    def forward(ctx: Any, piece: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        pieces = [torch.empty_like(piece, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
        dist.all_gather(pieces, piece.contiguous(), group=mesh.get_group())
        return torch.cat(pieces, dim=-1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.chunk(ctx.mesh.size(), dim=-1)[ctx.mesh.get_local_rank()], None


def _summed(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return the same tensor, with its gradient summed over the ranks of the mesh."""
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
