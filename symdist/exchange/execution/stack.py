"""A stack: what parameters have in common to run as one batch of matrices, and how its rule runs on pieces of them."""

import functools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from symdist.exchange.collectives.residual_sums import StageContribution, shared
from symdist.hardware import Hardware
from symdist.layouts import Group, Layout
from symdist.matrix_views import SplitKind, View
from symdist.rules import Factored, Matrix, Rule, Sum, relayed
from symdist.rules.registry import MatrixAxis

T = TypeVar("T")
Strategy: TypeAlias = Literal["local", "reduce", "owner"]
Tensors: TypeAlias = list[Tensor]
PolarObserver: TypeAlias = Callable[[Tensor, Sequence[int], float], None]
"""Callback for each stack of polar factors.

It gets nuclear norms (see `Factored.nuclear`), the positions in the job's `members` of the parameters that they belong
to, and how many ranks this call stands for.
"""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """This rank's pieces of a job's inputs.

    Each list has one tensor per member of the job, in their order. No tensor is written to.

    Attributes:
        directions: What the rule transforms: the gradients after momentum.
        gradients: The gradients themselves, for stacks that skip rows of zero gradient; otherwise None.
        states: What the rule remembers between steps: one list per name in `Stack.state_names`.
    """

    directions: Tensors
    gradients: Tensors | None = None
    states: tuple[Tensors, ...] = ()

    def fields(self, dtype: torch.dtype) -> list[Tensors]:
        """List the fields that are sent together.

        Args:
            dtype: The dtype of the mask.

        Returns:
            The directions; then, if there are gradients, the mask, which is 1 where the gradient is not zero; then the
            states.
        """
        touched = [] if self.gradients is None else [[gradient.ne(0).to(dtype) for gradient in self.gradients]]
        return [self.directions, *touched, *self.states]


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """This rank's pieces of a job's results, shaped like its inputs.

    Attributes:
        updates: What is multiplied by the learning rate and subtracted from the weights.
        moved: 1 where a weight may change, by weight decay included, and 0 where it may not; None if all may change.
        states: What the rule remembers for the next step: one list per name in `Stack.state_names`.
    """

    updates: Tensors
    moved: Tensors | None
    states: tuple[Tensors, ...]


ReadInputs: TypeAlias = Callable[[], StepInputs]
WriteOutputs: TypeAlias = Callable[[StepOutputs], None]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What parameters must have in common to run as one batch of matrices.

    Attributes:
        rule: The rule.
        options: The rule's own options, as sorted (name, value) pairs.
        view: How a stored tensor is seen as matrices.
        layout: How the matrices are cut while the rule runs, or, before planning, as they are stored. For parameters
            stored in ranges of elements it gives the ranks, and cuts nothing, before planning.
        dtype: The dtype of the state and of all arithmetic.
        device: The device of this rank's pieces.
        hardware: What the ranks can do, by which precisions are chosen.
        requested_strategy: The strategy that the user asked for, or "auto".
        skip_zero_grad_rows: Whether rows whose gradient is exactly zero stay unchanged; False by default.
        padding_rows: The number of rows at the end of the stored tensor that take no part and never change; 0 by
            default. The view may show them as columns.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    view: View
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    hardware: Hardware
    requested_strategy: str
    skip_zero_grad_rows: bool = False
    padding_rows: int = 0

    @property
    def like(self) -> Tensor:
        """An empty tensor with the dtype and device of all arithmetic."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def rows(self) -> int:
        """The number of rows of a matrix without padding, as the rule gets it."""
        return self.view.rows - (self.padding_rows if self.view.kind == "as_stored" else 0)

    @property
    def columns(self) -> int:
        """The number of columns of a matrix without padding, as the rule gets it."""
        return self.view.columns - (self.padding_rows if self.view.kind == "transposed" else 0)

    @property
    def numel(self) -> int:
        """The number of elements of a stored tensor, with padding."""
        return math.prod(self.layout.shape)

    @property
    def admitted(self) -> tuple[str, ...]:
        """The axes ("rows", "columns") along which matrices may be split for the rule to run with strategy "reduce"."""
        return self.rule.splits_of(dict(self.options), self.rows, self.columns)

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """The names of what the rule remembers between steps, besides the momentum."""
        return self.rule.remembers(dict(self.options))

    @functools.cached_property
    def coupled(self) -> bool:
        """Whether the rule couples the matrices of a residual stage."""
        return self.rule.couples(dict(self.options))

    @property
    def masked(self) -> bool:
        """Whether some weights must not change, so that a mask goes with the updates."""
        return self.skip_zero_grad_rows or self.padding_rows > 0

    def made(self, fields: Sequence[Tensors]) -> StepOutputs:
        """Sort the fields that `run_rule` returns into updates, mask and states.

        Args:
            fields: The fields, each a list with one tensor per parameter.

        Returns:
            The fields by name.
        """
        first = 1 + self.masked
        return StepOutputs(updates=fields[0], moved=fields[1] if self.masked else None, states=tuple(fields[first:]))

    @functools.cached_property
    def splits(self) -> dict[SplitKind, Group]:
        """How the layout splits the matrices ("rows", "columns", "batch" or "unaligned"), and over which ranks."""
        # If there are several "batch" or several "unaligned" splits, one may overwrite another; nothing here depends on
        # which of them remains.
        return {self.view.split_kind(split): self.layout.group_of(split) for split in self.layout.splits}

    @property
    def cut(self) -> dict[MatrixAxis, Group]:
        """The axes along which the matrices themselves are cut, and the ranks along each."""
        return {axis: group for axis, group in self.splits.items() if axis == "rows" or axis == "columns"}

    @property
    def parts(self) -> dict[MatrixAxis, int]:
        """The axes along which the matrices themselves are cut, and the number of ranks along each."""
        return {axis: group.size for axis, group in self.cut.items()}

    def first_column(self, box: Sequence[range]) -> int:
        """Return the column of the matrix at which a piece begins.

        Args:
            box: The range of the piece along each stored dimension.

        Returns:
            The index of the column, from 0.
        """
        if len(box) == 1:
            return 0
        match self.view.kind:
            case "as_stored" | "heads_0" if not self.view.transposed:
                return box[-1].start
            case "transposed":
                return box[-2].start
            case "heads_1" if self.view.transposed:
                return box[-2].start
        # In other views, a cut between heads or neurons leaves all columns on each rank. Rules that need to know the
        # column do not run on other cuts.
        return 0


def travels_as(stack: Stack, communication_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a stack's matrices are sent.

    If the rule remembers something, it is sent along with the matrices and must not be rounded; the dtype is then the
    stack's own.

    Args:
        stack: The stack.
        communication_dtype: The dtype that the user chose; None for the stack's own.

    Returns:
        The dtype.
    """
    return stack.dtype if communication_dtype is None or stack.state_names else communication_dtype


