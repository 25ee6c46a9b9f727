"""What a recipe comes to on a model over some number of ranks, found without the ranks and without the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from symdist.exchange import Counting, Job, Placement, describe, run
from symdist.groups import COMMON, Member, complete_group, describe_member, place_members
from symdist.layouts import local
from symdist.models import build, shard
from symdist.optimizer import WAVE_BYTES
from symdist.recipes import RecipeLike
from symdist.routing import route
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
    with _pretended(ranks) as mesh:
        sharded = shard(build(model, device="meta"), mesh)
        groups = [complete_group(group) for group in route(sharded, recipe)]
        members = [
            describe_member(parameter, name=name, index=i, group=group)
            for i, group in enumerate(groups)
            for name, parameter in zip(group["names"], group["params"], strict=True)
        ]
        waves = place_members(members, wave_bytes=WAVE_BYTES)
        moved = _dry_step(members, waves)
        where = describe(waves)
        routed = {
            member.name: _routed(member, groups[member.group], where.get(i, "local"))
            for i, member in enumerate(members)
        }
        return Preview(
            parameters=[routed[name] for name, _ in sharded.named_parameters() if name in routed],
            groups=len(groups),
            stacks=len({member.stack for member in members} - {None}),
            collectives=moved.collectives,
            sent=moved.sent,
        )


@contextmanager
def _pretended(ranks: int) -> Iterator[DeviceMesh]:
    """A mesh of which this process is rank 0, and the other ranks do not exist."""
    # Not public, but the only process group that has a size and no peers.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def _dry_step(members: list[Member], waves: list[list[Job]]) -> Counting:
    """What a step moves: one number a group for the agreement on finite gradients, and its jobs, on meta tensors."""
    counting = Counting()
    for group in {member.layout.split.group for member in members if member.layout.split is not None}:
        counting.all_reduce(local(members[0].parameter).new_empty(1), group=group)
    for wave in waves:
        run([job.task(partial(_pieces, job, members), lambda updates, moved: None) for job in wave], transport=counting)
    return counting


def _pieces(job: Job, members: list[Member]) -> tuple[list[Tensor], list[Tensor] | None]:
    pieces = [local(members[i].parameter).detach().to(job.stack.dtype) for i in job.members]
    return pieces, pieces if job.stack.hold else None


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
