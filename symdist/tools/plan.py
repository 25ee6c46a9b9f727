"""What a step costs on a mesh: bytes, collectives, operations and memory, found by running it on meta tensors."""

from __future__ import annotations

import json
import math
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.utils.flop_counter import FlopCounterMode

from symdist.diagnostics.memory import peak_bytes
from symdist.exchange import CountingTransport, ExchangeLike, Stack
from symdist.exchange.planning.costs import unit_cost, units_of
from symdist.layouts import FlatLayout, Group, Layout
from symdist.routing.recipes import RecipeLike
from symdist.rules.linalg.orthonormal import OPERATIONS
from symdist.tools.models import active_parameters
from symdist.tools.simulate import Simulated
from symdist.tools.simulate_flat import simulate_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORT = {"dp": "dp_shard"}
_ORDER = ("dp_replicate", "dp_shard", "ep", "tp")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank can do, for estimates of time: the order of an H100 on 400 Gb/s, unless said otherwise."""

    bandwidth: float = 50e9
    """Bytes a second that a rank sends."""
    flops: float = 60e12
    """Operations a second of the optimizer's products, float32."""
    model_flops: float = 400e12
    """Operations a second of forward and backward, as achieved."""
    tokens: int = 16384
    """Tokens of a data-parallel rank and step."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """A rank's share of a step. `sent` and `peak_bytes` in bytes, `flops` counts matrix products."""

    sent: float
    collectives: int
    flops: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class RoleCosts:
    """The parameters of one role, stepped alone by the rank that sends most in a whole step.

    `strategies` counts parameters. Roles share collectives, so that theirs do not add up to those of the step.
    """

    role: str
    rules: tuple[str, ...]
    parameters: int
    weights: int
    strategies: Mapping[str, int]
    costs: Costs


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What another way of stepping the same matrices would move and compute on a rank, by arithmetic."""

    name: str
    sent: float
    collectives: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """A step on a mesh.

    `busiest` has, of each cost, the most that any of the ranks looked at has; `mean_sent` is over the same ranks, all
    of them where `looked_at` is the number of ranks. `balance` is the most operations of any rank over the mean of all
    ranks, `indivisible` the same of a single largest unit: no assignment of whole matrices has a lower balance.
    """

    model: str
    recipe: str
    mesh: Mapping[str, int]
    ranks: int
    looked_at: int
    roles: list[RoleCosts]
    busiest: Costs
    mean_sent: float
    waves: int
    balance: float
    indivisible: float
    communication_seconds: float
    compute_seconds: float
    model_seconds: float
    machine: Machine
    alternatives: list[Alternative]

    @property
    def share(self) -> float:
        """The optimizer's share of a step, where communication and compute hide nothing of each other."""
        optimizer = self.communication_seconds + self.compute_seconds
        return optimizer / (optimizer + self.model_seconds)

    def write(self, path: Path) -> None:
        """Write all of it as JSON."""
        path.write_text(json.dumps({**asdict(self), "share": self.share}, indent=2) + "\n")


def parse_mesh(text: str) -> dict[str, int]:
    """`"dp=64,tp=8"` as sizes by mesh dimension: dp_replicate, dp_shard (or dp), ep, tp. Raises ValueError."""
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, equals, size = part.partition("=")
        name = _SHORT.get(name.strip(), name.strip())
        if name not in _ORDER or not equals or not size.strip().isdigit() or int(size) < 1 or name in mesh:
            raise ValueError(
                f"mesh {text!r}: {part.strip()!r} should be NAME=SIZE, each once; names are {', '.join(_ORDER)}, "
                "and dp for dp_shard"
            )
        mesh[name] = int(size)
    return {name: mesh[name] for name in _ORDER if name in mesh}


def smaller_meshes(mesh: Mapping[str, int], *, most: int = 6) -> list[dict[str, int]]:
    """The mesh with fewer data-parallel ranks, halved again and again, smallest first."""
    name = "dp_shard" if "dp_shard" in mesh else max(mesh, key=lambda name: mesh[name])
    sizes: list[int] = []
    size = mesh[name]
    while size % 2 == 0 and size > 2 and len(sizes) < most:
        size //= 2
        sizes.append(size)
    return [{**mesh, name: size} for size in reversed(sizes)]


def plan_step(
    model: str | Path,
    recipe: RecipeLike,
    *,
    mesh: Mapping[str, int],
    zero: int | None = None,
    built: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    exchange: ExchangeLike = None,
    alternatives: bool = False,
) -> StepPlan:
    """Run a step on meta tensors, as four to sixteen ranks of the mesh would, that with most work among them.

    Every rule, request and collective of `SymDist.step` runs, with the same arithmetic on the same shapes; only nothing
    is stored or sent. `built` has further options of `symdist.tools.models.build`. With `zero`, weights lie in the
    partitions of that ZeRO stage, over a mesh of `dp_shard` alone. Raises ValueError for whatever `build`, `shard`,
    `route` and `SymDist` refuse.
    """
    machine = machine or Machine()
    with simulate_on(
        model,
        recipe,
        mesh=mesh,
        zero=zero,
        built=built,
        exchange=exchange,
    ) as simulated:
        work = _by_rank(simulated, simulated.step(CountingTransport()))
        looked_at = _sample(work, most=_ranks_to_look_at(simulated))
        found = {rank: _costs(simulated, rank) for rank in looked_at}
        sender = max(found, key=lambda rank: (found[rank].sent, -rank))
        busiest = _most(found.values())
        mean = sum(work) / len(work)
        tokens = machine.tokens / simulated.mesh.get("tp", 1)
        return StepPlan(
            model=str(model),
            recipe=str(recipe) if isinstance(recipe, str | Path) else getattr(recipe, "name", "given"),
            mesh=dict(mesh) if zero is None else {f"ZeRO-{zero}": simulated.ranks},
            ranks=simulated.ranks,
            looked_at=len(found),
            roles=_roles(simulated, sender),
            busiest=busiest,
            mean_sent=sum(costs.sent for costs in found.values()) / len(found),
            waves=len(simulated.plan.waves),
            balance=max(work) / mean if mean else 1.0,
            indivisible=simulated.plan.largest_unit / mean if mean else 1.0,
            communication_seconds=busiest.sent / machine.bandwidth,
            compute_seconds=busiest.flops / machine.flops,
            model_seconds=6
            * active_parameters(cast("PreTrainedModel", simulated.model))
            * tokens
            / machine.model_flops,
            machine=machine,
            alternatives=_alternatives(simulated, busiest) if alternatives else [],
        )


