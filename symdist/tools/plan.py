"""Plans a step on a mesh: finds bytes, collectives, operations and memory by running it on meta tensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from symdist.diagnostics.memory import peak_bytes
from symdist.exchange import CountingTransport, ExchangeLike, ExchangeOptions, Hardware, Stack
from symdist.exchange.planning.costs import unit_cost, units_of
from symdist.exchange.planning.operations import OperationCounter
from symdist.layouts import FlatLayout, Layout
from symdist.routing.recipes import RecipeLike
from symdist.tools.megatron import MegatronMesh
from symdist.tools.models import active_parameters
from symdist.tools.output import write_whole
from symdist.tools.simulate import Simulated, simulate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORT = {"dp": "dp_shard"}
_ORDER = ("dp_replicate", "dp_shard", "ep", "tp")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The costs of a step on one rank.

    Attributes:
        sent: Bytes the rank sends.
        collectives: The number of collectives it starts.
        flops: Operations of its matrix products and decompositions.
        compute_seconds: The time that these take.
        peak_bytes: Bytes of temporary memory at the peak.
    """

    sent: float
    collectives: int
    flops: float
    compute_seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class RoleCosts:
    """The costs of all parameters of one role.

    Roles share collectives, so the costs of all roles do not add up to those of the step.

    Attributes:
        role: The role.
        rules: The names of the rules of its parameters.
        parameters: The number of parameters; of a parameter with sections, each counts.
        weights: The number of elements of these parameters.
        strategies: The number of parameters by strategy.
        precisions: In which precisions their rules compute roots.
        costs: The costs if only these parameters are stepped, on the rank that sends most in a whole step.
    """

    role: str
    rules: tuple[str, ...]
    parameters: int
    weights: int
    strategies: Mapping[str, int]
    precisions: tuple[str, ...]
    costs: Costs


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """The estimated costs on a rank of another way of stepping the same matrices.

    Attributes:
        name: What is done instead.
        sent: Bytes a rank sends.
        collectives: The number of collectives it starts.
        flops: Operations of its matrix products and decompositions.
    """

    name: str
    sent: float
    collectives: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The costs of a step on a mesh.

    Attributes:
        model: The name of the model.
        recipe: The name of the recipe.
        mesh: The sizes of the mesh dimensions, or the ZeRO stage with the number of ranks.
        ranks: The number of ranks.
        looked_at: The number of ranks whose costs were determined.
        roles: The costs by role.
        busiest: Each cost of the rank, among those looked at, for which it is largest.
        mean_sent: Bytes sent per rank, averaged over the ranks looked at.
        waves: The number of waves.
        balance: Operations of the rank with most of them, divided by the mean of all ranks.
        indivisible: Operations of the largest unit, divided by the mean of all ranks. No assignment of whole matrices
            to ranks has a lower `balance`.
        communication_seconds: Estimated time of the optimizer's communication, on the rank where it is largest.
        compute_seconds: Estimated time of the optimizer's matrix products, on the rank where it is largest.
        optimizer_seconds: Estimated time of the optimizer, on the slowest rank, if nothing overlaps.
        overlapped_seconds: The same if communication and products overlap.
        model_seconds: Estimated time of forward and backward.
        hardware: The speeds used for these estimates.
        tokens: Tokens per data-parallel rank and step.
        alternatives: The estimated costs of other ways of stepping the same matrices; empty unless requested.
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
    optimizer_seconds: float
    overlapped_seconds: float
    model_seconds: float
    hardware: Hardware
    tokens: int
    alternatives: list[Alternative]

    @property
    def share(self) -> float:
        """The optimizer's share of the time of a step, if communication and computation do not overlap."""
        return self.optimizer_seconds / (self.optimizer_seconds + self.model_seconds)

    @property
    def overlapped_share(self) -> float:
        """The optimizer's share of the time of a step, if its communication and its products overlap."""
        return self.overlapped_seconds / (self.overlapped_seconds + self.model_seconds)

    def write(self, path: Path) -> None:
        """Write the plan to a file as JSON.

        Args:
            path: The file.
        """
        content = {**asdict(self), "share": self.share, "overlapped_share": self.overlapped_share}
        write_whole(path, json.dumps(content, indent=2) + "\n")


def parse_mesh(text: str) -> dict[str, int]:
    """Parse the sizes of mesh dimensions, as in `"dp=64,tp=8"`.

    Args:
        text: Sizes of `dp_replicate`, `dp_shard` (or `dp`), `ep` and `tp`, each at most once.

    Returns:
        The sizes by name of dimension, in the order above.

    Raises:
        ValueError: If the text has another form or names another dimension.
    """
    mesh: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        name = _SHORT.get(name.strip(), name.strip())
        if name not in _ORDER or not re.fullmatch("0*[1-9][0-9]{0,8}", size.strip()) or name in mesh:
            raise ValueError(
                f"mesh {text!r}: {part.strip()!r} should be NAME=SIZE, with each name once; the names are "
                f"{', '.join(_ORDER)}, and dp for dp_shard"
            )
        mesh[name] = int(size)
    return {name: mesh[name] for name in _ORDER if name in mesh}


