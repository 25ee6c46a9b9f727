"""A model on a device mesh: FSDP2, with replicas, tensor parallelism and expert parallelism where the mesh has them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from symdist.tools.models.build import blocks
from symdist.tools.models.dimensions import Dimensions, dimensions
from symdist.tools.models.expert_parallel import check_experts, split_experts, stacked_experts
from symdist.tools.models.pieces import lay_out
from symdist.tools.models.tensor_parallel import check_tensors, split_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers' model types whose forward is known to be right on cut weights; the tests hold each of them to that.
_KNOWN = {"deepseek_v3", "gemma3_text", "gpt_oss", "olmoe", "qwen3", "qwen3_moe"}


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    policy: MixedPrecisionPolicy | None = None,
    layouts_only: bool = False,
) -> PreTrainedModel:
    """Shard a model in place over a mesh whose dimensions have some of these names, in this order.

    - `dp_replicate`: groups that each hold the whole model between them.
    - `dp_shard`: FSDP2, by decoder layer and the rest.
    - `ep`: routed experts, each rank some of them; to every other weight it is more of `dp_shard`.
    - `tp`: attention and feed-forward by heads and columns, embedding and head by vocabulary. Stacked experts,
      routers and norms stay whole there.

    A mesh of one dimension with any other name, or none, is `dp_shard`. The ranks of `tp` take the same tokens, all
    others their own, and the gradient is that of the mean of their losses.

    Nothing is sent: each rank keeps its pieces of the weights it has, which must be alike on all ranks, so build with
    `seed`, or on the meta device. Weights drawn later must come out alike where ranks hold the same piece. With one
    seed on all ranks DTensor sees to that on GPUs; on CPUs, where it does not, no seed is right under `tp`.

    Args:
        model: built by `build`, on the mesh's kind of device or on `"meta"`.
        mesh: over all the ranks that train the model.
        policy: FSDP2's mixed precision.
        layouts_only: place the weights only to look at where they lie. The forward need not be right, so any family
            may be split, and sizes may be uneven.

    Raises:
        ValueError: a mesh dimension has another name or place; `tp` does not divide heads or a cut weight, or `ep`
            the experts; a dense model has `ep`; the model's family is not known to run under `tp` or `ep`; a policy is
            given for a mesh without data parallelism.
    """
    parts = dimensions(mesh)
    policy = policy or MixedPrecisionPolicy()
    _check(model, parts, policy, layouts_only=layouts_only)
    if parts.ep is not None:
        split_experts(model, parts.ep, dtype=policy.param_dtype if parts.experts is None else None)
    if parts.tp is not None:
        split_tensors(model, parts.tp)
    if layouts_only:
        _lay_out(model, parts)
    else:
        _share(model, parts, policy)
    return model


def check_sizes(model: PreTrainedModel, *, ep: int = 1, tp: int = 1) -> None:
    """ValueError, with the reason, where a model, which may be on the meta device, does not run under `ep` and `tp`."""
    _check_sizes(model, ep=ep, tp=tp, layouts_only=False)


def _check(model: PreTrainedModel, parts: Dimensions, policy: MixedPrecisionPolicy, *, layouts_only: bool) -> None:
    """Refuse before anything is placed."""
    if parts.weights is None and policy != MixedPrecisionPolicy():
        raise ValueError("mixed precision comes with FSDP2, and the mesh has only tp: add a dp_shard of size 1 to it")
    ep, tp = (1 if part is None else part.size() for part in (parts.ep, parts.tp))
    _check_sizes(model, ep=ep, tp=tp, layouts_only=layouts_only)


def _check_sizes(model: PreTrainedModel, *, ep: int, tp: int, layouts_only: bool) -> None:
    for name, size in (("ep", ep), ("tp", tp)):
        if size > 1 and model.config.model_type not in _KNOWN and not layouts_only:
            raise ValueError(
                f"{model.config.model_type} is not known to run under {name}={size}, "
                f"only {', '.join(sorted(_KNOWN))}: use a mesh without {name}"
            )
    if ep > 1:
        check_experts(model, ep, even=not layouts_only)
    if tp > 1 and not layouts_only:
        check_tensors(model, tp)


def _share(model: PreTrainedModel, parts: Dimensions, policy: MixedPrecisionPolicy) -> None:
    """FSDP2 for what `ep` and `tp` have left on each rank."""
    elsewhere: set[nn.Parameter] = set()
    if parts.ep is not None:
        # The layer around them has cast what goes in, and the routers' weights are to stay as they are.
        inner = dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)
        for experts in stacked_experts(model):
            if parts.experts is not None:
                _share_module(experts, parts.experts, inner, split=parts.ep.size())
            elsewhere |= set(experts.parameters())
    if parts.weights is not None:
        for module in (*blocks(model), model):
            _share_module(module, parts.weights, policy, elsewhere=elsewhere)


def _share_module(
    module: nn.Module,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    *,
    elsewhere: set[nn.Parameter] | None = None,
    split: int = 1,
) -> None:
    """FSDP2 for a module's parameters, except those `elsewhere`; their first dimension is split in `split` already."""
    if mesh.mesh_dim_names == ("dp_replicate",):
        # Not public, but what FSDP2 itself becomes where there is nothing to shard over.
        from torch.distributed._composable.replicate_with_fsdp import replicate

        replicate(module, mesh=mesh, mp_policy=policy, ignored_params=elsewhere)
    else:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=policy,
            shard_placement_fn=lambda parameter: Shard(_cut_dim(parameter, mesh, split)),
            ignored_params=elsewhere,
        )


def _lay_out(model: PreTrainedModel, parts: Dimensions) -> None:
    """What `_share` does to the parameters, without the modules that would gather them."""
    experts = set(stacked_experts(model)) if parts.ep is not None else set()

    def choose(module: nn.Module, parameter: nn.Parameter) -> tuple[DeviceMesh, int] | None:
        mesh, split = parts.weights, 1
        if parts.ep is not None and module in experts:
            mesh, split = parts.experts, parts.ep.size()
        return None if mesh is None else (mesh, _cut_dim(parameter, mesh, split))

    lay_out(model, choose)


def _cut_dim(parameter: nn.Parameter, mesh: DeviceMesh, split: int) -> int:
    """The dimension to cut over data-parallel ranks, of a parameter whose first is split in `split` already."""
    ranks = mesh.size(mesh.ndim - 1)
    # More ranks than experts: within the experts, or most ranks would hold nothing.
    return int(split > 1 and parameter.shape[0] < split * ranks and parameter.shape[1] % ranks == 0)
