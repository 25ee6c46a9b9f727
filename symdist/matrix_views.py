"""Views: how a stored tensor is read as matrices (transposed, by heads, in gate/up pairs, expert by expert).

A view acts on the last two dimensions; any dimension before them makes a stack of matrices. The same code works on the
whole tensor and on a rank's piece, as long as the pieces are blocks of the matrices (see `View.split_kind`).

A view gives matrices of one size. Where the rows of a weight are matrices of several sizes, `sections_of` divides it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from symdist.layouts import DimSplit

Kind: TypeAlias = Literal[
    "as_stored", "transposed", "gate_up_stacked", "gate_up_stacked_1", "gate_up_interleaved", "heads_0", "heads_1"
]
SplitKind: TypeAlias = Literal["batch", "rows", "columns", "unaligned"]

_NAMED = ("as_stored", "transposed", "gate_up_stacked", "gate_up_interleaved")


@dataclass(frozen=True, kw_only=True)
class View:
    """A view bound to the shape of a stored tensor.

    Attributes:
        kind: The kind of view. "gate_up_stacked_1" means gate and up stacked along dimension 1, "heads_0" and "heads_1"
            mean heads along dimension 0 or 1.
        stored: The shape of the whole stored tensor.
        count: The number of matrices in the whole tensor.
        rows: The number of rows of each matrix.
        columns: The number of columns of each matrix.
        unit: For heads, the head size. For stacked gate and up, the size of one block, which holds some gates followed
            by their ups. Otherwise 1 (the default).
        transposed: Whether each head is read transposed; False by default.
    """

    kind: Kind
    stored: tuple[int, ...]
    count: int
    rows: int
    columns: int
    unit: int = 1
    transposed: bool = False

    @property
    def single(self) -> bool:
        """Whether all gates and ups form one block, so that any cut between neurons separates gates from their ups."""
        return self.unit == self.stored[-2 if self.kind == "gate_up_stacked" else -1]

    def matrices(self, tensor: Tensor) -> Tensor:
        """Read a stored tensor, or a piece of one, as matrices.

        Args:
            tensor: `[…, p, q]`: the stored tensor, a piece of it, or a stack of either. For vectors, `[…, p]`.

        Returns:
            `[b, m, n]`.
        """
        if len(self.stored) == 1:
            tensor = tensor[..., None]
        b = math.prod(tensor.shape[:-2])
        p, q = tensor.shape[-2:]
        match self.kind:
            case "as_stored":
                return tensor.reshape(b, p, q)
            case "transposed":
                return tensor.reshape(b, p, q).mT
            case "gate_up_stacked":
                pairs = tensor.reshape(b, p // self.unit, 2, self.unit // 2, q)
                return pairs.transpose(2, 3).reshape(b, p // 2, 2 * q)
            case "gate_up_stacked_1":
                pairs = tensor.reshape(b, p, q // self.unit, 2, self.unit // 2)
                return pairs.permute(0, 2, 4, 3, 1).reshape(b, q // 2, 2 * p)
            case "gate_up_interleaved":
                return tensor.mT.reshape(b, q // 2, 2 * p)
            case "heads_0":
                heads = tensor.reshape(b * (p // self.unit), self.unit, q)
                return heads.mT if self.transposed else heads
            case "heads_1":
                h = q // self.unit
                heads = tensor.reshape(b, p, h, self.unit).transpose(1, 2).reshape(b * h, p, self.unit)
                return heads.mT if self.transposed else heads

    def to_stored(self, matrices: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Undo `matrices`.

        Args:
            matrices: `[b, m, n]`.
            shape: The shape of the tensor that was passed to `matrices`.

        Returns:
            The values, in that shape.
        """
        if len(self.stored) == 1:
            return matrices.reshape(shape)
        b = math.prod(shape[:-2])
        p, q = shape[-2:]
        if self.transposed:
            matrices = matrices.mT
        match self.kind:
            case "as_stored" | "heads_0":
                return matrices.reshape(shape)
            case "transposed":
                return matrices.mT.reshape(shape)
            case "gate_up_stacked":
                pairs = matrices.reshape(b, p // self.unit, self.unit // 2, 2, q)
                return pairs.transpose(2, 3).reshape(shape)
            case "gate_up_stacked_1":
                pairs = matrices.reshape(b, q // self.unit, self.unit // 2, 2, p)
                return pairs.permute(0, 4, 1, 3, 2).reshape(shape)
            case "gate_up_interleaved":
                return matrices.reshape(b, q, p).mT.reshape(shape)
            case "heads_1":
                return matrices.reshape(b, q // self.unit, p, self.unit).transpose(1, 2).reshape(shape)

    def split_kind(self, split: DimSplit) -> SplitKind:
        """Return how a split of the stored tensor cuts the matrices of this view.

        Args:
            split: A split of the stored tensor.

        Returns:
            "batch" if the cuts run between matrices, "rows" or "columns" if they divide the rows or the columns of each
            matrix, and "unaligned" if the pieces are not blocks of the matrices. In the last case the rule can only run
            where the pieces are assembled into matrices.
        """
        dim = split.dim - len(self.stored)
        if len(self.stored) == 1:
            return "rows"
        if dim < -2:
            return "batch"
        stored_axis: Literal["rows", "columns"] = "rows" if (dim == -2) != self.transposed else "columns"
        transposed_axis: Literal["rows", "columns"] = "columns" if dim == -2 else "rows"
        unit = self.unit if self.unit > 1 else 2
        whole_units = all(start % unit == stop % unit == 0 for start, stop in split.ranges if start < stop)
        match self.kind:
            case "as_stored":
                return stored_axis
            case "transposed":
                return transposed_axis
            case "gate_up_stacked":
                return "columns" if dim == -1 else ("rows" if whole_units and not self.single else "unaligned")
            case "gate_up_stacked_1":
                return "columns" if dim == -2 else ("rows" if whole_units and not self.single else "unaligned")
            case "gate_up_interleaved":
                return "columns" if dim == -2 else ("rows" if whole_units else "unaligned")
            case "heads_0":
                return stored_axis if dim == -1 else ("batch" if whole_units or self.unit == 1 else "unaligned")
            case "heads_1":
                return stored_axis if dim == -2 else ("batch" if whole_units or self.unit == 1 else "unaligned")


def bind_view(view: Any, shape: tuple[int, ...], *, name: str) -> View:
    """Bind a view, as a param group names it, to the shape of a stored tensor.

    Args:
        view: One of

            - "as_stored": the last two dimensions as they are;
            - "transposed": the last two dimensions swapped;
            - "gate_up_stacked": `[…, 2r, d]`, all gates before all ups, read as r pairs `[…, r, 2d]`;
            - "gate_up_interleaved": `[…, d, 2r]`, gate and up alternating, read as r pairs `[…, r, 2d]`;
            - `{"gate_up": b, "dim": 0 or 1}`: b blocks along that dimension, each with its gates before its ups;
            - `{"heads": h, "dim": 0 or 1}`: h heads along that dimension, each of which is a matrix; if `"transposed":
              True` is added, each is read transposed, as if the weight were not stored `[in, out]`.
        shape: The shape of the whole stored tensor: a vector `[p]`, a matrix `[p, q]`, or a stack of matrices `[k, p,
            q]`.
        name: The parameter's name, for error messages.

    Returns:
        The bound view.

    Raises:
        ValueError: If there is no such view, or the shape does not fit it.

    Example:
        >>> view = bind_view({"heads": 4, "dim": 0}, (32, 64), name="q_proj.weight")
        >>> view.matrices(torch.empty(32, 64)).shape
        torch.Size([4, 8, 64])
    """
    if not 1 <= len(shape) <= 3:
        raise ValueError(
            f"{name}: shape {shape} is neither a vector, a matrix nor a stack of matrices; use rule 'adamw'"
        )
    batch = shape[0] if len(shape) == 3 else 1
    p, q = (shape[0], 1) if len(shape) == 1 else shape[-2:]
    if isinstance(view, Mapping) and "gate_up" in view:
        return _bind_gate_up(view, shape, batch, p, q, name)
    if isinstance(view, Mapping):
        return _bind_heads(view, shape, batch, p, q, name)
    match view:
        case "as_stored":
            rows, columns = p, q
        case "transposed":
            rows, columns = q, p
        case "gate_up_stacked":
            rows, columns = p // 2, 2 * q
        case "gate_up_interleaved":
            rows, columns = q // 2, 2 * p
        case _:
            raise ValueError(
                f"{name}: view {view!r} is not one of {', '.join(map(repr, _NAMED))}, {{'heads': h, 'dim': 0 or 1}}, "
                "{'gate_up': blocks, 'dim': 0 or 1} or {'sections': [rows, ...]}"
            )
    if len(shape) == 1 and view != "as_stored":
        raise ValueError(f"{name}: view {view!r} needs a matrix, but the shape is {shape}; use view 'as_stored'")
    if (view == "gate_up_stacked" and p % 2) or (view == "gate_up_interleaved" and q % 2):
        raise ValueError(f"{name}: {view} needs an even number of gate and up neurons, the shape is {shape}")
    unit = p if view == "gate_up_stacked" else 1
    return View(kind=view, stored=shape, count=batch, rows=rows, columns=columns, unit=unit)


def _bind_gate_up(view: Mapping[str, Any], shape: tuple[int, ...], batch: int, p: int, q: int, name: str) -> View:
    blocks, dim = view["gate_up"], view.get("dim")
    if set(view) != {"gate_up", "dim"} or dim not in (0, 1) or not isinstance(blocks, int):
        raise ValueError(f"{name}: view {dict(view)!r} should be {{'gate_up': blocks, 'dim': 0 or 1}}")
    size, other = (p, q) if dim == 0 else (q, p)
    if blocks < 1 or size % (2 * blocks) or len(shape) == 1:
        raise ValueError(f"{name}: dimension {dim} of {shape} does not split into {blocks} blocks of gate and up")
    kind: Kind = "gate_up_stacked" if dim == 0 else "gate_up_stacked_1"
    return View(kind=kind, stored=shape, count=batch, rows=size // 2, columns=2 * other, unit=size // blocks)


def _bind_heads(view: Mapping[str, Any], shape: tuple[int, ...], batch: int, p: int, q: int, name: str) -> View:
    transposed = view.get("transposed", False)
    if (
        {*view, "transposed"} != {"heads", "dim", "transposed"}
        or view["dim"] not in (0, 1)
        or not isinstance(view["heads"], int)
        or not isinstance(transposed, bool)
    ):
        raise ValueError(
            f"{name}: view {dict(view)!r} should be {{'heads': h, 'dim': 0 or 1}}, with 'transposed': True if each "
            "head is to be read transposed"
        )
    heads, dim = view["heads"], view["dim"]
    size = p if dim == 0 else q
    if heads < 1 or size % heads or len(shape) == 1:
        raise ValueError(f"{name}: dimension {dim} of {shape} does not split into {heads} heads")
    unit = size // heads
    rows, columns = (unit, q) if dim == 0 else (p, unit)
    if transposed:
        rows, columns = columns, rows
    kind: Kind = "heads_0" if dim == 0 else "heads_1"
    return View(
        kind=kind, stored=shape, count=batch * heads, rows=rows, columns=columns, unit=unit, transposed=transposed
    )


@dataclass(frozen=True, kw_only=True)
class Section:
    """Consecutive rows of a stored weight that are a matrix, or some heads, of their own.

    Attributes:
        start: The first row.
        stop: The row after the last one.
        view: How the rows are read as matrices, as a param group would name it.
    """

    start: int
    stop: int
    view: Any


def sections_of(view: Any, shape: tuple[int, ...], *, name: str) -> list[Section]:
    """Divide a weight by the sections of a view, as a fused q, k and v with fewer key heads than query heads needs.

    Args:
        view: A view as a param group names it. With sections it is `{"sections": [r, ...]}`: the rows of a stored
            matrix `[p, q]` are, in order, matrices of r rows each. To these may be added

            - `"heads": [h, ...]`, as many as there are sections: the section is h matrices of r/h rows; 0 or 1 for one;
            - `"transposed": True`: every matrix is read transposed.
        shape: The shape of the whole stored tensor.
        name: The parameter's name, for error messages.

    Returns:
        The sections, in order; empty if the view has none.

    Raises:
        ValueError: Naming the parameter, if the sections do not fit its shape.

    Example:
        >>> [section.view for section in sections_of({"sections": [8, 4], "heads": [2, 0]}, (12, 6), name="qk.weight")]
        [{'heads': 2, 'dim': 0}, 'as_stored']
    """
    if not isinstance(view, Mapping) or "sections" not in view:
        return []
    sizes = view["sections"]
    heads, transposed = view.get("heads", [0] * len(sizes) if _is_list(sizes) else []), view.get("transposed", False)
    if not (
        set(view) <= {"sections", "heads", "transposed"}
        and (_is_list(sizes) and all(isinstance(size, int) and size > 0 for size in sizes))
        and (_is_list(heads) and len(heads) == len(sizes))
        and all(isinstance(count, int) and count >= 0 for count in heads)
        and isinstance(transposed, bool)
    ):
        raise ValueError(
            f"{name}: view {dict(view)!r} should be {{'sections': [rows, ...]}}, with 1 or more rows each, and may "
            "also have 'heads': [h, ...] with a number for each section, 0 if it is one matrix, and 'transposed': True"
        )
    if len(shape) != 2 or sum(sizes) != shape[0]:
        raise ValueError(
            f"{name}: sections {list(sizes)} have {sum(sizes)} rows, but the shape is {shape}; sections divide the "
            "rows of a matrix [out, in] and must add up to them"
        )
    odd = next((i for i, (size, count) in enumerate(zip(sizes, heads, strict=True)) if count and size % count), None)
    if odd is not None:
        raise ValueError(
            f"{name}: section {odd}, of {sizes[odd]} rows, does not split into {heads[odd]} heads; give a number that "
            "divides its rows, or 0 if it is one matrix"
        )
    ends = list(itertools.accumulate(sizes))
    return [
        Section(start=stop - size, stop=stop, view=_view_of_section(count, transposed))
        for size, stop, count in zip(sizes, ends, heads, strict=True)
    ]


def _view_of_section(heads: int, transposed: bool) -> Any:
    if heads > 1:
        return {"heads": heads, "dim": 0, **({"transposed": True} if transposed else {})}
    return "transposed" if transposed else "as_stored"


def plain_view(view: Any) -> Any:
    """Return a view as TOML and JSON write it, with lists for tuples, so that views that mean the same are equal."""
    if not isinstance(view, Mapping):
        return view
    return {key: list(value) if _is_list(value) else value for key, value in view.items()}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
