"""Under Megatron every rule is what it is in one process, however tensor, expert and data parallelism cut."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.symdist_megatron.cases import CASES
from tests.symdist_megatron.how import How
from tests.symdist_megatron.versions import GROUPED, JOINT

Worlds = Callable[[int], Ranks]

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tp": 2, "etp": 2}),
    "tp4": (4, {"tp": 4, "etp": 4}),
    "tp2 dp2": (4, {"tp": 2, "etp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2 ep2": (4, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "dp4": (4, {}),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "dp3, unevenly": (3, {"bucket": 2000}),
    "experts cut too": (4, {"tp": 2, "etp": 2, "ep": 2}),
    "shared experts": (4, {"tp": 2, "etp": 2, "shared": True}),
    "fewer query groups than ranks": (4, {"tp": 4, "etp": 4, "groups": 2}),
    "tied": (4, {"tp": 2, "etp": 2, "tied": True}),
    "tied over stages": (4, {"pp": 2, "tied": True}),
    "layer by layer": (4, {"tp": 2, "etp": 2, "layer_wise": True}),
    "stages of two": (4, {"tp": 2, "etp": 2, "pp": 2, "layers": 4}),
}
if GROUPED:
    MORE |= {
        "grouped": (1, {"grouped": True}),
        "grouped, ep2": (4, {"ep": 2, "grouped": True}),
        "grouped, cut": (4, {"tp": 2, "etp": 2, "grouped": True}),
        "grouped, cut, ep2": (4, {"tp": 2, "etp": 2, "ep": 2, "grouped": True}),
    }


KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "latent attention": (1, {"kind": "latent", "shared": True, "mtp": 1}),
    "latent attention, tp2": (2, {"kind": "latent", "shared": True, "mtp": 1, "tp": 2, "etp": 2}),
    "latent attention, stages": (4, {"kind": "latent", "mtp": 1, "pp": 2, "tp": 2, "etp": 2}),
    "sparse attention": (1, {"kind": "sparse"}),
    "sparse attention, tp2": (4, {"kind": "sparse", "tp": 2, "etp": 2}),
    "gated delta net": (1, {"kind": "delta"}),
    "gated delta net, tp2": (4, {"kind": "delta", "tp": 2, "etp": 2}),
    "mamba": (1, {"kind": "mamba", "layers": 4}),
    "mamba, tp2": (4, {"kind": "mamba", "layers": 4, "tp": 2, "etp": 2}),
    "mamba, stages": (4, {"kind": "mamba", "layers": 4, "tp": 2, "etp": 2, "pp": 2}),
}
if JOINT:
    KINDS["latent attention, joint, tp2"] = (4, {"kind": "joint", "tp": 2, "etp": 2})

STEPPED = "tests.symdist_megatron.parity_ranks:stepped"
ALL = list(range(len(CASES)))


def check(found: list[dict[int, dict[str, tuple[float, str]]]], tolerance: float, of_rows: float) -> None:
    for on_rank in found:
        assert set(on_rank) == set(found[0])
        for case, errors in on_rank.items():
            bad = {
                name: (error, rule)
                for name, (error, rule) in errors.items()
                if not error <= (of_rows if rule in ("row_norm", "adamw") else tolerance)
            }
            assert not bad, f"case {case}: {bad}"


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rule_on_every_layout(worlds: Worlds, layout: str, distributed: bool) -> None:
    world, how = LAYOUTS[layout]
    check(worlds(world).run(world, STEPPED, How(**how, distributed=distributed), ALL), 1e-9, 1e-9)


@pytest.mark.parametrize("layout", MORE)
def test_and_where_layouts_meet(worlds: Worlds, layout: str) -> None:
    """Some of the cases with the distributed optimizer, others without, where it can be chosen."""
    world, how = MORE[layout]
    for distributed, cases in ((False, ALL[::3]), (True, ALL[1::3])):
        here = How(**how, distributed=distributed and not how.get("layer_wise"))
        check(worlds(world).run(world, STEPPED, here, cases), 1e-9, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(worlds: Worlds, kind: str) -> None:
    """Mixers' sections, latents, indexers and multi-token prediction."""
    world, how = KINDS[kind]
    for distributed, cases in ((False, ALL[::3]), (True, ALL[1::3])):
        check(worlds(world).run(world, STEPPED, How(**how, distributed=distributed), cases), 1e-9, 1e-9)


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_less_precision(worlds: Worlds, dtype: str, distributed: bool) -> None:
    """In bfloat16 the masters are compared: what the model computes with is rounded."""
    world, how = LAYOUTS["tp2 ep2"]
    made = How(**how, distributed=distributed, dtype=dtype)
    check(worlds(world).run(world, STEPPED, made, ALL), 1e-3, 1e-5)
