"""Plans a step: groups the parameters into stacks, and gives every residual stage its shared columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch.distributed.tensor import DTensor

from symdist.exchange import ExchangeOptions, Plan, Stack, StageSlot, Transport, check_agreement, lines_of, make_plan
from symdist.gradients.nonfinite import ranks_that_agree
from symdist.layouts import Group
from symdist.param_specs import ParamSpec, members_of
from symdist.routing.residual_stream import ResidualStage

_REMEDY = "use share = 'matrix', which gives every matrix a rotation of its own"


class StepPlanner:
    """Plans the steps of one optimizer, and remembers the plan until parameters are frozen, thawed or replaced.

    Args:
        exchange: The settings of the communication.
        transport: The transport, which makes its process groups when a plan first needs them.
        process_group: The ranks that must agree on gradients; None to find them from the parameters' meshes.
        replicate_group: The ranks that hold identical plain tensors; None if not known.

    Attributes:
        peers: The ranks that must agree on gradients, as of the last plan; None if this rank trains alone.
    """

    def __init__(
        self,
        *,
        exchange: ExchangeOptions,
        transport: Transport,
        process_group: Group | None,
        replicate_group: Group | None,
    ):
        self.exchange = exchange
        self.transport = transport
        self.replicate_group = replicate_group
        self.peers: Group | None = None
        self._process_group = process_group
        self._plan: Plan | None = None
        self._trainable: list[bool] = []

    def plan(self, specs: Sequence[ParamSpec]) -> Plan:
        """Return the plan for these parameters, made anew if others are trainable than before.

        Args:
            specs: All parameters of the optimizer.

        Returns:
            The plan, the same on all ranks that hold the same parameters.

        Raises:
            ValueError: As `plan_params` and `check_stages`.
        """
        trainable = [spec.parameter.requires_grad for spec in specs]
        if self._plan is None or trainable != self._trainable:
            plan = plan_params(specs, exchange=self.exchange)
            self.peers = self.peers_of(specs)
            check_stages(plan, self.peers)
            self.transport.prepare(plan.groups() | ({self.peers} if self.peers is not None else set()))
            self._plan, self._trainable = plan, trainable
        return self._plan

    def agree(self, specs: Sequence[ParamSpec]) -> None:
        """Compare the plans of all ranks, which must call it together, as they do at construction.

        Args:
            specs: All parameters of the optimizer.

        Raises:
            PlanError: On all ranks, if ranks that must run the same collectives have planned different ones.
            ValueError: As `plan`.
        """
        plan = self.plan(specs)
        if self.peers is not None and self.peers.size > 1:
            lines = lines_of(plan, [member.name for member in members_of(specs)])
            check_agreement(lines, peers=self.peers, transport=self.transport)

    def forget(self) -> None:
        """Make the next plan anew, because parameters were added or replaced."""
        self._plan = None

    def peers_of(self, specs: Sequence[ParamSpec]) -> Group | None:
        """Return the ranks that must take each step of these parameters together; None if this rank trains alone."""
        if self._process_group is not None:
            return self._process_group
        layouts = [spec.layout for spec in specs if not isinstance(spec.parameter, DTensor)]
        return ranks_that_agree([spec.parameter for spec in specs], layouts, replicas=self.replicate_group)


def plan_params(specs: Sequence[ParamSpec], *, exchange: ExchangeOptions) -> Plan:
    """Group the parameters into stacks and choose where each stack runs.

    Parameters without a stack and frozen parameters are not part of the plan.

    Args:
        specs: All parameters of the optimizer.
        exchange: The settings of the communication.

    Returns:
        The plan, the same on all ranks that hold the same parameters; its indices are those of `members_of(specs)`.

    Raises:
        ValueError: Naming a parameter, if its layout does not allow its strategy, or its residual stage cannot be
            shared.
    """
    specs = members_of(specs)
    stacks: dict[Stack, list[int]] = {}
    for i, spec in enumerate(specs):
        if spec.stack is not None and spec.parameter.requires_grad:
            stack = spec.stack
            if exchange.hardware_given or stack.device.type == "meta":
                stack = replace(stack, hardware=exchange.hardware)
            stacks.setdefault(stack, []).append(i)
    return make_plan(
        stacks,
        names=[spec.name for spec in specs],
        layouts=[spec.layout for spec in specs],
        exchange=exchange,
        stages=_stage_slots(specs),
    )


def _stage_slots(specs: Sequence[ParamSpec]) -> dict[int, StageSlot]:
    """Return, for every coupled parameter by index, its stage and which of the stage's shared columns it stores."""
    by_stage: dict[ResidualStage, list[int]] = {}
    for i, spec in enumerate(specs):
        if spec.stage is not None and spec.parameter.requires_grad:
            by_stage.setdefault(spec.stage, []).append(i)
    towers = {stage.tower for stage in by_stage if stage.tower is not None}
    if by_stage and len(towers) != 1:
        raise ValueError(
            "share = 'residual_stage' needs one stack of numbered layers, and the names of these parameters show "
            f"{', '.join(sorted(towers)) or 'none'}; {_REMEDY}"
        )
    last = max((stage.number for stage in by_stage if stage.number is not None), default=0)
    by_number: dict[int, list[int]] = {}
    for stage, indices in by_stage.items():
        by_number.setdefault(last if stage.number is None else stage.number, []).extend(indices)
    slots: dict[int, StageSlot] = {}
    for number in sorted(by_number):
        slots.update(_slots_of_stage(specs, sorted(by_number[number]), number))
    return slots


