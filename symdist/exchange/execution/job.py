"""A job: parameters of one stack that run together with one strategy, from where they are stored to there and back."""

import functools
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from symdist.exchange.collectives.gather_scatter import Batch, Gather, Redistribution, Scatter
from symdist.exchange.collectives.redistribution import redistribution_of
from symdist.exchange.collectives.residual_sums import StageContribution, StageSlot
from symdist.exchange.execution.scheduler import Task
from symdist.exchange.execution.stack import (
    PolarObserver,
    ReadInputs,
    Stack,
    Strategy,
    WriteOutputs,
    observed,
    run_rule,
)
from symdist.layouts import FlatLayout, Group, Layout
from symdist.rules.registry import MatrixAxis


@dataclass(frozen=True, kw_only=True)
class Job:
    """Some parameters of a stack, and where their rule runs.

    With strategy "local" each matrix is whole where it is stored, or the layout's cuts run between matrices. With
    "reduce", matrices stay cut, and the rule's sums run over ranks; rows that are cut are first completed on one rank
    each, and if the rule needs nothing from other rows, it then runs `alone`. With "owner", each unit is put together
    on its owner: one rank, or a team of ranks with a block each. A unit is an expert or a whole parameter.

    Attributes:
        stack: What the parameters have in common. Its layout is that of the matrices while the rule runs.
        members: The parameters that this rank takes part in, as indices in the optimizer's list. For the others it has
            nothing to send or to sum.
        everyone: The job's parameters on all ranks, as indices in the optimizer's list.
        layouts: How `members` are stored.
        strategy: Where the rule runs: "local", "reduce" or "owner".
        alone: Whether each matrix, or each row, is updated by a single rank that asks no other.
        owners: For strategy "owner", the owner of every unit: the group index of a rank, or the number of a team. The
            units of the first member come first.
        team: Whether owners are teams of ranks, over which the stack's layout cuts units: the rule then runs as with
            "reduce" within each team. False by default.
        multiple: How many consecutive rows must stay together; 1 by default.
        travels: Whether any rank sends anything to complete rows or matrices of flat layouts; True by default.
        column_blocks: The widths of the blocks of columns that flat matrices are stored in, one after another; empty if
            they are stored without such blocks.
        weigh: Returns how many bytes the busiest rank holds for the job, by phase; see `planning.buffers`. By default,
            it returns nothing.
        communication_dtype: The dtype in which pieces are sent.
        stages: The residual stages of `everyone`, if their rule couples the matrices of a stage; otherwise empty.
    """

    stack: Stack
    members: tuple[int, ...]
    everyone: tuple[int, ...]
    layouts: tuple[Layout | FlatLayout, ...]
    strategy: Strategy
    alone: bool
    owners: tuple[int, ...] = ()
    team: bool = False
    multiple: int = 1
    travels: bool = True
    column_blocks: tuple[int, ...] = ()
    weigh: Callable[[], Mapping[str, float]] = dict
    communication_dtype: torch.dtype = torch.float32
    stages: tuple[StageSlot, ...] = ()

    @functools.cached_property
    def redistribution(self) -> Redistribution:
        """How matrices get from where they are stored to where the rule runs, and updates back."""
        return redistribution_of(
            self.layouts,
            self.stack.layout,
            strategy=self.strategy,
            owners=self.owners,
            multiple=self.multiple,
            together=not self.alone or bool(self.stages),
            team=self.team,
            by_place=self.stack.padding_rows > 0,
            travels=self.travels,
            column_blocks=self.column_blocks,
        )

    @functools.cached_property
    def held(self) -> Mapping[str, float]:
        """What `weigh` returns."""
        return self.weigh()

    @property
    def along(self) -> dict[MatrixAxis, Group]:
        """The axes along which the rule's sums run, and their ranks; empty unless matrices stay cut."""
        splits = self.stack.splits if (self.strategy == "reduce" or self.team) and not self.alone else {}
        return {axis: group for axis, group in splits.items() if axis == "rows" or axis == "columns"}

    @property
    def parts(self) -> dict[MatrixAxis, int]:
        """For each axis along which matrices are cut while the rule runs, over how many ranks."""
        return {axis: group.size for axis, group in self.along.items()}

    @property
    def groups(self) -> set[Group]:
        """The groups that communicate for this job in a step."""
        moving = self.redistribution.gathers or self.redistribution.scatters
        home = self.stack.layout.group
        return {*self.along.values(), *((home,) if home is not None and (moving or self.stages) else ())}

    def only(self, members: set[int]) -> "Job | None":
        """Return the part of this job that belongs to some parameters.

        Args:
            members: The parameters, as indices in the optimizer's list.

        Returns:
            The job without all others; None if nothing is left that this rank takes part in.
        """
        indices = [i for i, member in enumerate(self.members) if member in members]
        everyone = [i for i, member in enumerate(self.everyone) if member in members]
        if not (indices or (everyone and self.alone and self.strategy != "local")):
            return None
        units = len(self.owners) // max(1, len(self.members))
        return replace(
            self,
            members=tuple(self.members[i] for i in indices),
            everyone=tuple(self.everyone[i] for i in everyone),
            layouts=tuple(self.layouts[i] for i in indices),
            owners=tuple(owner for i in indices for owner in self.owners[i * units : (i + 1) * units]),
            stages=tuple(self.stages[i] for i in everyone) if self.stages else (),
        )

    def task(
        self, read_inputs: ReadInputs, write_outputs: WriteOutputs, *, observe_polar: PolarObserver | None = None
    ) -> Task:
        """Make the task that runs this job.

        If the job communicates, every rank of the layout's group makes its own task for it and runs it in the same
        wave.

        Args:
            read_inputs: Called when the task starts; returns this rank's pieces.
            write_outputs: Called with this rank's pieces of the results when the task ends.
            observe_polar: Called for all polar factors that are computed on this rank; None (default) for
                nothing.

        Returns:
            The task, not started yet.
        """
        running = self._run(read_inputs, write_outputs, observe_polar)
        if self.strategy == "local" and not self.stages:
            return Task(running)
        return Task(running, along=self.along, home=self.stack.layout.group, strategy=self.strategy)

    def _run(
        self, read_inputs: ReadInputs, write_outputs: WriteOutputs, observe_polar: PolarObserver | None
    ) -> Generator[Any, Any, None]:
        """Bring the matrices to where the rule runs, update them, and bring the updates back."""
        way, dtype, like = self.redistribution, self.communication_dtype, self.stack.like
        # A rank that holds only a part of a row cannot tell whether the whole row's gradient is zero, so the mask is
        # sent too.
        fields = read_inputs().fields(self.stack.dtype)
        if way.gathers:
            assembled = yield Gather(fields=fields, route=way, dtype=dtype, like=like)
        else:
            assembled = [way.wholes({}, like=like, kept=way.kept(field)) for field in fields]
            fields.clear()
        updated = yield from self._updated(assembled, observe_polar)
        assembled.clear()
        if way.scatters:
            outputs = yield Scatter(fields=updated, route=way, dtype=dtype, like=like)
        else:
            outputs = [way.home({}, like=like, kept=way.kept_home(field)) for field in updated]
            updated.clear()
        # Write at once, so that the updates are freed while other tasks are still under way.
        write_outputs(self.stack.made(outputs))

    def _updated(
        self, assembled: list[Tensor], observe_polar: PolarObserver | None
    ) -> Generator[Any, Any, list[Tensor]]:
        """Run the rule on what this rank updates, batch by batch."""
        stack, way = self.stack, self.redistribution
        results: list[list[Tensor]] = []
        for i, batch in enumerate(way.batches):
            # A rank that owns no matrix still takes part in residual-stage sums; and a team, in the rounds of others.
            if not (batch.members or self.stages or self.team):
                continue
            pieces = [way.stacked(field, i) for field in assembled]
            running = observed(
                run_rule(stack, pieces, batch.box, self._contribution(pieces[0], batch), parts=self.parts),
                observe_polar,
                batch.members,
                self._ranks_a_report,
            )
            results.append((yield from running))
        fields = 1 + stack.masked + len(stack.state_names)
        return [way.unstacked([result[i] for result in results], like=stack.like) for i in range(fields)]

    def _contribution(self, pieces: Tensor, batch: Batch) -> StageContribution | None:
        """Return the part that the matrices of a batch have in residual-stage sums."""
        if not self.stages:
            return None
        stage_of = dict(zip(self.everyone, self.stages, strict=True))
        matrices = self.stack.view.matrices(pieces).shape[0] // max(1, len(batch.members))
        stages = [stage_of[self.members[i]] for i in batch.members for _ in range(matrices)]
        return StageContribution.of(stages, self.stages, copies=1 if self.alone else self.stack.layout.num_replicas)

    @property
    def _ranks_a_report(self) -> int:
        """How many ranks each report of a polar factor stands for, so that a matrix counts for the whole group."""
        if self.alone and self.stack.layout.group is not None:
            return self.stack.layout.group.size
        if self.team and self.stack.layout.group is not None and self.stack.layout.shard_group is not None:
            # Each rank of a team reports the same matrix, unless they have different heads.
            reports = 1 if "batch" in self.stack.splits else self.stack.layout.shard_group.size
            return self.stack.layout.group.size // reports
        # All ranks with a part of a matrix report it.
        batch = self.stack.splits.get("batch")
        return 1 if batch is None else batch.size
