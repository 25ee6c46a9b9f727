"""Checkpoints of one mesh continue on another: the same weights as without interruption."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from symdist import SymDist
from tests import resharding_ranks
from tests.ranks import Ranks, Shape
from tests.resharding_ranks import BEFORE, Weights

Where = tuple[Shape, str, int]
PLAIN: Where = ((1,), "plain", 0)
FSDP2: Where = ((2,), "fsdp", 0)
FSDP3: Where = ((3,), "fsdp", 0)
FSDP4: Where = ((4,), "fsdp", 0)
HSDP: Where = ((2, 2), "hsdp", 0)
TP: Where = ((2, 2), "tp", 0)
TP_WITHIN: Where = ((2, 2), "tp", 1)
TP3: Where = ((3, 2), "tp", 0)
HSDP_TP: Where = ((2, 2, 2), "tp", 0)
MOVES = {
    "fsdp 4 to 2": (FSDP4, FSDP2),
    "fsdp 4 to one process": (FSDP4, PLAIN),
    "one process to fsdp 3": (PLAIN, FSDP3),
    "fsdp 4 to fsdp x tp": (FSDP4, TP),
    "fsdp x tp to fsdp 3": (TP, FSDP3),
    "hsdp to fsdp 4": (HSDP, FSDP4),
    "fsdp x tp to hsdp": (TP_WITHIN, HSDP),
    "fsdp x tp to one process": (TP_WITHIN, PLAIN),
    "fsdp 4 to hsdp x tp": (FSDP4, HSDP_TP),
    "hsdp x tp to fsdp x tp": (HSDP_TP, TP_WITHIN),
    "fsdp 2 to fsdp x tp on 3 x 2": (FSDP2, TP3),
}


@cache
def alone(rules: str = "usual") -> list[Weights]:
    return resharding_ranks.alone(rules)


def distance(found: Weights, expected: Weights, start: Weights) -> float:
    """The largest of all parameters, relative to how far it moved."""
    assert found.keys() == expected.keys()
    moved = {name: float((expected[name] - start[name]).norm()) for name in expected}
    assert min(moved.values()) > 1e-3
    return max(float((found[name] - expected[name]).norm()) / moved[name] for name in expected)


@pytest.mark.parametrize(
    "move", ["fsdp 4 to one process", "fsdp 4 to fsdp x tp", "fsdp x tp to hsdp", "fsdp 2 to fsdp x tp on 3 x 2"]
)
@pytest.mark.parametrize("rules", ["remembering", "in sections"])
def test_rotations_and_averages_go_along(many: Ranks, tmp_path: Path, rules: str, move: str) -> None:
    (there, *kept), (here, *taken) = MOVES[move]
    uninterrupted = many.run(there, resharding_ranks.saving, *kept, str(tmp_path), False, rules)
    resumed = many.run(here, resharding_ranks.loading, *taken, str(tmp_path), False, rules)
    start, expected = alone(rules)[len(BEFORE) - 1], alone(rules)[len(BEFORE) :]
    for ran in (*uninterrupted, *resumed):
        assert all(distance(a, b, start) < 1e-8 for a, b in zip(ran, expected, strict=True))


@pytest.mark.parametrize("flat", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("move", MOVES)
def test_training_goes_on_elsewhere(many: Ranks, tmp_path: Path, move: str, flat: bool) -> None:
    (there, *kept), (here, *taken) = MOVES[move]
    uninterrupted = many.run(there, resharding_ranks.saving, *kept, str(tmp_path), flat)
    resumed = many.run(here, resharding_ranks.loading, *taken, str(tmp_path), flat)
    start, expected = alone()[len(BEFORE) - 1], alone()[len(BEFORE) :]
    for ran in (*uninterrupted, *resumed):
        for found, wanted in zip(ran, expected, strict=True):
            assert distance(found, wanted, start) < 1e-9


OLMOE = [
    ({"dp_shard": 2, "ep": 2}, {"dp_shard": 4}),
    ({"dp_shard": 2, "ep": 2}, {"dp_replicate": 2, "tp": 2}),
    ({"dp_shard": 4}, {"ep": 4}),
    ({"dp_replicate": 2, "dp_shard": 1, "ep": 2}, {"dp_shard": 2, "tp": 2}),
]


@pytest.mark.parametrize(("there", "here"), OLMOE, ids=str)
def test_olmoe_goes_on_elsewhere(ranks: Ranks, tmp_path: Path, there: dict[str, int], here: dict[str, int]) -> None:
    start, *expected = ranks.run(4, resharding_ranks.presets, there, str(tmp_path), False)[0]
    # transformers rounds norms and routing to float32, which not all splits of a sum survive alike.
    for loaded, *found in ranks.run(4, resharding_ranks.presets, here, str(tmp_path), True):
        assert all(torch.equal(loaded[name], start[name]) for name in start)
        errors = [distance(after, wanted, start) for after, wanted in zip(found, expected, strict=True)]
        assert max(errors) < 1e-5


LAYOUTS = {"fsdp 4": FSDP4, "hsdp": HSDP, "fsdp x tp": TP, "hsdp x tp": HSDP_TP, "fsdp x tp on 3 x 2": TP3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_new_optimizer_has_all_its_state(many: Ranks, layout: str) -> None:
    shape, *kind = LAYOUTS[layout]
    model = resharding_ranks.Model()
    expected = resharding_ranks.described(model, SymDist(resharding_ranks.groups_of(model)))
    assert len(expected["tensors"]) == 7 + 3 * 4
    for found, unchanged, stays in many.run(shape, resharding_ranks.fresh_state, *kind):
        assert found == expected
        assert unchanged
        assert stays


def test_stages_of_a_pipeline_become_one_model(many: Ranks, tmp_path: Path) -> None:
    found = many.run((2, 2), resharding_ranks.staged, str(tmp_path))
    resumed = many.run(3, resharding_ranks.from_stages, str(tmp_path))
    expected = resharding_ranks.stages_alone()
    start = expected[len(BEFORE) - 1]
    for rank, (held, unchanged, weights) in enumerate(found):
        assert held == found[rank - rank % 2][0]
        assert {name.split(".")[0] for name in held["tensors"]} == set(resharding_ranks.STAGES[rank // 2])
        assert unchanged
        for after, wanted in zip(weights, expected[len(BEFORE) :], strict=True):
            assert distance(after, {name: wanted[name] for name in after}, start) < 1e-9
    for weights, named in resumed:
        assert named
        for after, wanted in zip(weights, expected[len(BEFORE) :], strict=True):
            assert distance(after, wanted, start) < 1e-9


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another rule": ({"rule": "row_norm"}, ["has rule 'row_norm'", "the saved one has 'right_spectral'"]),
    "another option": ({"centered": False}, ["the saved run had centered=True, this one has centered=False"]),
    "another view": ({"view": "transposed"}, ["the saved run had view='as_stored', this one has view='transposed'"]),
    "sections": ({"view": {"sections": [9, 8]}}, ["the saved run had view='as_stored'", "view={'sections': [9, 8]}"]),
    "another state": ({"rule": "adamw"}, ["has rule 'adamw'"]),
}


@pytest.mark.parametrize("layout", ["fsdp 4", "fsdp x tp"])
def test_a_checkpoint_of_another_recipe_is_refused(many: Ranks, layout: str) -> None:
    shape, kind, _ = LAYOUTS[layout]
    for found in many.run(shape, resharding_ranks.refused, kind, [changed for changed, _ in REFUSED.values()]):
        for (message, unchanged), (_, words) in zip(found, REFUSED.values(), strict=True):
            for part in ["param group 'head'", *words, "Build the optimizer with the recipe of the saved run"]:
                assert part in message
            assert unchanged


def test_a_checkpoint_of_more_groups_is_refused() -> None:
    model = resharding_ranks.Model()
    saved = SymDist(resharding_ranks.groups_of(model)).state_dict()
    optimizer = SymDist(resharding_ranks.groups_of(model)[:2])
    with pytest.raises(ValueError, match=r"the saved state has state for down\.weight, router\.weight.*, not here"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("layout", ["fsdp 4", "fsdp x tp"])
def test_gradients_may_be_missing_after_loading(many: Ranks, tmp_path: Path, layout: str, rank: int) -> None:
    shape, kind, _ = LAYOUTS[layout]
    assert all(many.run(shape, resharding_ranks.missing, kind, rank, str(tmp_path)))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_frozen_weights_do_not_keep_a_checkpoint_from_loading(
    many: Ranks, tmp_path: Path, saved: bool, loaded: bool
) -> None:
    expected = alone()
    for before, after in many.run(2, resharding_ranks.frozen, str(tmp_path), saved, loaded):
        assert (before["up.weight"] != after["up.weight"]).any() == (not loaded)
        if not saved:
            assert all((before[name] - expected[1][name]).norm() < 1e-9 for name in before)
        if not saved and not loaded:
            assert distance(after, expected[2], expected[1]) < 1e-9
