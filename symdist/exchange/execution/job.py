"""A job: parameters of one shape, rule, options and layout that run together, where their strategy says."""

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from symdist.exchange.collectives.grid_redistribution import GridRedistribution
from symdist.exchange.collectives.redistribution import Gather, Scatter
from symdist.exchange.collectives.residual_sums import StageContribution, StageRequest, StageSlot, shared
from symdist.exchange.execution.scheduler import Task
from symdist.layouts import Group
from symdist.matrix_views import SplitKind, View
from symdist.rules import Matrix, Rule, Sum, relayed
from symdist.rules.linalg.inverse_root import InverseRoot

T = TypeVar("T")
Strategy: TypeAlias = Literal["local", "reduce", "owner"]
Tensors: TypeAlias = list[Tensor]
RootObserver: TypeAlias = Callable[[InverseRoot, Sequence[int], float], None]
"""Callback for each inverse root: the root, the job's member indices, and how many ranks this value represents."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """This rank's pieces of a job's inputs, each list in the order of the members. None is written to.

    Attributes:
        directions: What the rule transforms: gradients after momentum.
        gradients: The gradients, for stacks that skip rows of zero gradient; else None.
        states: What the rule remembers: one list per name in `Stack.state_names`.
    """

    directions: Tensors
    gradients: Tensors | None = None
    states: tuple[Tensors, ...] = ()

    def fields(self, dtype: torch.dtype) -> list[Tensors]:
        """List the fields that travel together: directions, then the mask of nonzero gradients if any, then states.

        Args:
            dtype: The dtype of the mask.
        """
        touched = [] if self.gradients is None else [[gradient.ne(0).to(dtype) for gradient in self.gradients]]
        return [self.directions, *touched, *self.states]


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """This rank's pieces of a job's results, shaped like its inputs.

    Attributes:
        updates: What is subtracted from the weights, times the learning rate.
        moved: 1 where a weight may move, decay included, and 0 where it may not; None if all may.
        states: What the rule remembers from now on: one list per name in `Stack.state_names`.
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
        options: The rule's own options, as sorted items.
        view: How a stored tensor is seen as matrices.
        layout: A `Layout`; before planning, a `FlatLayout` for parameters cut in runs of elements.
        dtype: The dtype of the state and all arithmetic.
        device: Where the pieces are.
        asked: The strategy the user asked for, or "auto".
        skip_zero_grad_rows: Whether a row whose gradient is exactly zero stays as it is.
        padding_rows: How many of the last rows of the stored tensor take no part and never move. The view may show
            them as columns.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    view: View
    layout: Any
    dtype: torch.dtype
    device: torch.device
    asked: str
    skip_zero_grad_rows: bool = False
    padding_rows: int = 0

    @property
    def like(self) -> Tensor:
        """An empty tensor with the dtype and device of all arithmetic."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def rows(self) -> int:
        """How many rows a matrix has without padding; the rule gets this number."""
        return self.view.rows - (self.padding_rows if self.view.kind == "as_stored" else 0)

    @property
    def columns(self) -> int:
        """How many columns a matrix has without padding; the rule gets this number."""
        return self.view.columns - (self.padding_rows if self.view.kind == "transposed" else 0)

    @property
    def admitted(self) -> tuple[str, ...]:
        """The axes ("rows", "columns") along which matrices may be split for the rule to run by reduce."""
        return self.rule.splits_of(dict(self.options), self.rows, self.columns)

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """Names of what the rule remembers between steps, besides the momentum."""
        return self.rule.remembers(dict(self.options))

    @functools.cached_property
    def coupled(self) -> bool:
        """Whether the rule couples the matrices of a residual stage."""
        return self.rule.couples(dict(self.options))

    @property
    def masked(self) -> bool:
        """Whether some weights must not move, so that a mask travels along."""
        return self.skip_zero_grad_rows or self.padding_rows > 0

    def made(self, fields: Sequence[Tensors]) -> StepOutputs:
        """Sort the fields that `run_rule` returns into updates, mask and states."""
        first = 1 + self.masked
        return StepOutputs(updates=fields[0], moved=fields[1] if self.masked else None, states=tuple(fields[first:]))

    @functools.cached_property
    def splits(self) -> dict[SplitKind, Group]:
        """How the layout splits the matrices ("rows", "columns", "batch" or "unaligned"), and over which ranks."""
        # Several splits between matrices, or several unaligned ones, may overwrite each other: nothing here depends on
        # which of them remains.
        return {self.view.split_kind(split): self.layout.group_of(split) for split in self.layout.splits}

    def first_column(self, box: Sequence[range]) -> int:
        """Return the matrix column at which a piece begins.

        Args:
            box: The piece's range along each stored dimension.
        """
        if len(box) == 1:
            return 0
        match self.view.kind:
            case "as_stored" | "heads_0":
                return box[-1].start
            case "transposed":
                return box[-2].start
        # In other views a cut between heads or neurons leaves all columns. Rules that need to know the column do not
        # run on other cuts.
        return 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some parameters of a stack, and where their rule runs.

    Attributes:
        stack: What the parameters have in common.
        members: Their indices in the optimizer's list of parameters.
        strategy: Where the rule runs: "local", "reduce" or "owner".
        owners: For strategy "owner", the group index of every unit's owner. A unit is an expert or a whole parameter;
            those of the first member come first.
        communication_dtype: The dtype in which matrices are sent.
        stages: The members' residual stages, if their rule couples the matrices of one; else empty.
    """

    stack: Stack
    members: tuple[int, ...]
    strategy: Strategy
    owners: tuple[int, ...] = ()
    communication_dtype: torch.dtype = torch.float32
    stages: tuple[StageSlot, ...] = ()

    @property
    def everyone(self) -> tuple[int, ...]:
        """The parameters of this job on any rank: the members, as all ranks of a job have the same ones."""
        return self.members

    @functools.cached_property
    def route(self) -> GridRedistribution:
        """How matrices travel to their owners and back, for strategy "owner"."""
        return GridRedistribution(self.stack.layout, count=len(self.members), owners=self.owners)

    def task(
        self, read_inputs: ReadInputs, write_outputs: WriteOutputs, *, observe_root: RootObserver | None = None
    ) -> Task:
        """Make the task that runs this job.

        Args:
            read_inputs: Called when the task starts.
            write_outputs: Called with the results when it ends.
            observe_root: Called with every inverse root computed or received here, if given.
        """
        home = self.stack.layout.group
        if self.strategy == "owner":
            return Task(
                written(self.stack, self._at_owners(read_inputs, observe_root), write_outputs),
                home=home,
                strategy="owner",
            )
        # All ranks with a part of a matrix report its root: one in `ranks` of the group. With this weight a matrix
        # counts for the whole group, as it does when only its owner reports it.
        batch = self.stack.splits.get("batch")
        ranks = batch.size if batch is not None else 1
        asking = written(
            self.stack,
            observed(self._in_place(read_inputs), observe_root, range(len(self.members)), ranks),
            write_outputs,
        )
        if self.strategy == "local" and not self.stages:
            return Task(asking)
        along: dict[str, Group] = {axis: group for axis, group in self.stack.splits.items() if axis != "batch"}
        return Task(asking, along=along, home=home, strategy=self.strategy)

    def _in_place(self, read_inputs: ReadInputs) -> Generator[Any, Any, list[Tensors]]:
        fields = [
            torch.stack(field) if len(field) > 1 else field[0].unsqueeze(0)
            for field in read_inputs().fields(self.stack.dtype)
        ]
        share = None
        if self.stages:
            matrices = self.stack.view.matrices(fields[0]).shape[0] // len(self.members)
            here = [stage for stage in self.stages for _ in range(matrices)]
            share = StageContribution.of(here, self.stages, copies=self.stack.layout.num_replicas)
        made = yield from run_rule(self.stack, fields, self.stack.layout.box, share)
        return [list(field.unbind(0)) for field in made]

    def _at_owners(
        self, read_inputs: ReadInputs, observe_root: RootObserver | None
    ) -> Generator[Any, Any, list[Tensors]]:
        stack, route = self.stack, self.route
        # Whether a row has a nonzero gradient is known only where the row is whole, so the mask travels too.
        fields = read_inputs().fields(stack.dtype)
        if route.whole_here:
            wholes = [route.own_wholes(field) for field in fields]
        else:
            wholes = yield Gather(fields=fields, route=route, dtype=self.communication_dtype, like=stack.like)
        del fields
        made = [wholes[0]] * (1 + stack.masked + len(stack.state_names))
        # A rank that owns none still joins the residual-stage sums.
        if route.owned or self.stages:
            if len(stack.layout.shape) == 1:
                wholes = [whole.squeeze(-1) for whole in wholes]
            experts = len(self.owners) // len(self.members)
            units = [unit // experts for unit in route.owned_units]
            share = None
            if self.stages:
                here = [self.stages[unit] for unit in units for _ in range(stack.view.count // experts)]
                share = StageContribution.of(here, self.stages, copies=1)
            asking = run_rule(stack, wholes, [range(size) for size in stack.layout.shape], share)
            made = yield from answered_locally(observed(asking, observe_root, units, route.group.size))
            if len(stack.layout.shape) == 1:
                made = [tensor.unsqueeze(-1) for tensor in made]
        del wholes
        return (
            yield Scatter(
                fields=made,
                route=route,
                dtype=self.communication_dtype,
                like=stack.like,
                shape=stack.layout.local_shape,
            )
        )


def travels_as(stack: Stack, communication_dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a stack's matrices are sent.

    If the rule remembers something, that travels with the matrices and must not be rounded: then it is the stack's
    own dtype.

    Args:
        stack: The stack.
        communication_dtype: The dtype asked for; None for the stack's own.
    """
    return stack.dtype if communication_dtype is None or stack.state_names else communication_dtype


def written(
    stack: Stack, asking: Generator[Any, Any, list[Tensors]], write_outputs: WriteOutputs
) -> Generator[Any, Any, None]:
    """Wrap a running rule so that its result goes to `write_outputs`."""
    # At once, so that updates are freed while other tasks are still under way.
    write_outputs(stack.made((yield from asking)))


def answered_locally(asking: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """Wrap a rule that runs on whole matrices: all its requests but residual-stage sums are answered on this rank."""

    def relay(request: Any) -> Generator[Any, Any, Any]:
        return (yield request) if isinstance(request, StageRequest) else request.answer_locally()

    return relayed(asking, relay)


def observed(
    asking: Generator[Any, Any, T], observe_root: RootObserver | None, members: Sequence[int], ranks: float
) -> Generator[Any, Any, T]:
    """Wrap a running rule so that every inverse root is also handed to `observe_root`, with `members` and `ranks`."""
    if observe_root is None:
        return asking

    def relay(request: Any) -> Generator[Any, Any, Any]:
        answer = yield request
        if isinstance(answer, InverseRoot):
            observe_root(answer, members, ranks)
        return answer

    return relayed(asking, relay)


def run_rule(
    stack: Stack, fields: Sequence[Tensor], box: Sequence[range], share: StageContribution | None = None
) -> Generator[Any, Any, list[Tensor]]:
    """Run the rule of a stack on pieces or whole matrices; a generator that yields the rule's requests.

    Args:
        stack: Whose rule to run.
        fields: Those of `StepInputs.fields`, each stacked over the parameters: `[n, *stored shape]`.
        box: The range that the pieces cover along each stored dimension.
        share: This job's part in the residual-stage sums, if the rule couples the matrices of a stage.

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
        places=None if share is None else share.places,
    )
    asking = stack.rule.update(matrix, **dict(stack.options))
    update = yield from asking if share is None else shared(asking, share)
    update, state = update if isinstance(update, tuple) else (update, {})
    made = [update]
    if stack.masked:
        moved = real
        if touched is not None:
            count = yield Sum(values=touched.sum(-1, keepdim=True).to(update.dtype), across="columns")
            moved = count.ne(0).to(update.dtype) * (1 if real is None else real)
        assert moved is not None
        made = [update * moved, moved.expand_as(update)]
    made += [state[name] for name in stack.state_names]
    return [stack.view.to_stored(field, shape) for field in made]


def _real(stack: Stack, box: Sequence[range], values: Tensor) -> Tensor | None:
    """1 for rows (or columns) of the matrix and 0 for padding, to broadcast; None without padding."""
    if not stack.padding_rows:
        return None
    index = torch.arange(box[0].start, box[0].stop, device=values.device)
    real = (index < stack.layout.shape[0] - stack.padding_rows).to(values.dtype)
    return real[:, None] if stack.view.kind == "as_stored" else real[None, :]
