"""Layouts under `FullyShardedDataParallel` with `use_orig_params=True`, which stores one long vector per FSDP unit.

The original parameters remain in the model as one-dimensional pieces. Only the FSDP unit records where a piece lies in
its matrix.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.utils.weak import WeakIdKeyDictionary

from symdist.layouts.flat import FlatLayout, flat_bounds, replicated
from symdist.layouts.groups import ascending
from symdist.layouts.layout import Layout

_LAYOUTS = WeakIdKeyDictionary()
"""The layouts that `read_units` found, keyed by parameter. Wrapping a model keeps its parameter objects."""

_REMEDY = "build the optimizer with symdist.build_optimizer(model, recipe), where model is the wrapped one"


def read_units(model: nn.Module) -> None:
    """Record the layouts of the parameters of a model's FSDP units, for `fsdp1_layout`.

    Every rank must call it, because each rank records its own pieces.

    Args:
        model: The model; modules that are not FSDP units are skipped.

    Raises:
        ValueError: If a unit was wrapped without `use_orig_params=True`, holds a parameter that is not contiguous, or
            has a process group whose ranks do not ascend.
    """
    for name, module in model.named_modules():
        handle = getattr(module, "_handle", None) if isinstance(module, FSDP) else None
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise ValueError(
                f"FullyShardedDataParallel module {name or '(root)'!r} replaced its weights by one flat parameter, in "
                "which symdist cannot find the matrices; wrap the model with use_orig_params=True"
            )
        for parameter, layout in _of_unit(handle):
            _LAYOUTS[parameter] = layout


def is_flattened(tensor: Tensor) -> bool:
    """Return whether a tensor belongs to an FSDP unit, either as a piece or as the flat parameter itself."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def fsdp1_layout(tensor: Tensor, *, name: str) -> Layout | FlatLayout:
    """Look up the layout of a parameter of an FSDP unit.

    Args:
        tensor: The piece that this rank holds.
        name: The parameter's name, for error messages.

    Returns:
        A `FlatLayout` if the unit shards its parameters, otherwise a `Layout` without splits.

    Raises:
        ValueError: If `tensor` is the flat parameter itself, or does not belong to a unit that `read_units` has read.
    """
    if getattr(tensor, "_is_flat_param", False):
        raise ValueError(
            f"{name} is the flat parameter of a FullyShardedDataParallel unit, in which symdist cannot find the "
            f"matrices; wrap the model with use_orig_params=True, then {_REMEDY}"
        )
    layout = _LAYOUTS.get(tensor)
    if layout is None:
        raise ValueError(
            f"{name} is a piece of a parameter in a FullyShardedDataParallel unit that symdist has not read; {_REMEDY}"
        )
    return layout


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of a whole parameter.

    Args:
        tensor: The parameter, or this rank's piece of a parameter of an FSDP unit.

    Returns:
        The shape of the whole parameter; for a piece of a unit that `read_units` has not read, the piece's own shape.
    """
    layout = _LAYOUTS.get(tensor) if is_flattened(tensor) else None
    return tuple(tensor.shape) if layout is None else layout.shape


def _of_unit(handle: Any) -> Iterator[tuple[nn.Parameter, Layout | FlatLayout]]:
    flat, group = handle.flat_param, ascending(handle.process_group)
    for name, contiguous in zip(flat._fqns, flat._contiguities, strict=True):
        if not contiguous:
            raise ValueError(
                f"{name} was not contiguous when FullyShardedDataParallel wrapped it; call .contiguous() on it before "
                "wrapping the model"
            )
    part = int(flat._sharded_size.numel())
    # The list of lengths also includes the padding between parameters.
    starts, start = [], 0
    for length, is_padding in zip(flat._numels_with_padding, flat._is_padding_mask, strict=True):
        if not is_padding:
            starts.append(start)
        start += length
    for parameter, shape, start in zip(flat._params, flat._shapes, starts, strict=True):
        if not handle.uses_sharded_strategy:
            yield parameter, replicated(tuple(shape), group)
        else:
            bounds = flat_bounds(start, shape.numel(), part=part, ranks=group.size)
            yield parameter, FlatLayout(shape=tuple(shape), group=group, bounds=bounds)
