"""Stages: matrices of several stacks that share a sum, as those that write to and read from one residual stream do."""

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
    """A matrix's stage, by its label, and what it keeps of what the stage shares: see `Places`."""

    label: str
    width: int
    first: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What matrices are in which stage, by their parameters' indices, and in which wave each stage is stepped."""

    of_parameter: Mapping[int, StageSlot]
    wave_of: Mapping[str, int]

    @staticmethod
    def cut(of_parameter: Mapping[int, StageSlot], sizes: Mapping[int, float], *, budget: float) -> "StagePlan":
        """StagePlan to waves, in the order of the parameters: as many in one as `budget` holds of `sizes`, or one."""
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
        """Those of some parameters."""
        return tuple(self.of_parameter[i] for i in parameters)

    def wave(self, stages: Sequence[StageSlot]) -> int:
        """The wave of a job's stages, which is one."""
        return self.wave_of[stages[0].label]

    def parts(self, items: Iterable[T], index: Callable[[T], int]) -> list[list[T]]:
        """Items by what one job may have: parameters of one wave, that share columns of one number."""
        parts: dict[tuple[int, int], list[T]] = {}
        for item in items:
            stage = self.of_parameter[index(item)]
            parts.setdefault((self.wave_of[stage.label], stage.width), []).append(item)
        return [parts[key] for key in sorted(parts)]


@dataclass(frozen=True, kw_only=True)
class StageContribution:
    """What a stack of matrices here has to say in its stages' sums.

    `labels` has the stage of every matrix here, `every` those of the whole job, here or not. Of what is said `copies`
    ranks say the same. `places` is for the rule.
    """

    labels: tuple[str, ...]
    every: tuple[str, ...]
    copies: int
    places: Places

    @staticmethod
    def of(here: Sequence[StageSlot], every: Sequence[StageSlot], *, copies: int) -> "StageContribution":
        """That of the matrices `here` of a job of `every` parameter, all of one width."""
        return StageContribution(
            labels=tuple(stage.label for stage in here),
            every=tuple(dict.fromkeys(stage.label for stage in every)),
            copies=copies,
            places=Places(width=every[0].width, firsts=tuple(stage.first for stage in here)),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class StageRequest:
    """A rule's `StageSum` with who asks it."""

    asked: StageSum
    share: StageContribution


def shared(asking: Generator[Any, Any, Any], share: StageContribution) -> Generator[Any, Any, Any]:
    """The generator with its `StageSum` requests made those of `share`."""

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
    """Sum up what is here of each stage, then over the ranks; one of them makes a sum orthonormal.

    All ranks of the group ask for the same stages. Without a group nobody else has any part.
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
