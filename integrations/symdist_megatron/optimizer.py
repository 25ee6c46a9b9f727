"""The optimizer inside each of Megatron's wrappers: it holds param groups and state, and `JointStep` steps it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from symdist.engines.external_state import slots
from symdist_megatron.peaks import KEPT
from symdist_megatron.routing import Routing


class MegatronSymDist(torch.optim.AdamW):
    """The param groups and state of one of Megatron's optimizers, for dense parameters or for experts.

    Of a group, `lr` and `weight_decay` are those of the recipe's matrices, which Megatron's schedulers set. Every
    matrix's own values keep their proportion to them.

    State has the shapes of the tensors that Megatron optimizes, and Adam's names, because Megatron's checkpoints know
    no others: `exp_avg` is the momentum or Adam's first moment, `exp_avg_sq` is Adam's second moment or the rule's
    second state, and `step` is the step count. Rules without a second state have no `exp_avg_sq`.

    It inherits from AdamW only because Megatron's distributed optimizer accepts no other class.

    Args:
        groups: The param groups from Megatron's factory.
        routing: What each parameter of the model was assigned.
    """

    def __init__(self, groups: list[dict[str, Any]], *, routing: Routing):
        self._routing = routing
        self.model_parameters = [list(group["params"]) for group in groups]
        super().__init__(groups, lr=routing.scaled.lr, weight_decay=routing.scaled.weight_decay)
        for group in self.param_groups:
            # These are AdamW's options; a rule's options are in the routing.
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
            # Megatron calls this when it has replaced the parameters by its own tensors; there is no state yet.
            return
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"the saved state has {len(saved)} param groups, this optimizer {len(self.param_groups)}")
        steps = self.steps
        for theirs in saved:
            self.check_rules(theirs)
            steps = int(theirs.get("step", steps))
        pairs: list[tuple[Tensor, Tensor]] = []
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if len(state_dict["state"]) > len(tensors):
            raise ValueError(
                f"the saved state is of {len(state_dict['state'])} tensors, this optimizer of {len(tensors)}"
            )
        # Tensors are numbered over all groups. The saved groups' own lists of tensors are not used, because Megatron
        # 0.16 mixes up groups that differ only in what `RATES` lists.
        for index, tensor in enumerate(tensors):
            pairs += self._matched(tensor, state_dict["state"].get(index, {}))
            steps = int(state_dict["state"].get(index, {}).get("step", steps))
        for group, theirs in zip(self.param_groups, saved, strict=True):
            group.update({key: value for key, value in theirs.items() if key not in ("params", "rules", *KEPT)})
        with torch.no_grad():
            for mine, value in pairs:
                if mine is not value:
                    mine.copy_(value)
        self.count(steps)

    def check_rules(self, saved: Mapping[str, Any]) -> None:
        """Check that a saved param group has the rules of this run.

        Args:
            saved: The saved group.

        Raises:
            ValueError: If it has other rules, or none.
        """
        rules = saved.get("rules")
        mine = self._routing.rules
        if rules is None or any(rules.get(role, rule) != rule for role, rule in mine.items()):
            raise ValueError(
                f"the checkpoint was saved with rules {rules}, this run has {dict(mine)}; "
                "use the recipe and the overrides of the saved run"
            )

    def _matched(self, tensor: Tensor, found: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for key, mine in self.state[tensor].items():
            if key == "step":
                continue
            if key not in found or found[key].shape != mine.shape:
                have = tuple(found[key].shape) if key in found else "none"
                raise ValueError(f"a parameter needs state {key!r} of shape {tuple(mine.shape)}; the saved has {have}")
            pairs.append((mine, found[key]))
        return pairs
