"""Tiny models of this year's architectures train under FSDP2 as in one process, and every weight of theirs moves."""

from fnmatch import fnmatchcase

import pytest
import torch

from symdist import route
from tests.architectures import tiny_ranks
from tests.architectures.tiny import TINY, WITHOUT_GRADIENT, tiny
from tests.ranks import Ranks


@pytest.mark.parametrize("model_type", TINY)
def test_training_under_fsdp2_is_that_of_one_process(ranks: Ranks, model_type: str) -> None:
    losses, expected, without = tiny_ranks.alone(model_type, 2)
    start = tiny_ranks.weights(tiny(model_type))
    for rank, (seen, weights) in enumerate(ranks.run(2, tiny_ranks.together, model_type)):
        assert seen == pytest.approx([step[rank] for step in losses], rel=1e-9)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert (weight - expected[name]).norm() <= 1e-9 * (expected[name] - start[name]).norm(), name
    reasons = WITHOUT_GRADIENT.get(model_type, {})
    assert without == {name for name in expected if any(fnmatchcase(name, pattern) for pattern in reasons)}
    for name, weight in expected.items():
        # Of experts in one tensor, each.
        each = (
            zip(weight, start[name], strict=True)
            if weight.ndim == 3 and "conv" not in name
            else [(weight, start[name])]
        )
        assert name in without or not any(torch.equal(now, then) for now, then in each), name


def test_every_kind_of_matrix_is_among_them() -> None:
    """What the models are tiny of: each role that a matrix may have, and views of every kind."""
    roles, views = set(), set()
    for model_type in TINY:
        for group in route(tiny(model_type), tiny_ranks.RECIPE):
            roles.add(group["role"])
            views.add(group["view"] if isinstance(group["view"], str) else " ".join(sorted(group["view"])))
    assert {"router", "indexer", "mixer_in", "mixer_out", "gate", "convolution", "state_space", "sink"} <= roles
    assert {"attention_q", "attention_qkv", "expert_gate_up", "expert_down", "per_layer_embedding"} <= roles
    assert {"as_stored", "transposed", "dim heads", "dim heads transposed", "sections"} <= views, views
