"""A fuzzed case: what ranks run for it, what one process makes of it, and how far they are apart.

A case is a plain dict of lists, numbers and strings. One that fails is reported as a line to run:

    python -m tests.fuzz_ranks '{"mesh": [2, 3], …}'
"""

import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.layouts import FlatLayout, Group, group_from, local
from tests.grids import Way
from tests.ranks import Ranks

BOUND = 1e-9

Case = dict[str, Any]
"""`mesh`, `bucket_bytes`, `replicas` (plain tensors are known to be alike), `steps`, and `parameters`, of which each
has

- `shape`, and `copies`, so many of one group; `group`, its options; `seed`;
- `on`, the axes of the mesh that it lies on, and `cuts`, `[[axis of those, dimension], …]`, or None for a plain tensor;
- instead of `cuts`, `bounds`: where each rank's run of elements ends, of a tensor that lies flat on all ranks;
- `gradients`, one a step: "drawn", "rows" (every third row is zero), "zero", "none" (on all ranks), or
  `["hole", axis, index]` (none on the ranks at that index of the axis; of a flat tensor, on the rank of that index).
"""


def way_of(case: Case, parameter: Case) -> Way:
    sizes = tuple(case["mesh"][axis] for axis in parameter["on"])
    return Way(sizes, tuple((axis, dim) for axis, dim in parameter["cuts"]))


def drawn(parameter: Case, copy: int, step: int) -> Tensor:
    """The weight at step 0, then the gradients, without holes."""
    generator = torch.Generator().manual_seed(1000 * parameter["seed"] + 10 * copy + step)
    tensor = torch.randn(parameter["shape"], generator=generator, dtype=torch.float64)
    kind = parameter["gradients"][step - 1] if step else "drawn"
    if kind == "rows":
        (tensor.mT if parameter["group"].get("view") == "transposed" else tensor)[1::3] = 0
    return tensor * (kind not in ("zero", "none"))


def gradient_alone(case: Case, parameter: Case, copy: int, step: int) -> Tensor | None:
    """What all ranks' gradients are together."""
    kind = parameter["gradients"][step - 1]
    gradient = drawn(parameter, copy, step)
    if kind[0] == "hole" and "bounds" in parameter:
        bounds = [0, *parameter["bounds"]]
        gradient.view(-1)[bounds[kind[2]] : bounds[kind[2] + 1]] = 0
    elif kind[0] == "hole":
        way = way_of(case, parameter)
        for coordinate in itertools.product(*map(range, way.mesh)):
            if coordinate[kind[1]] == kind[2]:
                way.piece(gradient, coordinate).zero_()
    return None if kind == "none" else gradient


