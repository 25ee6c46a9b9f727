"""Weights on different meshes sliced from one, and on stages of a pipeline: all of it equals the single process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import mixed_meshes_ranks
from tests.mixed_meshes_ranks import MODELS, Step, coordinate_of
from tests.ranks import Ranks

LAST = {"grid": 3, "cube": 7, "crossed": 7, "pipeline": 3, "deep": 7, "plain stage": 3}
"""The last rank, which holds less than others, or nothing."""


def near(model: str, results: list[dict[str, Tensor]], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """Every rank's pieces are those of the single process, to nine digits of how far a weight moved."""
    mesh, weights = MODELS[model]
    held: set[str] = set()
    for rank, pieces in enumerate(results):
        coordinate = coordinate_of(rank, mesh)
        assert set(pieces) == {name for name, weight in weights.items() if weight.here(coordinate)}
        held |= set(pieces)
        for name, piece in pieces.items():
            moved = (expected[name] - start[name]).norm()
            away = (piece - weights[name].piece(expected[name], mesh, coordinate)).norm()
            assert away <= 1e-9 * moved, f"{name} on rank {rank}: {float(away)} of {float(moved)}"
    assert held == set(weights)


def starts(model: str) -> dict[str, Tensor]:
    return {name: mixed_meshes_ranks.draw(name, weight.shape, 0) for name, weight in MODELS[model][1].items()}


def plans(model: str) -> dict[str, list[Step]]:
    every = list(MODELS[model][1])
    return {
        "whole": [{}, {}, {}],
        "missing on a rank": [{}, {"hole": 0}, {"hole": LAST[model]}],
        "missing everywhere": [{"gone": every[::2]}, {"gone": every}, {}, {"gone": every[::2]}],
        "zero": [{"zero": every}, {}, {"zero": every[1::2]}, {"zero": every}],
    }


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 30])
@pytest.mark.parametrize("plan", plans("grid"))
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_those_of_one_process(many: Ranks, model: str, plan: str, bucket_bytes: int) -> None:
    steps = plans(model)[plan]
    results = many.run(
        MODELS[model][0], mixed_meshes_ranks.trained, model, steps, {"exchange": {"bucket_bytes": bucket_bytes}}
    )
    expected, start = mixed_meshes_ranks.alone(model, steps), starts(model)
    assert all((expected[name] - start[name]).norm() > 0.01 for name in start)
    near(model, results, expected, start)


@pytest.mark.parametrize("model", ["cube", "crossed", "deep"])
def test_meshes_may_number_ranks_in_any_order(many: Ranks, model: str) -> None:
    steps: list[Step] = [{}, {}, {}]
    found = sorted(many.run((2, 2, 2), mixed_meshes_ranks.shuffled, model, steps), key=lambda result: result[0])
    near(model, [pieces for _, pieces in found], mixed_meshes_ranks.alone(model, steps), starts(model))


@pytest.mark.parametrize("model", MODELS)
def test_zero_gradients_alone_move_nothing_but_decay(many: Ranks, model: str) -> None:
    mesh, weights = MODELS[model]
    steps = [{"zero": list(weights)}, {"gone": list(weights)}]
    start = starts(model)
    for rank, pieces in enumerate(many.run(mesh, mixed_meshes_ranks.trained, model, steps, {})):
        for name, piece in pieces.items():
            options = weights[name].options
            decay = options.get("weight_decay", 0) * (not options.get("skip_zero_grad_rows"))
            wanted = weights[name].piece(start[name], mesh, coordinate_of(rank, mesh)) * (1 - 0.1 * decay) ** 2
            torch.testing.assert_close(piece, wanted, rtol=1e-12, atol=0)


# A rank and a weight that it holds some of; in pipelines also in the later stage only.
WHERE: list[tuple[str, int, str]] = [
    ("grid", 1, "row-wise"),
    ("grid", 3, "norm"),
    ("grid", 2, "plain"),
    ("grid", 0, "scale"),
    ("cube", 5, "one axis"),
    ("cube", 6, "all"),
    ("pipeline", 0, "more"),
    ("pipeline", 3, "second norm"),
    ("deep", 1, "tp"),
    ("deep", 7, "summed"),
    ("plain stage", 2, "plain"),
    ("plain stage", 1, "tall"),
]
BAD = [float("nan"), float("inf")]


def broken(many: Ranks, model: str, rank: int, name: str, value: float, nonfinite: str) -> list[Any]:
    return many.run(MODELS[model][0], mixed_meshes_ranks.broken, model, rank, name, value, nonfinite)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("model", "rank", "name"), WHERE)
def test_all_raise_before_anything_moves(many: Ranks, model: str, rank: int, name: str, value: float) -> None:
    for index, (message, skipped, moved, _) in enumerate(broken(many, model, rank, name, value, "raise")):
        where = f"of {name} is" if index == rank else "is"
        assert where in message
        assert "not finite; no weight was changed" in message
        assert (skipped, moved) == (0, False)


@pytest.mark.parametrize(("model", "rank", "name"), WHERE)
def test_all_skip_and_count(many: Ranks, model: str, rank: int, name: str) -> None:
    for message, skipped, moved, _ in broken(many, model, rank, name, float("nan"), "skip"):
        assert (message, skipped, moved) == ("", 1, False)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(("model", "rank", "name"), WHERE)
def test_zeroed_elements_are_zero(many: Ranks, model: str, rank: int, name: str, value: float) -> None:
    found = broken(many, model, rank, name, value, "zero")
    assert all((message, skipped, moved) == ("", 0, True) for message, skipped, moved, _ in found)
    near(model, [pieces for *_, pieces in found], mixed_meshes_ranks.zeroed(model, rank, name), starts(model))


@pytest.mark.parametrize("step", [{}, {"hole": 0}, "half"], ids=["whole", "hole", "half"])
@pytest.mark.parametrize("max_norm", [0.5, float("inf")])
@pytest.mark.parametrize("model", MODELS)
def test_clipping_measures_the_whole_model(many: Ranks, model: str, max_norm: float, step: Step | str) -> None:
    mesh, weights = MODELS[model]
    plan = {"gone": list(weights)[::2]} if isinstance(step, str) else step
    whole = {name: mixed_meshes_ranks.gradient(model, name, 1, plan) for name in weights}
    norm = float(torch.stack([x.square().sum() for x in whole.values() if x is not None]).sum().sqrt())
    factor = min(1.0, max_norm / (norm + 1e-6))
    for rank, (found, gradients) in enumerate(many.run(mesh, mixed_meshes_ranks.clipped, model, max_norm, plan)):
        # Returned in single precision.
        assert found == pytest.approx(norm, rel=1e-6)
        for name, gradient in gradients.items():
            wanted = whole[name]
            assert (gradient is None) == (wanted is None) or "hole" in plan
            if gradient is not None and wanted is not None:
                piece = weights[name].piece(wanted, mesh, coordinate_of(rank, mesh)) * factor
                assert (gradient - piece).norm() <= 1e-9 * wanted.norm()