def _slots_of_stage(specs: Sequence[ParamSpec], indices: Sequence[int], number: int) -> dict[int, StageSlot]:
    stacks: dict[int, Stack] = {}
    # Error messages name only one parameter per width and per set of ranks, as there may be hundreds of experts.
    name_by_width: dict[int, str] = {}
    name_by_ranks: dict[tuple[int, ...], str] = {}
    for i in indices:
        stack = specs[i].stack
        assert stack is not None
        stacks[i] = stack
        group = stack.layout.group
        name_by_width.setdefault(stack.rows, specs[i].name)
        name_by_ranks.setdefault(() if group is None else group.ranks, specs[i].name)
    if len(name_by_width) > 1:
        widths = ", ".join(f"{width} in {name}" for width, name in sorted(name_by_width.items()))
        raise ValueError(f"stage {number} of the residual stream has matrices of several widths: {widths}; {_REMEDY}")
    if len(name_by_ranks) > 1:
        places = ", ".join(f"{name} on {ranks or 'this rank alone'}" for ranks, name in sorted(name_by_ranks.items()))
        raise ValueError(
            f"the matrices of stage {number} of the residual stream lie on different ranks: {places}; {_REMEDY}, for "
            "some of them or for all"
        )
    (stream_width,) = name_by_width
    num_columns = 0
    first_columns: dict[int, int] = {}
    for i in indices:
        stores = specs[i].holds and num_columns < stream_width
        first_columns[i] = num_columns if stores else -1
        num_columns += min(stacks[i].columns, stream_width - num_columns) if stores else 0
    if num_columns == 0:
        raise ValueError(
            f"stage {number} of the residual stream has only experts, such as {specs[indices[0]].name}, and experts "
            f"do not store a shared rotation; {_REMEDY}"
        )
    return {i: StageSlot(label=f"{number:06d}", width=num_columns, first=first_columns[i]) for i in indices}


def check_stages(plan: Plan, peers: Group | None) -> None:
    """Check that no other rank can hold more matrices of the residual stages in a plan.

    Args:
        plan: The plan of a step.
        peers: The ranks that train this model; None if this rank trains alone.

    Raises:
        ValueError: If other ranks may hold more matrices of these stages.
    """
    coupled = [job for job in plan.jobs if job.stages]
    if not coupled or peers is None or peers.size == 1:
        return
    group = coupled[0].stack.layout.group
    if group is None or set(group.ranks) != set(peers.ranks):
        raise ValueError(
            f"share = 'residual_stage': ranks {peers.ranks} train this model, but the matrices of this rank lie on "
            f"{group.ranks if group is not None else 'this rank alone'}, so the others may hold more matrices of the "
            f"same stages, as under pipeline parallelism; {_REMEDY}. If plain tensors are the same on all ranks, pass "
            "replicate_group="
        )
