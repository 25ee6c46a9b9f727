"""Ranks that do not all hold the same parameters: pipeline stages, groups that overlap, weights frozen and added."""

import pytest
import torch
from torch import Tensor, nn

from tests import stages_ranks
from tests.ranks import Ranks
from tests.stages_ranks import STAGES, STEPS, draw, on_rings


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-9 * expected.norm())


def unsharded(stages: int, *, skipped: bool = False, zeroed: tuple[int, int] | None = None) -> tuple[list, list[float]]:
    """The whole model in one process: weights by stage, and the norms that clipping finds."""
    built = [stages_ranks.built(stage, torch.clone) for stage in range(stages)]
    norms = []
    for step in range(1, STEPS + 1):
        gradients = [[draw(stage, i, step) for i in range(len(STAGES[stage]))] for stage in range(stages)]
        norm = float(torch.stack([g.square().sum() for of_stage in gradients for g in of_stage]).sum().sqrt())
        norms.append(norm)
        for (parameters, optimizer), of_stage, stage in zip(built, gradients, range(stages), strict=True):
            for i, (parameter, gradient) in enumerate(zip(parameters, of_stage, strict=True)):
                parameter.grad = gradient * min(1.0, 1.0 / (norm + 1e-6))
                if step == 2 and zeroed == (stage, i):
                    parameter.grad.view(-1)[0] = 0
            if not (skipped and step == 2):
                optimizer.step()
    return [[parameter.detach() for parameter in parameters] for parameters, _ in built], norms


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 4)])
def test_stages_of_a_pipeline_are_the_whole_model(many: Ranks, shape: tuple[int, int]) -> None:
    weights, norms = unsharded(shape[0])
    for stage, found, measured, message, skipped in many.run(shape, stages_ranks.pipeline, "raise", None, None):
        assert all(close(a, b) for a, b in zip(found, weights[stage], strict=True))
        assert measured == pytest.approx(norms, rel=1e-6)
        assert (message, skipped) == ("", 0)


@pytest.mark.parametrize("broken", [(0, 1, 1), (1, 0, 3), (2, 1, 0)])
def test_a_nan_in_one_stage_is_everyones(many: Ranks, broken: tuple[int, int, int]) -> None:
    skipping = unsharded(3, skipped=True)[0]
    for nonfinite in ("raise", "skip"):
        for stage, found, _, message, skipped in many.run((3, 2), stages_ranks.pipeline, nonfinite, broken, None):
            assert all(close(a, b) for a, b in zip(found, skipping[stage], strict=True))
            assert skipped == (nonfinite == "skip")
            assert ("not finite" in message) == (nonfinite == "raise")
    if broken[1] == 0:
        zeroed = unsharded(3, zeroed=(broken[0], broken[2]))[0]
        for stage, found, _, message, skipped in many.run((3, 2), stages_ranks.pipeline, "zero", broken, None):
            assert all(close(a, b) for a, b in zip(found, zeroed[stage], strict=True))
            assert (message, skipped) == ("", 0)


@pytest.mark.parametrize("missing", [0, 3, 5])
def test_a_rank_without_gradients_holds_nobody_up(many: Ranks, missing: int) -> None:
    results = many.run((3, 2), stages_ranks.pipeline, "raise", None, missing)
    assert all(message == "" for _, _, _, message, _ in results)
    norms = [measured for _, _, measured, _, _ in results]
    assert all(measured == norms[0] for measured in norms)
    assert norms[0][1] < unsharded(3)[1][1]


@pytest.mark.parametrize("bucket_bytes", [1, 4000, 1 << 30])
def test_overlapping_groups_do_not_wait_in_a_ring(ranks: Ranks, bucket_bytes: int) -> None:
    parameters, optimizer = on_rings(stages_ranks.RINGS, lambda tensor, ring: tensor)
    for _ in range(2):
        optimizer.step()
    held = 0
    for weights in ranks.run(4, stages_ranks.overlapping, bucket_bytes):
        held += len(weights)
        assert all(close(weight, parameters[name].detach()) for name, weight in weights.items())
    assert held == len(stages_ranks.RULES) * sum(map(len, stages_ranks.RINGS))


def test_frozen_weights_stay_and_later_ones_join(ranks: Ranks) -> None:
    for first, second, third in ranks.run(3, stages_ranks.frozen):
        start = nn.Parameter(torch.ones(()).double())
        assert first[0] < start
        assert first[1] == first[2] == start
        assert second[0] == first[0]
        assert second[1] < start
        assert second[2] == start
        assert third[0] == first[0]
        assert third[1] < second[1]
        assert third[2] < start
