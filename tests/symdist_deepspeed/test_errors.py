"""What cannot run as asked is an error before the first step, on all ranks, that names it and the remedy."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

from symdist_deepspeed.options import check_features
from tests.ranks import Ranks
from tests.symdist_deepspeed import engines

Worlds = Callable[[int], Ranks]
CASES = ["row", "muon_tall", "adamw_vector"]
RECIPE = engines.recipe(CASES)


def params(**options: Any) -> dict[str, Any]:
    return {"optimizer": {"type": "SymDist", "params": {"recipe": RECIPE, **options}}}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no recipe": ({"optimizer": {"type": "SymDist"}}, "needs a recipe"),
    "unknown recipe": (params(recipe="olmo"), "there is no recipe 'olmo'; there are adamw,"),
    "unknown rule": (params(overrides={"matrix": {"rule": "shampoo"}}), "there is no rule 'shampoo'; the rules are"),
    "unknown role": (params(overrides={"conv": {"lr": 0.1}}), "names 'conv', which is no role; the roles are"),
    "unknown option of a rule": (
        params(recipe={**RECIPE, "patterns": [{**RECIPE["patterns"][0], "betas2": 1}, *RECIPE["patterns"][1:]]}),
        "rule 'row_norm' knows no option 'betas2'; it knows",
    ),
    "unknown option": (params(betas=[0.9, 0.95]), "optimizer SymDist knows no option 'betas'; it knows recipe, lr,"),
    "rate that is none": (params(lr="fast"), "lr='fast' must be a positive number"),
    "dtype that is none": (
        params(exchange={"communication_dtype": "float16"}),
        "communication_dtype='float16' must be one of 'bfloat16', 'float32', 'float64'",
    ),
    "nonfinite that is none": (params(nonfinite="ignore"), "nonfinite='ignore' is not 'raise', 'skip' or 'zero'"),
    "no role": (
        params(recipe={"patterns": RECIPE["patterns"][1:], "matrix": RECIPE["matrix"]}),
        "p0 (17, 6) has no role: symdist does not recognize this kind of weight; the likeliest are matrix,",
    ),
    "rule that does not fit": (
        params(recipe={**RECIPE, "patterns": [*RECIPE["patterns"][:2], {**RECIPE["patterns"][2], "rule": "muon"}]}),
        "p2 has shape (3,): rule 'muon' needs a matrix",
    ),
    "elastic": (zero(1, elastic_checkpoint=True), "elastic_checkpoint (convert to a universal checkpoint instead)"),
    "nvme": (
        zero(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}),
        "does not support at ZeRO stage 3: offload_optimizer to NVMe",
    ),
    "partial offload": (zero(3, offload_optimizer={"device": "cpu", "ratio": 0.5}), "offload_optimizer with ratio"),
}


@pytest.fixture(scope="module")
def messages(worlds: Worlds) -> dict[str, list[str]]:
    """What each rank was told, all in one go."""
    settings = {name: engines.config(CASES) | zero(2) | changed for name, (changed, _) in WRONG.items()}
    results = worlds(2).run(2, engines.refused, CASES, settings)
    return {name: [result[name] for result in results] for name in WRONG}


@pytest.mark.parametrize("name", WRONG)
def test_refused(messages: dict[str, list[str]], name: str) -> None:
    for message in messages[name]:
        assert message.startswith(("ValueError: ", "UnroutedError: "))
        assert WRONG[name][1] in message


@pytest.mark.skipif(not hasattr(DeepSpeedEngine, "torch_autocast_enabled"), reason="this DeepSpeed has no autocast")
def test_autocast_in_float16_is_refused() -> None:
    settings = engines.config(CASES) | zero(1) | {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    # In a process of its own: DeepSpeed turns autocast on for the rest of its life.
    alone = Ranks(1)
    try:
        ((message,),) = (found.values() for found in alone.run(1, engines.refused, CASES, {"autocast": settings}))
    finally:
        alone.close()
    assert "torch_autocast in float16, whose scaler may skip a step on some ranks only" in message


OFFLOAD = {"device": "cpu", "ratio": 1.0, "super_offload": False}
FEATURES: dict[str, tuple[dict[str, Any], str]] = {
    "parameters on NVMe": ({"offload_param": SimpleNamespace(device="nvme")}, "offload_param to NVMe"),
    "super offload": (
        {"offload_optimizer": SimpleNamespace(**OFFLOAD | {"super_offload": True})},
        "at ZeRO stage 3: super_offload",
    ),
    "zenflow": ({"zenflow": object()}, "zenflow"),
    "mics": ({"mics_shard_size": 2}, "MiCS (mics_shard_size)"),
}


def stand_in(**zero: Any) -> Any:
    """As much of an engine as is looked at."""
    given = {"offload_optimizer": None, "offload_param": None, "elastic_checkpoint": False, **zero}
    return SimpleNamespace(
        zero_optimization_stage=lambda: 3,
        _config=SimpleNamespace(zero_config=SimpleNamespace(**given)),
        fp16_master_weights_and_gradients=lambda: False,
    )


@pytest.mark.parametrize("feature", FEATURES)
def test_what_needs_hardware_to_start_is_refused_too(feature: str) -> None:
    check_features(stand_in(offload_optimizer=SimpleNamespace(**OFFLOAD)))
    with pytest.raises(ValueError, match="symdist does not support") as caught:
        check_features(stand_in(**FEATURES[feature][0]))
    assert FEATURES[feature][1] in str(caught.value)


def test_pipelines_are_refused() -> None:
    engine = stand_in()
    engine.pipeline_parallelism = True
    with pytest.raises(ValueError, match="pipeline parallelism"):
        check_features(engine)


@pytest.mark.parametrize("which", ["fp16", "bf16"])
def test_masters_of_low_precision_are_refused(which: str) -> None:
    engine = stand_in()
    setattr(engine, f"{which}_master_weights_and_gradients", lambda: True)
    with pytest.raises(ValueError, match=f"{which} master weights"):
        check_features(engine)


def test_strange_parameters_are_refused(worlds: Worlds) -> None:
    for message in worlds(2).run(2, engines.strange_parameter, CASES):
        assert "model_parameters has a parameter of shape (2, 3) that is not in the model" in message


def test_another_deepspeed_is_refused(worlds: Worlds) -> None:
    for message, after in worlds(2).run(2, engines.another_deepspeed):
        assert message.startswith("ImportError: DeepSpeed ")
        assert (
            "lacks DeepSpeedZeroOptimizer_Stage3.no_such_attribute, which symdist relies on; install one of" in message
        )
        assert after == "registered"


def test_other_optimizers_are_left_alone(worlds: Worlds) -> None:
    assert worlds(2).run(2, engines.other_type) == ["SGD", "SGD"]
