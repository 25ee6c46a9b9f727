"""Weights under `FullyShardedDataParallel` with `use_orig_params=True`: stretches of one long vector for each unit.

The original parameters stay, as one-dimensional pieces that do not tell what they are pieces of; their units do.
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
"""Of parameters of units that have been read; a parameter is the same object from before it is wrapped on."""

_REMEDY = "build the optimizer with symdist.build_optimizer(model, recipe), where model is the wrapped one"


def read_units(model: nn.Module) -> None:
    """Note where the parameters of a model's FSDP units lie, for `fsdp1_layout`. All ranks call it.

    Raises ValueError, naming the unit and the remedy, for one that has put its parameters into another of its own.
    """
    for name, module in model.named_modules():
        handle = getattr(module, "_handle", None) if isinstance(module, FSDP) else None
        if handle is None:
            continue
        if not handle._use_orig_params:
            raise ValueError(
                f"FullyShardedDataParallel {name or 'at the root'!r} has made one flat parameter of all its weights, "
                "of which nothing tells the matrices; wrap the model with use_orig_params=True"
            )
        for parameter, layout in _of_unit(handle):
            _LAYOUTS[parameter] = layout


def is_flattened(tensor: Tensor) -> bool:
    """Whether a tensor belongs to an FSDP unit, as a piece or as the flat parameter itself."""
    return bool(getattr(tensor, "_fsdp_flattened", False))


def fsdp1_layout(tensor: Tensor, *, name: str) -> Layout | FlatLayout:
    """The layout of a parameter of an FSDP unit; ValueError, naming it, where no unit is known that it belongs to."""
    if getattr(tensor, "_is_flat_param", False):
        raise ValueError(
            f"{name} is the flat parameter of a FullyShardedDataParallel unit, of which nothing tells the matrices; "
            f"wrap the model with use_orig_params=True, then {_REMEDY}"
        )
    layout = _LAYOUTS.get(tensor)
    if layout is None:
        raise ValueError(
            f"{name} is a piece of a parameter of FullyShardedDataParallel, and does not tell of which; {_REMEDY}"
        )
    return layout


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter, be it in pieces."""
    layout = _LAYOUTS.get(tensor) if is_flattened(tensor) else None
    return tuple(tensor.shape) if layout is None else layout.shape


def _of_unit(handle: Any) -> Iterator[tuple[nn.Parameter, Layout | FlatLayout]]:
    flat, group = handle.flat_param, ascending(handle.process_group)
    for name, contiguous in zip(flat._fqns, flat._contiguities, strict=True):
        if not contiguous:
            raise ValueError(
                f"{name} lies transposed, or with gaps, in its FullyShardedDataParallel unit; make it contiguous "
                "before wrapping the model"
            )
    part = int(flat._sharded_size.numel())
    # Padding between parameters is in the list of lengths, too.
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
