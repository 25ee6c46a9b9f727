"""Megatron's optimizer wrappers, adapted to state other than Adam's and to one step for all optimizers."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, FP32Optimizer, MegatronOptimizer
from torch import Tensor

from symdist.exchange import CountingTransport
from symdist.layouts.flat import flat_bounds
from symdist_megatron.checkpoints import (
    COMMON,
    common_state,
    own_copies,
    reshardable,
    with_groups,
    without_groups,
)
from symdist_megatron.joint_step import JointStep, OptimizedTensor
from symdist_megatron.layout import HeldRange
from symdist_megatron.optimizer import MegatronSymDist
from symdist_megatron.peaks import saved_rates, take_rates


class SymDistDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer over a `MegatronSymDist`.

    State that a rule does not have is saved as zeros, so that checkpoints have Megatron's own form and load under any
    parallel layout.
    """

    optimizer: MegatronSymDist

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the param groups alone, since Megatron saves the parameters' state separately.

        Returns:
            The state dict.
        """
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self.optimizer.state_dict()["param_groups"]
        ]
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the groups, and the parameters' state if it is included.

        Args:
            state_dict: What `state_dict` returned, with or without the parameters' state.

        Raises:
            ValueError: Before anything changes, if its rules are not this run's.
        """
        super().load_state_dict(state_dict)
        # Megatron loads the step count only for optimizers that it knows.
        self.optimizer.count(int(state_dict["optimizer"]["param_groups"][0]["step"]))

    def _get_main_param_and_optimizer_states(self, model_param: Any) -> dict[str, Tensor]:
        main = self._main_of(model_param)
        state = self.optimizer.state[main]
        # New zeros, not shared ones, because some formats load into the tensors returned here.
        second = state["exp_avg_sq"] if "exp_avg_sq" in state else torch.zeros_like(main)
        return {"param": main, "exp_avg": state["exp_avg"], "exp_avg_sq": second}

    def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict[str, Tensor]) -> None:
        main = self._main_of(model_param)
        targets = {"param": main.detach(), **self.optimizer.state[main]}
        for key in ("param", "exp_avg", "exp_avg_sq"):
            if key in targets:
                targets[key].copy_(tensors[key])

    def _main_of(self, model_param: Any) -> Tensor:
        group, order = self.model_param_group_index_map[model_param]
        return self.optimizer.param_groups[group]["params"][order]


