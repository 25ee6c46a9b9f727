"""What the Megatron adapter refuses it names; what one rank meets, all ranks know."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.symdist_megatron.how import How

Worlds = Callable[[int], Ranks]
RANKS = "tests.symdist_megatron.error_ranks:"
GOOD: dict[str, Any] = {"default": {"rule": "muon", "lr": 0.1}, "other": {"rule": "adamw", "lr": 0.01}}
HOW = How(dtype="float32")

REFUSED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "recipe": ("olmo", {}, {}, "there is no recipe 'olmo'; there are .*olmoe"),
    "role": (GOOD, {}, {"overrides": {"routers": {"lr": 1.0}}}, "'routers', which is no role; did you mean 'router'"),
    "rule": (GOOD | {"router": {"rule": "row", "lr": 0.1}}, {}, {}, "router.*'row'.*row_norm"),
    "option": (GOOD | {"router": {"rule": "row_norm", "lr": 0.1, "alpha": 1}}, {}, {}, "knows no option 'alpha'"),
    "no section": ({"matrix": {"rule": "muon", "lr": 0.1}}, {}, {}, "has role '.*', for which recipe .* no section"),
    "pattern": (GOOD | {"patterns": [{"match": "*.wo", "role": "matrix"}]}, {}, {}, r"pattern '\*\.wo' applies to no"),
    "view": (GOOD | {"router": {"rule": "muon", "view": "heads", "lr": 1.0}}, {}, {}, "router.*view 'heads' needs"),
    "heads": (
        GOOD | {"mlp": {"rule": "muon", "view": "groups", "lr": 1.0}},
        {},
        {},
        "linear_fc.*view 'groups' is only",
    ),
    "vocabulary": (GOOD, {}, {"vocabulary": 41}, "has 40 rows, fewer than the vocabulary of 41"),
    "rate": (GOOD, {"lr": 0.0}, {}, "lr=0.0 of the optimizer config must be a positive number"),
    "decay": (GOOD, {"weight_decay": 0.1}, {}, "no weight decay for its matrices, but .* is 0.1.*weight-decay 0"),
    "fp16": (GOOD, {"fp16": True}, {}, "does not support fp16.*use bf16"),
    "offload": (GOOD, {"optimizer_cpu_offload": True}, {}, "optimizer_cpu_offload"),
    "decoupled": (GOOD, {"decoupled_lr": 0.1}, {}, r"decoupled_lr \(use .* embedding.lr"),
    "torch FSDP2": (GOOD, {}, {"bare": True}, "no DistributedDataParallel.*GPTModel.*symdist.build_optimizer"),
    "Megatron-FSDP": (GOOD, {}, {"ddp": {"use_megatron_fsdp": True}}, "Megatron-FSDP.*distributed optimizer"),
    "fp8 weights": (GOOD, {}, {"ddp": {"fp8_param_gather": True}}, "weights stored in fp8"),
    "both": (GOOD, {"use_distributed_optimizer": True}, {"layer_wise": True}, "layer-wise and the distributed"),
    "disagreement": (GOOD, {"use_distributed_optimizer": True}, {}, "is True in the optimizer's config and False"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named(worlds: Worlds, what: str) -> None:
    recipe, config, options, said = REFUSED[what]
    found = worlds(2).run(2, RANKS + "refused", HOW, recipe, config, options)
    assert found[0] == found[1]
    assert re.search(said, found[0]), found[0]


@pytest.mark.parametrize(("tp", "etp"), [(2, 1), (1, 2)])
def test_experts_whose_gradients_megatron_reduces_wrongly(worlds: Worlds, tp: int, etp: int) -> None:
    """Told by the stage that has none, too; without experts, or with them spread, the layout is a good one."""
    how = replace(HOW, tp=tp, etp=etp, pp=2)
    found = worlds(4).run(4, RANKS + "refused", how, GOOD, {}, {})
    assert len(set(found)) == 1
    said = (
        f"local_experts.*: expert_tensor_parallel_size={etp} differs from tensor_model_parallel_size={tp}, "
        f".*set expert_tensor_parallel_size={tp}, "
    )
    assert re.search(said, found[0]), found[0]
    for fine in (replace(how, moe=(0, 0)), replace(HOW, tp=tp, etp=etp, ep=2)):
        assert set(worlds(4).run(4, RANKS + "refused", fine, GOOD, {}, {})) == {"nothing was refused"}


def test_a_fault_of_one_stage_is_told_on_all(worlds: Worlds) -> None:
    """The head is on the last stage alone."""
    recipe = GOOD | {"head": {"rule": "row_norm", "view": "heads", "lr": 0.1}}
    found = worlds(2).run(2, RANKS + "refused", replace(HOW, pp=2), recipe, {}, {})
    assert found[0] == found[1]
    assert found[0].startswith("output_layer.weight: view 'heads' needs")


def test_also_one_that_shows_late(worlds: Worlds) -> None:
    recipe = GOOD | {"head": {"rule": "row_norm", "view": {"heads": 2, "dim": 1}, "lr": 0.1}}
    found = worlds(2).run(2, RANKS + "refused", replace(HOW, pp=2, tied=False), recipe, {}, {"vocabulary": 37})
    assert found[0] == found[1]
    assert "padding_rows=3 needs a matrix of more than 3 rows" in found[0]


def test_all_ranks_must_train(worlds: Worlds) -> None:
    found = worlds(2).run(2, RANKS + "unlike", replace(HOW, pp=2), 1)
    assert found[0] == found[1]
    assert found[0].startswith("symdist: ranks [1] train no parameter")


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_what_is_not_finite_on_one_rank_moves_nothing_anywhere(worlds: Worlds, policy: str, distributed: bool) -> None:
    how = replace(HOW, ep=2, distributed=distributed)
    for said, moved, skipped in worlds(2).run(2, RANKS + "not_finite", how, policy, None):
        assert not moved
        assert ("not finite" in said) if policy == "raise" else (said, skipped) == ("False", 1)


def test_found_inf_skips_together(worlds: Worlds) -> None:
    """With a loss scale Megatron looks itself, expert gradients on their own ranks; then all leave the step out."""
    how = replace(HOW, ep=2, dtype="bfloat16")
    assert worlds(2).run(2, RANKS + "not_finite", how, "raise", 1.0) == [("False", False, 0)] * 2


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_moved_state_is_followed(worlds: Worlds, distributed: bool) -> None:
    assert all(worlds(2).run(2, RANKS + "offloaded", replace(HOW, distributed=distributed)))


def test_registration_makes_megatrons_own_function_do_it(worlds: Worlds) -> None:
    """Also where it was imported before; `lr` is the matrices', others follow, and overrides stand."""
    for found in worlds(2).run(2, RANKS + "registered", HOW):
        assert "no recipe; add --symdist-recipe" in found["said"]
        assert found["kind"] == "SymDistChain"
        assert found["rates"] == pytest.approx(
            {role: rate for role, rate in found["rates"].items() if role not in ("embedding", "head", "norm")}
            | {"embedding": 0.2, "head": 0.3, "norm": 0.02}
        )
        assert found["rates"]["attention_q"] == pytest.approx(0.1)
        assert found["groups"] == [0.1, 0.1]
        assert found["adam"] == "AdamW"
        assert found["registry"]


