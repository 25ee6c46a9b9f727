"""The optimizer in each of Megatron's wrappers, which holds param groups and state for `JointStep`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from symdist.engines.external_state import slots
from symdist_megatron.peaks import KEPT
from symdist_megatron.routing import Routing


class MegatronSymDist(torch.optim.AdamW):
    """The param groups and state of one of Megatron's optimizers, for dense parameters or for experts.

    The `lr` and `weight_decay` of a group are those of the recipe's role "matrix". Megatron's schedulers set them, and
    the values of all other roles keep their proportion to them.

    State has the shapes of the tensors that Megatron optimizes, and Adam's names, because Megatron's checkpoints know
    no others: `exp_avg` is the momentum or Adam's first moment, `exp_avg_sq` is Adam's second moment or the rule's
    second state, and `step` is the step count. Rules without a second state have no `exp_avg_sq`.

    It inherits from AdamW only because Megatron's distributed optimizer accepts no other class.

    Args:
        groups: The param groups from Megatron's factory.
        routing: The assignments of the model's parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], *, routing: Routing):
        self._routing = routing
        self.model_parameters = [list(group["params"]) for group in groups]
        super().__init__(groups, lr=routing.scaled.lr, weight_decay=routing.scaled.weight_decay)
        for group in self.param_groups:
            # AdamW adds options of its own; the options of the rules are in the routing.
            for key in set(self.defaults) - {"lr", "weight_decay"}:
                group.pop(key, None)
            group["rules"] = dict(routing.rules)
            group["step"] = 0
        self._complete = False

    def complete_state(self, pairs: list[tuple[Any, Tensor]]) -> None:
        """Create the state of the optimized tensors, as zeros.

        Args:
            pairs: Each model parameter with the tensor that Megatron optimizes for it.
        """
        for parameter, tensor in pairs:
            rules = {routed.options["rule"] for routed in self._routing.routed[id(parameter)]}
            state = self.state[tensor]
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            for key in sorted({slot for rule in rules for slot in slots(rule).values()}):
                state[key] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
            state["step"] = torch.zeros((), dtype=torch.float32)
        self._complete = True

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing: `SymDistChain` has already stepped all its optimizers at once when Megatron calls this."""

    def count(self, steps: int) -> None:
        """Set the number of steps taken.

        Args:
            steps: The number of steps.
        """
        for group in self.param_groups:
            group["step"] = steps
        for state in self.state.values():
            state["step"].fill_(steps)

    @property
    def steps(self) -> int:
        """The number of steps taken."""
        return int(next((group["step"] for group in self.param_groups), 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy saved state into the existing tensors; the groups keep their values for schedulers.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            ValueError: Before anything changes, if the groups, rules or state do not match this run's.
        """
        if not self._complete:
            # Megatron also calls this right after it has replaced the parameters by its tensors, before there is state.
            return
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(
                f"the saved state has {len(saved)} param groups, but this optimizer has {len(self.param_groups)}; use "
                "the model and the config_overrides of the saved run"
            )
        steps = self.steps
        for saved_group in saved:
            self.check_rules(saved_group)
            steps = int(saved_group.get("step", steps))
        pairs: list[tuple[Tensor, Tensor]] = []
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if len(state_dict["state"]) > len(tensors):
            raise ValueError(
                f"the saved state is of {len(state_dict['state'])} tensors, but this optimizer has {len(tensors)}; use "
                "the model of the saved run"
            )
        # Tensors are numbered over all groups. The saved groups' own lists of tensors are not used, because Megatron
        # 0.16 mixes up groups that differ only in what `RATES` lists.
        for index, tensor in enumerate(tensors):
            pairs += self._matched(tensor, state_dict["state"].get(index, {}))
            steps = int(state_dict["state"].get(index, {}).get("step", steps))
        for group, saved_group in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in saved_group.items() if key not in ("params", "rules", *KEPT)})
        with torch.no_grad():
            for current, value in pairs:
                if current is not value:
                    current.copy_(value)
        self.count(steps)

    def check_rules(self, saved: Mapping[str, Any]) -> None:
        """Check that a saved param group has the rules of this run.

        Args:
            saved: The saved group.

        Raises:
            ValueError: If it has other rules, or none.
        """
        rules = saved.get("rules")
        current = self._routing.rules
        if rules is None or any(rules.get(role, rule) != rule for role, rule in current.items()):
            raise ValueError(
                f"the checkpoint was saved with rules {rules}, but this run has {dict(current)}; "
                "use the recipe and the overrides of the saved run"
            )

    def _matched(self, tensor: Tensor, saved: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pair the state of a tensor with its saved state; raise ValueError if that is missing or of another shape."""
        pairs = []
        for key, current in self.state[tensor].items():
            if key == "step":
                continue
            if key not in saved or saved[key].shape != current.shape:
                saved_shape = tuple(saved[key].shape) if key in saved else "none"
                raise ValueError(
                    f"the state {key!r} of a parameter should have shape {tuple(current.shape)}, but in the checkpoint "
                    f"it has {saved_shape}; use the model and the parallel layout of the saved run"
                )
            pairs.append((current, saved[key]))
        return pairs
