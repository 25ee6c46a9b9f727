"""A job: parameters of one shape, rule, options and layout, run as one stack where strategy put them."""

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
    """This rank's pieces of what a job transforms, each in the order of its members; none is written to.

    `directions` are what the rule transforms, `gradients` are given where rows of zero gradients are skipped, `states`
    are what the rule remembers: a list for each name.
    """

    directions: Tensors
    gradients: Tensors | None = None
    states: tuple[Tensors, ...] = ()

    def fields(self, dtype: torch.dtype) -> list[Tensors]:
        """All there is of every parameter, of one dtype; of gradients, where they are not zero."""
        touched = [] if self.gradients is None else [[gradient.ne(0).to(dtype) for gradient in self.gradients]]
        return [self.directions, *touched, *self.states]


@dataclass(frozen=True, kw_only=True)
class StepOutputs:
    """What a job made: pieces like those that were given.

    `moved` holds 1 where a weight may move, decay included, and 0 where it may not, or is None where every one moves.
    """

    updates: Tensors
    moved: Tensors | None
    states: tuple[Tensors, ...]


ReadInputs: TypeAlias = Callable[[], StepInputs]
WriteOutputs: TypeAlias = Callable[[StepOutputs], None]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What parameters must share to run as one: nothing here differs between them.

    `options` are the rule's own, as sorted items. With `skip_zero_grad_rows` a row of a matrix whose gradient is
    exactly zero does not move. The last `padding_rows` rows of the stored tensor, which the view shows as rows or as
    columns, take no part and never move.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    view: View
    layout: Any
    """A `Layout`, or of a parameter not yet placed a `FlatLayout`."""
    dtype: torch.dtype
    device: torch.device
    asked: str
    """The strategy the user asked for, or "auto"."""
    skip_zero_grad_rows: bool = False
    padding_rows: int = 0

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and device of all arithmetic."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def rows(self) -> int:
        """The rows of a matrix that are real: what a rule is told, and decides by."""
        return self.view.rows - (self.padding_rows if self.view.kind == "as_stored" else 0)

    @property
    def columns(self) -> int:
        """The columns of a matrix that are real."""
        return self.view.columns - (self.padding_rows if self.view.kind == "transposed" else 0)

    @property
    def admitted(self) -> tuple[str, ...]:
        """The splits under which the rule can run where the pieces lie; told of what is real, as the rule itself is."""
        return self.rule.splits_of(dict(self.options), self.rows, self.columns)

    @functools.cached_property
    def state_names(self) -> tuple[str, ...]:
        """What the rule remembers, beside the momentum."""
        return self.rule.remembers(dict(self.options))

    @functools.cached_property
    def coupled(self) -> bool:
        """Whether the rule couples the matrices of a stage."""
        return self.rule.couples(dict(self.options))

    @property
    def masked(self) -> bool:
        """Whether some weights may not move."""
        return self.skip_zero_grad_rows or self.padding_rows > 0

    def made(self, fields: Sequence[Tensors]) -> StepOutputs:
        """The fields that `run_rule` made, by what they are."""
        first = 1 + self.masked
        return StepOutputs(updates=fields[0], moved=fields[1] if self.masked else None, states=tuple(fields[first:]))

    @functools.cached_property
    def splits(self) -> dict[SplitKind, Group]:
        """What the splits of the layout are to the matrices, and the ranks over which each runs."""
        # Several splits that run between matrices, or tear them, differ in nothing that matters here.
        return {self.view.split_kind(split): self.layout.group_of(split) for split in self.layout.splits}

    def first_column(self, box: Sequence[range]) -> int:
        """Where the columns of a piece begin in the matrix."""
        if len(box) == 1:
            return 0
        match self.view.kind:
            case "as_stored" | "heads_0":
                return box[-1].start
            case "transposed":
                return box[-2].start
        # A cut between heads, or neurons, leaves them their columns; another is for rules that need not know.
        return 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some parameters of a stack, where their rule runs, and who owns each unit where owners do.

    `owners` has the group index of the owner of every unit, an expert or a whole parameter. `communication_dtype` is
    what matrices travel as.
    """

    stack: Stack
    members: tuple[int, ...]
    """Indices into the optimizer's list of parameters."""
    strategy: Strategy
    owners: tuple[int, ...] = ()
    communication_dtype: torch.dtype = torch.float32
    stages: tuple[StageSlot, ...] = ()
    """Of the members, where their rule couples the matrices of a stage."""

    @property
    def everyone(self) -> tuple[int, ...]:
        """All members: each rank that has a job has all of it."""
        return self.members

    @functools.cached_property
    def route(self) -> GridRedistribution:
        """How the matrices of an owner's job travel."""
        return GridRedistribution(self.stack.layout, count=len(self.members), owners=self.owners)

    def task(
        self, read_inputs: ReadInputs, write_outputs: WriteOutputs, *, observe_root: RootObserver | None = None
    ) -> Task:
        """The job as a task that calls `read_inputs` when it starts and `write_outputs` when it has run.

        `observe_root`, where given, is told every inverse root that is taken or received here.
        """
        home = self.stack.layout.group
        if self.strategy == "owner":
            return Task(
                written(self.stack, self._at_owners(read_inputs, observe_root), write_outputs),
                home=home,
                strategy="owner",
            )
        # Every rank speaks that holds a part of the matrices: all of them, over as many as have other ones.
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
        # Whether a row was touched is known only where the row is whole, so that travels too.
        fields = read_inputs().fields(stack.dtype)
        if route.whole_here:
            wholes = [route.own_wholes(field) for field in fields]
        else:
            wholes = yield Gather(fields=fields, route=route, dtype=self.communication_dtype, like=stack.like)
        del fields
        made = [wholes[0]] * (1 + stack.masked + len(stack.state_names))
        # Who owns nothing still has a part in sums over stages.
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
    """What the matrices of a stack travel as. What a rule remembers must come back as it went, and travels along."""
    return stack.dtype if communication_dtype is None or stack.state_names else communication_dtype


def written(
    stack: Stack, asking: Generator[Any, Any, list[Tensors]], write_outputs: WriteOutputs
) -> Generator[Any, Any, None]:
    """The generator with its result handed to `write_outputs`."""
    # Handed on at once, so that no update outlives its use while others are under way.
    write_outputs(stack.made((yield from asking)))


def answered_locally(asking: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
    """The generator of matrices that are whole here: what it asks answers itself, sums over stages apart."""

    def relay(request: Any) -> Generator[Any, Any, Any]:
        return (yield request) if isinstance(request, StageRequest) else request.answer_locally()

    return relayed(asking, relay)


def observed(
    asking: Generator[Any, Any, T], observe_root: RootObserver | None, members: Sequence[int], ranks: float
) -> Generator[Any, Any, T]:
    """A running rule whose every inverse root is also handed to `observe_root`, with `members` and `ranks`."""
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
    """Run the rule on stacks of pieces or wholes, which are what `box` tells of every stored dimension.

    The fields are those of `StepInputs.fields`, and become those of `StepOutputs`: the update, where it may move for a
    stack of which not all does, and the new state. `share` is given where the rule couples the matrices of a stage.
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
    """1 for rows, or columns, of the matrix that are real, 0 for padding."""
    if not stack.padding_rows:
        return None
    index = torch.arange(box[0].start, box[0].stop, device=values.device)
    real = (index < stack.layout.shape[0] - stack.padding_rows).to(values.dtype)
    return real[:, None] if stack.view.kind == "as_stored" else real[None, :]
