"""Descriptions of parameters: the layout, view, stack and residual stage of each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from symdist.exchange import Stack
from symdist.hardware import hardware_of
from symdist.layouts import FlatLayout, Group, Layout, layout_of, local
from symdist.matrix_views import Section, bind_view, sections_of
from symdist.routing.residual_stream import ResidualStage, residual_stage
from symdist.rules import Rule, get_rule


@dataclass(frozen=True, kw_only=True, eq=False)
class ParamSpec:
    """A parameter as the optimizer describes it, or a section of one: rows that are a matrix of their own.

    State, gradients and saving are those of parameters. Planning and stepping go by their `members`.

    Attributes:
        parameter: The parameter: a plain tensor or a DTensor.
        name: The parameter's name; of a section, with its number, as in "in_proj.weight[0]".
        group: The index of its param group.
        rule: Its rule.
        layout: How it is sharded.
        view: How it is read as matrices, as its group says; of a section, how that is read.
        signature: Its dtype, device and shape when it was described. These can change while the parameter remains the
            same object.
        dtype: The dtype of its state and of all arithmetic: float32, or the parameter's dtype if that is wider.
        momentum_dtype: The dtype of its momentum, if its rule has one besides AdamW's.
        stack: The properties that parameters must share to run together. None if PyTorch's AdamW can step the local
            piece, and if the parameter has sections.
        stage: Its stage of the residual stream, if its rule couples the matrices of a stage; otherwise None (the
            default).
        holds: Whether it may store part of the tensor that its stage shares; False by default.
        sections: The sections that its rule steps one by one; empty (default) if it is stepped as a whole.
        part: Where this rank's piece of a section lies along the first dimension of this rank's piece of the parameter;
            None (default) for the whole piece.
    """

    parameter: Tensor
    name: str
    group: int
    rule: Rule
    layout: Layout | FlatLayout
    view: Any
    signature: tuple[object, ...]
    dtype: torch.dtype
    momentum_dtype: torch.dtype
    stack: Stack | None
    stage: ResidualStage | None = None
    holds: bool = False
    sections: tuple[ParamSpec, ...] = ()
    part: range | None = None

    @property
    def members(self) -> tuple[ParamSpec, ...]:
        """What its rule steps one by one: its sections, or itself."""
        return self.sections or (self,)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this rank's piece of this parameter or section.

        Args:
            tensor: The parameter, or a tensor that is placed like it, such as its gradient or state. If it has no
                dimensions it is returned as it is.

        Returns:
            The piece, which shares memory with `tensor`.
        """
        piece = local(tensor)
        if self.part is None or not piece.dim():
            return piece
        return piece.narrow(0, self.part.start, len(self.part))

    def zeros(self, key: str) -> Tensor:
        """Return a state of this parameter before the first step, placed like the parameter."""
        dtype = self.momentum_dtype if key == "momentum" else self.dtype
        return torch.zeros_like(self.parameter, dtype=dtype, requires_grad=False)

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this rank's piece from all others, and is the same on all ranks that hold it."""
        layout = self.layout
        if isinstance(layout, FlatLayout):
            return self.name, *layout.bounds[layout.group.index : layout.group.index + 2]
        return self.name, *((side.start, side.stop) for side in layout.box)


def signature_of(parameter: Tensor) -> tuple[object, ...]:
    """Return what can change while a parameter stays the same object: its dtype, device and shape."""
    return parameter.dtype, parameter.device, parameter.shape


