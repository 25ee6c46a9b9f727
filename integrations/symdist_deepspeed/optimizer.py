"""The optimizer that DeepSpeed steps: DeepSpeed sees its flat tensors, `symdist.SymDist` the matrices in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from symdist.engines.bound_tensors import BoundTensor
from symdist.engines.external_state import ENGINE_STATE_NAMES, ExternalStateSymDist, slots
from symdist.layouts import FlatLayout, Layout
from symdist.layouts.flat import replicated
from symdist.param_specs import flat_parts
from symdist_deepspeed.options import Options
from symdist_deepspeed.routing import EngineAssignment
from symdist_deepspeed.transport import transport_for

if TYPE_CHECKING:
    from symdist_deepspeed.layout import OptimizedTensor, Part


class DeepSpeedSymDist(torch.optim.Optimizer):
    """The torch optimizer that DeepSpeed steps; the `symdist.SymDist` inside it steps the matrices.

    DeepSpeed replaces the parameters in `param_groups` by flat fp32 partitions, and calls `step` for some of them at a
    time. The gradients are kept until the last of these calls, which steps all tensors at once.

    A group's `lr`, which DeepSpeed's schedulers set, is the learning rate of the recipe's matrices. Every parameter's
    learning rate keeps its proportion to it.

    State has Adam's names, because DeepSpeed's checkpoint converter knows no others: `exp_avg` is the momentum or
    Adam's first moment, `exp_avg_sq` is Adam's second moment or the rule's second state, and `step` is the step count.

    Users do not create it: after `register()`, DeepSpeed does.

    Args:
        groups: The param groups from `route_engine`.
        assignments: By `id` of a model parameter, its name, shape and options, from `route_engine`.
        options: The options from the DeepSpeed config.
    """

    def __init__(self, groups: list[dict[str, Any]], *, assignments: dict[int, EngineAssignment], options: Options):
        self._assignments = assignments
        self._options = options
        self._symdist: ExternalStateSymDist | None = None
        self._bound: list[_DeepSpeedTensor] = []
        self._waiting: set[int] = set()
        self._relink: Callable[[], None] = lambda: None
        # For each group of the inner SymDist: the index of its group here, and the factor to that group's `lr`.
        self._rates: list[tuple[int, float]] = []
        self._rules = [group["rules"] for group in groups]
        # Options that a loaded checkpoint must not change, and each learning rate as a multiple of the first group's.
        self._fixed_options = [{"rules": group["rules"], "schedule": group["schedule"]} for group in groups]
        first = float(groups[0]["lr"])
        self._lr_ratios = [float(group["lr"]) / first if first else 1.0 for group in groups]
        super().__init__(groups, {})
        self._all_groups = list(self.param_groups)

    @property
    def symdist(self) -> ExternalStateSymDist:
        """The `SymDist` that steps the matrix shards.

        Raises:
            RuntimeError: Before DeepSpeed has made its partitions.
        """
        if self._symdist is None:
            raise RuntimeError(
                "this SymDist optimizer is not attached to a DeepSpeed engine yet: use it after deepspeed.initialize()"
            )
        return self._symdist

    @property
    def names(self) -> dict[int, str]:
        """The names of the model's parameters, by `id` of the parameter."""
        return {key: assignment.name for key, assignment in self._assignments.items()}

    @property
    def skipped_steps(self) -> int:
        """The number of steps skipped because a gradient was not finite."""
        return self.symdist.skipped_steps

    def attach(self, tensors: list[OptimizedTensor], *, relink: Callable[[], None]) -> None:
        """Create the state and the inner `SymDist` for the tensors that DeepSpeed has made; all ranks call it once.

        Args:
            tensors: The tensors that DeepSpeed optimizes, and the parameters in them.
            relink: Called whenever state has been created or has moved.

        Raises:
            ValueError: If the rule, view or layout of a parameter does not fit. The message names the parameter.
        """
        self._all_groups = list(self.param_groups)
        self._empty_at_rest = not any(group["params"] for group in self.param_groups)
        self._relink = relink
        inner: dict[tuple[int, int], dict[str, Any]] = {}
        rates: dict[tuple[int, int], tuple[int, float]] = {}
        state_tensors: dict[int, dict[str, Tensor]] = {}
        for optimized in tensors:
            bound = _DeepSpeedTensor(optimized)
            self._bound.append(bound)
            self._make_state(optimized.tensor, self._all_groups[optimized.group])
            for part in optimized.parts:
                assignment = self._assignments[id(part.parameter)]
                key = optimized.group, id(assignment.options)
                rates[key] = optimized.group, assignment.lr_ratio
                group = inner.setdefault(key, {**assignment.options, "lr": 0.0, "params": [], "layouts": []})
                for shard in _shards(part, optimized.tensor, assignment):
                    bound.shards.append(shard)
                    group["params"].append((shard.name, shard.parameter))
                    group["layouts"].append(shard.layout)
                    state_tensors[id(shard.parameter)] = {
                        slot: shard.of(self.state[optimized.tensor][slot])
                        for slot in slots(group["rule"], group).values()
                    }
            bound.remember(self.state[optimized.tensor])
        self._symdist = ExternalStateSymDist(
            list(inner.values()),
            state_tensors=state_tensors,
            nonfinite=self._options.nonfinite,
            exchange=self._options.exchange,
            process_group=dist.group.WORLD,
            transport=transport_for([optimized.tensor for optimized in tensors]),
        )
        self._symdist.compare_plans()
        self._rates = list(rates.values())
        self._set_rates()
        relink()

    @torch.no_grad()
    def follow(self) -> None:
        """Rebind the shards to tensors and state that DeepSpeed has moved, and release the old ones."""
        moved = [bound.follow(self.state[bound.tensor], self.symdist) for bound in self._bound]
        if any(moved):
            self._relink()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take the gradients of the tensors in `param_groups`, and step once those of all tensors are there.

        All ranks call it.

        Args:
            closure: Ignored.

        Returns:
            None.

        Raises:
            FloatingPointError: On every rank, before anything changes, if a gradient on any rank is not finite and
                `nonfinite` is "raise".
        """
        if len(self.param_groups) == len(self._rules):
            self._all_groups = list(self.param_groups)
        if self._symdist is None:
            # DeepSpeed calls `step` once as a trial while it makes its partitions.
            return None
        stepped = {id(tensor) for group in self.param_groups for tensor in group["params"]}
        if self._waiting & stepped:
            # The previous step was interrupted.
            self._forget()
        for bound in self._bound:
            if id(bound.tensor) in stepped:
                bound.take_gradient()
        self._waiting |= stepped
        if len(self._waiting) < len(self._bound):
            return None
        try:
            self._step()
        except Exception:
            # DeepSpeed reduced the param groups for this call, and does not restore them after an exception.
            self.param_groups = list(self._all_groups)
            if self._empty_at_rest:
                for group in self.param_groups:
                    group["params"] = []
            raise
        finally:
            self._forget()
        for bound in self._bound:
            if id(bound.tensor) not in stepped:
                bound.publish()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the state as torch's optimizers do, with `exp_avg_sq` for every tensor that has `exp_avg`.

        DeepSpeed's converter to universal checkpoints requires `exp_avg_sq`. For rules that only have momentum it is a
        tensor of zeros that takes up one element in memory and in the file.

        Returns:
            The state dict.
        """
        result = super().state_dict()
        if len(result["param_groups"]) == len(self._fixed_options):
            for group, fixed in zip(result["param_groups"], self._fixed_options, strict=True):
                group.update(fixed)
        for index, state in result["state"].items():
            if "exp_avg" in state and "exp_avg_sq" not in state:
                zeros = torch.zeros(1, device=state["exp_avg"].device).expand(state["exp_avg"].shape)
                result["state"][index] = {**state, "exp_avg_sq": zeros}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy saved state into the existing tensors.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: Before anything changes, if the groups, rules or state do not match this run's.
        """
        saved_groups = state_dict["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has {len(saved_groups)} param groups, but this optimizer {len(self.param_groups)}: "
                "use the recipe and the model_parameters of the saved run"
            )
        self._check_rules(saved_groups)
        pairs: list[tuple[Tensor, Mapping[str, Any]]] = []
        for i, (group, saved_group) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(group["params"]) != len(saved_group["params"]):
                raise ValueError(
                    f"param group {i} has {len(group['params'])} tensors here, but {len(saved_group['params'])} in the "
                    "checkpoint: use the ZeRO stage and sub_group_size of the saved run"
                )
            for tensor, index in zip(group["params"], saved_group["params"], strict=True):
                saved_state = state_dict["state"].get(index, {})
                for key, current in self.state[tensor].items():
                    if key not in saved_state or torch.as_tensor(saved_state[key]).numel() != current.numel():
                        saved_shape = tuple(torch.as_tensor(saved_state[key]).shape) if key in saved_state else "none"
                        raise ValueError(
                            f"param group {i} needs state {key!r} of shape {tuple(current.shape)}, but the checkpoint "
                            f"has {saved_shape}. If the number of ranks has changed, load a universal checkpoint"
                        )
                pairs.append((tensor, saved_state))
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved_group.items() if key != "params"})
        with torch.no_grad():
            for tensor, saved_state in pairs:
                for key, current in self.state[tensor].items():
                    current.copy_(torch.as_tensor(saved_state[key]).view(current.shape))

    def _step(self) -> None:
        assert self._symdist is not None
        self._check_loaded()
        self._set_rates()
        self.follow()
        skipped = self._symdist.skipped_steps
        self._symdist.step()
        if self._symdist.skipped_steps == skipped:
            for bound in self._bound:
                bound.count(self.state[bound.tensor])

    def _check_loaded(self) -> None:
        """Check the rules of groups that a universal checkpoint has replaced.

        At stage 3 a universal checkpoint gives all groups the values of the first, so those of the others are restored.
        """
        loaded = [group.get("rules") for group in self._all_groups]
        if loaded == self._rules:
            return
        if not self._empty_at_rest or any(rules != loaded[0] for rules in loaded):
            self._check_rules(self._all_groups)
        self._check_rules(self._all_groups[:1])
        first = float(self._all_groups[0]["lr"])
        for group, fixed, ratio in zip(self._all_groups, self._fixed_options, self._lr_ratios, strict=True):
            group.update(fixed, lr=first * ratio)

    def _check_rules(self, groups: list[dict[str, Any]]) -> None:
        for i, (group, expected) in enumerate(zip(groups, self._rules, strict=False)):
            if group.get("rules") != expected:
                raise ValueError(
                    f"param group {i} of the loaded checkpoint has rules {group.get('rules')}, but this run "
                    f"has {expected}: use the recipe of the saved run"
                )

    def _set_rates(self) -> None:
        """Set the learning rates of the inner SymDist's groups from those of this optimizer's groups."""
        for (group, ratio), inner in zip(self._rates, self.symdist.param_groups, strict=True):
            inner["lr"] = float(self._all_groups[group]["lr"]) * ratio

    def _make_state(self, tensor: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[tensor]
        for key in sorted({slot for rule in group["rules"].values() for slot in slots(rule).values()}):
            state[key] = torch.zeros_like(tensor, dtype=torch.float32, requires_grad=False)
        state["step"] = torch.zeros((), dtype=torch.float32)

    def _forget(self) -> None:
        self._waiting.clear()
        for bound in self._bound:
            bound.drop_gradient()


@dataclass(kw_only=True)
class MatrixShard:
    """The part of an optimized tensor that belongs to one matrix or vector.

    Attributes:
        name: The name of the matrix or vector.
        parameter: The part as a parameter: a view of the optimized tensor, or the tensor itself.
        layout: How the whole matrix lies on all ranks.
        start: The offset in the optimized tensor at which the part begins; None (default) if it is the whole tensor.
        stop: The offset at which it ends; None (default) likewise.
        copied: Always False, since parts of flat tensors are views.
    """

    name: str
    parameter: Tensor
    layout: FlatLayout | Layout
    start: int | None = None
    stop: int | None = None
    copied = False

    @property
    def itself(self) -> bool:
        """Whether the parameter is the optimized tensor itself."""
        return self.start is None

    def bind(self, tensor: Tensor) -> None:
        """Make the parameter a view of its part of a tensor.

        Args:
            tensor: The optimized tensor.
        """
        self.parameter.data = self.of(tensor)

    def of(self, tensor: Tensor) -> Tensor:
        """Return this matrix's part of a tensor.

        Args:
            tensor: A tensor of the optimized tensor's shape.

        Returns:
            A view, or the tensor itself.
        """
        return tensor if self.itself else tensor.detach()[self.start : self.stop]


class _DeepSpeedTensor(BoundTensor[MatrixShard]):
    """A bound tensor with a step count of its own, as DeepSpeed keeps one for each tensor."""

    def __init__(self, optimized: OptimizedTensor):
        super().__init__(optimized.tensor)
        self.publish = optimized.publish
        self._steps = 0.0

    def remember(self, state: Mapping[str, Any]) -> None:
        """See `BoundTensor`; the step count is kept as a number, since loading overwrites its tensor."""
        super().remember(state)
        self._steps = float(state["step"])

    def follow(self, state: Mapping[str, Any], symdist: ExternalStateSymDist) -> bool:
        """See `BoundTensor`; also takes over a loaded step count, and deletes state that the rules do not use."""
        for name in [name for name in state if name in ENGINE_STATE_NAMES and name not in self.state]:
            # Universal checkpoints bring `exp_avg_sq` even for rules that only have momentum.
            del state[name]  # type: ignore[attr-defined]
        if float(state["step"]) != self._steps:
            for shard in self.shards:
                if "step" in symdist.state[shard.parameter]:
                    symdist.state[shard.parameter]["step"].fill_(float(state["step"]))
        return super().follow(state, symdist)

    def count(self, state: dict[str, Any]) -> None:
        """Count one more step, in a new tensor, because a universal checkpoint gives all tensors the same one."""
        state["step"] = torch.tensor(self._steps + 1)
        self.remember(state)


def _shards(part: Part, tensor: Tensor, assignment: EngineAssignment) -> list[MatrixShard]:
    """Return a parameter's shards in an optimized tensor: one, or one for each matrix of a stack."""
    name, shape, options = assignment.name, assignment.shape, assignment.options
    if part.bounds is None:
        whole = part.block.layout if part.block is not None else replicated(shape, part.ranks)
        return [MatrixShard(name=name, parameter=tensor, layout=whole)]
    if part.block is not None:
        assert part.block.flat is not None
        if len(shape) > 2:
            raise ValueError(
                f"{name} has shape {shape}: symdist does not support stacks of matrices, such as fused experts, that "
                "tensor parallelism cuts; leave this parameter out of tensor parallelism"
            )
        matrices = [(name, part.block.flat, 0)]
    else:
        matrices = flat_parts(name, shape, options, bounds=part.bounds, ranks=part.ranks)
    shards = []
    for matrix_name, layout, offset in matrices:
        start = part.start + offset
        stop = start + layout.local_shape[0]
        parameter = nn.Parameter(tensor.detach()[start:stop])
        shards.append(MatrixShard(name=matrix_name, parameter=parameter, layout=layout, start=start, stop=stop))
    return shards