def _costs(simulated: Simulated, rank: int, only: set[int] | None = None) -> Costs:
    counting = CountingTransport()
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as flops:
        peak = peak_bytes(lambda: simulated.step(counting, rank=rank, only=only), device="meta")
    return Costs(sent=counting.sent, collectives=counting.collectives, flops=flops.get_total_flops(), peak_bytes=peak)


def _most(costs: Iterable[Costs]) -> Costs:
    each = list(costs)
    return Costs(
        sent=max(cost.sent for cost in each),
        collectives=max(cost.collectives for cost in each),
        flops=max(cost.flops for cost in each),
        peak_bytes=max(cost.peak_bytes for cost in each),
    )


def _by_rank(simulated: Simulated, work_of: Mapping[Group, list[float]]) -> list[float]:
    """The operations of every rank in a step."""
    work = [0.0] * simulated.ranks
    for group, loads in work_of.items():
        for rank in range(simulated.ranks):
            work[rank] += loads[simulated.place_in(group, rank)]
    return work


def _ranks_to_look_at(simulated: Simulated) -> int:
    """So many that the answer comes within a minute: a rank's step takes as long as there are matrices to route."""
    units = sum(len(job.members) * units_of(job.stack) for job in simulated.plan.jobs)
    return max(4, min(16, 20_000 // max(1, units)))


def _sample(work: Sequence[float], *, most: int) -> list[int]:
    """Ranks to look at: all of few; of many some evenly spread, the last, and those with most and least work."""
    ranks = len(work)
    if ranks <= most:
        return list(range(ranks))
    spread = [i * ranks // (most - 3) for i in range(most - 3)]
    return sorted({*spread, ranks - 1, work.index(max(work)), work.index(min(work))})


def _roles(simulated: Simulated, rank: int) -> list[RoleCosts]:
    strategies = simulated.plan.strategies()
    members: dict[str, set[int]] = {}
    for i, member in enumerate(simulated.members):
        members.setdefault(simulated.groups[member.group]["role"], set()).add(i)
    return [
        RoleCosts(
            role=role,
            rules=tuple(sorted({simulated.members[i].rule.name for i in indices})),
            parameters=len(indices),
            weights=sum(math.prod(simulated.members[i].layout.shape) for i in indices),
            strategies=dict(sorted(Tally(strategies.get(i, "local") for i in indices).items())),
            costs=_costs(simulated, rank, indices),
        )
        for role, indices in members.items()
    ]


def _alternatives(simulated: Simulated, ours: Costs) -> list[Alternative]:
    """What users run instead, on the ranks that hold each weight: for the matrices that a matrix rule steps."""
    gathered = exchanged = all_work = shared_work = 0.0
    by_shape: dict[tuple[tuple[int, ...], int], list[Stack]] = {}
    matrices = 0
    for member in simulated.members:
        if member.stack is None or not member.rule.matrices:
            continue
        shards = _num_shards(member.layout)
        role = simulated.groups[member.group]["role"]
        matrices += shards > 1
        all_work += _unit_flops(member.stack) * units_of(member.stack)
        gathered += math.prod(member.layout.shape) * 4 * (shards - 1) / shards
        if role not in ("embedding", "tied_embedding", "head", "router"):
            by_shape.setdefault((member.layout.shape, shards), []).append(member.stack)
    for (shape, shards), stacks in by_shape.items():
        # Batches of as many as there are ranks, the last one padded; bfloat16 there and back.
        batches = -(-len(stacks) // shards)
        exchanged += 2 * batches * math.prod(shape) * 2 * (shards - 1) / shards
        shared_work += batches * _unit_flops(stacks[0]) * units_of(stacks[0])
    return [
        Alternative(name="this plan", sent=ours.sent, collectives=ours.collectives, flops=ours.flops),
        Alternative(name="all-gather of every matrix", sent=gathered, collectives=matrices, flops=all_work),
        Alternative(
            name="Muon by all-to-all of equal shapes, AdamW elsewhere",
            sent=exchanged,
            collectives=2 * sum(-(-len(stacks) // shards) for (_, shards), stacks in by_shape.items() if shards > 1),
            flops=shared_work,
        ),
        Alternative(name="AdamW", sent=0.0, collectives=0, flops=0.0),
    ]


def _num_shards(layout: Layout | FlatLayout) -> int:
    """Among how many ranks a weight is cut."""
    group = layout.group if isinstance(layout, FlatLayout) else layout.shard_group
    return group.size if group is not None else 1


def _unit_flops(stack: Stack) -> float:
    asked = unit_cost(stack)
    return asked.flops + asked.root_flops