def smaller_meshes(mesh: Mapping[str, int], *, most: int = 6) -> list[dict[str, int]]:
    """Return the same mesh with fewer data-parallel ranks, repeatedly halved.

    Args:
        mesh: The sizes by name of dimension. Without `dp_shard`, the largest dimension is halved.
        most: The largest number of meshes; 6 by default.

    Returns:
        The meshes, smallest first, without the given one.
    """
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
    mesh: Mapping[str, int] | MegatronMesh,
    zero: int | None = None,
    built: Mapping[str, Any] | None = None,
    tokens: int = 16384,
    exchange: ExchangeLike = None,
    alternatives: bool = False,
) -> StepPlan:
    """Find out what a step of the optimizer costs on a mesh of any size, without the ranks and without the weights.

    The step runs on meta tensors as each of four to sixteen ranks would run it, among them the one with most work. All
    rules, requests and collectives of `SymDist.step` run with the same arithmetic and shapes, but nothing is stored or
    sent. For a mesh, no process group may be open in this process.

    Args:
        model: A preset, or the path of a TOML file; see `symdist.tools.models.build`.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        mesh: The sizes by name of mesh dimension, such as `{"dp_shard": 64, "tp": 8}`, see `parse_mesh`; or the ranks
            of a Megatron job.
        zero: A ZeRO stage (1, 2 or 3), to store the weights in its partitions instead of in FSDP2 shards. The mesh then
            has `dp_shard` only. None by default.
        built: Further keyword arguments of `symdist.tools.models.build`. None by default.
        tokens: Tokens per data-parallel rank and step, for the estimate of the model's time; 16384 by default.
        exchange: How matrices travel between ranks: `ExchangeOptions` or a mapping of its keys. None for the defaults.
            Its hardware chooses the strategies and gives the estimates of time.
        alternatives: Whether to estimate other ways of stepping the same matrices, too. False by default.

    Returns:
        The costs.

    Raises:
        ValueError: If `build`, `shard`, `route` or `SymDist` would refuse the model, recipe or mesh.

    Example:
        >>> plan = plan_step("olmoe-1b-7b", "olmoe", mesh={"dp_shard": 64})
        >>> plan.busiest.sent, plan.share
    """
    if not 1 <= tokens <= 10**12:
        raise ValueError(f"tokens={tokens} must be at least 1, and at most a million million")
    exchange = ExchangeOptions.of(exchange)
    hardware = exchange.hardware
    with simulate(
        model,
        recipe,
        mesh=mesh,
        zero=zero,
        built=built,
        exchange=exchange,
    ) as simulated:
        work = simulated.work()
        looked_at = sorted({*_sample(work, most=_ranks_to_look_at(simulated)), *_busiest_owners(simulated)})
        costs_by_rank = {rank: _costs(simulated, rank) for rank in looked_at}
        sender = max(costs_by_rank, key=lambda rank: (costs_by_rank[rank].sent, -rank))
        busiest = _most(costs_by_rank.values())
        mean = sum(work) / len(work)
        times = [
            (costs.sent / hardware.bandwidth + costs.collectives * hardware.latency, costs.compute_seconds)
            for costs in costs_by_rank.values()
        ]
        return StepPlan(
            model=str(model),
            recipe=str(recipe) if isinstance(recipe, str | Path) else getattr(recipe, "name", "given"),
            mesh=dict(simulated.parallel),
            ranks=simulated.ranks,
            looked_at=len(costs_by_rank),
            roles=_roles(simulated, sender),
            busiest=busiest,
            mean_sent=sum(costs.sent for costs in costs_by_rank.values()) / len(costs_by_rank),
            waves=len(simulated.plan.waves),
            balance=max(work) / mean if mean else 1.0,
            indivisible=simulated.plan.largest_unit(hardware) / mean if mean else 1.0,
            communication_seconds=max(communication for communication, _ in times),
            compute_seconds=busiest.compute_seconds,
            optimizer_seconds=max(map(sum, times)),
            overlapped_seconds=max(map(max, times)),
            model_seconds=6
            * active_parameters(cast("PreTrainedModel", simulated.model))
            * tokens
            / (simulated.parallel.get("tp", 1) * simulated.parallel.get("pp", 1))
            / hardware.model_flops,
            hardware=hardware,
            tokens=tokens,
            alternatives=_alternatives(simulated, busiest) if alternatives else [],
        )


