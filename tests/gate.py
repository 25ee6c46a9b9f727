"""What `bash tests/run.sh` runs of the largest tests: the gate of every change. With --all, all their cases run.

A test that is not listed runs whole. Of one that is, those cases run whose id matches a pattern: at least one of each
kind (rule, view, strategy, layout, stage, engine), so that what the others add is a combination.
"""

from fnmatch import fnmatchcase

import pytest

# Each kind of layout once, on few ranks where the number does not matter: eight ranks on two cores are slow.
LAYOUTS = (
    *("*-shard0 on 1", "*-shard0 on 3", "*-shard0 on 8", "*-shard1 on 3", "*-replicated on 3", "*-hsdp on 2 x 3"),
    *("*-fsdp over column-wise tp on 2 x 2", "*-fsdp over row-wise tp on 2 x 3"),
    "*-fsdp over expert parallel and tp on 2 x 2 x 2",
)
GATE: dict[str, tuple[str, ...]] = {
    "tests/test_parity.py::test_float64_is_exact": LAYOUTS,
    # Numbers in float32 hang on the layout little.
    "tests/test_parity.py::test_float32_is_near": (
        *("*-shard0 on 3", "*-hsdp on 2 x 3", "*-replicated on 3", "*-fsdp over row-wise tp on 2 x 3"),
    ),
    "tests/test_parity.py::test_waves_change_nothing": ("*-shard0 on 3",),
    "tests/test_parity.py::test_meshes_may_number_ranks_in_any_order": ("fsdp over row-wise tp on 2 x 2",),
    "tests/test_flat.py::test_float64_is_exact": (
        *("*-each-3", "*-one-3", "*-one-8", "*-anywhere-3", "*-anyhow-4", "*-shuffled-4", "*-columns-3"),
    ),
    "tests/test_flat.py::test_float32_is_near": ("*-anywhere-3",),
    "tests/test_flat.py::test_small_waves_change_nothing": ("*-one-3",),
    "tests/test_plan.py::test_owners_are_balanced_on_the_papers_models": (
        *("8-gpt-oss-small", "64-gemma3-1b", "512-olmoe-1b-7b"),
    ),
    "tests/test_teams.py::test_a_team_gets_the_result_of_one_process": ("*-shard0 on 4", "*-hsdp on 2 x 2"),
    # tests/architectures builds every model as well.
    "tests/models/test_outlines.py::test_every_causal_model_type_is_its_default_model_or_refused_in_a_line": (),
    "tests/test_cli.py::test_compare": (),
    "tests/test_plan.py::test_the_largest_meshes_are_planned": (),
    "tests/test_plan.py::test_buffers_stay_within_the_budget": ("qwen3-0.6b-8",),
    "tests/test_resharding.py::test_olmoe_goes_on_elsewhere": ("*-{'ep': 4}",),
    "tests/test_resharding.py::test_training_goes_on_elsewhere": (
        *("fsdp 4 to hsdp x tp-", "hsdp x tp to fsdp x tp-flattened"),
    ),
    "tests/test_shared_rotation.py::test_sharded_is_alone": ("*-sinkhorn-auto", "hsdp on 2 x 3-*-auto"),
    "tests/test_fsdp1.py::test_every_rule_is_exact": ("full-3", "hybrid-4", "grad_op-3", "none-2"),
    "tests/test_mixed_meshes.py::test_weights_are_those_of_one_process": (
        *("*-missing on a rank-1", "*-whole-1073741824"),
    ),
    "tests/test_mixed_meshes.py::test_all_raise_before_anything_moves": ("*-nan",),
    "tests/test_mixed_meshes.py::test_zeroed_elements_are_zero": ("*-inf",),
    "tests/test_training.py::test_training_is_that_of_the_unsharded_model": (
        *("small-moe-dp_shard=2 tp=2", "spectral-dp_shard=2 ep=2", "small-moe-ddp=2"),
    ),
    "tests/test_fuzz.py::test_the_line_of_a_case_runs_it": ("1e-09-0",),
    "tests/test_overlapping.py::test_no_ring_of_waits_closes": ("drawn 0-1-*", "nested-3000-*", "drawn 1-1073741824-*"),
    "tests/rules/test_aro.py::test_a_rotation_stays_one": ("sinkhorn-residual_stage", "row_norm-matrix", "adam-matrix"),
    # Denormal numbers are slow to compute with, and the view has no part in it.
    "tests/attacks/test_numbers.py::test_an_idle_expert_stays_finite": ("one a rule-bfloat16",),
    "tests/attacks/test_numbers.py::test_a_dead_matrix_passes_through_denormal_numbers": ("one a rule-*",),
    # Of the kinds of gradients those at the ends; every rule and option on each.
    "tests/attacks/test_numbers.py::test_no_finite_gradient_makes_a_weight_that_is_not": (
        *("1e-38-raise-*None", "1e+20-raise-*None", "1e+33-raise-*None", "1e+38-zero-*None", "of all sizes-zero-*1.0"),
        *("denormal-raise-*None", "zero-raise-*None", "rank one, huge-raise-*None", "tiny rows-raise-*None"),
    ),
    "tests/attacks/test_numbers.py::test_nor_on_the_smallest_matrices": (
        *("zero-1 x 1", "1e+33-one row", "of all sizes-one column"),
    ),
    "tests/attacks/test_numbers.py::test_nor_at_the_ends_of_float64": ("1e-300", "1e+119"),
    "tests/attacks/test_numbers.py::test_nor_in_another_dtype": (
        *("1e+33-bfloat16", "zero rows-float64", "of all sizes-narrow momentum", "1e-38-rounded by chance"),
    ),
    # All rules at every stage of ZeRO, with masters of either dtype and any number of ranks.
    "tests/symdist_deepspeed/test_parity.py::test_every_rule_at_every_stage": (
        *("0-2-bf16", "1-3-fp32", "2-2-bf16", "3-3-fp32"),
    ),
    "tests/symdist_deepspeed/test_parity.py::test_whatever_the_configuration": (
        *("round robin, stage 2", "accumulated in fp32", "offloaded, stage 3", "sub-groups, from zero.Init"),
        "frozen, stage 3",
    ),
    "tests/symdist_deepspeed/test_checkpoint.py::test_resumed_runs_go_on_as_if_nothing_was": ("stage 3",),
    "tests/symdist_deepspeed/test_tensor_parallel.py::test_losses_are_those_of_one_rank": ("2-4-1", "4-6-3"),
    "tests/symdist_deepspeed/test_experts.py::test_losses_are_those_of_one_rank": ("1-2-2",),
    "tests/symdist_megatron/test_parity.py::test_every_rule_on_every_layout": (
        *("tp2-plain", "tp2 dp2-distributed", "ep2-plain", "pp2-distributed"),
    ),
    "tests/symdist_megatron/test_parity.py::test_and_where_layouts_meet": (
        *("dp3, unevenly", "experts cut too", "tied over stages", "grouped, cut, ep2"),
    ),
    "tests/symdist_megatron/test_parity.py::test_every_kind_of_model": (
        *("latent attention, stages", "sparse attention, tp2", "gated delta net, tp2", "mamba, stages"),
    ),
    "tests/symdist_megatron/test_parity.py::test_in_less_precision": ("bfloat16-distributed",),
    "tests/symdist_megatron/test_wire.py::test_the_plan_is_what_is_sent": (
        *("*-1", "tp2 ep2-0", "tp2 dp2, distributed-3", "pp2 dp2, tied, distributed-3"),
    ),
    "tests/symdist_megatron/test_training.py::test_checkpoints_load_at_any_layout": (
        *("plain", "distributed", "stages*", "mamba, distributed", "tied stages"),
    ),
    "tests/symdist_megatron/test_training.py::test_tensor_parallelism_does_not_change_the_answer": (
        "experts-2-distributed",
    ),
    # Data: every kind of fault once; what is left is the same fault of another file, or another flip.
    "tests/attacks/test_data_faults.py::test_flips_in_parquet_are_refused_or_change_no_row": ("?",),
    "tests/attacks/test_cache_faults.py::test_a_changed_manifest_is_seen": (
        *("paths", "nested*", "missing", "without checksums*", "a thousand more", "other checksums", "fifo"),
    ),
    "tests/attacks/test_cache_faults.py::test_a_changed_shard_is_seen": ("*-train-00000.bin", "*ids*"),
    "tests/attacks/test_cache_faults.py::test_a_changed_tokenizer_is_seen": ("middle bit", "a link to the same"),
    "tests/attacks/test_data_under_jobs.py::test_a_flipped_bit_in_the_cache_changes_no_loss": (),
    "tests/attacks/test_data_under_jobs.py::test_a_shard_cut_under_a_job_ends_it_with_its_name": (),
    # Attacks: of each kind some.
    "tests/attacks/test_configs.py::test_recipes": ("*-0",),
    "tests/attacks/test_configs.py::test_models": ("*-0",),
    "tests/attacks/test_configs.py::test_studies": ("0",),
    "tests/attacks/test_configs.py::test_options": ("*-0",),
    "tests/attacks/test_report_inputs.py::test_any_file": (
        "log.jsonl-NULs",
        "log.jsonl-binary",
        "*-a pipe",
        "*-escapes",
    ),
    "tests/attacks/test_report_inputs.py::test_any_value_of_a_measure": ("11", "21"),
    "tests/attacks/test_report_inputs.py::test_any_value_of_a_file": ("*-11", "run.json-23"),
    "tests/attacks/test_report_inputs.py::test_files_by_chance": ("run.json-0",),
    # Jobs: each engine by its own launcher and without, stopped and resumed under FSDP2, a damaged checkpoint, a full
    # disk, a lost rank. What is left is the same under the other engines, and what takes two machines.
    "tests/launch/test_pretrain.py::test_weights_drawn_in_shards_train_too": (),
    "tests/launch/test_pretrain.py::test_world_size_changes_only_the_rounding": (),
    "tests/launch/test_pretrain_deepspeed.py::test_losses_are_those_of_fsdp2": ("2", "3"),
    "tests/launch/test_pretrain_deepspeed.py::test_sigterm_saves_and_auto_resume_repeats_every_step_exactly": (),
    "tests/launch/test_pretrain_deepspeed.py::test_another_number_of_ranks_needs_a_conversion": (),
    "tests/launch/test_pretrain_megatron.py::test_losses_and_router_measures_are_those_of_fsdp2": ("data", "tensor"),
    "tests/launch/test_pretrain_megatron.py::test_sigterm_saves_and_auto_resume_repeats_every_step_exactly": (),
    "tests/launch/test_pretrain_megatron.py::test_a_checkpoint_is_gone_on_from_at_another_layout": (),
    "tests/launch/test_survival.py::test_four_ranks_go_on_as_two_and_under_tensor_parallelism": ("2 * tp 2",),
    "tests/launch/test_survival.py::test_a_full_disk_does_not_end_the_run": ("background",),
    "tests/launch/test_full_disk.py::test_full_disk_loses_no_step_under": (),
    "tests/launch/test_survival.py::test_it_goes_back_only_so_often": (),
    "tests/launch/test_survival.py::test_a_run_that_only_ever_leaves_out_steps_ends": (),
    "tests/launch/test_nodes.py::test_a_run_on_two_nodes_survives_the_loss_of_one": (),
    "tests/launch/test_slurm.py::test_slurm_requeues_a_warned_job_which_goes_on_beside_a_drained_node": (),
    "tests/launch/test_slurm.py::test_scancel_saves_and_the_job_goes_on_when_it_is_submitted_again": (),
    "tests/launch/test_slurm.py::test_slurm_requeues_a_job_that_loses_a_node": (),
    "tests/launch/test_slurm.py::test_slurm_warns_before_the_time_is_over": (),
    "tests/launch/test_slurm.py::test_a_failure_is_the_jobs_in_slurm_too": (),
    "tests/attacks/test_run_folders.py::test_the_run_goes_on": (
        *("log.jsonl NULs", "events.jsonl fifo", ".launch directory", "manifest nested", "second as ninth"),
    ),
    "tests/attacks/test_run_folders.py::test_no_step_is_repeated_in_silence": ("all damaged",),
    # Every engine once, in what its own files have a part in.
    "tests/launch/test_resuming.py::test_weights_of_another_shape_are_refused": ("deepspeed",),
    "tests/launch/test_resuming.py::test_another_rule_is_refused_and_the_value_named": ("megatron",),
    "tests/attacks/test_job_configs.py::test_files": ("*-0",),
    "tests/attacks/test_job_configs.py::test_options": ("*-0",),
    "tests/attacks/test_kills.py::test_none_is_left_of_an_engine_whose_launcher_is_killed": (),
    "tests/attacks/test_kills.py::test_a_rank_whose_launcher_is_gone_does_not_begin": ("while a rank imports",),
    "tests/attacks/test_kills.py::test_a_run_on_two_nodes_that_loses": (),
}


def check_patterns(cases: dict[str, set[str]]) -> None:
    """Raise pytest.UsageError if a test is gone, or a pattern matches none of its cases.

    `cases` has the ids of all tests of the files collected.
    """
    files = {test.partition("::")[0] for test in cases}
    for test, patterns in GATE.items():
        if test not in cases and test.partition("::")[0] in files:
            raise pytest.UsageError(f"tests/gate.py: there is no {test}; name the test as it is called now")
        for pattern in patterns if test in cases else ():
            if not any(fnmatchcase(case, pattern) for case in cases[test]):
                raise pytest.UsageError(f"tests/gate.py: no case of {test} matches {pattern!r}")


def left_out(test: str, case: str) -> bool:
    """Whether a case of a test, `file::function`, is left to --all; `case` is its id, or empty."""
    return test in GATE and not any(fnmatchcase(case, pattern) for pattern in GATE[test])
