"""Parameters that are planned together, and the choice of where their rule runs.

Costs are those of the busiest rank, in the time it takes to send one byte, since all other ranks wait for it.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from symdist.exchange.execution.stack import Stack, Strategy, travels_as
from symdist.exchange.options import ExchangeOptions
from symdist.exchange.planning.costs import RuleCost, shard_cost, unit_cost, units_of
from symdist.hardware import Hardware
from symdist.layouts import FlatLayout, Grid, Group, Layout
from symdist.layouts.layout import blocks

_ROUNDS = 6
"""The collectives that a rule needs to run by sums: at least one for sums, and four for roots of few matrices."""

Members: TypeAlias = list[tuple[int, Layout | FlatLayout]]
"""Parameters, by their indices in the optimizer's list, with the layouts they are stored in."""


@dataclass
class Kind:
    """Parameters that differ only in how they are cut.

    In a ZeRO partition hardly any two are cut alike; they share jobs nevertheless.

    Attributes:
        stack: What they have in common. Its layout says which ranks hold them.
        name: The name of the first parameter, for error messages.
        column_blocks: The widths of the blocks of columns that are stored one after another; empty without such blocks.
        dtype: The dtype in which matrices are sent.
        hardware: The speeds of the ranks.
        whole: The parameters that are whole on one rank and updated there, unknown to all others.
        cut: All other parameters, which run as `strategy` says.
        sent: The parameters that are whole on one rank but run at an owner, to even out the load or for their stage.
        strategy: Where `cut` runs.
        team: The layout of a unit over teams of ranks, if teams own the units of `cut`; otherwise None.
        owners: The owners of the units of each parameter, by parameter index: ranks, or the numbers of teams.
    """

    stack: Stack
    name: str
    column_blocks: tuple[int, ...]
    dtype: torch.dtype
    hardware: Hardware
    whole: Members = field(default_factory=list)
    cut: Members = field(default_factory=list)
    sent: Members = field(default_factory=list)
    strategy: Strategy = "local"
    team: Layout | None = None
    owners: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def group(self) -> Group | None:
        """The ranks over which the parameters are sharded; None where only this rank is known."""
        return self.stack.layout.group

    @property
    def multiple(self) -> int:
        """How many rows must stay together: those of a head, or of a block of gate and up rows; otherwise 1."""
        view = self.stack.view
        if len(view.stored) > 2:
            return 1
        return view.unit if view.kind == "heads_0" or (view.kind == "gate_up_stacked" and not view.single) else 1

    @property
    def fields(self) -> int:
        """How many tensors of a matrix go to its owner and back: the direction, and what the rule remembers."""
        return 1 + len(self.stack.state_names)

    @property
    def team_size(self) -> int:
        """The number of ranks that own a unit together."""
        return 1 if self.team is None or self.team.shard_group is None else self.team.shard_group.size

    @property
    def in_team(self) -> Stack:
        """The stack as its rule runs within a team, or at a single owner."""
        return self.stack if self.team is None else dataclasses.replace(self.stack, layout=self.team)

    def possible_teams(self, sizes: Sequence[int]) -> Iterator[Layout]:
        """Yield the layouts by which teams can own units.

        Args:
            sizes: The numbers of ranks that a team may have; each divides the number of ranks.

        Yields:
            Layouts that cut a unit's rows or columns over each team.
        """
        group, shape = self.group, self.stack.layout.shape
        if group is None or len(shape) < 2 or self.column_blocks or self.stack.coupled:
            return
        flat = not all(layout.completed for _, layout in self.cut)
        multiple = self.stack.view.unit if self.stack.view.kind not in ("as_stored", "transposed") else 1
        for size in sizes:
            for dim in (len(shape) - 2, len(shape) - 1):
                count, rest = divmod(shape[dim] // multiple, size)
                # Ranges of elements are whole rows.
                if not count or shape[dim] % multiple or (flat and dim > 0):
                    continue
                grid = Grid(
                    sizes=(group.size // size, size),
                    ranks=group.ranks,
                    position=group.index,
                    handles=(group.handle, group.handle),
                )
                widths = [(count + (i < rest)) * multiple for i in range(size)]
                team = Layout(shape=shape, grid=grid, splits=(blocks(dim, widths, axis=1),))
                stack = dataclasses.replace(self.stack, layout=team)
                if "unaligned" not in stack.splits and set(stack.cut) <= set(stack.admitted):
                    yield team

    def time_at_owner(self, team: Layout | None) -> float:
        """Return the seconds that a unit takes its owner: pieces come, the rule runs, updates go.

        Args:
            team: The layout over a team that owns it; None for a single rank.
        """
        hardware, stack = self.hardware, self.stack
        layout = self.cut[0][1]
        size = 1 if team is None or team.shard_group is None else team.shard_group.size
        # What it sends; the pieces come at the same time.
        sent = self.fields * stack.numel / layout.units / size * layout.num_replicas * self.dtype.itemsize
        if team is None:
            cost = unit_cost(stack, hardware=hardware)
            flops = units_of(stack) / layout.units * (cost.flops + cost.root_flops)
            return sent / hardware.bandwidth + flops / hardware.flops
        rows = dataclasses.replace(stack, layout=team)
        cost = shard_cost(rows, (1, *team.largest_shape[-2:])[-len(team.shape) :], rows.parts, hardware=hardware)
        sums = 2 * sum(cost.summed.values()) * (size - 1) / size * stack.dtype.itemsize
        matrices = max(1, stack.view.count // layout.units)
        roots = cost.root_flops * (-(-matrices // size) / matrices if rows.cut else 1.0)
        rounds = _ROUNDS * hardware.latency if rows.cut else 0.0
        return (sent + sums) / hardware.bandwidth + (cost.flops + roots) / hardware.flops + rounds

    def in_place(self, layout: Layout | FlatLayout) -> Stack:
        """Return the stack as its rule runs on a parameter where it is stored, once cut rows are completed."""
        return dataclasses.replace(self.stack, layout=layout.by_rows(multiple=self.multiple))

    def alone(self, layout: Layout | FlatLayout) -> bool:
        """Return whether ranks complete rows of a parameter, and its rule then needs nothing of other rows."""
        if layout.completed:
            return False
        rows = self.in_place(layout)
        if not rows.cut:
            return True
        if rows.skip_zero_grad_rows and "columns" in rows.cut:
            return False
        return not any(self.cost_of(rows).summed.values())

    @property
    def summed_bytes(self) -> float:
        """What any rank sends for the sums of the parameters in `cut`, if these run in place."""
        total = 0.0
        for layout, count in Counter(layout for _, layout in self.cut).items():
            rows = self.in_place(layout)
            summed = self.cost_of(rows).summed
            total += sum(
                2 * count * summed[axis] * (group.size - 1) / group.size * rows.dtype.itemsize
                for axis, group in rows.cut.items()
            )
        return total

    def cost_of(self, rows: Stack) -> RuleCost:
        """Return the cost of the rule on the largest piece of a parameter that `in_place` has returned the stack of."""
        return shard_cost(rows, rows.layout.largest_shape, rows.parts, hardware=self.hardware)


def kinds_of(
    stacks: Mapping[Stack, Sequence[int]],
    *,
    names: Sequence[str],
    layouts: Sequence[Layout | FlatLayout],
    exchange: ExchangeOptions,
) -> list[Kind]:
    """Sort parameters by what they have in common.

    Args:
        stacks: By stack, the indices of its parameters.
        names: The names of all parameters, by index.
        layouts: How all parameters are stored, by index.
        exchange: Gives the dtype in which matrices are sent, and the hardware.

    Returns:
        The kinds, in the order of the stacks; matrices that are whole on one rank are in its `whole`, or, if they
        belong to a residual stage, in `sent`, owned by that rank.
    """
    kinds: dict[tuple[Stack, tuple[int, ...]], Kind] = {}
    for stack, members in stacks.items():
        dtype = travels_as(stack, exchange.communication_dtype)
        # In model order, so that the parameters of one wave are cut over many ranks and not all over the same few.
        for i in sorted(members):
            # Equal layouts may be one object each, and large ones are slow to work with.
            layout = stack.layout if layouts[i] == stack.layout else layouts[i]
            blocks, owner = layout.column_blocks, layout.sole_owner
            if (stack, blocks) not in kinds:
                kinds[stack, blocks] = Kind(
                    stack=stack, name=names[i], column_blocks=blocks, dtype=dtype, hardware=exchange.hardware
                )
            kind = kinds[stack, blocks]
            if owner is None or blocks:
                kind.cut.append((i, layout))
            elif stack.coupled:
                kind.sent.append((i, layout))
                kind.owners[i] = (owner,)
            else:
                kind.whole.append((i, layout))
    return list(kinds.values())


def possible_strategies(kind: Kind) -> list[Strategy]:
    """Return the strategies that the rule, view and layouts of a kind's cut parameters admit.

    Args:
        kind: The parameters; at least one is in `cut`.

    Returns:
        The strategies; at least one.
    """
    # The first parameter is enough: whether rows suit the view does not depend on where they are cut.
    layout = kind.cut[0][1]
    rows = kind.in_place(layout)
    strategies: list[Strategy] = []
    if "unaligned" not in rows.splits and not kind.column_blocks:
        if layout.completed and not rows.cut:
            strategies.append("local")
        # Sums over a residual stage are not taken over completed rows.
        elif set(rows.cut) <= set(rows.admitted) and (layout.completed or not kind.stack.coupled):
            strategies.append("reduce")
    return [*strategies, "owner"] if kind.group is not None else strategies


def choose_strategy(kind: Kind) -> Strategy:
    """Return the strategy that the user chose, or the cheapest possible one if that is "auto".

    Args:
        kind: The parameters.

    Returns:
        The strategy of the parameters in `cut`; "local" if there are none.

    Raises:
        ValueError: If the layout does not admit the strategy that the user chose; the message names the parameter.
    """
    if not kind.cut:
        return "local"
    possible = possible_strategies(kind)
    requested = kind.stack.requested_strategy
    if requested != "auto":
        for strategy in possible:
            if strategy == requested:
                return strategy
        raise ValueError(
            f"{kind.name}: rule {kind.stack.rule.name!r} cannot run with strategy {requested!r} on this layout; set "
            f"strategy to {', '.join(map(repr, possible))} or 'auto'"
        )
    if len(possible) == 1 or all(kind.alone(layout) for _, layout in kind.cut):
        return possible[0]
    return possible[0] if _cost_in_place(kind) <= _cost_at_owners(kind) else "owner"


def _cost_in_place(kind: Kind) -> float:
    """Return the cost in bytes: the sums over the ranks, and the FLOPs converted to bytes.

    It is that of any rank: sums run over all ranks, whether or not they hold the matrix.
    """
    total = kind.summed_bytes
    for layout, count in Counter(layout for _, layout in kind.cut).items():
        rows = kind.in_place(layout)
        cost = kind.cost_of(rows)
        ranks = max((group.size for group in rows.cut.values()), default=1)
        matrices = count * rows.view.count
        roots = cost.root_flops * count * -(-matrices // ranks) / matrices
        total += (count * cost.flops + roots) / kind.hardware.flops_per_byte
    return total


def _cost_at_owners(kind: Kind) -> float:
    """Return the cost of the busiest rank in bytes.

    It adds up its pieces that are sent to owners, the updates it sends to every copy of what it owns, and its FLOPs
    converted to bytes.
    """
    cost = unit_cost(kind.stack, hardware=kind.hardware)
    costs: dict[int, float] = {}
    for layout, count in Counter(layout for _, layout in kind.cut).items():
        units = count * layout.units
        owned = -(-units // len(layout.candidates))
        # If there are fewer units than candidates, only the first few candidates own one.
        owners = set(layout.candidates[:units])
        work = units_of(kind.stack) / layout.units * (cost.flops + cost.root_flops) / kind.hardware.flops_per_byte
        size = kind.stack.numel / layout.units
        copies = layout.num_replicas
        for rank, held in layout.held.items():
            piece = held / layout.units
            mine = owned if rank in owners else 0
            numbers = piece * max(0.0, units / copies - mine) + mine * (copies * size - piece)
            costs[rank] = costs.get(rank, 0.0) + kind.fields * numbers * kind.dtype.itemsize + mine * work
    return max(costs.values())