def observed(
    running: Generator[Any, Any, T], observe_polar: PolarObserver | None, members: Sequence[int], ranks: float
) -> Generator[Any, Any, T]:
    """Wrap a running rule so that a callback learns of every polar factor.

    Args:
        running: The running rule.
        observe_polar: The callback; None to return the rule as it is.
        members: Passed to the callback: the positions in the job's `members` of the parameters that run.
        ranks: Passed to the callback: how many ranks each call stands for.

    Returns:
        The wrapped rule, with the same result.
    """
    if observe_polar is None:
        return running

    def relay(request: Any) -> Generator[Any, Any, Any]:
        if isinstance(request, Factored):
            observe_polar(request.nuclear(), members, ranks)
            return None
        return (yield request)

    return relayed(running, relay)


def run_rule(
    stack: Stack,
    fields: Sequence[Tensor],
    box: Sequence[range],
    contribution: StageContribution | None = None,
    *,
    parts: Mapping[MatrixAxis, int],
) -> Generator[Any, Any, list[Tensor]]:
    """Run the rule of a stack on pieces or on whole matrices.

    This is a generator: it yields the rule's requests, and is sent their answers.

    Args:
        stack: The stack whose rule to run.
        fields: The fields of `StepInputs.fields`, each stacked over n parameters: `[n, *stored shape]`.
        box: The range that the pieces cover along each stored dimension.
        contribution: This job's contribution to residual-stage sums, if the rule couples the matrices of a stage; None
            by default.
        parts: For each axis along which the matrices are cut while the rule runs, over how many ranks.

    Returns:
        The fields for `Stack.made`, in the shape of the input fields: the update, the mask if the stack has one, and
        the new states.
    """
    shape = tuple(fields[0].shape)
    values, *others = [stack.view.matrices(field) for field in fields]
    touched = others.pop(0).ne(0) if stack.skip_zero_grad_rows else None
    real = _real(stack, box, values)
    if real is not None:
        values = values * real
    matrix = Matrix(
        values=values,
        rows=stack.rows,
        columns=stack.columns,
        real=real if stack.view.kind == "as_stored" else None,
        first_column=stack.first_column(box),
        state=dict(zip(stack.state_names, others, strict=True)),
        places=None if contribution is None else contribution.places,
        parts=parts,
        hardware=stack.hardware,
    )
    running = stack.rule.update(matrix, **dict(stack.options))
    update = yield from running if contribution is None else shared(running, contribution)
    update, state = update if isinstance(update, tuple) else (update, {})
    outputs = [update]
    if stack.masked:
        moved = real
        if touched is not None:
            count = yield Sum(values=touched.sum(-1, keepdim=True).to(update.dtype), across="columns")
            moved = count.ne(0).to(update.dtype) * (1 if real is None else real)
        assert moved is not None
        outputs = [update * moved, moved.expand_as(update)]
    outputs += [state[name] for name in stack.state_names]
    return [stack.view.to_stored(field, shape) for field in outputs]


def _real(stack: Stack, box: Sequence[range], values: Tensor) -> Tensor | None:
    """Return 1 for real rows (or columns) of the matrix and 0 for padding, to broadcast; None without padding."""
    if not stack.padding_rows:
        return None
    index = torch.arange(box[0].start, box[0].stop, device=values.device)
    real = (index < stack.layout.shape[0] - stack.padding_rows).to(values.dtype)
    return real[:, None] if stack.view.kind == "as_stored" else real[None, :]
