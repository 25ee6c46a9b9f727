"""Residual stages: matrices that write to and read from one residual stream share sums, across stacks and ranks."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from symdist.exchange.collectives.reduce import answer_shared, answer_sums
from symdist.exchange.collectives.transport import Handle, Transport
from symdist.layouts import Group
from symdist.rules import Orthonormal, Places, StageSum, Sum, relayed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageSlot:
    """The residual stage of a parameter, and the part of the stage's shared columns that its matrix stores.

    See `Places`, which has the same information for a whole stack of matrices.

    Attributes:
        label: The label of the stage.
        width: The number of columns that the stage shares.
        first: The first shared column that the matrix stores; −1 if it stores none.
    """

    label: str
    width: int
    first: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Which parameters belong to which residual stage, and which stages run in which wave.

    Attributes:
        of_parameter: The stage of each parameter, by parameter index.
        wave_of: The wave of each stage, by label.
    """

    of_parameter: Mapping[int, StageSlot]
    wave_of: Mapping[str, int]

    @staticmethod
    def cut(of_parameter: Mapping[int, StageSlot], sizes: Mapping[int, float], *, budget: float) -> "StagePlan":
        """Assign stages to waves, in the order of the parameters.

        A wave gets as many stages as fit the budget, and at least one.

        Args:
            of_parameter: The stage of each parameter, by parameter index.
            sizes: The bytes that each parameter holds while under way, by parameter index.
            budget: The bytes that a wave may hold.

        Returns:
            The plan.
        """
        stage_sizes: dict[str, float] = {}
        for i, stage in of_parameter.items():
            stage_sizes[stage.label] = stage_sizes.get(stage.label, 0.0) + sizes[i]
        wave_of: dict[str, int] = {}
        wave, wave_size = 0, 0.0
        for label, size in stage_sizes.items():
            if wave_size and wave_size + size > budget:
                wave, wave_size = wave + 1, 0.0
            wave_of[label] = wave
            wave_size += size
        return StagePlan(of_parameter=of_parameter, wave_of=wave_of)

    def of(self, parameters: Iterable[int]) -> tuple[StageSlot, ...]:
        """Return the stages of the given parameters.

        Args:
            parameters: Parameter indices.

        Returns:
            The stage of each parameter.
        """
        return tuple(self.of_parameter[i] for i in parameters)

    def wave(self, stages: Sequence[StageSlot]) -> int:
        """Return the wave in which a job runs.

        Args:
            stages: The stages of the job, which are all in the same wave.

        Returns:
            The number of the wave.
        """
        return self.wave_of[stages[0].label]

    def parts(self, items: Iterable[T], index: Callable[[T], int]) -> list[list[T]]:
        """Split items into parts that may share a job: those of the same wave with the same number of shared columns.

        Args:
            items: The items, each of which belongs to a parameter.
            index: A function that returns the parameter index of an item.

        Returns:
            The parts, by wave, then by number of shared columns.
        """
        parts: dict[tuple[int, int], list[T]] = {}
        for item in items:
            stage = self.of_parameter[index(item)]
            parts.setdefault((self.wave_of[stage.label], stage.width), []).append(item)
        return [parts[key] for key in sorted(parts)]


@dataclass(frozen=True, kw_only=True)
class StageContribution:
    """What this rank's matrices of a job contribute to residual-stage sums.

    Attributes:
        labels: The stage of each of the job's matrices on this rank.
        every: The stages of all the job's matrices on all ranks, each listed once.
        copies: How many ranks contribute the same matrices; each contribution is divided by this number.
        places: Which of the shared columns each matrix on this rank stores; passed to the rule.
    """

    labels: tuple[str, ...]
    every: tuple[str, ...]
    copies: int
    places: Places

    @staticmethod
    def of(local_stages: Sequence[StageSlot], every: Sequence[StageSlot], *, copies: int) -> "StageContribution":
        """Build the contribution of a job.

        Args:
            local_stages: The stage of each of the job's matrices on this rank.
            every: The stages of all the job's parameters; at least one, and all of the same width.
            copies: How many ranks contribute the same matrices.

        Returns:
            The contribution.
        """
        return StageContribution(
            labels=tuple(stage.label for stage in local_stages),
            every=tuple(dict.fromkeys(stage.label for stage in every)),
            copies=copies,
            places=Places(width=every[0].width, firsts=tuple(stage.first for stage in local_stages)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class StageRequest:
    """A rule's `StageSum` request, together with the contribution of the job in which the rule runs.

    Attributes:
        stage_sum: The rule's request.
        share: The contribution of the job.
    """

    stage_sum: StageSum
    share: StageContribution


def shared(asking: Generator[Any, Any, Any], share: StageContribution) -> Generator[Any, Any, Any]:
    """Wrap a running rule so that it yields a `StageRequest` in place of every `StageSum`.

    Args:
        asking: The running rule.
        share: The contribution of the job, which is put into the requests.

    Returns:
        The wrapped rule.
    """

    def relay(request: Any) -> Generator[Any, Any, Any]:
        return (yield StageRequest(stage_sum=request, share=share) if isinstance(request, StageSum) else request)

    return relayed(asking, relay)


def answer_stages(
    requests: Sequence[StageRequest],
    *,
    group: Group | None,
    transport: Transport,
    loads: list[float] | None = None,
) -> Generator[Handle, None, list[Tensor]]:
    """Sum each residual stage over this rank's matrices, then over the ranks.

    If the requests ask for it, each sum is also orthonormalised, by one rank. This is a generator: it yields the handle
    of each collective, and its caller resumes it once the wait on that handle has returned. All ranks of the group must
    call it, for the same stages.

    Args:
        requests: Requests with values `[b, m, k]` of the same `m`, `k` and dtype.
        group: The ranks to sum over; None if this rank holds all the matrices.
        transport: Runs the collectives.
        loads: The FLOPs that each rank has so far, updated in place; they decide which ranks orthonormalise. Zeros by
            default.

    Returns:
        For each request, the sum of the stage of each of its matrices, `[b, m, k]`.
    """
    stages = sorted({label for request in requests for label in request.share.every})
    index_of = {label: i for i, label in enumerate(stages)}
    like = requests[0].stage_sum.values
    total = like.new_zeros((len(stages), *like.shape[1:]))
    indices = []
    for request in requests:
        index = torch.tensor([index_of[label] for label in request.share.labels], dtype=torch.long)
        # The host does not wait for the copy.
        index = index.to(like.device, non_blocking=True)
        total.index_add_(0, index, request.stage_sum.values, alpha=1 / request.share.copies)
        indices.append(index)
    joint_request = (
        Orthonormal(values=total, across="all")
        if requests[0].stage_sum.orthonormal
        else Sum(values=total, across="all")
    )
    if group is None or group.size == 1:
        sums = joint_request.answer_locally()
    elif isinstance(joint_request, Orthonormal):
        (sums,) = yield from answer_shared([joint_request], group=group, transport=transport, loads=loads)
    else:
        (sums,) = yield from answer_sums([joint_request], group=group, transport=transport)
    return [sums.index_select(0, index) for index in indices]
