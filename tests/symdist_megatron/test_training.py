"""Trained by Megatron's own schedules, a model is the same however its ranks share it; and after a checkpoint."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from tests.ranks import Ranks
from tests.symdist_megatron.how import How

Worlds = Callable[[int], Ranks]
RANKS = "tests.symdist_megatron.training_ranks:"
STEPS = 20
RECIPE: dict[str, Any] = {
    "embedding": {"rule": "row_norm", "lr": 0.3},
    "head": {"rule": "right_spectral", "centered": True, "lr": 0.03},
    "router": {"rule": "left_spectral", "centered": True, "lr": 0.01},
    "attention": {"rule": "muon", "lr": 0.02},
    "attention_o": {"rule": "muon", "view": "heads", "lr": 0.02},
    "mlp": {"rule": "hybrid", "view": "neurons", "lr": 0.02},
    "matrix": {"rule": "muon", "lr": 0.02, "weight_decay": 0.01},
    "other": {"rule": "adamw", "lr": 0.01},
}
DENSE = How(dtype="float32", moe=(0, 0))
EXPERTS = How(dtype="float32")
Run = tuple[list[float], list[float], dict[str, Tensor]]


@cache
def alone(worlds: Worlds, how: How, steps: int) -> Run:
    return worlds(1).run(1, RANKS + "trained", how, RECIPE, steps)[0]


def check(worlds: Worlds, world: int, how: How, base: How, *, tolerance: float, steps: int = STEPS) -> None:
    losses, norms, weights = alone(worlds, base, steps)
    assert losses[-1] < losses[0] - 0.005 * steps
    assert max(norms) > 0.2, "clipping at 0.1 had something to do"
    for on_rank, norms_on_rank, furthest in worlds(world).run(world, RANKS + "beside", how, RECIPE, steps, weights):
        assert on_rank == pytest.approx(losses, abs=tolerance)
        assert norms_on_rank == pytest.approx(norms, rel=max(tolerance, 1e-6))
        assert furthest < tolerance


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("base", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_tensor_parallelism_does_not_change_the_answer(worlds: Worlds, base: How, tp: int, distributed: bool) -> None:
    """Fused q, k and v and gated weights included; norms, which clip, are those of one process."""
    check(worlds, tp, replace(base, tp=tp, etp=tp, distributed=distributed), base, tolerance=1e-4)


OTHERS: dict[str, tuple[int, How]] = {
    "dp2": (2, How()),
    "dp4, distributed, overlapping": (4, How(distributed=True, overlap=True)),
    "tp2 dp2, overlapping": (4, How(tp=2, etp=2, overlap=True)),
    "tp2 ep2": (4, How(tp=2, ep=2)),
    "tp2 ep2, distributed": (4, How(tp=2, ep=2, distributed=True)),
    "pp2 dp2, distributed": (4, How(pp=2, distributed=True)),
    "dp2 tp2, layer by layer": (4, How(tp=2, etp=2, layer_wise=True)),
    "tied, pp2": (2, How(pp=2, tied=True)),
    "tied, pp2 tp2, distributed": (4, How(pp=2, tp=2, etp=2, tied=True, distributed=True)),
    "tied, pp2 dp2, distributed": (4, How(pp=2, tied=True, distributed=True)),
    "shared experts, tp2 ep2": (4, How(tp=2, ep=2, shared=True, distributed=True)),
    "latent attention, tp2 pp2": (4, How(kind="latent", mtp=1, tp=2, etp=2, pp=2, distributed=True)),
    "latent attention, tp2": (2, How(kind="latent", mtp=1, tp=2, etp=2, shared=True)),
    "gated delta net, tp2": (2, How(kind="delta", tp=2, etp=2, distributed=True)),
    "mamba, tp2 ep2": (4, How(kind="mamba", layers=4, tp=2, ep=2, distributed=True)),
}


@pytest.mark.parametrize("layout", OTHERS)
def test_nor_does_any_other(worlds: Worlds, layout: str) -> None:
    """In double precision, so that no top-k choice flips."""
    world, how = OTHERS[layout]
    base = replace(how, tp=1, pp=1, ep=1, etp=1, distributed=False, overlap=False, layer_wise=False)
    check(worlds, world, how, base, tolerance=1e-6, steps=8)


PLAIN = How(dtype="float32", moe=(0, 0))
DISTRIBUTED = replace(PLAIN, distributed=True)
MIXED = replace(DISTRIBUTED, dtype="bfloat16")
FIRST = How(dtype="float32")
MAMBA = How(dtype="float32", kind="mamba", layers=4)
DELTA = How(dtype="float32", kind="delta", moe=(0, 0))
LATENT = How(dtype="float32", kind="latent", mtp=1, moe=(0, 0))
WAYS: dict[str, list[tuple[int, How]]] = {
    "plain": [(4, replace(PLAIN, tp=2)), (4, PLAIN), (4, replace(PLAIN, tp=4))],
    "distributed": [(4, replace(DISTRIBUTED, tp=2)), (4, DISTRIBUTED), (4, replace(DISTRIBUTED, tp=4))],
    "bfloat16, distributed": [(4, replace(MIXED, tp=2)), (4, MIXED), (2, MIXED)],
    "experts": [(2, replace(FIRST, ep=2)), (1, FIRST)],
    "experts, distributed": [(4, replace(FIRST, ep=2, distributed=True)), (2, replace(FIRST, distributed=True))],
    "bfloat16, layer by layer": [
        (4, replace(MIXED, tp=2, distributed=False, layer_wise=True)),
        (2, replace(MIXED, distributed=False)),
    ],
    "stages": [(4, replace(FIRST, pp=2, distributed=True)), (2, replace(FIRST, ep=2, distributed=True))],
    "stages of experts": [(4, replace(FIRST, pp=2, ep=2)), (4, replace(FIRST, ep=4))],
    "stages of experts, distributed": [
        (4, replace(FIRST, pp=2, ep=2, distributed=True)),
        (4, replace(FIRST, ep=4, distributed=True)),
    ],
    "mamba": [(2, replace(MAMBA, tp=2, etp=2)), (1, MAMBA)],
    "mamba, distributed": [(4, replace(MAMBA, tp=2, etp=2, distributed=True)), (2, replace(MAMBA, distributed=True))],
    "gated delta net": [(2, replace(DELTA, tp=2)), (1, DELTA)],
    "latent attention, stages": [(2, replace(LATENT, pp=2)), (2, replace(LATENT, tp=2, etp=2))],
    "tied stages": [(2, replace(PLAIN, pp=2, tied=True)), (2, replace(PLAIN, tied=True))],
}


@pytest.mark.parametrize("way", WAYS)
def test_checkpoints_load_at_any_layout(worlds: Worlds, tmp_path: Any, way: str) -> None:
    """Saved at one, loaded and saved at the next: the same losses follow each."""
    losses: list[list[float]] = []
    folder: str | None = None
    for i, (world, how) in enumerate(WAYS[way]):
        given = {"resume": folder, "folder": str(tmp_path / str(i)), "steps": 3, "after": 6}
        found = worlds(world).run(world, RANKS + "saved", how, RECIPE, given)
        assert all(on_rank == found[0] for on_rank in found)
        losses.append(found[0])
        folder = given["folder"]
    for after in losses[1:]:
        assert after == pytest.approx(losses[0], abs=2e-2 if "bfloat16" in way else 1e-4)


def test_megatrons_own_form_loads_where_it_was_saved(worlds: Worlds, tmp_path: Any) -> None:
    """That of the distributed optimizer's buffers, which Megatron takes unless told otherwise."""
    how = replace(FIRST, ep=2, distributed=True)
    first = {"resume": None, "folder": str(tmp_path / "0"), "steps": 3, "after": 4, "form": "dp_reshardable"}
    then = first | {"resume": first["folder"], "folder": str(tmp_path / "1")}
    losses = [worlds(4).run(4, RANKS + "saved", how, RECIPE, given)[0] for given in (first, then)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
