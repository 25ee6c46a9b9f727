"""Narrow arithmetic wherever a rule runs: errors against float64 in one process are those of the precision."""

from typing import Any

import pytest
import torch

from tests import precision_ranks
from tests.ranks import Ranks

BOUND = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1, "auto": 5e-2}
RULES: dict[str, dict[str, Any]] = {
    "muon": {"rule": "muon"},
    "normuon": {"rule": "normuon"},
    "aurora": {"rule": "aurora"},
    "scion": {"rule": "scion"},
    "hybrid": {"rule": "hybrid", "centered": True, "alpha": 1.0},
    "hybrid_polar_first": {"rule": "hybrid", "order": "polar_then_row"},
    "right_spectral": {"rule": "right_spectral", "centered": True, "alpha": 1.0, "scale": "nuclear_over_frobenius"},
    "left_spectral": {"rule": "left_spectral", "alpha": 1.0, "view": "transposed"},
    "polar": {"rule": "polar", "alpha": 0.5},
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("strategy", ["reduce", "owner"])
def test_errors_do_not_depend_on_where_a_rule_runs(
    ranks: Ranks, name: str, precision: str, world: int, strategy: str
) -> None:
    options = {**RULES[name], "precision": precision}
    expected, _ = precision_ranks.stepped(None, {**RULES[name], "precision": "float32"}, torch.float64)
    for found, shown in ranks.run(world, precision_ranks.stepped, {**options, "strategy": strategy}, torch.float32):
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < BOUND[precision]
        if precision in ("float16", "bfloat16"):
            assert shown.startswith(precision)
            assert error > 1e-5
