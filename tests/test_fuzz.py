"""Random parameters, layouts, rules, views and gradients in one optimizer: sharded equals the single process."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests import fuzz_ranks
from tests.fuzz_ranks import Case
from tests.grids import GRIDS
from tests.ranks import Ranks

MESHES = (*GRIDS, (1,), (2,), (3,), (4,), (6,), (8,))
EXAMPLES = 7
Options = dict[str, Any]


# Found by this test: the rule saw one real row where strategy saw ten.
FOUND: Case = {
    "mesh": [3, 2],
    "bucket_bytes": 1,
    "replicas": True,
    "steps": 3,
    "parameters": [
        {
            "shape": [10, 5],
            "on": [0, 1],
            "cuts": [[0, 0]],
            "copies": 2,
            "seed": 109,
            "group": {"rule": "muon", "lr": 0.1, "strategy": "reduce", "padding_rows": 9},
            "gradients": ["drawn", "zero", ["hole", 0, 0]],
        }
    ],
}


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


CENTERED = one_of(False, True)
SCALE = one_of("nuclear", "nuclear_over_frobenius")
SIDE = one_of("auto", "right", "left")
# Views, centring and missing gradients make singular Grams of any shape. An exact root without damping magnifies their
# rounding to 1e-8 of the update, so it has damping here; test_parity has it without, where the Gram is not singular.
# The polynomials magnify nothing more than a thousandfold.
NUMERICS = st.one_of(
    st.fixed_dictionaries({"method": st.just("exact"), "damping": one_of(1e-3, 1e-2)}),
    st.fixed_dictionaries(
        {"method": st.just("polar_express"), "damping": one_of(1e-8, 1e-3), "ns_steps": one_of(0, 3)}
    ),
    st.fixed_dictionaries({"method": st.just("newton_schulz"), "damping": one_of(1e-8, 1e-3)}),
)
MOMENTUM = {"momentum": one_of(0.0, 0.5, 0.95)}
ALPHA = st.one_of(
    st.fixed_dictionaries({"alpha": one_of(0.5, 1.0), "scale": SCALE}),
    st.fixed_dictionaries({"alpha": st.just(0.0), "scale": one_of("nuclear", "none")}),
)
ORDERS = st.one_of(
    st.fixed_dictionaries({"order": st.just("polar_then_row")}),
    st.fixed_dictionaries({"order": st.just("row_then_polar"), "alpha": one_of(0.5, 1.0), "scale": SCALE}),
)


def told(rule: str, *more: st.SearchStrategy[Options], **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Options]:
    parts = st.tuples(st.fixed_dictionaries({"rule": st.just(rule), **options}), *more)
    return parts.map(lambda dicts: {key: value for part in dicts for key, value in part.items()})


# Left out are precisions below that of the weights, which round to two or three digits by design.
RULES = st.one_of(
    told("row_norm", centered=CENTERED, **MOMENTUM),
    told("right_spectral", NUMERICS, ALPHA, centered=CENTERED, **MOMENTUM),
    told("left_spectral", NUMERICS, ALPHA, centered=CENTERED, **MOMENTUM),
    told("polar", NUMERICS, ALPHA, centered=CENTERED, side=SIDE, **MOMENTUM),
    told("hybrid", NUMERICS, ORDERS, centered=CENTERED, side=SIDE, **MOMENTUM),
    told(
        "muon",
        NUMERICS,
        side=SIDE,
        adjust_lr=one_of("spectral", "match_rms_adamw", "none"),
        nesterov=CENTERED,
        **MOMENTUM,
    ),
    told("adamw", centered=CENTERED, betas=one_of([0.9, 0.95], [0.0, 0.5])),
    told("normuon", NUMERICS, beta2=one_of(0.5, 0.95), **MOMENTUM),
    told("aurora", NUMERICS, iterations=one_of(1, 3), **MOMENTUM),
    told("scion", norm=one_of("spectral", "sign", "row", "row_rms"), radius=one_of(1.0, 3.0), **MOMENTUM),
    told("aro", base=one_of("sinkhorn", "row_norm", "adam"), **MOMENTUM),
)
COMMON = st.fixed_dictionaries(
    {
        "lr": one_of(0.1, 0.01),
        "weight_decay": one_of(0.0, 0.1),
        "strategy": one_of("auto", "local", "reduce", "owner"),
        "skip_zero_grad_rows": one_of(False, False, True),
    }
)


@st.composite
def shapes_and_views(draw: st.DrawFn, dims: int) -> tuple[list[int], Options]:
    p, q = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    heads, unit = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    turned = {"transposed": True} if draw(one_of(False, True)) else {}
    kinds = ["as_stored", "as_stored", "transposed", "gate_up_stacked", "gate_up_interleaved", "heads_0", "heads_1"]
    kind = draw(one_of(*kinds, *(["sections"] if dims == 2 else [])))
    view: Options = {"view": kind}
    match kind if dims > 1 else "vector":
        case "vector":
            return [p], {}
        case "gate_up_stacked":
            p += p % 2
        case "gate_up_interleaved":
            q += q % 2
        case "heads_0":
            p, view = heads * unit, {"view": {"heads": heads, "dim": 0} | turned}
        case "heads_1":
            q, view = heads * unit, {"view": {"heads": heads, "dim": 1} | turned}
        case "sections":
            counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
            sizes = [draw(st.integers(1, 5)) * max(count, 1) for count in counts]
            p, view = sum(sizes), {"view": {"sections": sizes, "heads": counts} | turned}
        case "as_stored" | "transposed" if dims == 2 and p > 1:
            view["padding_rows"] = draw(one_of(0, 0, 1, p - 1))
    return [draw(st.integers(1, 9)), p, q][3 - dims :], view


@st.composite
def cuts(draw: st.DrawFn, sizes: tuple[int, ...], dims: int) -> list[tuple[int, int]]:
    """Of any dimensions, by any axes. The order is one that placements can tell: an axis cuts a dimension before all
    axes to its right or after them all."""
    orders: dict[int, list[int]] = {}
    for axis in reversed(range(len(sizes))):
        dim = draw(one_of(None, *range(dims)))
        if dim is not None:
            order = orders.setdefault(dim, [])
            order.insert(draw(one_of(0, len(order))), axis)
    return [(axis, dim) for dim, order in orders.items() for axis in order]


@st.composite
def parameters(draw: st.DrawFn, mesh: tuple[int, ...], steps: int) -> Case:
    group = draw(RULES) | draw(COMMON)
    flat = draw(st.integers(0, 2)) == 0
    dims = draw(one_of(*((1,) if group["rule"] == "adamw" else ()), 2, *(() if flat else (3,))))
    shape, view = draw(shapes_and_views(dims))
    if group["rule"] == "aro" and str(view.get("view")).startswith("gate_up"):
        view = {}  # It depends on the order of columns, which such a view changes.
    ranks, size = math.prod(mesh), math.prod(shape)
    on = draw(st.sets(st.sampled_from(range(len(mesh))), min_size=1)) if draw(CENTERED) else range(len(mesh))
    sizes = tuple(mesh[axis] for axis in sorted(on))
    plain = draw(st.integers(0, 5)) == 0
    cut = None if plain else draw(cuts(sizes, dims))
    kinds: list[Any] = ["drawn", "drawn", "drawn", "rows", "zero", "none"]
    # Ranks with copies of one piece lack its gradient together, so holes run along the axes that cut.
    kinds += [["hole", axis, index] for axis, _ in cut or () for index in {0, sizes[axis] - 1}]
    where: Case = {"on": sorted(on), "cuts": cut}
    if flat:
        kinds = [*kinds[:6], ["hole", 0, 0], ["hole", 0, ranks - 1]]
        ends = draw(st.lists(one_of(0, size, draw(st.integers(0, size))), min_size=ranks - 1, max_size=ranks - 1))
        where = {"on": list(range(len(mesh))), "cuts": None, "bounds": [*sorted(ends), size]}
    return {
        "shape": shape,
        **where,
        "copies": draw(one_of(1, 1, 2, 3)),
        "seed": draw(st.integers(0, 999)),
        "group": group | view,
        "gradients": [draw(one_of(*kinds)) for _ in range(steps)],
    }


@st.composite
def cases(draw: st.DrawFn, mesh: tuple[int, ...]) -> Case:
    steps = draw(one_of(2, 3))
    drawn = draw(st.lists(parameters(mesh, steps), min_size=3, max_size=6))
    if not any(parameter["gradients"][0] in ("drawn", "rows", "zero") for parameter in drawn):
        # A first step without any gradient is refused, and a hole may be on all ranks of its axis.
        drawn[0]["gradients"][0] = "drawn"
    return {
        "mesh": list(mesh),
        "bucket_bytes": draw(one_of(1, 4000, 20000, 1 << 30)),
        "replicas": draw(one_of(False, True)),
        "steps": steps,
        "parameters": drawn,
    }


def check(many: Ranks, case: Case) -> list[str]:
    """Fail with the line that reproduces it where a case goes wrong; else what it had in it, for counting."""
    try:
        found, strategies = fuzz_ranks.wrong(many, case)
    except AssertionError as error:
        pytest.fail(f"{error}\n{fuzz_ranks.line(case)}", pytrace=False)
    if found:
        pytest.fail("\n".join([*found, fuzz_ranks.line(fuzz_ranks.smallest(many, case))]), pytrace=False)
    kinds = ["example", str(case["mesh"]), *strategies.values()]
    for parameter in case["parameters"]:
        kinds += ["sections"] * ("sections" in parameter["group"].get("view", ()))
        kinds += ["submesh"] * (len(parameter["on"]) < len(case["mesh"]))
        way = "flat" if "bounds" in parameter else "plain" if parameter["cuts"] is None else "cut"
        padded = ["padding", f"{way} padding"] if parameter["group"].get("padding_rows") else []
        kinds += ["parameter", parameter["group"]["rule"], way, *padded]
        kinds += [kind if isinstance(kind, str) else "hole" for kind in parameter["gradients"]]
    return kinds


def test_what_was_found_stays_mended(many: Ranks) -> None:
    check(many, FOUND)


def test_sharded_equals_the_single_process(many: Ranks) -> None:
    seen: Counter[str] = Counter()
    for number, mesh in enumerate(MESHES):
        # No shrinking by hypothesis: after a crash other ranks may still be waiting. What goes wrong is cut down to
        # its parameter instead.
        @seed(number)
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(mesh))
        def run(case: Case) -> None:
            seen.update(check(many, case))

        run()
    print(dict(seen))
    assert seen["example"] >= 60
    assert seen["parameter"] >= 200
    kinds = [
        "plain",
        "submesh",
        "none",
        "zero",
        "rows",
        "hole",
        "local",
        "reduce",
        "owner",
        "row_norm",
        "right_spectral",
    ]
    kinds += ["left_spectral", "polar", "hybrid", "muon", "adamw", "normuon", "aurora", "scion", "aro"]
    assert {kind: seen[kind] for kind in [*kinds, "flat", "padding", "sections"] if seen[kind] < 20} == {}
    assert {kind: seen[kind] for kind in ("flat padding", "cut padding", "plain padding") if not seen[kind]} == {}


CASE: Case = {
    "mesh": [2],
    "bucket_bytes": 4000,
    "replicas": False,
    "steps": 2,
    "parameters": [
        {
            "shape": [7, 4],
            "on": [0],
            "cuts": [[0, 0]],
            "copies": 2,
            "seed": 1,
            "group": {"rule": "muon", "lr": 0.1, "strategy": "owner"},
            "gradients": ["drawn", ["hole", 0, 1]],
        }
    ],
}


@pytest.mark.parametrize(("bound", "status"), [(1e-9, 0), (0.0, 1)])
def test_the_line_of_a_case_runs_it(bound: float, status: int) -> None:
    words = fuzz_ranks.line(CASE).removeprefix("reproduce: python -m tests.fuzz_ranks ").strip("'")
    command = [sys.executable, "-m", "tests.fuzz_ranks", words, str(bound)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    _, verdict, after = done.stdout.partition(f"{2 * status} of 2 parameters are wrong\n")
    assert verdict, done.stdout
    assert after.splitlines()[2:] == [fuzz_ranks.line(CASE)] * status
