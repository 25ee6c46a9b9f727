"""Step all Megatron optimizers of a rank at once, with one SymDist over the matrix shards of their tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symdist.engines.agreement import gather, gather_unless_failed
from symdist.engines.bound_tensors import BoundTensor
from symdist.engines.external_state import ENGINE_STATE_NAMES, ExternalStateSymDist, slots
from symdist.exchange import CountingTransport, Transport
from symdist.layouts import ascending
from symdist.layouts.rank_grid import RankGrid
from symdist_megatron.layout import HeldRange, MatrixShard, shard_of
from symdist_megatron.optimizer import MegatronSymDist
from symdist_megatron.options import Options
from symdist_megatron.rank_grids import RankGrids
from symdist_megatron.routing import Routing, UnitAssignment


@dataclass(frozen=True, kw_only=True)
class OptimizedTensor:
    """A model parameter and the tensor that Megatron optimizes for it.

    Attributes:
        parameter: The model's parameter.
        group: The index of its param group.
        tensor: The tensor; None if other ranks hold all of the parameter.
        held: Which of the parameter's elements the tensor has.
    """

    parameter: Any
    group: int
    tensor: Tensor | None
    held: HeldRange


class _MegatronTensor(BoundTensor[MatrixShard]):
    """A bound tensor, the model parameter it belongs to, and the optimizer that keeps its state."""

    def __init__(self, parameter: Any, base: MegatronSymDist, tensor: Tensor):
        super().__init__(tensor)
        self.parameter = parameter
        self.base = base


@dataclass(frozen=True, kw_only=True)
class _Rate:
    """The learning rate and weight decay of a group of the inner SymDist, computed from its group in Megatron."""

    base: MegatronSymDist
    group: int
    routed: UnitAssignment

    def lr(self) -> float:
        return float(self.base.param_groups[self.group]["lr"]) * self.routed.lr_ratio

    def decay(self) -> float:
        group = self.base.param_groups[self.group]
        if self.routed.decay_ratio is None:
            return self.routed.decay * float(group.get("wd_mult", 1.0))
        return float(group["weight_decay"]) * self.routed.decay_ratio


class JointStep:
    """One step for the tensors of all optimizers of a rank, of dense parameters and of experts, by one SymDist.

    All ranks must create it, with the same options.

    Args:
        stepped: Each optimizer with its tensors, in an order that is the same on all ranks that hold the same
            parameters.
        routing: What each parameter was assigned.
        rank_grids: The ranks that hold dense parameters and experts.
        options: The user's options.
        shared: The process group of the pipeline stages' ranks that each hold a copy of a shared embedding. None
            (default) if there is none.

    Raises:
        ValueError: On all ranks, if a rule, view or layout does not fit on any, or a rank has no trainable parameter.
            Also if the stages that share an embedding hold unequal parts of it.
    """

    def __init__(
        self,
        stepped: Sequence[tuple[MegatronSymDist, Sequence[OptimizedTensor]]],
        *,
        routing: Routing,
        rank_grids: RankGrids,
        options: Options,
        shared: Any = None,
    ):
        self._bases = [base for base, _ in stepped]
        self._bound: list[_MegatronTensor] = []
        self._rates: list[_Rate] = []
        self._counted = 0
        failure: str | None = None
        trains = any(tensors for _, tensors in stepped)
        try:
            if trains:
                self.symdist = self._create(stepped, routing, rank_grids, options)
        except ValueError as error:
            # Ranks that hold the same parameters all fail, but other pipeline stages do not know of it yet.
            failure = str(error)
        _agree_to_begin(failure, trains)
        self.symdist.compare_plans()
        self._release()
        self._tied_sync = _TiedEmbeddingSync(self._bound, self.symdist.strategies(), shared)

    def _create(
        self,
        stepped: Sequence[tuple[MegatronSymDist, Sequence[OptimizedTensor]]],
        routing: Routing,
        rank_grids: RankGrids,
        options: Options,
    ) -> ExternalStateSymDist:
        """Create the SymDist that steps the shards of all tensors."""
        groups: dict[tuple[int, int, int], dict[str, Any]] = {}
        states: dict[int, dict[str, Tensor]] = {}
        for index, (base, tensors) in enumerate(stepped):
            base.complete_state([(item.parameter, item.tensor) for item in tensors if item.tensor is not None])
            for item in tensors:
                assignments = routing.routed[id(item.parameter)]
                rank_grid = rank_grids.of(item.parameter, expert=routing.described[id(item.parameter)].expert)
                bound = self._bind(base, item, rank_grid, assignments)
                for shard, routed in zip(bound.shards, assignments, strict=True):
                    key = index, item.group, id(routed.options)
                    if key not in groups:
                        groups[key] = {**routed.options, "lr": 0.0, "params": [], "layouts": []}
                        self._rates.append(_Rate(base=base, group=item.group, routed=routed))
                    groups[key]["params"].append((shard.name, shard.parameter))
                    groups[key]["layouts"].append(shard.layout)
                    states[id(shard.parameter)] = {
                        slot: shard.of(bound.state[slot])
                        for slot in slots(routed.options["rule"], routed.options).values()
                    }
        return ExternalStateSymDist(
            list(groups.values()),
            state_tensors=states,
            nonfinite=options.nonfinite,
            exchange=options.exchange,
            process_group=dist.group.WORLD,
        )

    @torch.no_grad()
    def step(self) -> bool:
        """Step every tensor by its gradient; all ranks must call it.

        Returns:
            False if the step was skipped because a gradient was not finite, otherwise True.

        Raises:
            FloatingPointError: On every rank, before anything changes, if a gradient on any rank is not finite and
                `nonfinite` is "raise".
        """
        self._follow()
        for group, rate in zip(self.symdist.param_groups, self._rates, strict=True):
            group["lr"], group["weight_decay"] = rate.lr(), rate.decay()
        skipped = self.symdist.skipped_steps
        try:
            self._take_gradients()
            self.symdist.step()
        finally:
            self._release(write_back=True)
        if self.symdist.skipped_steps > skipped:
            return False
        self._counted += 1
        for base in self._bases:
            base.count(self._counted)
        self._tied_sync.agree(self.symdist.transport)
        return True

    def trace_collectives(self) -> CountingTransport:
        """Record the collectives of a step on this rank, without communicating.

        Returns:
            The transport that recorded them.
        """
        counting = self.symdist.trace_collectives()
        self._tied_sync.agree(counting)
        return counting

    def _bind(
        self, base: MegatronSymDist, item: OptimizedTensor, rank_grid: RankGrid, routed: Sequence[UnitAssignment]
    ) -> _MegatronTensor:
        """Create the shards of an optimized tensor; they are empty if other ranks hold all of the parameter."""
        tensor, state = item.tensor, {}
        if tensor is None:
            dtype = torch.promote_types(item.parameter.dtype, torch.float32)
            tensor = torch.empty(0, dtype=dtype, device=item.parameter.device)
            state = dict.fromkeys(ENGINE_STATE_NAMES, tensor)
        else:
            state = dict(base.state[tensor])
        bound = _MegatronTensor(item.parameter, base, tensor)
        bound.remember(state)
        for assignment in routed:
            shard = shard_of(assignment.unit, rank_grid, item.held, assignment.options)
            shard.bind(tensor)
            bound.shards.append(shard)
        self._bound.append(bound)
        return bound

    def _follow(self) -> None:
        """Follow tensors and state that Megatron has moved, as in offloading, and use a step count it has loaded."""
        for bound in self._bound:
            bound.follow(bound.base.state.get(bound.tensor, bound.state), self.symdist)
        steps = self._bases[0].steps
        if steps != self._counted:
            self._counted = steps
            for state in self.symdist.state.values():
                if "step" in state:
                    state["step"].fill_(steps)

    def _take_gradients(self) -> None:
        """Give the shards their gradients, and fill those that are copies."""
        for bound in self._bound:
            for shard in bound.shards:
                if shard.copied:
                    shard.parameter.data = shard.of(bound.tensor)
                    bound.fill_state(shard, self.symdist)
            bound.take_gradient()

    def _release(self, *, write_back: bool = False) -> None:
        """Release gradients and copies; with `write_back`, write the copies back first."""
        for bound in self._bound:
            bound.drop_gradient()
            for shard in bound.shards:
                if shard.copied:
                    state = self.symdist.state[shard.parameter]
                    slot_names = self.symdist.slots(shard.parameter)
                    if write_back:
                        shard.put(bound.tensor, shard.parameter.data)
                        for key, slot in slot_names.items():
                            shard.put(bound.state[slot], state[key])
                    shard.parameter.data = shard.parameter.data.new_empty(0)
                    state.update({key: state[key].new_empty(0) for key in slot_names})


class _TiedEmbeddingSync:
    """A broadcast that keeps the copies of an embedding on the first and the last pipeline stage equal.

    The stages step their copies by equal gradients. But if the rule sums over ranks, the order of the sums may differ
    between stages, and with it the last digit. The first stage's weights are then sent to the others.
    """

    def __init__(self, bound: Sequence[_MegatronTensor], strategies: Mapping[str, str], group: Any):
        self._tensors: list[Tensor] = []
        if group is None or dist.get_world_size(group) == 1:
            return
        self._group = ascending(group)
        shared = [tensor for tensor in bound if getattr(tensor.parameter, "shared_embedding", False)]
        summed = any(strategies[shard.name] != "local" for tensor in shared for shard in tensor.shards)
        sizes = [tensor.tensor.numel() for tensor in shared]
        by_stage = gather((summed, sizes), group)
        if not any(stage_sums for stage_sums, _ in by_stage):
            return
        if any(stage_sizes != sizes for _, stage_sizes in by_stage):
            raise ValueError(
                "symdist: the pipeline stages that share an embedding hold different parts of it, so its copies cannot "
                "be kept equal; this happens with layer_wise, which assigns parameters to ranks stage by stage, so use "
                "the distributed optimizer instead"
            )
        self._tensors = [tensor.tensor for tensor in shared if tensor.tensor.numel()]

    def agree(self, transport: Transport) -> None:
        """Send the first stage's weights to the others."""
        for tensor in self._tensors:
            transport.broadcast(tensor.detach().view(-1), group=self._group).wait()


def _agree_to_begin(failure: str | None, trains: bool) -> None:
    """Raise ValueError on all ranks if any has failed, or has nothing to step and would miss the collectives."""
    if idle := [rank for rank, rank_trains in enumerate(gather_unless_failed(trains, failure)) if not rank_trains]:
        raise ValueError(
            f"symdist: ranks {idle} train no parameter. If all parameters of a pipeline stage are frozen, use fewer "
            "stages; if layer_wise leaves some data-parallel ranks without parameters, use the distributed optimizer"
        )
