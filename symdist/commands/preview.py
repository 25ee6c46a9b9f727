"""What a recipe comes to on a model over some number of ranks, found without the ranks and without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symdist.commands.pretend import pretend
from symdist.exchange import Counting, Placement
from symdist.groups import COMMON, Member
from symdist.recipes import RecipeLike
from symdist.rules import get_rule
from symdist.rules.registry import ACCUMULATOR_OPTIONS


@dataclass(frozen=True, kw_only=True)
class Routed:
    """One parameter: what it is, and how and where it will be stepped.

    `options` are those of its rule, and the decay, stale and padding rows, that are not at their defaults.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    options: dict[str, Any]
    lr: float
    view: Any
    placement: Placement


@dataclass(frozen=True, kw_only=True)
class Preview:
    """`parameters` in the model's order; `collectives` and `sent` bytes are what one rank does in a step.

    `stacks` counts what runs as one, apart from the groups that PyTorch's AdamW steps where they lie.
    """

    parameters: list[Routed]
    groups: int
    stacks: int
    collectives: int
    sent: float


def preview(model: str | Path, recipe: RecipeLike, *, ranks: int) -> Preview:
    """Shard a model over `ranks` as FSDP2 does, by decoder layer and the rest, and route it; nothing is materialised.

    `model` is a preset or a TOML file, see `symdist.models.build`. No process group may be open. Raises ValueError for
    whatever `build`, `route` and `SymDist` refuse.
    """
    if ranks < 1:
        raise ValueError(f"ranks={ranks} must be 1 or more")
    with pretend(model, recipe, mesh={"dp_shard": ranks}) as pretended:
        counting = Counting()
        pretended.step(counting)
        where = pretended.plan.placements()
        routed = {
            member.name: _routed(member, pretended.groups[member.group], where.get(i, "local"))
            for i, member in enumerate(pretended.members)
        }
        return Preview(
            parameters=[routed[name] for name, _ in pretended.model.named_parameters() if name in routed],
            groups=len(pretended.groups),
            stacks=len({member.stack for member in pretended.members} - {None}),
            collectives=counting.collectives,
            sent=counting.sent,
        )


def _routed(member: Member, group: dict[str, Any], placement: Placement) -> Routed:
    defaults = {
        **{key: value for key, value in COMMON.items() if key not in ("view", "placement", "role")},
        **ACCUMULATOR_OPTIONS[member.rule.accumulator],
        **get_rule(group["rule"]).defaults,
    }
    return Routed(
        name=member.name,
        shape=member.layout.shape,
        role=group["role"],
        rule=group["rule"],
        options={key: group[key] for key, value in defaults.items() if group[key] != value},
        lr=float(group["lr"]),
        view=group["view"],
        placement=placement,
    )
