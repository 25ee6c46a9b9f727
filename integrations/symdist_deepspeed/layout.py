"""Reads which elements of which parameters lie in each tensor that DeepSpeed hands to the optimizer."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils.mixed_precision_linkage import link_hp_params
from torch import Tensor

from symdist.layouts import FlatLayout, Group, Layout, ascending
from symdist.layouts.flat import flat_bounds


@dataclass(frozen=True, kw_only=True)
class Block:
    """How a parameter cut by tensor parallelism lies on all ranks that hold some of it.

    Attributes:
        layout: The layout if ZeRO does not cut the parameter further.
        flat: The layout if ZeRO does; None otherwise.
    """

    layout: Layout
    flat: FlatLayout | None


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter, or this rank's elements of it, in an optimized tensor.

    If tensor parallelism cuts the parameter, `start` and `bounds` refer to this rank's block of it.

    Attributes:
        parameter: The model's parameter.
        ranks: The data-parallel ranks that hold it.
        start: The offset in the optimized tensor at which this rank's elements begin; 0 by default.
        bounds: Rank i of `ranks` holds the parameter's elements `bounds[i]` to `bounds[i + 1]`. None (default) if the
            optimized tensor is the parameter, the same on all `ranks`.
        block: The layout under tensor parallelism; None (default) if it does not cut the parameter.
    """

    parameter: Tensor
    ranks: Group
    start: int = 0
    bounds: tuple[int, ...] | None = None
    block: Block | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizedTensor:
    """A tensor that DeepSpeed hands to the optimizer.

    Attributes:
        tensor: The tensor.
        group: The index of its param group.
        parts: The parameters in it.
        publish: Copies its values to the weights that the model computes with. This is for tensors that DeepSpeed
            copies before the step has been taken. Does nothing by default.
    """

    tensor: Tensor
    group: int
    parts: list[Part]
    publish: Callable[[], None] = field(default=lambda: None)


def read_partitions(engine: Any) -> list[OptimizedTensor]:
    """Find the tensors that DeepSpeed hands to the optimizer, and the parameters in them.

    Args:
        engine: The DeepSpeed engine, after it has made its partitions.

    Returns:
        The tensors and what they hold.

    Raises:
        ValueError: If symdist cannot read the engine's optimizer wrapper. The message names it.
    """
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        pairs = [[(p, p) for p in group["params"]] for group in wrapper.param_groups]
        return _whole(engine, pairs)
    if type(wrapper) is FP16_UnfusedOptimizer:
        groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
        pairs = [list(zip(of_group, masters, strict=True)) for of_group, masters in groups]
        return _whole(engine, pairs)
    if type(wrapper) is DeepSpeedZeroOptimizer:
        return _stage_1_and_2(wrapper)
    if type(wrapper) is DeepSpeedZeroOptimizer_Stage3:
        return _stage_3(wrapper)
    if type(wrapper) is BF16_Optimizer:
        return _bf16(wrapper)
    raise ValueError(
        f"symdist cannot read {type(wrapper).__name__}, the optimizer wrapper that this DeepSpeed config selects. "
        "Use ZeRO stage 0, 1, 2 or 3, without features that replace its optimizer"
    )


def ranks_of(group: Any) -> Group:
    """Return the ranks of a process group.

    Args:
        group: The process group; None is all ranks.

    Returns:
        The ranks.

    Raises:
        ValueError: If the group does not number its ranks in ascending order.
    """
    return ascending(dist.group.WORLD if group is None else group)