def test_norms_are_told_apart(worlds: Worlds) -> None:
    (found,) = worlds(1).run(1, RANKS + "norms", HOW)
    layers = range(HOW.layers)
    expected = {
        f"decoder.layers.{i}.{name}_layernorm.weight": "input_norm" for i in layers for name in ("input", "pre_mlp")
    }
    expected |= {f"decoder.layers.{i}.self_attention.{x}_layernorm.weight": "qk_norm" for i in layers for x in "qk"}
    assert found == expected | {"decoder.final_layernorm.weight": "input_norm"}


def test_the_command_line(worlds: Worlds) -> None:
    words = ["--optimizer", "symdist", "--use-distributed-optimizer", "--lr", "0.02", "--symdist-recipe", "olmoe"]
    more = ["--symdist-override", "router.rule=left_spectral", "--symdist-override", "head.lr=0.1"]
    (found,) = worlds(1).run(1, RANKS + "command_line", [*words, *more])
    assert found == {
        "optimizer": "symdist",
        "distributed": True,
        "seen": "adam",
        "symdist": {
            "recipe": "olmoe",
            "overrides": {"router": {"rule": "left_spectral"}, "head": {"lr": 0.1}},
            "vocabulary": 37,
            "nonfinite": "raise",
            "exchange": {"communication_dtype": None, "bucket_bytes": 1 << 30, "hardware": "h100"},
        },
    }
    (found,) = worlds(1).run(1, RANKS + "command_line", ["--optimizer", "symdist"])
    assert found == {"said": "--optimizer symdist needs a recipe: add --symdist-recipe, like --symdist-recipe olmoe"}
    (found,) = worlds(1).run(1, RANKS + "command_line", ["--optimizer", "adam"])
    assert found == {"optimizer": "adam", "distributed": False, "seen": "adam", "symdist": None}
