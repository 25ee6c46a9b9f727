"""What ranks run for the parity tests: every case in one optimizer, three steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.exchange import ExchangeOptions
from symdist.exchange.planning.kinds import kinds_of, possible_strategies
from symdist.layouts import group_from, local
from symdist.param_groups import with_defaults
from symdist.param_specs import describe_param
from tests.cases import CASES, LR, STEPS, tensors
from tests.grids import WAYS

STRATEGIES = ("auto", "local", "reduce", "owner")
COPIES = 2
"""Parameters of each case, so that every stack holds several."""


def whole(case: str) -> list[tuple[Tensor, list[Tensor]]]:
    """Weight and gradients of every copy."""
    return [tensors(case, copy) for copy in range(COPIES)]


def possible(weight: Tensor, group: dict[str, Any], replicas: DeviceMesh | None) -> set[str]:
    """The strategies that a group on such a weight admits, for all its sections."""
    ranks = None if replicas is None else group_from(replicas)
    full = with_defaults({**group, "lr": LR, "param_names": ["w"], "strategy": "owner"})
    found = {"local", "reduce", "owner"}
    for spec in describe_param(weight, name="w", index=0, group=full, replicas=ranks).members:
        assert spec.stack is not None
        (kind,) = kinds_of({spec.stack: [0]}, names=["w"], layouts=[spec.layout], exchange=ExchangeOptions())
        found &= {*possible_strategies(kind)}
    # What treats every number by itself is local wherever it lies.
    (spec, *_) = describe_param(weight, name="w", index=0, group=full | {"strategy": "local"}, replicas=ranks).members
    return {"auto", *found, *(["local"] if spec.stack is None else [])}


def train(place: Callable[[Tensor], Tensor], dtype: torch.dtype, strategies: tuple[str, ...], **options: Any) -> Any:
    """Final weights by (case, copy, strategy), and the optimizer; a strategy a case cannot have is left out."""
    groups, drawn = [], {}
    for case, (_, group) in CASES.items():
        here = [(place(weight.to(dtype)), [place(g.to(dtype)) for g in gradients]) for weight, gradients in whole(case)]
        admitted = possible(here[0][0], group, options.get("replicate_group"))
        for strategy in (each for each in strategies if each in admitted):
            parameters = []
            for copy, (weight, gradients) in enumerate(here):
                parameter = nn.Parameter(weight.detach().clone())
                drawn[case, copy, strategy] = parameter, gradients
                parameters.append((f"{case}/{copy}/{strategy}", parameter))
            groups.append({"params": parameters, "lr": LR, "strategy": strategy, **group})
    optimizer = SymDist(groups, **options)
    for step in range(STEPS):
        for parameter, gradients in drawn.values():
            parameter.grad = gradients[step]
        optimizer.step()
    return {key: parameter.detach() for key, (parameter, _) in drawn.items()}, optimizer


def sharded(mesh: DeviceMesh, way: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[dict, dict[str, str]]:
    """This rank's pieces of every case laid out in one way, and where the rules ran."""
    weights, optimizer = train(lambda tensor: WAYS[way].place(tensor, mesh), dtype, STRATEGIES, **options)
    return {key: local(weight) for key, weight in weights.items()}, optimizer.strategies()


def shuffled(mesh: DeviceMesh, way: str) -> tuple[list[int], dict]:
    """The same where the mesh does not number ranks in their order: this rank's coordinate and pieces."""
    grid = DeviceMesh("cpu", torch.tensor([[3, 1], [2, 0]]), mesh_dim_names=("outer", "inner"))
    weights, _ = train(lambda tensor: WAYS[way].place(tensor, grid), torch.float64, ("auto", "owner"))
    coordinate = grid.get_coordinate()
    assert coordinate is not None
    return list(coordinate), {key: local(weight) for key, weight in weights.items()}


def replicas(mesh: DeviceMesh, dtype: torch.dtype) -> tuple[dict, dict[str, str]]:
    """Every case in plain tensors, whole on all ranks."""
    weights, optimizer = train(torch.clone, dtype, STRATEGIES, replicate_group=mesh)
    return weights, optimizer.strategies()


def alone(dtype: torch.dtype) -> dict:
    """The single-process oracle."""
    return train(torch.clone, dtype, ("auto",))[0]
