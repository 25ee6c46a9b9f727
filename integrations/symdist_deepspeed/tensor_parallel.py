"""Reads how DeepSpeed's tensor parallelism cuts parameters into blocks, before ZeRO cuts these blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepspeed.utils import groups as deepspeed_groups

from symdist.engines.agreement import gather
from symdist.layouts.rank_grid import find_rank_grid
from symdist_deepspeed.layout import Block, OptimizedTensor, ranks_of

_META = "ds_autotp_universal_checkpoint_meta"


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How tensor parallelism cuts a parameter.

    Attributes:
        shape: The parameter's full shape.
        dim: The dimension along which it is cut.
        sizes: The size of each tensor-parallel rank's block along `dim`.
    """

    shape: tuple[int, ...]
    dim: int
    sizes: tuple[int, ...]


def tensor_parallel_group(engine: Any) -> Any:
    """Find the process group over which an engine's parameters are cut.

    Args:
        engine: The DeepSpeed engine.

    Returns:
        The group, or None without tensor parallelism.

    Raises:
        ValueError: If there is tensor parallelism, but neither `mpu` nor DeepSpeed has a group for it.
    """
    if engine.mp_world_size == 1:
        return None
    for holder in (engine.mpu, deepspeed_groups):
        for name in ("get_tensor_model_parallel_group", "get_model_parallel_group"):
            group = getattr(holder, name, lambda: None)()
            if group is not None:
                return group
    raise ValueError(
        f"the DeepSpeed engine has tensor parallelism over {engine.mp_world_size} ranks, but neither its mpu nor "
        "deepspeed.utils.groups has the process group: pass deepspeed.initialize() an mpu with "
        "get_tensor_model_parallel_group()"
    )


def cut_of(parameter: Any, *, ranks: int, name: str) -> Cut | None:
    """Read how a parameter is cut, from the attributes that AutoTP or Megatron (`partition_dim`) has set on it.

    Args:
        parameter: The parameter.
        ranks: The number of tensor-parallel ranks.
        name: The parameter's name, for messages.

    Returns:
        The cut; None if every tensor-parallel rank holds the whole parameter.

    Raises:
        ValueError: If the cut is unknown or gives a rank several blocks. The message names the parameter.
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    meta: Mapping[str, Any] | None = getattr(parameter, _META, None)
    if meta is not None and not meta["replicated"]:
        sizes = meta["partition_sizes"] or (meta["sub_param_shard_widths"] or [None])[0]
        full, dim = tuple(meta["original_shape"]), meta["partition_dim"]
        several = len(meta["sub_param_shard_widths"] or ()) > 1
        unsupported = (meta.get("conversion") or {}).get("unsupported_reason") or len(meta["logical_shape"]) != len(
            full
        )
        if unsupported or several or sizes is None:
            raise ValueError(
                f"{name}: AutoTP cuts it into several blocks a rank, which symdist does not support; "
                "leave it out of tensor_parallel's partition_config, or split the layer in the model"
            )
        return Cut(shape=full, dim=dim, sizes=tuple(sizes))
    if meta is None and getattr(parameter, "tensor_model_parallel", False):
        dim = getattr(parameter, "partition_dim", None)
        if dim is None or getattr(parameter, "partition_stride", 1) != 1:
            raise ValueError(
                f"{name} has tensor_model_parallel set, but symdist cannot tell how it is cut: set its partition_dim, "
                "with a partition_stride of 1"
            )
        full = tuple(size * (ranks if i == dim else 1) for i, size in enumerate(shape))
        return Cut(shape=full, dim=dim, sizes=(shape[dim],) * ranks)
    return None


def with_blocks(engine: Any, tensors: list[OptimizedTensor], names: Mapping[int, str]) -> list[OptimizedTensor]:
    """Add the block's layout to every part of a parameter that tensor parallelism cuts; all ranks must call it.

    Args:
        engine: The DeepSpeed engine.
        tensors: What `read_partitions` returned.
        names: The names of the model's parameters, by `id`.

    Returns:
        The tensors with blocks; `tensors` itself without tensor parallelism.

    Raises:
        ValueError: If the ranks are not a grid of data and tensor parallelism, or a cut is not supported.
    """
    handle = tensor_parallel_group(engine)
    if handle is None:
        return tensors
    rank_grid = find_rank_grid(engine.seq_data_parallel_group, handle)
    world = ranks_of(None)
    if rank_grid.everyone.ranks != world.ranks:
        raise ValueError(
            f"the {world.size} ranks are not a grid of {rank_grid.data.size} data-parallel × {rank_grid.across.size} "
            "tensor-parallel ranks; symdist supports no other parallelism next to tensor parallelism"
        )
    all_bounds = gather([part.bounds for optimized in tensors for part in optimized.parts], handle)
    result = []
    index = 0
    for optimized in tensors:
        parts = []
        for part in optimized.parts:
            cut = cut_of(part.parameter, ranks=rank_grid.across.size, name=names[id(part.parameter)])
            block = None
            if cut is not None:
                layout = rank_grid.copies(cut.shape, cut=cut.dim, sizes=cut.sizes)
                flat = None
                if part.bounds is not None:
                    bounds = [of_rank[index] or () for of_rank in all_bounds]
                    flat = rank_grid.ranges(cut.shape, cut=cut.dim, sizes=cut.sizes, bounds=bounds)
                block = Block(layout=layout, flat=flat)
            parts.append(replace(part, block=block))
            index += 1
        result.append(replace(optimized, parts=parts))
    return result