class SymDistChain(ChainedOptimizer):
    """Megatron's chain of optimizers, which are all stepped at once before each copies its results to the model.

    Attributes:
        joint_step: The step of all optimizers.
        owned: Whether each data-parallel rank steps whole parameters that no other such rank steps.
    """

    joint_step: JointStep
    owned = False
    _saved_rates: Sequence[tuple[dict[str, Any], dict[str, Any]]] = ()

    def attach(self, joint_step: JointStep) -> None:
        """Set the joint step of the optimizers.

        Args:
            joint_step: The step of all optimizers of this chain.
        """
        self.joint_step = joint_step

    @property
    def skipped_steps(self) -> int:
        """The number of steps that symdist itself, not Megatron, skipped because a gradient was not finite."""
        return self.joint_step.symdist.skipped_steps

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> dict[Any, Any]:
        """Return the sharded state, as Megatron's chain does.

        In formats that save parameters by their shapes, it is independent of the layout: it loads under any other,
        whether or not experts have an optimizer of their own there.

        Args:
            model_sharded_state_dict: The model's sharded state.
            is_loading: Whether it is to be filled from a checkpoint. False by default.
            **kwargs: Passed on to Megatron; `metadata` names the format.

        Returns:
            The sharded state.
        """
        if not reshardable(kwargs.get("metadata"), self.chained_optimizers):
            return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        parts: dict[Any, Any] = {
            i: without_groups(wrapper.sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs))
            for i, wrapper in enumerate(self.chained_optimizers)
        }
        if self.owned:
            own_copies(parts)
        return {COMMON: common_state(self.chained_optimizers), **parts}

    def load_state_dict(self, state_dict: Any) -> None:
        """Load saved state.

        Args:
            state_dict: What `state_dict` returned, or the filled `sharded_state_dict`.

        Raises:
            ValueError: Before anything changes, if the groups, rules or state do not match this run's.
        """
        if not (isinstance(state_dict, dict) and COMMON in state_dict):
            # Read before loading, because Megatron replaces these groups as it loads.
            saved = [list(part.get("optimizer", part).get("param_groups", ())) for part in self._parts(state_dict)]
            super().load_state_dict(state_dict)
            self._remember_rates(saved)
            return
        common = state_dict[COMMON]
        for wrapper in self.chained_optimizers:
            if wrapper.optimizer is not None:
                wrapper.optimizer.check_rules(next(iter(common["groups"].values())))
        parts = [with_groups(state_dict[i], common) for i in range(len(self.chained_optimizers))]
        for wrapper, part in zip(self.chained_optimizers, parts, strict=True):
            wrapper.load_state_dict(part)
        self._remember_rates([list(common["groups"].values())] * len(parts))

    def take_saved_rates(self) -> None:
        """Replace the groups' values for schedulers (`max_lr` and the like) by those of the loaded checkpoint.

        The learning rates of all matrices follow in proportion. Megatron's scheduler calls this, see
        `peaks.follow_schedulers`.
        """
        for group, saved in self._saved_rates:
            take_rates(group, saved)

    def _parts(self, state_dict: Any) -> list[Any]:
        """Split a loaded state by optimizer."""
        if len(self.chained_optimizers) == 1:
            return [state_dict]
        return [state_dict[key] for key in sorted(state_dict)] if isinstance(state_dict, dict) else list(state_dict)

    def _remember_rates(self, saved: list[list[dict[str, Any]]]) -> None:
        self._saved_rates = [
            pair
            for wrapper, groups in zip(self.chained_optimizers, saved, strict=True)
            for pair in zip(wrapper.param_groups, saved_rates(wrapper.param_groups, groups), strict=True)
        ]

    def trace_collectives(self) -> CountingTransport:
        """Record the collectives of symdist in a step on this rank, without communicating.

        Megatron's own collectives, for norms and for gathering weights, are not included.

        Returns:
            The transport that recorded every collective in order, with the bytes it sends.
        """
        return self.joint_step.trace_collectives()

    @torch.no_grad()
    def prepare_grads(self) -> bool:
        """Prepare the gradients as Megatron does, and agree on overflows; all ranks must call it.

        If `nonfinite` is "zero", gradient elements that are not finite are set to 0.

        Returns:
            Whether any rank found an overflow, which is only checked for with a loss scale; then no rank steps.
        """
        overflow = super().prepare_grads()
        if any(getattr(wrapper, "grad_scaler", None) is not None for wrapper in self.chained_optimizers):
            flag = torch.tensor([float(overflow)], device=torch.cuda.current_device())
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            overflow = bool(flag.item())
        if self.joint_step.symdist.nonfinite == "zero":
            # This must come before Megatron computes norms of the gradients.
            for wrapper in self.chained_optimizers:
                for parameter in wrapper.get_parameters():
                    if parameter.grad is not None:
                        torch.nan_to_num_(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)
        return overflow

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Step all optimizers, then copy the results to the model; all ranks must call it.

        Returns:
            False if the step was skipped because a gradient was not finite, otherwise what Megatron's chain returns.

        Raises:
            FloatingPointError: On every rank, before anything changes, if a gradient on any rank is not finite and
                `nonfinite` is "raise".
        """
        timers = self.config.timers
        if timers is not None:
            timers("symdist-step", log_level=1).start(barrier=self.config.barrier_with_L1_time)
        stepped = self.joint_step.step()
        if timers is not None:
            timers("symdist-step").stop()
        return super().step_with_ready_grads() if stepped else False


class SymDistLayerWise(SymDistChain, LayerWiseDistributedOptimizer):
    """Megatron's layer-wise optimizer: each data-parallel rank steps whole parameters of its own and holds their state.

    Its checkpoints load on any number of ranks, too.
    """

    owned = True


def stepped_by(wrapper: MegatronOptimizer, *, owned: bool = False) -> list[OptimizedTensor]:
    """List the tensors that a Megatron wrapper optimizes.

    Args:
        wrapper: The wrapper, around a `MegatronSymDist`.
        owned: Whether no other data-parallel rank has these parameters. False by default.

    Returns:
        One entry for every model parameter that the wrapper serves, in the order of its groups.

    Raises:
        ValueError: If the distributed optimizer divides its buffers otherwise than symdist expects.
    """
    base: MegatronSymDist = wrapper.optimizer
    if isinstance(wrapper, DistributedOptimizer):
        return list(_of_distributed(wrapper, base))
    parameter_of_main: dict[int, Any] = {}
    if not isinstance(wrapper, FP32Optimizer):
        for parameters, mains in zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True):
            parameter_of_main.update((id(main), parameter) for parameter, main in zip(parameters, mains, strict=True))
    return [
        OptimizedTensor(
            parameter=parameter_of_main.get(id(tensor), tensor),
            group=i,
            tensor=tensor,
            held=HeldRange(low=0, high=tensor.numel(), bounds=None, copies=not owned),
        )
        for i, group in enumerate(base.param_groups)
        for tensor in group["params"]
    ]


def _of_distributed(wrapper: DistributedOptimizer, base: MegatronSymDist) -> Iterator[OptimizedTensor]:
    """Yield the tensors of the distributed optimizer: a range of each parameter, as buckets are divided among ranks."""
    ranges: dict[int, tuple[int, Any]] = {}
    for buffer in wrapper.buffers:
        ranks = buffer.data_parallel_group.size()
        for parameter, (start, _, bucket_index) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_index]
            part = bucket.grad_data.numel() // ranks
            ranges[id(parameter)] = (
                buffer.data_parallel_group.rank(),
                flat_bounds(start - bucket.offset, parameter.numel(), part=part, ranks=ranks),
            )
    mains: dict[int, Tensor] = {}
    for models, shards in (
        (wrapper.model_float16_groups, wrapper.shard_fp32_from_float16_groups),
        (wrapper.model_fp32_groups, wrapper.shard_fp32_groups),
    ):
        for group_parameters, group_shards in zip(models, shards, strict=True):
            mains.update((id(parameter), main) for parameter, main in zip(group_parameters, group_shards, strict=True))
    for i, parameters in enumerate(base.model_parameters):
        for parameter in parameters:
            rank, bounds = ranges[id(parameter)]
            low, high = bounds[rank], bounds[rank + 1]
            main = mains.get(id(parameter))
            if (main.numel() if main is not None else 0) != high - low:
                raise ValueError(
                    f"symdist: this rank should hold {high - low} elements of a parameter of shape "
                    f"{tuple(parameter.shape)} in Megatron's distributed optimizer, but holds "
                    f"{0 if main is None else main.numel()}; symdist does not know how this release of megatron-core "
                    "divides its buffers"
                )
            yield OptimizedTensor(
                parameter=parameter,
                group=i,
                tensor=main,
                held=HeldRange(low=low, high=high, bounds=bounds if len(bounds) > 2 else None),
            )