def trained(
    case: Case,
    place: Callable[[Case, Tensor], Tensor],
    gradient: Callable[[Case, int, int], Tensor | None],
    ranks: Group | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and strategies by name after the steps; a strategy that a case cannot have gives way to "auto"."""
    groups: list[dict[str, Any]] = []
    weights: dict[str, tuple[Case, int, nn.Parameter]] = {}
    for i, parameter in enumerate(case["parameters"]):
        named = []
        for copy in range(parameter["copies"]):
            weight = nn.Parameter(place(parameter, drawn(parameter, copy, 0)))
            weights[f"{i}.{copy}"] = parameter, copy, weight
            named.append((f"{i}.{copy}", weight))
        group = {"params": named, **parameter["group"]}
        if "bounds" in parameter and ranks is not None:
            bounds = 0, *parameter["bounds"]
            group["layouts"] = [FlatLayout(shape=tuple(parameter["shape"]), group=ranks, bounds=bounds)] * len(named)
        try:
            SymDist([dict(group)], **options)
        except ValueError as error:
            if "cannot run with strategy" not in str(error):
                raise
            group["strategy"] = "auto"
        groups.append(group)
    optimizer = SymDist(groups, exchange={"bucket_bytes": case["bucket_bytes"]}, **options)
    for step in range(1, case["steps"] + 1):
        for parameter, copy, weight in weights.values():
            weight.grad = gradient(parameter, copy, step)
        optimizer.step()
    return {name: local(w).detach() for name, (_, _, w) in weights.items()}, optimizer.strategies()


def on_ranks(mesh: DeviceMesh, case: Case) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's pieces, and where the rules ran."""
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    ranks = group_from(mesh)

    def place(parameter: Case, tensor: Tensor) -> Tensor:
        if "bounds" in parameter:
            bounds = [0, *parameter["bounds"]]
            return tensor.reshape(-1)[bounds[ranks.index] : bounds[ranks.index + 1]]
        if parameter["cuts"] is None:
            return tensor
        names = tuple((mesh.mesh_dim_names or ())[axis] for axis in parameter["on"])
        return way_of(case, parameter).place(tensor, mesh if len(names) == mesh.ndim else mesh[names])

    def gradient(parameter: Case, copy: int, step: int) -> Tensor | None:
        kind = parameter["gradients"][step - 1]
        at = (
            ranks.index
            if "bounds" in parameter
            else coordinate[parameter["on"][kind[1]]]
            if kind[0] == "hole"
            else None
        )
        missing = kind == "none" or (kind[0] == "hole" and at == kind[2])
        return None if missing else place(parameter, drawn(parameter, copy, step))

    replicas = mesh if case["replicas"] else None
    return trained(case, place, gradient, ranks, process_group=mesh, replicate_group=replicas)


def alone(case: Case) -> dict[str, Tensor]:
    """The weights that one process finds."""

    def gradient(parameter: Case, copy: int, step: int) -> Tensor | None:
        return gradient_alone(case, parameter, copy, step)

    return trained(case, lambda _, tensor: tensor, gradient)[0]


def errors(case: Case, results: list[tuple[dict[str, Tensor], dict[str, str]]]) -> dict[str, float]:
    """By name, the distance to the single process relative to how far that moved; inf where ranks disagree."""
    assert all(strategies == results[0][1] for _, strategies in results), "strategies differ between ranks"
    found = {}
    for name, expected in alone(case).items():
        i, copy = map(int, name.split("."))
        parameter = case["parameters"][i]
        if "bounds" in parameter:
            whole = torch.cat([weights[name] for weights, _ in results]).view(parameter["shape"])
            found[name] = _distance(whole, expected, drawn(parameter, copy, 0))
            continue
        # The pieces of every copy of the submesh, in its own order.
        copies: dict[tuple[int, ...], list[Tensor]] = {}
        for coordinate, (weights, _) in zip(itertools.product(*map(range, case["mesh"])), results, strict=True):
            elsewhere = tuple(at for axis, at in enumerate(coordinate) if axis not in parameter["on"])
            copies.setdefault(elsewhere, []).append(weights[name])
        pieces, *others = copies.values()
        assert all(torch.equal(a, b) for other in others for a, b in zip(pieces, other, strict=True)), "copies differ"
        if parameter["cuts"] is None:
            assert all(torch.equal(piece, pieces[0]) for piece in pieces), "replicas differ"
        cut = parameter["cuts"] is not None
        whole = way_of(case, parameter).whole(pieces, tuple(parameter["shape"])) if cut else pieces[0]
        found[name] = _distance(whole, expected, drawn(parameter, copy, 0))
    return found


def _distance(whole: Tensor, expected: Tensor, start: Tensor) -> float:
    moved, away = float((expected - start).norm()), float((whole - expected).norm())
    return away / moved if moved else math.inf * away if away else 0.0


def wrong(many: Ranks, case: Case, bound: float = BOUND) -> tuple[list[str], dict[str, str]]:
    """What is wrong with a case, a line for each parameter, and where the rules ran."""
    mesh = tuple(case["mesh"])
    results = many.run(mesh if len(mesh) > 1 else mesh[0], on_ranks, case)
    strategies = results[0][1]

    def where(name: str) -> str:
        return ", ".join(strategy for member, strategy in strategies.items() if member.partition("[")[0] == name)

    return [
        f"{name} {case['parameters'][int(name.split('.')[0])]['shape']} at {where(name)}: {error:.1e}"
        for name, error in errors(case, results).items()
        if not error < bound
    ], strategies


def smallest(many: Ranks, case: Case) -> Case:
    """The case with as few parameters, copies and steps as still go wrong."""
    for i in range(len(case["parameters"])):
        one = case | {"parameters": [case["parameters"][i]]}
        if wrong(many, one)[0]:
            case = one
            break
    for steps in range(1, case["steps"]):
        if wrong(many, case | {"steps": steps})[0]:
            case = case | {"steps": steps}
            break
    single = case | {"parameters": [parameter | {"copies": 1} for parameter in case["parameters"]]}
    return single if wrong(many, single)[0] else case


def line(case: Case) -> str:
    """What to run to see a case again."""
    return f"reproduce: python -m tests.fuzz_ranks '{json.dumps(case)}'"


def main(literal: str, bound: float = BOUND) -> int:
    """Run one case on ranks of its own; 1 where it is wrong."""
    case = json.loads(literal)
    mesh = tuple(case["mesh"])
    many = Ranks(math.prod(mesh), (mesh,) if len(mesh) > 1 else ())
    try:
        found, strategies = wrong(many, case, bound)
        print(f"{len(found)} of {len(strategies)} parameters are wrong")
        print("\n".join([*found, line(smallest(many, case)) if bound == BOUND else line(case)] if found else []))
        return int(bool(found))
    finally:
        many.close()


if __name__ == "__main__":
    # Not this module, which ranks could not import.
    from tests import fuzz_ranks

    sys.exit(fuzz_ranks.main(sys.argv[1], *map(float, sys.argv[2:])))
