"""What the views of weights are for, by what a model does: which rows of which matrices its output is a function of."""

from typing import Any

import torch
from torch import Tensor, nn

from symdist import route
from symdist.matrix_views import View, bind_view

# By neurons and heads, wherever there are any.
RECIPE = {
    "attention": {"rule": "muon", "view": "heads", "lr": 0.01},
    "mlp": {"rule": "muon", "view": "neurons", "lr": 0.01},
    "experts": {"rule": "muon", "view": "neurons", "lr": 0.01},
    "matrix": {"rule": "muon", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 0.01},
}


class Matrices:
    """The weights of attention or an MLP as the matrices that their views make of them, by role.

    Args:
        model: The model, routed as a whole.
        part: The part whose weights these are.
    """

    def __init__(self, model: nn.Module, part: nn.Module):
        held = {id(weight) for weight in part.parameters()}
        self.weights: dict[str, nn.Parameter] = {}
        self.views: dict[str, View] = {}
        for group in route(model, RECIPE):
            for weight in group["params"]:
                role = group["role"]
                if id(weight) in held and role.startswith(("attention_", "mlp_", "expert_")):
                    assert role not in self.weights
                    self.weights[role] = weight
                    self.views[role] = bind_view(group["view"], tuple(weight.shape), name=role)

    def silence(self, role: str, where: tuple[Any, ...]) -> None:
        """Set a part of the matrices of a weight to zero, and leave it out of what is looked at."""
        weight, view = self.weights.pop(role), self.views.pop(role)
        with torch.no_grad():
            matrices = view.matrices(weight).clone()
            matrices[where] = 0
            weight.copy_(view.to_stored(matrices, tuple(weight.shape)))

    def reached(self, output: Tensor) -> dict[str, Tensor]:
        """By role, which rows of which matrices the output is a function of: `[matrices, rows]`."""
        away = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        gradients = torch.autograd.grad((output * away.to(output.dtype)).sum(), list(self.weights.values()))
        by_role = zip(self.weights, gradients, strict=True)
        return {role: self.views[role].matrices(gradient).abs().amax(2) > 0 for role, gradient in by_role}

    def check_neurons(self, run: Any, neurons: int) -> None:
        """Check that a neuron is a row of every matrix: one whose output is lost has no effect.

        Args:
            run: Runs the part on its input.
            neurons: How many there are, in each expert.
        """
        (down,) = [role for role in self.weights if role.endswith("_down")]
        assert self.views[down].rows == neurons
        self.silence(down, (slice(None), 5))
        reached = self.reached(run())
        assert {role.partition("_")[2] for role in reached} in ({"gate", "up"}, {"gate_up"}, {"up"})
        for role, rows in reached.items():
            busy = rows[rows.any(1)]  # Experts that got tokens.
            assert len(busy) >= min(3, len(rows)), role
            assert busy.shape[1] == neurons, role
            assert not busy[:, 5].any(), role
            assert busy.sum(1).eq(neurons - 1).all(), role

    def check_heads(self, run: Any, heads: int, groups: int, *, grouped: bool = False) -> None:
        """Check that a head is a matrix of every weight: one whose output is lost has no effect.

        Args:
            run: Runs the part on its input.
            heads: The number of heads of queries.
            groups: The number of heads of keys and values.
            grouped: Whether a fused weight has queries, key and value of each group one after another. By default it
                has all queries, then all keys, then all values.
        """
        assert self.views["attention_o"].count == heads
        share, silent = heads // groups, heads - 2
        group = silent // share
        self.silence("attention_o", (silent,))
        for role, rows in self.reached(run()).items():
            lost = (~rows.any(1)).nonzero().flatten().tolist()
            match role:
                case "attention_q" | "attention_gate":
                    each = len(rows) // heads  # A query may have its gate beside it.
                    assert lost == list(range(silent * each, (silent + 1) * each)), role
                case "attention_k" | "attention_v":
                    assert len(rows) == groups, role
                    assert lost == ([group] if share == 1 else []), role
                case "attention_qkv":
                    # In its group of query, key and value, or among all queries, before all keys and all values.
                    place = group * (share + 2) + silent % share if grouped else silent
                    with_it = [place + 1, place + 2] if grouped else [heads + group, heads + groups + group]
                    assert len(rows) == heads + 2 * groups, role
                    assert lost == [place, *(with_it if share == 1 else [])], role
                case _:
                    raise AssertionError(role)
