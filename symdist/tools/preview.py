"""Shows what a recipe does to a model on a number of ranks, without the ranks and without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from symdist.assignment import Assignment, assignment
from symdist.exchange import CountingTransport
from symdist.routing.recipes import Recipe, RecipeLike, load_recipe
from symdist.routing.sites import find_sites
from symdist.tools.simulate import simulate


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What a recipe does to a model.

    Attributes:
        parameters: How each parameter is stepped, in the order of the model.
        groups: The number of param groups.
        stacks: The number of stacks, which each run as one; parameters that PyTorch's AdamW steps are in none.
        collectives: The number of collectives that one rank starts per step.
        sent: The bytes that it sends per step.
        evidence: By the name of a parameter, what told its role: "pattern" for a pattern of the recipe, otherwise the
            evidence of its `symdist.routing.param_site.ParamSite`. Empty if it is not known.
    """

    parameters: list[Assignment]
    groups: int
    stacks: int
    collectives: int
    sent: float
    evidence: Mapping[str, str] = field(default_factory=dict)


def preview(
    model: str | Path | nn.Module,
    recipe: RecipeLike,
    *,
    mesh: Mapping[str, int],
    zero: int | None = None,
    built: Mapping[str, Any] | None = None,
) -> Preview:
    """Route a model that is sharded over a mesh or partitioned by ZeRO, without creating weights.

    No process group may be open in this process, unless `zero` is given.

    Args:
        model: A preset, the path of a TOML file (see `symdist.tools.models.build`), or a module on the meta device,
            which is sharded in place.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        mesh: The sizes by name of mesh dimension; see `symdist.tools.models.shard`.
        zero: A ZeRO stage (1, 2 or 3), to store the weights in its partitions instead of in FSDP2 shards. The mesh then
            has `dp_shard` only. None by default.
        built: Further keyword arguments of `symdist.tools.models.build`. None by default.

    Returns:
        What the recipe does to the model.

    Raises:
        ValueError: If `build`, `shard`, `route` or `SymDist` would refuse the model, recipe or mesh.

    Example:
        >>> routing = preview("olmoe-tiny", "small-moe", mesh={"dp_shard": 2})
        >>> [(parameter.name, parameter.strategy) for parameter in routing.parameters]
    """
    with simulate(model, recipe, mesh=mesh, zero=zero, built=built) as simulated:
        counting = CountingTransport()
        simulated.step(counting)
        strategies, precisions = simulated.plan.strategies(), simulated.plan.precisions()
        assignments = {
            member.name: assignment(
                member, simulated.groups[member.group], strategies.get(i, "local"), precisions.get(i, "")
            )
            for i, member in enumerate(simulated.members)
        }
        evidence = _evidence(simulated.model, load_recipe(recipe))
        order = {name: i for i, (name, _) in enumerate(simulated.model.named_parameters())}

        def place(parameter: Assignment) -> int:
            # Sections, and the matrices of a stack in partitions, are named by their number in the parameter.
            name = parameter.name
            return order.get(name, order.get(name.rpartition("[")[0], len(order)))

        return Preview(
            parameters=sorted(assignments.values(), key=place),
            evidence={name: evidence.get(name) or evidence[name.rpartition("[")[0]] for name in assignments},
            groups=len(simulated.groups),
            stacks=len({member.stack for member in simulated.members} - {None}),
            collectives=counting.collectives,
            sent=counting.sent,
        )


def _evidence(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """Return what told the role of each parameter, by its name."""
    told: dict[str, str] = {}
    for name, (_, site) in find_sites(model).items():
        index = recipe.pattern_of(name)
        pattern = {} if index is None else recipe.patterns[index]
        # A pattern without a role changes options only, unless nothing else tells a role.
        told[name] = "pattern" if "role" in pattern or site.role is None else site.evidence
    return told
