"""What a recipe comes to on a model over some number of ranks, found without the ranks and without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symdist.assignment import Assignment, assignment
from symdist.exchange import CountingTransport
from symdist.routing.recipes import RecipeLike
from symdist.tools.simulate_flat import simulate_on


@dataclass(frozen=True, kw_only=True)
class Preview:
    """`parameters` in the model's order; `collectives` and `sent` bytes are what one rank does in a step.

    `stacks` counts what runs as one, apart from the groups that PyTorch's AdamW steps where they lie.
    """

    parameters: list[Assignment]
    groups: int
    stacks: int
    collectives: int
    sent: float


def preview(
    model: str | Path,
    recipe: RecipeLike,
    *,
    mesh: Mapping[str, int],
    zero: int | None = None,
    built: Mapping[str, Any] | None = None,
) -> Preview:
    """Route a model that is sharded over a mesh, or in the partitions of a ZeRO stage; nothing is materialised.

    `model` is a preset or a TOML file, with further options of `symdist.tools.models.build` in `built`. No process
    group may be open. Raises ValueError for whatever `build`, `shard`, `route` and `SymDist` refuse.
    """
    with simulate_on(model, recipe, mesh=mesh, zero=zero, built=built) as simulated:
        counting = CountingTransport()
        simulated.step(counting)
        where = simulated.plan.strategies()
        found = {
            member.name: assignment(member, simulated.groups[member.group], where.get(i, "local"))
            for i, member in enumerate(simulated.members)
        }
        order = {name: i for i, (name, _) in enumerate(simulated.model.named_parameters())}
        return Preview(
            # Parts of a parameter come after all that are in one.
            parameters=sorted(found.values(), key=lambda each: order.get(each.name, len(order))),
            groups=len(simulated.groups),
            stacks=len({member.stack for member in simulated.members} - {None}),
            collectives=counting.collectives,
            sent=counting.sent,
        )