def _costs(simulated: Simulated, rank: int, only: set[int] | None = None) -> Costs:
    counting = CountingTransport()
    simulated.on_rank(rank)  # What planning takes is no part of the step.
    with OperationCounter(simulated.exchange.hardware) as counted:
        peak = peak_bytes(lambda: simulated.step(counting, rank=rank, only=only), device="meta")
    return Costs(
        sent=counting.sent,
        collectives=counting.collectives,
        flops=counted.operations,
        compute_seconds=counted.seconds,
        peak_bytes=peak,
    )


def _most(costs: Iterable[Costs]) -> Costs:
    all_costs = list(costs)
    return Costs(
        sent=max(cost.sent for cost in all_costs),
        collectives=max(cost.collectives for cost in all_costs),
        flops=max(cost.flops for cost in all_costs),
        compute_seconds=max(cost.compute_seconds for cost in all_costs),
        peak_bytes=max(cost.peak_bytes for cost in all_costs),
    )


def _ranks_to_look_at(simulated: Simulated) -> int:
    """Return how many ranks to look at so that the result is there within a minute.

    The time for one rank grows with the number of matrices to distribute.
    """
    units = sum(len(job.members) * units_of(job.stack) for job in simulated.plan.jobs)
    return max(4, min(16, 20_000 // max(1, units)))


def _busiest_owners(simulated: Simulated) -> set[int]:
    """Return the rank that sends most updates of matrices it owns; none if no single rank owns any."""
    sent: Tally[int] = Tally()
    for job in simulated.plan.jobs:
        group = job.stack.layout.group
        if job.team or not job.owners or group is None:
            continue
        unit = job.stack.numel // units_of(job.stack) * job.stack.layout.num_replicas
        for owner in job.owners:
            sent[group.ranks[owner]] += unit
    return {max(sent, key=lambda rank: (sent[rank], -rank))} if sent else set()


def _sample(work: Sequence[float], *, most: int) -> list[int]:
    """Return the ranks to look at: all of a few; else evenly spread ones and those with most and least work."""
    ranks = len(work)
    if ranks <= most:
        return list(range(ranks))
    spread = [i * ranks // (most - 3) for i in range(most - 3)]
    return sorted({*spread, ranks - 1, work.index(max(work)), work.index(min(work))})


def _roles(simulated: Simulated, rank: int) -> list[RoleCosts]:
    specs, plan = simulated.specs(rank), simulated.on_rank(rank)
    strategies, precisions = plan.strategies(), plan.precisions()
    members: dict[str, set[int]] = {}
    for i, member in enumerate(specs):
        members.setdefault(simulated.groups[member.group]["role"], set()).add(i)
    return [
        RoleCosts(
            role=role,
            rules=tuple(sorted({specs[i].rule.name for i in indices})),
            parameters=len(indices),
            weights=sum(math.prod(specs[i].layout.shape) for i in indices),
            strategies=dict(sorted(Tally(strategies.get(i, "local") for i in indices).items())),
            precisions=tuple(sorted({precisions.get(i, "") for i in indices} - {""})),
            costs=_costs(simulated, rank, indices),
        )
        for role, indices in members.items()
    ]


def _alternatives(simulated: Simulated, planned: Costs) -> list[Alternative]:
    """Estimate what other optimizers would cost for the matrices that matrix rules step, sharded in the same way."""
    gathered = exchanged = all_work = shared_work = 0.0
    by_shape: dict[tuple[tuple[int, ...], int], list[Stack]] = {}
    matrices = 0
    for member in simulated.members:
        if member.stack is None or not member.rule.matrices:
            continue
        shards = _num_shards(member.layout)
        role = simulated.groups[member.group]["role"]
        matrices += shards > 1
        all_work += _unit_flops(simulated, member.stack) * units_of(member.stack)
        gathered += math.prod(member.layout.shape) * 4 * (shards - 1) / shards
        if role not in ("embedding", "tied_embedding", "head", "router"):
            by_shape.setdefault((member.layout.shape, shards), []).append(member.stack)
    for (shape, shards), stacks in by_shape.items():
        # Matrices go in batches of one per rank, the last batch padded, and travel in bfloat16 both ways.
        batches = -(-len(stacks) // shards)
        exchanged += 2 * batches * math.prod(shape) * 2 * (shards - 1) / shards
        shared_work += batches * _unit_flops(simulated, stacks[0]) * units_of(stacks[0])
    return [
        Alternative(name="this plan", sent=planned.sent, collectives=planned.collectives, flops=planned.flops),
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
    """Return the number of ranks that a weight is divided among."""
    return layout.shard_group.size if layout.shard_group is not None else 1


def _unit_flops(simulated: Simulated, stack: Stack) -> float:
    cost = unit_cost(stack, hardware=simulated.exchange.hardware)
    return cost.flops + cost.root_flops
