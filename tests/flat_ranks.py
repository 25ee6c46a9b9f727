"""What ranks run for the tests of flat layouts: every case as runs of elements, three steps."""

import math
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from symdist import SymDist
from symdist.exchange import CountingTransport, Hardware, TorchTransport
from symdist.layouts import FlatLayout, group_from
from symdist.layouts.flat import flat_bounds, flat_vector
from tests.cases import CASES, LR, STEPS, tensors

Key = tuple[str, int, str, int]
"""Case, copy, strategy, expert."""
STRATEGIES = ("auto", "local", "reduce", "owner")
COPIES = 2


def shapes(case: str) -> list[tuple[int, ...]]:
    """A matrix, or the matrices of a stack one by one."""
    shape = CASES[case][0]
    return [shape[1:]] * shape[0] if len(shape) == 3 else [shape]


def all_keys() -> list[Key]:
    return [
        (case, copy, strategy, expert)
        for case in CASES
        for copy in range(COPIES)
        for strategy in STRATEGIES
        for expert in range(len(shapes(case)))
    ]


def cut(keys: list[Key], way: str, ranks: int) -> dict[Key, dict[str, Any]]:
    """The bounds of every tensor: "each" cut by itself, all in "one" vector, or anywhere.

    "shuffled" ranks hold the runs in an order of their own; of "columns" matrices are cut in blocks of these first.
    """
    sizes = [math.prod(shapes(case)[expert]) for case, _, _, expert in keys]
    if way == "each":
        bounds = [flat_bounds(0, size, part=-(-size // ranks), ranks=ranks) for size in sizes]
    elif way == "one":
        bounds = flat_vector(sizes, ranks=ranks, align=2)
    else:
        source = random.Random(f"{way} {ranks}")
        bounds = []
        for size in sizes:
            inner = sorted(source.choice((0, size, source.randint(0, size))) for _ in range(ranks - 1))
            bounds.append((0, *inner, size))
    source = random.Random(way)
    found: dict[Key, dict[str, Any]] = {}
    for key, of_key in zip(keys, bounds, strict=True):
        found[key] = {"shape": shapes(key[0])[key[3]], "bounds": of_key}
        if way in ("shuffled", "columns"):
            found[key]["rank_order"] = tuple(source.sample(range(ranks), ranks))
        if way == "columns" and len(found[key]["shape"]) == 2:
            rows, width = found[key]["shape"]
            found[key]["column_blocks"] = (width - width // 3, width // 3)
            if "sections" in CASES[key[0]][1].get("view", ()):
                # A rank holds elements of one block, as under tensor parallelism.
                first = rows * (width - width // 3)
                found[key]["bounds"] = tuple(sorted({*range(0, rows * width, -(-first // (ranks - 1))), first}))[:ranks]
                found[key]["bounds"] += (rows * width,)
    return found


def piece(whole: Tensor, layout: FlatLayout) -> Tensor:
    """What this rank holds: written down apart from the library."""
    blocks = whole.split(layout.column_blocks, dim=1) if layout.column_blocks else [whole]
    elements = torch.cat([block.reshape(-1) for block in blocks])
    place = layout.rank_order.index(layout.group.index) if layout.rank_order else layout.group.index
    return elements[layout.bounds[place] : layout.bounds[place + 1]]


def put_together(pieces: list[Tensor], given: dict[str, Any]) -> Tensor:
    """The whole tensor, from what all ranks hold."""
    order = given.get("rank_order") or range(len(pieces))
    elements = torch.cat([pieces[rank] for rank in order])
    rows = given["shape"][0]
    widths = given.get("column_blocks") or (elements.numel() // rows,)
    blocks = elements.split([rows * width for width in widths])
    return torch.cat([block.view(rows, -1) for block in blocks], dim=1).view(given["shape"])


def train_sending(mesh: DeviceMesh, way: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """The same where sending costs nothing, so that whole matrices go to whoever has least to do."""
    free = Hardware(bandwidth=1e15, flops=1e3, model_flops=1e3)
    return train(mesh, way, dtype, {"exchange": {"hardware": free}})


def train(mesh: DeviceMesh, way: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[dict, dict]:
    """This rank's pieces after three steps, by key; and where the rules ran."""
    group = group_from(mesh)
    keys = all_keys()
    layouts = {key: FlatLayout(group=group, **given) for key, given in cut(keys, way, group.size).items()}
    drawn: dict[Key, tuple[nn.Parameter, list[Tensor]]] = {}
    groups: list[dict[str, Any]] = []
    for case, (shape, options_of_case) in CASES.items():
        for strategy in STRATEGIES:
            candidate: dict[str, Any] = {
                "lr": LR,
                "strategy": strategy,
                **options_of_case,
                "params": [],
                "layouts": [],
            }
            for key in keys:
                if key[0] != case or key[2] != strategy:
                    continue
                weight, gradients = tensors(case, key[1])
                pieces = [
                    piece((t[key[3]] if len(shape) == 3 else t).to(dtype), layouts[key]) for t in (weight, *gradients)
                ]
                parameter = nn.Parameter(pieces[0].clone())
                candidate["params"].append(("/".join(map(str, key)), parameter))
                candidate["layouts"].append(layouts[key])
                drawn[key] = parameter, pieces[1:]
            try:
                SymDist([dict(candidate)], process_group=mesh, **options)
            except ValueError as error:
                if "cannot run with strategy" not in str(error):
                    raise
                drawn = {key: found for key, found in drawn.items() if key[0] != case or key[2] != strategy}
            else:
                groups.append(candidate)
    optimizer = SymDist(groups, process_group=mesh, **options)
    for step in range(STEPS):
        for parameter, gradients in drawn.values():
            parameter.grad = gradients[step]
        optimizer.step()
    return {key: parameter.detach() for key, (parameter, _) in drawn.items()}, optimizer.strategies()


def counted(
    mesh: DeviceMesh, shape: tuple[int, ...], group: dict[str, Any], way: str, copies: int
) -> tuple[float, list[str], list[tuple[int, int]]]:
    """Bytes this rank sends in a step over float32 copies of a matrix, the collectives, and its runs."""
    ranks = group_from(mesh)
    sizes = [math.prod(shape)] * copies
    if way == "each":
        bounds = [flat_bounds(0, size, part=-(-size // ranks.size), ranks=ranks.size) for size in sizes]
    else:
        bounds = flat_vector(sizes, ranks=ranks.size)
    runs = [(bound[ranks.index], bound[ranks.index + 1]) for bound in bounds]
    counting = CountingTransport(inner=TorchTransport())
    given = {
        "params": [nn.Parameter(torch.ones(stop - start)) for start, stop in runs],
        "layouts": [FlatLayout(shape=shape, group=ranks, bounds=bound) for bound in bounds],
        "lr": 0.1,
        **group,
    }
    for parameter in given["params"]:
        parameter.grad = torch.zeros_like(parameter)
    SymDist([given], transport=counting, process_group=mesh).step()
    # The first is the agreement on gradients.
    (agreement, *log) = counting.log
    assert agreement.kind == "all_reduce"
    return sum(moved.sent for moved in log), [moved.kind for moved in log], runs