def describe_param(
    parameter: Tensor,
    *,
    name: str,
    index: int,
    group: Mapping[str, Any],
    replicas: Group | None = None,
    layout: Layout | FlatLayout | None = None,
) -> ParamSpec:
    """Determine a parameter's layout, view, stack and residual stage.

    Args:
        parameter: The parameter.
        name: The parameter's name.
        index: The index of its param group.
        group: The group, completed by `with_defaults`.
        replicas: The ranks that hold identical plain tensors; None (default) if not known.
        layout: How the parameter is sharded; None (default) to read that from the tensor.

    Returns:
        The description.

    Raises:
        ValueError: Naming the parameter, if it is not floating-point, if several of its elements share memory, or if
            its rule, view or layout does not fit its shape.
    """
    rule = get_rule(group["rule"])
    if not parameter.is_floating_point():
        raise ValueError(f"{name} is {parameter.dtype}; only floating-point parameters can be optimized")
    layout = layout if layout is not None else layout_of(parameter, name=name, replicas=replicas)
    if not isinstance(parameter, DTensor) and tuple(parameter.shape) != layout.local_shape:
        raise ValueError(
            f"{name}: this rank's tensor has shape {tuple(parameter.shape)}, but its layout says "
            f"{layout.local_shape}; give the layout of this tensor, or none"
        )
    _check_memory(name, parameter)
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    if dtype == torch.float64 and group.get("state_dtype") is not None:
        raise ValueError(f"{name} is float64, so its momentum is, too; leave out state_dtype")
    if parameter.dtype == torch.float16 and group["weight_rounding"] == "stochastic":
        raise ValueError(
            f"{name} is float16, and weight_rounding='stochastic' rounds to bfloat16; train in bfloat16, or keep "
            "float32 weights"
        )
    if rule.matrices and len(layout.shape) < 2:
        raise ValueError(f"{name} has shape {layout.shape}: rule {rule.name!r} needs a matrix; use rule 'adamw'")
    if rule.matrices and 0 in layout.shape:
        raise ValueError(f"{name} has shape {layout.shape}, so it is empty; leave it out of the optimizer")
    padding, skip = group["padding_rows"], group["skip_zero_grad_rows"]
    if padding and (
        group["view"] not in ("as_stored", "transposed") or len(layout.shape) != 2 or padding >= layout.shape[0]
    ):
        raise ValueError(
            f"{name}: padding_rows={padding} needs a matrix of more than {padding} rows in view 'as_stored' or "
            f"'transposed'; its shape is {layout.shape}, its view {group['view']!r}"
        )
    plain = not rule.matrices and not group["centered"] and not padding and not skip
    stacked = not plain or group["strategy"] in ("reduce", "owner")
    spec = ParamSpec(
        parameter=parameter,
        name=name,
        group=index,
        rule=rule,
        layout=layout,
        view=group["view"],
        signature=signature_of(parameter),
        dtype=dtype,
        momentum_dtype=dtype if group.get("state_dtype") is None else torch.bfloat16,
        stack=None,
    )
    # A view is checked even if nothing uses it. The default view is not, because a tensor of any shape may have it.
    sections = sections_of(spec.view, layout.shape, name=name)
    if stacked and sections:
        return replace(spec, sections=tuple(_stacked(part, group) for part in _divided(spec, sections)))
    if stacked:
        return _stacked(spec, group)
    if spec.view != "as_stored" and not sections:
        bind_view(spec.view, layout.shape, name=name)
    return spec


def _divided(spec: ParamSpec, sections: Sequence[Section]) -> Iterator[ParamSpec]:
    """Yield the descriptions of the sections of a parameter, without their stacks."""
    name, layout = spec.name, spec.layout
    for i, section in enumerate(sections):
        if any(interleaving.dim == 0 for interleaving in layout.interleaved):
            raise ValueError(
                f"{name}: its rows are sharded so that each rank holds pieces of several parts, not in their original "
                f"order, which view {spec.view!r} needs; shard the parameter without interleaving"
            )
        try:
            rows, part = layout.rows(section.start, section.stop)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        yield replace(spec, name=f"{name}[{i}]", layout=rows, view=section.view, part=part)


def _stacked(spec: ParamSpec, group: Mapping[str, Any]) -> ParamSpec:
    """Add its stack and residual stage to a description."""
    name, rule, layout, stored_view = spec.name, spec.rule, spec.layout, spec.view
    padding = group["padding_rows"]
    if layout.interleaved:
        stored_view = _view_of_interleaved(stored_view, layout, name=name, padding=padding, ordered=rule.ordered)
    view = bind_view(stored_view, layout.shape, name=name)
    if rule.ordered and view.kind.startswith("gate_up"):
        raise ValueError(
            f"{name}: the result of rule {rule.name!r} depends on the order of columns, and view "
            f"{spec.view!r} changes that order; use view 'as_stored', 'transposed' or, in a recipe, 'residual'"
        )
    stack = Stack(
        rule=rule,
        options=tuple(sorted(rule.update_options(group).items())),
        view=view,
        layout=layout.everywhere,
        dtype=spec.dtype,
        device=spec.parameter.device,
        hardware=hardware_of(spec.parameter.device),
        requested_strategy=group["strategy"],
        skip_zero_grad_rows=group["skip_zero_grad_rows"],
        padding_rows=padding,
    )
    stage = residual_stage(name, str(group.get("role", ""))) if stack.coupled else None
    return replace(
        spec,
        stack=stack,
        stage=stage,
        # Experts store none of the shared columns. Under expert parallelism, ranks hold different experts, and what is
        # stored where must not depend on how the experts are distributed.
        holds=stage is not None and len(layout.shape) == 2 and not str(group["role"]).startswith("expert"),
    )


def members_of(specs: Iterable[ParamSpec]) -> list[ParamSpec]:
    """Return what the rules of parameters step one by one, in order; see `ParamSpec.members`."""
    return [member for spec in specs for member in spec.members]


def _check_memory(name: str, parameter: Tensor) -> None:
    """Raise ValueError if several elements share one number in memory, as in expanded tensors.

    Such a tensor cannot be stepped.
    """
    tensor = local(parameter)
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ValueError(
            f"{name} is an expanded tensor: with shape {tuple(tensor.shape)} and strides {tensor.stride()}, several of "
            "its elements share one number in memory; make the tensor before expand() the parameter, and expand it in "
            "forward()"
        )


