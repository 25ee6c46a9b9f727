"""Shards a model on a device mesh: FSDP2, replicas, tensor parallelism and expert parallelism."""

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

# Model types of transformers whose forward is known to be correct on split weights; the tests check each of them.
_KNOWN = {"deepseek_v3", "gemma3_text", "gpt_oss", "olmoe", "qwen3", "qwen3_moe"}


def shard(
    model: PreTrainedModel,
    mesh: DeviceMesh,
    *,
    policy: MixedPrecisionPolicy | None = None,
    layouts_only: bool = False,
) -> PreTrainedModel:
    """Shard a model in place over a device mesh. All ranks of the mesh must call it.

    The names of the mesh dimensions say how they are used. They are some of these, in this order:

    - `dp_replicate`: replicas of the model.
    - `dp_shard`: FSDP2, which wraps each decoder layer and the rest of the model.
    - `ep`: expert parallelism; each rank holds some of the routed experts. All other weights are sharded over it as
      over `dp_shard`.
    - `tp`: tensor parallelism; attention and feed-forward are split by heads and columns, embedding and head by
      vocabulary. Stacked experts, routers and most norms are not split.

    A one-dimensional mesh with another name, or without a name, is taken as `dp_shard`. Ranks of the same `tp` group
    must get the same tokens, all others different ones; the gradient is that of the mean of their losses.

    No weights are sent: each rank keeps its pieces of the weights it has. They must be equal on all ranks, so build the
    model with `seed` or on the meta device. Weights drawn after sharding must be equal wherever ranks hold the same
    piece. On GPUs, DTensor ensures this if all ranks use the same seed. On CPUs it does not, and under `tp` no choice
    of seeds is right.

    Args:
        model: A model made by `build`, on the mesh's kind of device or on `"meta"`.
        mesh: A mesh over all ranks that train the model.
        policy: FSDP2's mixed precision; None (default) for no mixed precision.
        layouts_only: Only place the weights, to inspect their layouts, without a forward that works. Any model family
            and uneven sizes are then allowed. False by default.

    Returns:
        The same model.

    Raises:
        ValueError: If a mesh dimension has another name or position, `tp` does not divide the heads or a weight, `ep`
            does not divide the experts, a dense model is used with `ep`, the model's family is not known to run under
            `tp` or `ep`, or a policy is given for a mesh without data parallelism.

    Example:
        >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp_replicate", "dp_shard"))
        >>> model = shard(build("olmoe-1b-7b", device="meta"), mesh)
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
    """Check that a model runs under expert and tensor parallelism of given sizes.

    Args:
        model: The model; it may be on the meta device.
        ep: The number of ranks of expert parallelism; 1 (default) for none.
        tp: The number of ranks of tensor parallelism; 1 (default) for none.

    Raises:
        ValueError: If it does not, with the reason.
    """
    _check_sizes(model, ep=ep, tp=tp, layouts_only=False)


def _check(model: PreTrainedModel, parts: Dimensions, policy: MixedPrecisionPolicy, *, layouts_only: bool) -> None:
    """Check everything before any parameter is changed."""
    if parts.weights is None and policy != MixedPrecisionPolicy():
        raise ValueError(
            "policy asks for mixed precision, which FSDP2 provides, but the mesh has only tp: add a dp_shard of size 1 "
            "to it"
        )
    ep, tp = (1 if part is None else part.size() for part in (parts.ep, parts.tp))
    _check_sizes(model, ep=ep, tp=tp, layouts_only=layouts_only)


def _check_sizes(model: PreTrainedModel, *, ep: int, tp: int, layouts_only: bool) -> None:
    for name, size in (("ep", ep), ("tp", tp)):
        if size > 1 and model.config.model_type not in _KNOWN and not layouts_only:
            raise ValueError(
                f"{model.config.model_type} is not known to be correct under {name}={size}, only "
                f"{', '.join(sorted(_KNOWN))}: use a mesh without {name}"
            )
    if ep > 1:
        check_experts(model, ep, even=not layouts_only)
    if tp > 1 and not layouts_only:
        check_tensors(model, tp)


def _share(model: PreTrainedModel, parts: Dimensions, policy: MixedPrecisionPolicy) -> None:
    """Apply FSDP2 to what `ep` and `tp` have left on each rank."""
    elsewhere: set[nn.Parameter] = set()
    if parts.ep is not None:
        # The enclosing layer has cast the inputs already, and the routing weights must keep their dtype.
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
    """Apply FSDP2 to a module's parameters, except those in `elsewhere`.

    `split` is the number of ranks that their first dimension has been divided among already.
    """
    if mesh.mesh_dim_names == ("dp_replicate",):
        # A private API: FSDP2 for meshes with nothing but replicas.
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
    """Shard the parameters as `_share` does, but without the hooks that would gather them."""
    experts = set(stacked_experts(model)) if parts.ep is not None else set()

    def choose(module: nn.Module, parameter: nn.Parameter) -> tuple[DeviceMesh, int] | None:
        mesh, split = parts.weights, 1
        if parts.ep is not None and module in experts:
            mesh, split = parts.experts, parts.ep.size()
        return None if mesh is None else (mesh, _cut_dim(parameter, mesh, split))

    lay_out(model, choose)


def _cut_dim(parameter: nn.Parameter, mesh: DeviceMesh, split: int) -> int:
    """Return the dimension along which to shard a parameter over data-parallel ranks.

    `split` is the number of ranks that its first dimension has been divided among already.
    """
    ranks = mesh.size(mesh.ndim - 1)
    # With more ranks than experts, shard within each expert, since otherwise most ranks would hold nothing.
    return int(split > 1 and parameter.shape[0] < split * ranks and parameter.shape[1] % ranks == 0)
