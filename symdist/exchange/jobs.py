"""A job: parameters of one shape, rule, options and layout, run as one stack where placement put them."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from symdist.exchange.requests import Return, Ship
from symdist.exchange.scheduler import Task
from symdist.layouts import Layout
from symdist.rules import Matrix, Rule, Sum, answer_alone
from symdist.views import View

Placement: TypeAlias = Literal["local", "reduce", "owner"]
Tensors: TypeAlias = list[Tensor]
Begin: TypeAlias = Callable[[], tuple[Tensors, Tensors | None]]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What parameters must share to run as one: nothing here differs between them.

    `options` are the rule's own, as sorted items. With `hold` a row of a matrix whose gradient is exactly zero does
    not move. The last `padding_rows` rows of the stored tensor take no part and never move.
    """

    rule: Rule
    options: tuple[tuple[str, Any], ...]
    view: View
    layout: Layout
    dtype: torch.dtype
    device: torch.device
    asked: str
    """The placement the user asked for, or "auto"."""
    hold: bool = False
    padding_rows: int = 0

    def matrix(self, values: Tensor, real: Tensor | None) -> Matrix:
        """`values` `[b, m, n]` with the global counts a rule may need."""
        return Matrix(values=values, rows=self.view.rows - self.padding_rows, columns=self.view.columns, real=real)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some parameters of a stack, where their rule runs, and who owns each where an owner does."""

    stack: Stack
    members: tuple[int, ...]
    """Indices into the optimizer's list of parameters."""
    placement: Placement
    axis: Literal["rows", "columns"] | None = None
    owners: tuple[int, ...] = ()

    def task(self, begin: Begin, done: Callable[[Tensors, Tensors | None], None]) -> Task:
        """The job as a task that calls `begin` when it starts and `done(updates, moved)` when it has run.

        `begin` returns `(directions, gradients)`: this rank's pieces of what the rule transforms, in the order of
        `members`, which are not written to, and the gradients, where the stack holds stale rows. `updates` are such
        pieces too; `moved` holds 1 where a weight may move (decay included) and 0 where it may not, or is None where
        every weight moves.
        """
        split = self.stack.layout.split
        if self.placement == "owner":
            assert split is not None
            return Task(_finish(self._at_owners(begin), done), group=split.group)
        held = split.here if split is not None and split.dim == 0 else range(self.stack.layout.shape[0])
        asking = _finish(_update(self.stack, begin, held), done)
        if self.placement == "local" or split is None:
            return Task(asking)
        return Task(asking, axis=self.axis, group=split.group)

    def _at_owners(self, begin: Begin) -> Generator[Any, Any, tuple[Tensors, Tensors | None]]:
        layout, k = self.stack.layout, len(self.members)
        pieces, gradients = begin()
        like = pieces[0].new_empty(0)
        owners = self.owners
        if gradients is not None:
            # Whether a row was touched is known only where the row is whole, so the gradients travel too.
            pieces = [*pieces, *(gradient.to(like.dtype) for gradient in gradients)]
            owners = owners * 2
        wholes = yield Ship(pieces=pieces, owners=owners, layout=layout)
        owned = len(wholes) // (1 if gradients is None else 2)
        home: Tensors = []
        if owned:
            given = wholes[:owned], wholes[owned:] if gradients is not None else None
            updates, moved = answer_alone(_update(self.stack, lambda: given, range(layout.shape[0])))
            home = [*updates, *(moved or [])]
        masked = self.stack.hold or self.stack.padding_rows > 0
        owners = self.owners * 2 if masked else self.owners
        back = yield Return(wholes=home, owners=owners, layout=layout, like=like)
        return back[:k], back[k:] if masked else None


def _finish(
    asking: Generator[Any, Any, tuple[Tensors, Tensors | None]], done: Callable[[Tensors, Tensors | None], None]
) -> Generator[Any, Any, None]:
    # Handed on at once, so that no update outlives its use while others are under way.
    done(*(yield from asking))


def _update(stack: Stack, begin: Begin, held: range) -> Generator[Any, Any, tuple[Tensors, Tensors | None]]:
    """Run the rule on the pieces of `begin`, of which `held` are the indices along the stored dimension 0."""
    directions, gradients = begin()
    stored = torch.stack(directions) if len(directions) > 1 else directions[0].unsqueeze(0)
    del directions
    shape = tuple(stored.shape)
    values = stack.view.matrices(stored)
    del stored
    real = _real_rows(stack, held, values)
    if real is not None:
        values = values * real
    options: Mapping[str, Any] = dict(stack.options)
    update = yield from stack.rule.update(stack.matrix(values, real), **options)
    moved = real
    if stack.hold:
        assert gradients is not None
        touched = stack.view.matrices(torch.stack(gradients)).ne(0).sum(-1, keepdim=True).to(update.dtype)
        touched = yield Sum(values=touched, across="columns")
        moved = touched.ne(0).to(update.dtype) * (1 if real is None else real)
    if moved is not None:
        update = update * moved
        moved = stack.view.stored_form(moved.expand_as(update), shape)
    updates = stack.view.stored_form(update, shape)
    return list(updates.unbind(0)), None if moved is None else list(moved.unbind(0))


def _real_rows(stack: Stack, held: range, values: Tensor) -> Tensor | None:
    if not stack.padding_rows:
        return None
    rows = torch.arange(held.start, held.stop, device=values.device)
    return (rows < stack.layout.shape[0] - stack.padding_rows).to(values.dtype)[:, None]