def _whole(engine: Any, pairs: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> list[OptimizedTensor]:
    """Read stage 0: whole parameters or masters, on all data-parallel ranks (experts: on expert-data-parallel ones)."""
    ranks: dict[Any, Group] = {}

    def ranks_holding(parameter: Any) -> Group:
        name = None if getattr(parameter, "allreduce", True) else parameter.group_name
        if name not in ranks:
            group = deepspeed_groups._get_expert_data_parallel_group(name) if name else engine.seq_data_parallel_group
            ranks[name] = ranks_of(group)
        return ranks[name]

    return [
        OptimizedTensor(tensor=tensor, group=i, parts=[Part(parameter=parameter, ranks=ranks_holding(parameter))])
        for i, group_pairs in enumerate(pairs)
        for parameter, tensor in group_pairs
    ]


def _stage_1_and_2(wrapper: Any) -> list[OptimizedTensor]:
    tensors = []
    for i, tensor in enumerate(wrapper.single_partition_of_fp32_groups):
        ranks = ranks_of(wrapper.real_dp_process_group[i])
        parameters = wrapper.round_robin_bit16_groups[i]
        # Under every option, the parameters are views of the group's flat tensor, so addresses give their offsets.
        flat = wrapper.bit16_groups_flat[i]
        offsets = [(p.data_ptr() - flat.data_ptr()) // flat.element_size() for p in parameters]
        parts = _parts(zip(parameters, offsets, strict=True), part_size=int(wrapper.partition_size[i]), ranks=ranks)
        tensors.append(
            OptimizedTensor(tensor=tensor, group=i, parts=parts, publish=partial(_publish, wrapper, i, ranks.index))
        )
    return tensors


def _bf16(wrapper: Any) -> list[OptimizedTensor]:
    tensors = []
    for i, tensor in enumerate(wrapper.fp32_groups_flat_partition):
        parameters = wrapper.bf16_groups[i]
        offsets = [0]
        for parameter in parameters:
            offsets.append(offsets[-1] + parameter.numel())
        ranks = ranks_of(wrapper.real_dp_process_group[i])
        parts = _parts(zip(parameters, offsets, strict=False), part_size=tensor.numel(), ranks=ranks)
        tensors.append(OptimizedTensor(tensor=tensor, group=i, parts=parts))
    return tensors


def _parts(offsets: Iterable[tuple[Tensor, int]], *, part_size: int, ranks: Group) -> list[Part]:
    """Return the parts of parameters at given offsets of a vector of which each rank holds `part_size` elements."""
    parts = []
    for parameter, offset in offsets:
        bounds = flat_bounds(offset, parameter.numel(), part=part_size, ranks=ranks.size)
        start = offset + bounds[ranks.index] - part_size * ranks.index
        parts.append(Part(parameter=parameter, ranks=ranks, start=start, bounds=bounds))
    return parts


def _stage_3(wrapper: Any) -> list[OptimizedTensor]:
    """Read stage 3: every parameter is cut by itself, and the parts of a sub-group lie one after another."""
    tensors = []
    for i, tensor in enumerate(wrapper.fp32_partitioned_groups_flat):
        parts = []
        start = 0
        for parameter in wrapper.fp16_groups[i]:
            ranks = ranks_of(parameter.ds_process_group)
            part_size = parameter.partition_numel()
            bounds = flat_bounds(0, parameter.ds_numel, part=part_size, ranks=ranks.size)
            parts.append(Part(parameter=parameter, ranks=ranks, start=start, bounds=bounds))
            start += part_size
        publish = partial(wrapper._reassign_or_swap_out_partitioned_parameters, i)
        tensors.append(
            OptimizedTensor(tensor=tensor, group=wrapper.sub_group_to_group_id[i], parts=parts, publish=publish)
        )
    return tensors


@torch.no_grad()
def _publish(wrapper: Any, group: int, rank: int) -> None:
    # Looked up at every call, because DeepSpeed creates new masters when it offloads and reloads them.
    masters = wrapper.single_partition_of_fp32_groups[group]
    wrapper.parallel_partitioned_bit16_groups[group][rank].data.copy_(masters.data)


def keep_linked(wrapper: Any) -> Callable[[], None]:
    """Keep DeepSpeed's links from parameters to their state right, for its `safe_get_full_…` functions and checkpoints.

    DeepSpeed links each parameter to its fragments when it makes its partitions and when it loads them. It links state
    only once, after the first step. With `round_robin_gradients`, and without the padding of `parameter_alignment`, it
    also links fragments as if they were still in their original order. This function corrects both.

    Args:
        wrapper: DeepSpeed's optimizer wrapper.

    Returns:
        A function to call whenever state has been created or has moved.
    """
    link = getattr(wrapper, "_link_all_hp_params", None)
    if link is None or isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        # Stage 3 looks state up at every access; stage 0 has nothing to link.
        return lambda: None

    def linked() -> None:
        link()
        padded = any(map(any, getattr(wrapper, "round_robin_bit16_padding", ())))
        if getattr(wrapper, "round_robin_gradients", False) and not padded:
            _link_in_order(wrapper)

    def linked_with_states() -> None:
        linked()
        states()

    def states() -> None:
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()

    wrapper._link_all_hp_params = linked_with_states
    linked()
    return states


def follow_offloads(wrapper: Any, follow: Callable[[], None]) -> None:
    """Call a function whenever DeepSpeed has offloaded or reloaded masters and state, so that old tensors are released.

    Args:
        wrapper: DeepSpeed's optimizer wrapper; only that of stages 1 and 2 is changed.
        follow: The function to call.
    """
    if not isinstance(wrapper, DeepSpeedZeroOptimizer):
        return
    for name in ("offload_states", "reload_states"):
        move = getattr(wrapper, name, None)
        if move is not None:
            setattr(wrapper, name, _followed(move, follow))


def _followed(move: Callable[..., Any], follow: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(move)
    def moved(*args: Any, **options: Any) -> Any:
        result = move(*args, **options)
        follow()
        return result

    return moved


def _link_in_order(wrapper: Any) -> None:
    """Link the parameters of stages 1 and 2 in the order in which they lie in their group's flat tensor."""
    for i, tensor in enumerate(wrapper.single_partition_of_fp32_groups):
        rank = dist.get_rank(group=wrapper.real_dp_process_group[i])
        part_size = int(wrapper.partition_size[i])
        link_hp_params(
            lp_param_list=wrapper.round_robin_bit16_groups[i],
            flat_hp_partition=tensor,
            gradient_dict=wrapper.averaged_gradients,
            offload_gradient_dict=wrapper.offload_gradient_dict,
            use_offload=wrapper.cpu_offload,
            param_group_index=i,
            partition_start=rank * part_size,
            partition_size=part_size,
            dp_group=wrapper.real_dp_process_group[i],
        )
    wrapper._param_slice_mappings = wrapper._create_param_mapping()
    if wrapper.cpu_offload:
        wrapper._create_optimizer_mapping()
