"""Weights that hold several matrices, such as query, key and value, or gate and up: what each matrix is."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from symdist.layouts import FlatLayout, Layout
from symdist.layouts.rank_grid import RankGrid
from symdist.layouts.strided_slice import StridedSlice
from symdist.routing.param_site import ParamSite
from symdist.routing.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class MatrixSpec:
    """A matrix or vector that a parameter consists of, alone or beside others.

    In every rank's part of the parameter, it lies among the `size` elements from `base` on. `strided_slice` selects its
    elements from these stretches of all tensor-parallel ranks, put one after another.

    Attributes:
        name: Its name: the parameter's, followed by a suffix in brackets if the parameter consists of several.
        shape: Its full shape, on all tensor-parallel ranks.
        site: What it is used for, and how it is stored.
        base: The offset of its stretch in every rank's part of the parameter.
        size: The number of elements of that stretch.
        strided_slice: Which elements belong to it.
        cut: The dimension along which tensor parallelism cuts it; None (default) if every rank has all of it.
        widths: The size along `cut` on each tensor-parallel rank; empty by default.
        vocabulary: Whether its rows are those of the vocabulary, padded to a size that tensor parallelism divides.
            False by default.
        opaque: Whether tensor parallelism cuts it in a way that is not known. False by default.
    """

    name: str
    shape: tuple[int, ...]
    site: ParamSite
    base: int
    size: int
    strided_slice: StridedSlice
    cut: int | None = None
    widths: tuple[int, ...] = ()
    vocabulary: bool = False
    opaque: bool = False

    def layout(self, rank_grid: RankGrid, bounds: Sequence[int] | None, *, alone: bool = False) -> Layout | FlatLayout:
        """Return how the matrix lies on all ranks.

        Args:
            rank_grid: The ranks that hold it.
            bounds: The offsets in a rank's part of the parameter at which the ranges of the data-parallel ranks meet,
                from 0 to its end. None if each of these ranks holds all of the part.
            alone: Whether other data-parallel ranks are to be left out; False by default.

        Returns:
            The layout.
        """
        if bounds is None:
            return rank_grid.copies(self.shape, cut=self.cut, sizes=self.widths, alone=alone)
        by_rank = self.strided_slice.bounds(bounds, base=self.base, size=self.size, ranks=rank_grid.across.size)
        return rank_grid.ranges(self.shape, cut=self.cut, sizes=self.widths, bounds=by_rank)

    def elements(self, rank_grid: RankGrid, low: int, high: int) -> tuple[int, int]:
        """Return which of its elements lie in a range of a rank's part of the parameter.

        Args:
            rank_grid: The ranks that hold it.
            low: The first element of the range.
            high: The element after the last one.

        Returns:
            The position of the first one in `strided_slice`, and how many there are.
        """
        start = rank_grid.across.index * self.size if self.cut is not None else 0
        first, last = (start + min(max(bound - self.base, 0), self.size) for bound in (low, high))
        return start, self.strided_slice.between(first, last)


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The sections of a fused weight, which lie one after another and repeat together.

    Attributes:
        by_name: By the name of each section, in order, its size in one period and its site. Empty (the default) for a
            weight that is not fused.
        repeats: How often they repeat in the full weight, on all tensor-parallel ranks. 1 by default.
    """

    by_name: Mapping[str, tuple[int, ParamSite]] = field(default_factory=dict)
    repeats: int = 1


def matrices_of(
    names: Sequence[str],
    shape: tuple[int, ...],
    site: ParamSite,
    *,
    sections: Sections,
    cut: int | None,
    ranks: int,
    recipe: Recipe,
    vocabulary: bool = False,
    opaque: bool = False,
) -> Iterator[MatrixSpec]:
    """Yield the matrices or vectors of a parameter.

    Experts that are stored together become one matrix each. A fused q, k and v becomes one matrix each, unless the
    recipe has a section `attention_qkv` or gives all of them the same options with `view = "heads"`. The gate and up of
    a dense MLP become two, unless the recipe has a section `mlp_gate_up` or gives it `view = "neurons"`. Any other
    fused weight becomes one matrix for each section.

    Args:
        names: The parameter's name; if it holds several experts of one shape, one after another, a name for each.
        shape: The shape on each rank, of each expert.
        site: What it is used for.
        sections: The sections of a fused weight.
        cut: The dimension along which tensor parallelism cuts it; None if every rank has all of it.
        ranks: The number of tensor-parallel ranks.
        recipe: The recipe.
        vocabulary: See `MatrixSpec`; False by default.
        opaque: See `MatrixSpec`; False by default.

    Yields:
        The matrices or vectors.

    Raises:
        ValueError: If the sections contradict the shape; the message names the parameter.
    """
    size = math.prod(shape)
    if site.fused is not None:
        site = replace(site, blocks=ranks)
    dim = 1 if site.transposed else 0
    if cut is not None:
        shape = _resized(shape, cut, shape[cut] * ranks)
    selections = [("", shape, site, StridedSlice.whole(math.prod(shape)))]
    if sections.by_name and _are_apart(recipe, str(site.role), sections):
        selections = list(_selections(names[0], shape, dim, sections))
    for i, name in enumerate(names):
        for suffix, unit_shape, unit_site, selected in selections:
            widths: tuple[int, ...] = ()
            if cut is not None:
                ends = [selected.between(0, rank * size) // unit_shape[1 - cut] for rank in range(ranks + 1)]
                widths = tuple(end - start for start, end in itertools.pairwise(ends))
            yield MatrixSpec(
                name=name + suffix,
                shape=unit_shape,
                site=unit_site,
                base=i * size,
                size=size,
                strided_slice=selected,
                cut=cut,
                widths=widths,
                vocabulary=vocabulary,
                opaque=opaque,
            )


def _selections(
    name: str, shape: tuple[int, ...], dim: int, sections: Sections
) -> Iterator[tuple[str, tuple[int, ...], ParamSite, StridedSlice]]:
    """Yield the suffix, shape, site and elements of each section of a fused weight, which lie along `dim`."""
    sizes, repeats = [size for size, _ in sections.by_name.values()], sections.repeats
    if shape[dim] != repeats * sum(sizes):
        raise ValueError(
            f"{name} has {shape[dim]} rows, but by its module's config it should have {repeats} * "
            f"({' + '.join(map(str, sizes))}); symdist does not know this kind of fused weight"
        )
    width = math.prod(shape[dim + 1 :])
    period, start = sum(sizes) * width, 0
    for section, (size, site) in sections.by_name.items():
        stop = start + size * width
        selected = StridedSlice(count=math.prod(shape) // period, period=period, start=start, stop=stop)
        yield f"[{section}]", _resized(shape, dim, repeats * size), site, selected
        start = stop


def _resized(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _are_apart(recipe: Recipe, role: str, sections: Sections) -> bool:
    """Return whether the sections of a fused weight are matrices of their own.

    Those of a fused q, k and v are, unless the recipe has a section for it or gives all of them the same options, by
    heads. A fused gate and up of a dense MLP are unless the recipe says otherwise, because many models store them
    apart; of experts, only if the recipe says so, because other models store them as one as well.
    """
    options = recipe.options(role) or {}
    own = any(str(site.role) in recipe.sections for _, site in sections.by_name.values())
    if role == "attention_qkv":
        return role not in recipe.sections and (own or options.get("view") != "heads")
    if role not in ("mlp_gate_up", "expert_gate_up") or own or options.get("view") == "apart":
        return True
    return role == "mlp_gate_up" and role not in recipe.sections and options.get("view") != "neurons"
