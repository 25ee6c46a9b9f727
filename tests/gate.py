"""What `bash tests/run.sh` runs of the largest tests: the gate of every change. With --all, all their cases run.

A test that is not listed runs whole. Of one that is, those cases run whose id matches a pattern: at least one of each
kind (rule, view, strategy, layout, stage, engine), so that what the others add is a combination.
"""

from fnmatch import fnmatchcase

import pytest

GATE: dict[str, tuple[str, ...]] = {
    # Numbers in float32 hang on the layout little: one of each kind of layout.
    "tests/test_parity.py::test_float32_is_near": (
        *("*-shard0 on 3", "*-hsdp on 2 x 3", "*-replicated on 3", "*-fsdp over row-wise tp on 2 x 2"),
    ),
    "tests/test_flat.py::test_float32_is_near": ("*-anywhere-3",),
    # All rules at every stage of ZeRO, with masters of either dtype and any number of ranks.
    "tests/symdist_deepspeed/test_parity.py::test_every_rule_at_every_stage": (
        *("0-2-bf16", "1-3-fp32", "1-2-bf16", "2-4-fp32", "3-3-fp32", "3-2-bf16"),
    ),
    "tests/symdist_deepspeed/test_parity.py::test_whatever_the_configuration": (
        *("round robin, stage 2", "accumulated in fp32", "offloaded", "offloaded, stage 3", "sub-groups"),
        *("sub-groups, from zero.Init", "own groups", "frozen, stage 3"),
    ),
    "tests/symdist_deepspeed/test_checkpoint.py::test_resumed_runs_go_on_as_if_nothing_was": ("stage 1", "stage 3"),
    "tests/symdist_deepspeed/test_tensor_parallel.py::test_losses_are_those_of_one_rank": ("2-4-1", "4-6-3"),
    "tests/symdist_deepspeed/test_experts.py::test_losses_are_those_of_one_rank": ("1-2-2", "2-4-1"),
    "tests/symdist_megatron/test_parity.py::test_every_rule_on_every_layout": (
        *("tp2-plain", "tp2 dp2-distributed", "tp2 ep2-distributed", "ep2-plain", "pp2-distributed", "dp2-distributed"),
    ),
    "tests/symdist_megatron/test_parity.py::test_and_where_layouts_meet": (
        *("dp3, unevenly", "experts cut too", "tied over stages", "grouped, cut, ep2", "layer by layer"),
    ),
    "tests/symdist_megatron/test_parity.py::test_in_less_precision": ("bfloat16-distributed",),
    "tests/symdist_megatron/test_training.py::test_tensor_parallelism_does_not_change_the_answer": (
        "experts-2-distributed",
    ),
}


def check_patterns(cases: dict[str, set[str]]) -> None:
    """Raise pytest.UsageError if a pattern matches no case of its test; `cases` has the ids of the tests collected."""
    for test, patterns in GATE.items():
        for pattern in patterns if test in cases else ():
            if not any(fnmatchcase(case, pattern) for case in cases[test]):
                raise pytest.UsageError(f"tests/gate.py: no case of {test} matches {pattern!r}")


def left_out(test: str, case: str) -> bool:
    """Whether a case of a test, `file::function`, is left to --all; `case` is its id, or empty."""
    return test in GATE and not any(fnmatchcase(case, pattern) for pattern in GATE[test])
