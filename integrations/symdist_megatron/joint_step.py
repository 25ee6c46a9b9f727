"""Steps all Megatron optimizers of a rank at once, with one SymDist over the matrix shards of their tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from symdist.engines.agreement import gather, gather_unless_failed
from symdist.engines.bound_tensors import BoundTensor
from symdist.engines.external_state import ENGINE_STATE_NAMES, ExternalStateSymDist, slots
from symdist_megatron.layout import HeldRange, MatrixShard, shard_of
from symdist_megatron.optimizer import MegatronSymDist
from symdist_megatron.options import Options
from symdist_megatron.rank_grid import RankGrid, RankGrids
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
    """Computes the learning rate and weight decay of a group of the inner SymDist from its group in Megatron."""

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
    """Steps the tensors of all optimizers of a rank, of dense parameters and of experts, with one SymDist.

    All ranks must create one, with the same options.

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
        trains = any(given for _, given in stepped)
        try:
            if trains:
                self.symdist = self._made(stepped, routing, rank_grids, options)
        except ValueError as error:
            # Ranks that hold the same parameters all fail, but other pipeline stages must be told.
            failure = str(error)
        _agree_to_begin(failure, trains)
        self._let_go()
        self._twins = _TiedEmbeddingSync(self._bound, self.symdist.strategies(), shared)

    def _made(
        self,
        stepped: Sequence[tuple[MegatronSymDist, Sequence[OptimizedTensor]]],
        routing: Routing,
        rank_grids: RankGrids,
        options: Options,
    ) -> ExternalStateSymDist:
        """Create the SymDist that steps the shards of all tensors."""
        groups: dict[tuple[int, int, int], dict[str, Any]] = {}
        states: dict[int, dict[str, Tensor]] = {}
        for place, (base, given) in enumerate(stepped):
            base.complete_state([(each.parameter, each.tensor) for each in given if each.tensor is not None])
            for each in given:
                rank_grid = rank_grids.of(each.parameter, expert=routing.described[id(each.parameter)].expert)
                bound = self._bind(base, each, rank_grid, routing.routed[id(each.parameter)])
                for shard, routed in zip(bound.shards, routing.routed[id(each.parameter)], strict=True):
                    key = place, each.group, id(routed.options)
                    if key not in groups:
                        groups[key] = {**routed.options, "lr": 0.0, "params": [], "layouts": []}
                        self._rates.append(_Rate(base=base, group=each.group, routed=routed))
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
            self._take()
            self.symdist.step()
        finally:
            self._let_go(written=True)
        if self.symdist.skipped_steps > skipped:
            return False
        self._counted += 1
        for base in self._bases:
            base.count(self._counted)
        self._twins.agree()
        return True

    def _bind(
        self, base: MegatronSymDist, given: OptimizedTensor, rank_grid: RankGrid, routed: Sequence[UnitAssignment]
    ) -> _MegatronTensor:
        tensor, state = given.tensor, {}
        if tensor is None:
            dtype = torch.promote_types(given.parameter.dtype, torch.float32)
            tensor = torch.empty(0, dtype=dtype, device=given.parameter.device)
            state = dict.fromkeys(ENGINE_STATE_NAMES, tensor)
        else:
            state = dict(base.state[tensor])
        bound = _MegatronTensor(given.parameter, base, tensor)
        bound.remember(state)
        for each in routed:
            shard = shard_of(each.unit, rank_grid, given.held, each.options)
            shard.bind(tensor)
            bound.shards.append(shard)
        self._bound.append(bound)
        return bound

    def _follow(self) -> None:
        """Follow tensors and state that Megatron has moved, as in offloading, and take over a loaded step count."""
        for bound in self._bound:
            bound.follow(bound.base.state.get(bound.tensor, bound.state), self.symdist)
        steps = self._bases[0].steps
        if steps != self._counted:
            self._counted = steps
            for state in self.symdist.state.values():
                if "step" in state:
                    state["step"].fill_(steps)

    def _take(self) -> None:
        """Give the shards their gradients, and fill those that are copies."""
        for bound in self._bound:
            for shard in bound.shards:
                if shard.copied:
                    shard.parameter.data = shard.of(bound.tensor)
                    bound.fill_state(shard, self.symdist)
            bound.take_gradient()

    def _let_go(self, *, written: bool = False) -> None:
        """Release gradients and copies; with `written`, write the copies back first."""
        for bound in self._bound:
            bound.drop_gradient()
            for shard in bound.shards:
                if shard.copied:
                    state = self.symdist.state[shard.parameter]
                    held = self.symdist.slots(shard.parameter)
                    if written:
                        shard.put(bound.tensor, shard.parameter.data)
                        for key, slot in held.items():
                            shard.put(bound.state[slot], state[key])
                    shard.parameter.data = shard.parameter.data.new_empty(0)
                    state.update({key: state[key].new_empty(0) for key in held})


class _TiedEmbeddingSync:
    """Keeps embeddings equal that both the first and the last pipeline stage hold.

    The stages step them by equal gradients. But if the rule sums over ranks, the order of the sums may differ between
    stages, and with it the last digit. The first stage's weights are then sent to the others.
    """

    def __init__(self, bound: Sequence[_MegatronTensor], strategies: Mapping[str, str], group: Any):
        self._group = group
        self._tensors: list[Tensor] = []
        if group is None or dist.get_world_size(group) == 1:
            return
        mine = [each for each in bound if getattr(each.parameter, "shared_embedding", False)]
        summed = any(strategies[shard.name] != "local" for each in mine for shard in each.shards)
        sizes = [each.tensor.numel() for each in mine]
        found = gather((summed, sizes), group)
        if not any(theirs for theirs, _ in found):
            return
        if any(theirs != sizes for _, theirs in found):
            raise ValueError(
                "symdist: the stages that share an embedding hold unequal parts of it, and its rule sums over ranks; "
                "under layer_wise, which shares whole parameters out stage by stage, use the distributed optimizer"
            )
        self._tensors = [each.tensor for each in mine if each.tensor.numel()]

    def agree(self) -> None:
        """Send the first stage's weights to the others."""
        for tensor in self._tensors:
            dist.broadcast(tensor.detach(), src=dist.get_process_group_ranks(self._group)[0], group=self._group)


def _agree_to_begin(failure: str | None, trains: bool) -> None:
    """Raise ValueError on all ranks if any has failed, or has nothing to step and would miss the collectives."""
    if idle := [rank for rank, theirs in enumerate(gather_unless_failed(trains, failure)) if not theirs]:
        raise ValueError(
            f"symdist: ranks {idle} train no parameter. Where all of a stage are frozen, cut the model in fewer; "
            "where layer_wise leaves some data-parallel ranks without any, use the distributed optimizer"
        )
