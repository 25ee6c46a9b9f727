"""A job: parameters of one shape, rule, options and layout, run as one stack where placement put them."""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from symdist.exchange.requests import Return, Ship
from symdist.exchange.routes import Route
from symdist.exchange.scheduler import Task
from symdist.layouts import Group
from symdist.rules import Matrix, Rule, Sum, answer_alone
from symdist.rules.roots import InverseRoot
from symdist.views import Seen, View

T = TypeVar("T")
Placement: TypeAlias = Literal["local", "reduce", "owner"]
Tensors: TypeAlias = list[Tensor]
Begin: TypeAlias = Callable[[], tuple[Tensors, Tensors | None]]
Note: TypeAlias = Callable[[InverseRoot, Sequence[int], float], None]
"""Is told a root that was taken, of which members of a job, in order, and for how many ranks this one speaks."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What parameters must share to run as one: nothing here differs between them.

    `options` are the rule's own, as sorted items. With `hold` a row of a matrix whose gradient is exactly zero does
    not move. The last `padding_rows` rows of the stored tensor take no part and never move.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    view: View
    layout: Any
    """A `Layout`, or of a parameter not yet placed a `FlatLayout`."""
    dtype: torch.dtype
    device: torch.device
    asked: str
    """The placement the user asked for, or "auto"."""
    hold: bool = False
    padding_rows: int = 0

    @property
    def like(self) -> Tensor:
        """An empty tensor of the dtype and device of all arithmetic."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def rows(self) -> int:
        """The rows of a matrix that are real: what a rule is told, and decides by."""
        return self.view.rows - self.padding_rows

    @functools.cached_property
    def seen(self) -> dict[Seen, Group]:
        """What the splits of the layout are to the matrices, and the ranks over which each runs."""
        # Several splits that run between matrices, or tear them, differ in nothing that matters here.
        return {self.view.seen(split): self.layout.group_of(split) for split in self.layout.splits}

    def matrix(self, values: Tensor, real: Tensor | None) -> Matrix:
        """`values` `[b, m, n]` with the global counts a rule may need."""
        return Matrix(values=values, rows=self.rows, columns=self.view.columns, real=real)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some parameters of a stack, where their rule runs, and who owns each unit where owners do.

    `owners` has the group index of the owner of every unit, an expert or a whole parameter. `exchange_dtype` is what
    matrices travel as.
    """

    stack: Stack
    members: tuple[int, ...]
    """Indices into the optimizer's list of parameters."""
    placement: Placement
    owners: tuple[int, ...] = ()
    exchange_dtype: torch.dtype = torch.float32

    @property
    def everyone(self) -> tuple[int, ...]:
        """All members: each rank that has a job has all of it."""
        return self.members

    @functools.cached_property
    def route(self) -> Route:
        """How the matrices of an owner's job travel."""
        return Route(self.stack.layout, count=len(self.members), owners=self.owners)

    def task(self, begin: Begin, done: Callable[[Tensors, Tensors | None], None], *, note: Note | None = None) -> Task:
        """The job as a task that calls `begin` when it starts and `done(updates, moved)` when it has run.

        `begin` returns `(directions, gradients)`: this rank's pieces of what the rule transforms, in the order of
        `members`, which are not written to, and the gradients, where the stack holds stale rows. `updates` are such
        pieces too; `moved` holds 1 where a weight may move (decay included) and 0 where it may not, or is None where
        every weight moves. `note`, where given, is told every inverse root that is taken or received here.
        """
        home = self.stack.layout.group
        if self.placement == "owner":
            return Task(finished(self._at_owners(begin, note), done), home=home, placement="owner")
        # Every rank speaks that holds a part of the matrices: all of them, over as many as have other ones.
        batch = self.stack.seen.get("batch")
        asking = finished(
            noted(self._in_place(begin), note, range(len(self.members)), batch.size if batch is not None else 1), done
        )
        if self.placement == "local":
            return Task(asking)
        along: dict[str, Group] = {axis: group for axis, group in self.stack.seen.items() if axis != "batch"}
        return Task(asking, along=along, home=home, placement="reduce")

    def _in_place(self, begin: Begin) -> Generator[Any, Any, tuple[Tensors, Tensors | None]]:
        directions, gradients = begin()
        touched = None
        if gradients is not None:
            touched = torch.stack(gradients).ne(0)
        stored = torch.stack(directions) if len(directions) > 1 else directions[0].unsqueeze(0)
        del directions, gradients
        update, moved = yield from updated(self.stack, stored, touched, self.stack.layout.box[0])
        return list(update.unbind(0)), None if moved is None else list(moved.unbind(0))

    def _at_owners(self, begin: Begin, note: Note | None) -> Generator[Any, Any, tuple[Tensors, Tensors | None]]:
        stack, route = self.stack, self.route
        pieces, gradients = begin()
        layers = [pieces]
        if gradients is not None:
            # Whether a row was touched is known only where the row is whole, so that travels too.
            layers.append([gradient.ne(0).to(pieces[0].dtype) for gradient in gradients])
        del pieces, gradients
        if route.whole_here:
            wholes = [route.own_wholes(layer) for layer in layers]
        else:
            wholes = yield Ship(layers=layers, route=route, dtype=self.exchange_dtype, like=stack.like)
        del layers
        masked = stack.hold or stack.padding_rows > 0
        made = [wholes[0]] * (1 + masked)
        if route.owned:
            if len(stack.layout.shape) == 1:
                wholes = [whole.squeeze(-1) for whole in wholes]
            touched = wholes[1].ne(0) if stack.hold else None
            asking = updated(stack, wholes[0], touched, range(stack.layout.shape[0]))
            experts = len(self.owners) // len(self.members)
            units = [unit // experts for unit in route.owned_units]
            update, moved = answer_alone(noted(asking, note, units, route.group.size))
            made = [update] if moved is None else [update, moved]
            if len(stack.layout.shape) == 1:
                made = [tensor.unsqueeze(-1) for tensor in made]
        del wholes
        back = yield Return(
            layers=made, route=route, dtype=self.exchange_dtype, like=stack.like, shape=stack.layout.local_shape
        )
        return back[0], back[1] if masked else None


def finished(
    asking: Generator[Any, Any, tuple[Tensors, Tensors | None]], done: Callable[[Tensors, Tensors | None], None]
) -> Generator[Any, Any, None]:
    """The generator with its result handed to `done`."""
    # Handed on at once, so that no update outlives its use while others are under way.
    done(*(yield from asking))


def noted(
    asking: Generator[Any, Any, T], note: Note | None, members: Sequence[int], ranks: float
) -> Generator[Any, Any, T]:
    """The generator with every inverse root it is answered told to `note`: of `members`, and for so many `ranks`."""
    if note is None:
        return (yield from asking)
    answer: Any = None
    while True:
        try:
            request = asking.send(answer)
        except StopIteration as last:
            return last.value
        answer = yield request
        if isinstance(answer, InverseRoot):
            note(answer, members, ranks)


def updated(
    stack: Stack, stored: Tensor, touched: Tensor | None, rows: range
) -> Generator[Any, Any, tuple[Tensor, Tensor | None]]:
    """Run the rule on a stack of pieces or wholes, `rows` of the stored dimension 0; the update, and where it may move.

    `touched` says where a gradient is not zero, for a stack that holds stale rows.
    """
    shape = tuple(stored.shape)
    values = stack.view.matrices(stored)
    del stored
    real = _real_rows(stack, rows, values)
    if real is not None:
        values = values * real
    options: Mapping[str, Any] = dict(stack.options)
    update = yield from stack.rule.update(stack.matrix(values, real), **options)
    moved = real
    if touched is not None:
        count = stack.view.matrices(touched).sum(-1, keepdim=True).to(update.dtype)
        count = yield Sum(values=count, across="columns")
        moved = count.ne(0).to(update.dtype) * (1 if real is None else real)
    if moved is not None:
        update = update * moved
        moved = stack.view.stored_form(moved.expand_as(update), shape)
    return stack.view.stored_form(update, shape), moved


def _real_rows(stack: Stack, rows: range, values: Tensor) -> Tensor | None:
    if not stack.padding_rows:
        return None
    index = torch.arange(rows.start, rows.stop, device=values.device)
    return (index < stack.layout.shape[0] - stack.padding_rows).to(values.dtype)[:, None]
