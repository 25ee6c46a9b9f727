"""Where there are fewer matrices than ranks, teams of ranks own them: the same result, less for the busiest rank."""

from functools import cache

import pytest
import torch

from symdist.tools.plan import plan_step
from tests import teams_ranks
from tests.cases import CASES
from tests.grids import WAYS
from tests.ranks import Ranks

MATRICES = [case for case, (_, group) in CASES.items() if group["rule"] != "adamw"]
FLAT = [case for case in MATRICES if len(CASES[case][0]) == 2]
LAYOUTS = ["shard0 on 4", "shard1 on 8", "replicated on 3", "hsdp on 2 x 2", "fsdp over column-wise tp on 2 x 2"]
LAYOUTS += ["hsdp on 2 x 3", "shard0 on 6"]


@cache
def in_blocks(many: Ranks, way: str) -> dict[str, tuple[torch.Tensor, set[int]]]:
    results = many.run(WAYS[way].mesh, teams_ranks.in_blocks, way, MATRICES)
    return {
        case: (
            WAYS[way].whole([found[case][0] for found in results], CASES[case][0]),
            {size for found in results for size in found[case][1]},
        )
        for case in MATRICES
    }


def distance(case: str, weight: torch.Tensor) -> float:
    expected = teams_ranks.oracle(case)
    return float((weight - expected).norm() / expected.norm())


@pytest.mark.parametrize("way", LAYOUTS)
@pytest.mark.parametrize("case", MATRICES)
def test_a_team_gets_the_result_of_one_process(many: Ranks, case: str, way: str) -> None:
    assert distance(case, in_blocks(many, way)[case][0]) < 1e-9


def test_teams_were_formed(many: Ranks) -> None:
    sizes = {size for _, of_case in in_blocks(many, "shard0 on 4").values() for size in of_case}
    assert sizes == {1, 2, 4}


@pytest.mark.parametrize("case", FLAT)
def test_a_team_owns_what_is_cut_into_ranges(many: Ranks, case: str) -> None:
    results = many.run(4, teams_ranks.in_ranges, [case])
    whole = torch.cat([found[case][0] for found in results]).view(CASES[case][0])
    assert distance(case, whole) < 1e-9


def test_the_busiest_rank_has_less_to_do_on_many_ranks() -> None:
    found = plan_step("gemma3-1b", "gemma3", mesh={"dp_shard": 512})
    assert found.balance < 0.9 * found.indivisible
