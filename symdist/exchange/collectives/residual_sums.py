"""Residual stages: matrices that write to and read from one residual stream share sums, across stacks and ranks."""

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from symdist.exchange.collectives.reduce import answer_shared, answer_sums
from symdist.exchange.collectives.transport import Transport
from symdist.layouts import Group
from symdist.rules import Orthonormal, Places, StageSum, Sum, relayed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StageSlot:
    """A parameter's residual stage, and the part of what the stage shares that its matrix keeps; see `Places`.

    Attributes:
        label: The stage's label.
        width: How many columns the stage shares.
        first: The first of these columns that the matrix keeps; −1 if it keeps none.
    """

    label: str
    width: int
    first: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Which parameters are in which residual stage, and which stages are in which wave.

    Attributes:
        of_parameter: The stage of each parameter, by index.
        wave_of: The wave of each stage, by label.
    """

    of_parameter: Mapping[int, StageSlot]
    wave_of: Mapping[str, int]

    @staticmethod
    def cut(of_parameter: Mapping[int, StageSlot], sizes: Mapping[int, float], *, budget: float) -> "StagePlan":
        """Assign stages to waves in the order of the parameters, as many per wave as fit the budget, at least one.

        Args:
            of_parameter: The stage of each parameter, by index.
            sizes: The bytes that each parameter holds while under way, by index.
            budget: The bytes that a wave may hold.
        """
        needed: dict[str, float] = {}
        for i, stage in of_parameter.items():
            needed[stage.label] = needed.get(stage.label, 0.0) + sizes[i]
        wave_of: dict[str, int] = {}
        wave, held = 0, 0.0
        for label, size in needed.items():
            if held and held + size > budget:
                wave, held = wave + 1, 0.0
            wave_of[label] = wave
            held += size
        return StagePlan(of_parameter=of_parameter, wave_of=wave_of)

    def of(self, parameters: Iterable[int]) -> tuple[StageSlot, ...]:
        """Return the stages of the given parameters."""
        return tuple(self.of_parameter[i] for i in parameters)

    def wave(self, stages: Sequence[StageSlot]) -> int:
        """Return the wave of a job's stages; all of them are in one wave."""
        return self.wave_of[stages[0].label]

    def parts(self, items: Iterable[T], index: Callable[[T], int]) -> list[list[T]]:
        """Split items into parts that may share a job: same wave, same number of shared columns.

        Args:
            items: The items.
            index: Returns the parameter index of an item.
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
        labels: The stage of each matrix on this rank.
        every: The stages of all the job's matrices, on any rank.
        copies: How many ranks contribute the same matrices; each counts for its share.
        places: What each matrix keeps of what its stage shares, for the rule.
    """

    labels: tuple[str, ...]
    every: tuple[str, ...]
    copies: int
    places: Places

    @staticmethod
    def of(here: Sequence[StageSlot], every: Sequence[StageSlot], *, copies: int) -> "StageContribution":
        """Make the contribution of a job.

        Args:
            here: The stage of each matrix on this rank.
            every: The stages of all the job's parameters, all of one width; at least one.
            copies: How many ranks contribute the same matrices.
        """
        return StageContribution(
            labels=tuple(stage.label for stage in here),
            every=tuple(dict.fromkeys(stage.label for stage in every)),
            copies=copies,
            places=Places(width=every[0].width, firsts=tuple(stage.first for stage in here)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class StageRequest:
    """A rule's `StageSum`, with the contribution of the job that it runs in."""

    asked: StageSum
    share: StageContribution


def shared(asking: Generator[Any, Any, Any], share: StageContribution) -> Generator[Any, Any, Any]:
    """Wrap a running rule so that its `StageSum` requests become `StageRequest`s with `share`."""

    def relay(request: Any) -> Generator[Any, Any, Any]:
        return (yield StageRequest(asked=request, share=share) if isinstance(request, StageSum) else request)

    return relayed(asking, relay)


def answer_stages(
    requests: Sequence[StageRequest],
    *,
    group: Group | None,
    transport: Transport,
    loads: list[float] | None = None,
) -> Generator[Any, None, list[Tensor]]:
    """Sum each residual stage over this rank's matrices, then over the ranks.

    If the requests ask for it, one rank orthonormalises each sum. All ranks of the group must call it, for the same
    stages.

    Args:
        requests: Requests with values `[b, m, k]` of the same `m`, `k` and dtype.
        group: The ranks; None if this one holds all the matrices.
        transport: What runs the collectives.
        loads: Each rank's FLOPs so far, updated in place; they decide which ranks orthonormalise.

    Returns:
        For each request, the sum of each of its matrices' stages, `[b, m, k]`.
    """
    stages = sorted({label for request in requests for label in request.share.every})
    place = {label: i for i, label in enumerate(stages)}
    like = requests[0].asked.values
    total = like.new_zeros((len(stages), *like.shape[1:]))
    indices = []
    for request in requests:
        index = torch.tensor([place[label] for label in request.share.labels], dtype=torch.long, device=like.device)
        total.index_add_(0, index, request.asked.values, alpha=1 / request.share.copies)
        indices.append(index)
    answer = (
        Orthonormal(values=total, across="all") if requests[0].asked.orthonormal else Sum(values=total, across="all")
    )
    if group is None or group.size == 1:
        found = answer.answer_locally()
    elif isinstance(answer, Orthonormal):
        (found,) = yield from answer_shared([answer], group=group, transport=transport, loads=loads)
    else:
        (found,) = yield from answer_sums([answer], group=group, transport=transport)
    return [found.index_select(0, index) for index in indices]