def _view_of_interleaved(view: Any, layout: Layout | FlatLayout, *, name: str, padding: int, ordered: bool) -> Any:
    """Translate a view of a tensor in its own order to a view of the tensor as it is stored, interleaved over ranks.

    Most views remain the same, because most rules do not depend on the order of rows or columns; `ordered` rules do.

    Raises:
        ValueError: Naming the parameter, if the view does not work on the interleaved order.
    """
    for interleaved in layout.interleaved:
        side = interleaved.dim - (len(layout.shape) - 2)
        fused = {"gate_up": 1, "dim": side} if side in (0, 1) else None
        if interleaved.parts == 2 and (view == fused or (view == "gate_up_stacked" and side == 0)):
            view = {"gate_up": interleaved.ranks, "dim": side}
            continue
        other_side = isinstance(view, Mapping) and view.get("dim") == 1 - side
        if side < 0 or ((view in ("as_stored", "transposed") or other_side) and not padding and not ordered):
            continue
        raise ValueError(
            f"{name}: dimension {interleaved.dim} is sharded over {interleaved.ranks} ranks, each of which holds "
            f"pieces of {interleaved.parts} parts, so its rows or columns are not in their original order, which view "
            f"{view!r}{' with padding rows' if padding else ''} needs; use view 'as_stored' or 'transposed' with a "
            "rule that does not depend on the order, or shard the parameter without interleaving"
        )
    return view


def coordinate_wise(options: Mapping[str, Any]) -> bool:
    """Return whether the rule of a group treats every element independently of all others.

    Args:
        options: The group, completed by `with_defaults`.

    Returns:
        False if the rule needs matrices or an option of the group applies to whole rows, otherwise True.
    """
    rows = options.get("centered") or options["skip_zero_grad_rows"] or options["padding_rows"] > 0
    return not (get_rule(options["rule"]).matrices or rows)


def flat_parts(
    name: str, shape: tuple[int, ...], options: Mapping[str, Any], *, bounds: tuple[int, ...], ranks: Group
) -> list[tuple[str, FlatLayout, int]]:
    """Split a parameter that is cut into ranges of elements into the parts that the optimizer takes as parameters.

    A stack of matrices becomes one part per matrix. If the rule treats every element independently, a parameter of any
    shape becomes one vector.

    Args:
        name: The parameter's name.
        shape: The shape of the whole parameter.
        options: The options of its group, completed by `with_defaults`.
        bounds: The offsets at which the ranges of the ranks meet, from 0 to the number of elements: one more than there
            are ranks.
        ranks: The ranks, in the order of their ranges.

    Returns:
        For each part: its name, its layout, and the offset within this rank's range at which this rank's piece of the
        part starts.

    Raises:
        ValueError: If the parameter has no elements.
    """
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}, so it is empty; leave it out of the optimizer")
    count = math.prod(shape[:-2]) if len(shape) > 2 else 1
    shapes: list[tuple[int, ...]] = [shape]
    names = [name]
    if coordinate_wise(options):
        shapes = [(bounds[-1],)]
    elif len(shape) > 2:
        shapes, names = [shape[-2:]] * count, [f"{name}[{i}]" for i in range(count)]
    size = bounds[-1] // len(shapes)
    first = bounds[ranks.index]
    parts = []
    for i, (part_shape, part_name) in enumerate(zip(shapes, names, strict=True)):
        part_bounds = tuple(min(max(bound - i * size, 0), size) for bound in bounds)
        layout = FlatLayout(shape=part_shape, group=ranks, bounds=part_bounds)
        parts.append((part_name, layout, max(i * size - first, 0)))
    return parts


def warn_of_narrow_weights(specs: Sequence[ParamSpec], groups: Sequence[Mapping[str, Any]]) -> None:
    """Warn if trainable weights are too coarse for updates at usual learning rates, or are to be rounded but cannot be.

    bfloat16 and float16 are too coarse, and only bfloat16 can be rounded.

    Args:
        specs: The optimizer's parameters.
        groups: Its param groups; those that round stochastically are left out.
    """
    narrow = [
        spec
        for spec in specs
        if spec.parameter.requires_grad
        and spec.parameter.dtype in (torch.bfloat16, torch.float16)
        and groups[spec.group]["weight_rounding"] == "nearest"
    ]
    rounded = {spec.group for spec in specs if groups[spec.group]["weight_rounding"] == "stochastic"}
    if rounded and not any(spec.parameter.dtype == torch.bfloat16 for spec in specs if spec.group in rounded):
        warnings.warn(
            "weight_rounding='stochastic' rounds only bfloat16 weights, and the groups that ask for it have none; "
            "leave it out, or pass bfloat16 weights",
            stacklevel=3,
        )
    if not narrow:
        return
    kind = str(narrow[0].parameter.dtype).removeprefix("torch.")
    warnings.warn(
        f"{len(narrow)} weights, the first of them {narrow[0].name}, are {kind} and have no master copy: at usual "
        "learning rates four in five of their elements never change, because an update is less than half the distance "
        "to the next number. Round bfloat16 weights by chance, weight_rounding='stochastic', or keep them in float32 "
        "and compute in bfloat16: FSDP2's "
        "MixedPrecisionPolicy(param_dtype=torch.bfloat16), torch.autocast, or an engine with master weights, such as "
        "DeepSpeed or Megatron",
        stacklevel=3,
    )
