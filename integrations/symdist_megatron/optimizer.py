"""What Megatron's wrappers drive: an optimizer by its groups and state, stepped together with its like."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from symdist.engines.external_state import slots
from symdist_megatron.peaks import KEPT
from symdist_megatron.routing import Routing


class MegatronSymDist(torch.optim.AdamW):
    """The groups of one of Megatron's optimizers, of dense parameters or of experts, and their state.

    State is kept like the tensors that Megatron has stepped: `exp_avg` (momentum, or Adam's first moment),
    `exp_avg_sq` (Adam's second, or what else a rule remembers) where a rule has it, and `step`: Megatron's checkpoints
    know Adam's names alone. `lr` and `weight_decay` of a group are those of the recipe's matrices,
    which Megatron's schedulers set; every matrix has its own in proportion.

    It is an AdamW by descent alone, for Megatron's distributed optimizer takes no other.
    """

    def __init__(self, groups: list[dict[str, Any]], *, routing: Routing):
        self._routing = routing
        self.model_parameters = [list(group["params"]) for group in groups]
        super().__init__(groups, lr=routing.scaled.lr, weight_decay=routing.scaled.weight_decay)
        for group in self.param_groups:
            # Of these AdamW would make use; a rule's own options are the recipe's.
            for key in set(self.defaults) - {"lr", "weight_decay"}:
                group.pop(key, None)
            group["rules"] = dict(routing.rules)
            group["step"] = 0
        self._complete = False

    def complete_state(self, pairs: list[tuple[Any, Tensor]]) -> None:
        """Make the state of the tensors that are stepped, each given with the model's parameter that it is of."""
        for parameter, tensor in pairs:
            rules = {routed.options["rule"] for routed in self._routing.routed[id(parameter)]}
            state = self.state[tensor]
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            for key in sorted({slot for rule in rules for slot in slots(rule).values()}):
                state[key] = torch.zeros_like(tensor, dtype=dtype, requires_grad=False)
            state["step"] = torch.zeros((), dtype=torch.float32)
        self._complete = True

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Nothing: the chain that this is part of has stepped all its optimizers at once when this is called."""

    def count(self, steps: int) -> None:
        """Note how many steps have been taken."""
        for group in self.param_groups:
            group["step"] = steps
        for state in self.state.values():
            state["step"].fill_(steps)

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return int(next((group["step"] for group in self.param_groups), 0))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, into the tensors that are here; what groups say to schedulers stays.

        Raises ValueError, before anything changes, where groups, rules or state do not match.
        """
        if not self._complete:
            # Megatron has the optimizer take over the tensors that it has put in place of the parameters.
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
        # They are counted over all groups. What groups say of them may be another's: Megatron 0.16 takes groups that
        # differ by their peaks alone for one.
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
        """ValueError where a saved group is of a run with other rules."""
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
