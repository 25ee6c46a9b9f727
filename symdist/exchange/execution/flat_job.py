"""A job over flat layouts: ranks hold ranges of elements, from which rows or whole matrices are put together."""

import functools
import itertools
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symdist.exchange.collectives.flat_redistribution import FlatRedistribution, owned_by
from symdist.exchange.collectives.redistribution import Gather, Scatter
from symdist.exchange.collectives.residual_sums import StageContribution, StageSlot
from symdist.exchange.execution.job import (
    ReadInputs,
    RootObserver,
    Stack,
    Strategy,
    Tensors,
    WriteOutputs,
    answered_locally,
    observed,
    run_rule,
    written,
)
from symdist.exchange.execution.scheduler import Task
from symdist.layouts import Group
from symdist.layouts.flat import FlatLayout, elements_of, matrices_of, runs_of_rows
from symdist.matrix_views import SplitKind
from symdist.rules import run_locally


@dataclass(frozen=True, kw_only=True)
class FlatJob:
    """Some parameters of one kind in flat layouts, and where their rule runs.

    Strategy "local": each parameter is whole on this rank. Strategy "owner": each parameter is put together on its
    owner. Strategy "reduce": rows that are cut are first completed on one rank each. Then there are two cases. If the
    rule needs nothing from other rows (`alone`), each parameter may be cut differently. Otherwise all parameters are
    cut alike, and the rule's sums run over the ranks given by the layout of `stack`.

    Attributes:
        stack: What the parameters have in common.
        members: The parameters that this rank takes part in, as indices in the optimizer's list. For the others it has
            nothing to send or to sum.
        everyone: The job's parameters on all ranks, as indices in the optimizer's list.
        layouts: The layouts of `members`.
        strategy: Where the rule runs: "local", "reduce" or "owner".
        owners: For strategy "owner", the group index of the owner of each of `members`.
        multiple: How many consecutive rows must stay together; 1 by default.
        alone: For strategy "reduce", whether the rule needs nothing from other rows.
        travels: Whether any rank sends anything to complete rows or matrices.
        flight_bytes: How many bytes the busiest rank holds while the job is under way.
        communication_dtype: The dtype in which pieces are sent.
        stages: The residual stages of `everyone`, if the rule couples the matrices of a stage; all matrices then go to
            owners. Otherwise empty.
        column_blocks: The widths of the blocks of columns that are stored one after another; empty if the matrices are
            stored without such blocks.
    """

    stack: Stack
    members: tuple[int, ...]
    everyone: tuple[int, ...]
    layouts: tuple[FlatLayout, ...]
    strategy: Strategy
    owners: tuple[int, ...] = ()
    multiple: int = 1
    alone: bool = False
    travels: bool = True
    flight_bytes: float = 0.0
    communication_dtype: torch.dtype = torch.float32
    stages: tuple[StageSlot, ...] = ()
    column_blocks: tuple[int, ...] = ()

    @property
    def group(self) -> Group:
        """The ranks over which the parameters are sharded."""
        assert self.stack.layout.group is not None
        return self.stack.layout.group

    @property
    def summed(self) -> dict[SplitKind, Group]:
        """The axes along which the rule's sums run, and their ranks; empty unless matrices stay cut."""
        in_place = self.strategy == "reduce" and not self.alone
        return {axis: group for axis, group in self.stack.splits.items() if axis != "batch"} if in_place else {}

    @functools.cached_property
    def route(self) -> FlatRedistribution:
        """How ranges of elements become whole rows (reduce) or matrices (owner), and how updates return."""
        held = [layout.runs for layout in self.layouts]
        if self.strategy == "owner":
            wanted = [owned_by(owner, layout.shape) for owner, layout in zip(self.owners, self.layouts, strict=True)]
        else:
            wanted = [runs_of_rows(layout.by_rows(multiple=self.multiple)) for layout in self.layouts]
        return FlatRedistribution(self.group, have=held, want=wanted)

    def task(
        self, read_inputs: ReadInputs, write_outputs: WriteOutputs, *, observe_root: RootObserver | None = None
    ) -> Task:
        """Make the task that runs this job.

        Unless the strategy is "local", every rank of the group makes its own task for the job and runs it in the same
        wave.

        Args:
            read_inputs: Called when the task starts; returns this rank's pieces.
            write_outputs: Called with this rank's pieces of the results when the task ends.
            observe_root: Called with every inverse root that is computed or received on this rank; None (default) for
                nothing.

        Returns:
            The task, not started yet.
        """
        if self.strategy == "local":
            running = observed(self._update_local(read_inputs), observe_root, range(len(self.members)), self.group.size)
            return Task(written(self.stack, running, write_outputs))
        along: dict[str, Group] = dict(self.summed.items())
        running_together = written(self.stack, self._update_sent(read_inputs, observe_root), write_outputs)
        return Task(running_together, along=along, home=self.group, strategy=self.strategy)

    def _update_local(self, read_inputs: ReadInputs) -> Generator[Any, Any, list[Tensors]]:
        """Update parameters that are whole on this rank."""
        shape = self.stack.layout.shape
        fields = [
            (torch.stack(field) if len(field) > 1 else field[0]).view(-1, *shape)
            for field in read_inputs().fields(self.stack.dtype)
        ]
        outputs = yield from run_rule(self.stack, fields, [range(size) for size in shape])
        return [list(field.flatten(1)) for field in outputs]

    def _update_sent(
        self, read_inputs: ReadInputs, observe_root: RootObserver | None
    ) -> Generator[Any, Any, list[Tensors]]:
        """Put rows or matrices together, update them, and send the updates back."""
        stack, route = self.stack, self.route
        # A rank that holds only a part of a row cannot tell whether the whole row's gradient is zero, so the mask is
        # sent too.
        fields = read_inputs().fields(stack.dtype)
        if self.travels:
            wanted = yield Gather(fields=fields, route=route, dtype=self.communication_dtype, like=stack.like)
        else:
            wanted = [route.wholes({}, like=stack.like, kept=route.kept(field)) for field in fields]
        del fields
        if self.summed:
            outputs = yield from observed(self._update_in_place(wanted), observe_root, range(len(self.members)), 1)
        elif self.stages:
            outputs = yield from self._update_in_stages(wanted, observe_root)
        else:
            outputs = self._update_alone(wanted, observe_root)
        del wanted
        if self.travels:
            return (
                yield Scatter(fields=outputs, route=route, dtype=self.communication_dtype, like=stack.like, shape=())
            )
        return [route.home({}, shape=(), like=stack.like, kept=route.kept_home(field)) for field in outputs]

    def _update_in_place(self, wanted: list[Tensor]) -> Generator[Any, Any, list[Tensor]]:
        """Update all members as one stack, with sums over the other ranks; all members are cut alike."""
        layout = self.stack.layout
        stacks = [field.view(len(self.members), *layout.local_shape) for field in wanted]
        outputs = yield from run_rule(self.stack, stacks, layout.box)
        return [tensor.reshape(-1) for tensor in outputs]

    def _update_in_stages(
        self, wanted: list[Tensor], observe_root: RootObserver | None
    ) -> Generator[Any, Any, list[Tensor]]:
        """Update the matrices that this rank owns, with residual-stage sums.

        A rank that owns no matrix still takes part in these sums.
        """
        stack = self.stack
        stage_of = dict(zip(self.everyone, self.stages, strict=True))
        owned = [i for i, (start, stop) in enumerate(self.route.wanted) if stop > start]
        owned_stages = [stage_of[self.members[i]] for i in owned for _ in range(stack.view.count)]
        contribution = StageContribution.of(owned_stages, self.stages, copies=1)
        shape = stack.layout.shape
        flat = [field.view(len(owned), math.prod(shape)) for field in wanted]
        stacks = [matrices_of(field, shape, column_blocks=self.column_blocks) for field in flat]
        running = run_rule(stack, stacks, [range(size) for size in shape], contribution)
        outputs = yield from answered_locally(observed(running, observe_root, owned, self.group.size))
        return [elements_of(field, column_blocks=self.column_blocks).reshape(-1) for field in outputs]

    def _update_alone(self, wanted: list[Tensor], observe_root: RootObserver | None) -> list[Tensor]:
        """Update whole matrices or rows that need no other rank, in batches of those with the same number of rows."""
        stack = self.stack
        outputs = [torch.empty_like(wanted[0]) for _ in range(1 + stack.masked + len(stack.state_names))]
        width = self.layouts[0].width if self.layouts else 1
        batches: dict[tuple[int, int], dict[int, slice]] = {}
        offset = 0
        for member, (start, stop) in enumerate(self.route.wanted):
            if stop > start:
                # The first row matters only for padding; without padding, pieces with the same number of rows are
                # alike.
                key = (start if stack.padding_rows else 0, stop - start)
                batches.setdefault(key, {})[member] = slice(offset, offset + stop - start)
            offset += stop - start
        for (start, size), slice_of in batches.items():
            slices = list(slice_of.values())
            rows = range(start // width, (start + size) // width)
            shape = (len(slices), len(rows), *stack.layout.shape[1:])
            flat = [_stacked(field, slices).view(len(slices), -1) for field in wanted]
            # Only whole matrices can have column blocks; `matrix` puts these side by side.
            stacks = [
                self.layouts[0].matrix(field) if self.strategy == "owner" else field.view(shape) for field in flat
            ]
            running = run_rule(stack, stacks, [rows, *(range(size) for size in stack.layout.shape[1:])])
            results = run_locally(observed(running, observe_root, list(slice_of), self.group.size))
            for field, tensor in zip(outputs, results, strict=True):
                parts = self.layouts[0].elements(tensor) if self.strategy == "owner" else tensor.flatten(1)
                for destination, part in zip(slices, parts, strict=True):
                    field[destination] = part
        return outputs


def _stacked(field: Tensor, slices: list[slice]) -> Tensor:
    """Return the given parts of a vector, one after another; a view if they are adjacent."""
    if all(a.stop == b.start for a, b in itertools.pairwise(slices)):
        return field[slices[0].start : slices[-1].stop]
    return torch.stack([field[part] for part in slices])
