"""The judge of routings: what it sees a forward do, and that it refuses routings that are wrong."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from symdist import route
from tests.architectures.judge import Facts, ViewKind, facts_of, judge
from tests.architectures.models import build
from tests.architectures.survey import RESIDUAL
from tests.architectures.uses import Use, follow


@cache
def known(model_type: str) -> tuple[nn.Module, Facts]:
    model = build(model_type)
    assert isinstance(model, nn.Module), model
    followed = follow(model)
    assert followed.error is None
    return model, facts_of(model, followed)


@pytest.mark.parametrize(
    ("model_type", "weight", "expected"),
    [
        (
            "llama",
            "model.layers.0.self_attn.q_proj.weight",
            Use(stored={"out_in"}, reads=True, heads={(0, 4096): (32, 128)}, ends={64, 128}),  # Rotary halves.
        ),
        (
            "llama",
            "model.layers.0.self_attn.o_proj.weight",
            Use(stored={"out_in"}, elsewhere=True, writes=True, heads_in={(32, 128)}),
        ),
        ("llama", "model.layers.0.mlp.down_proj.weight", Use(stored={"out_in"}, elsewhere=True, writes=True)),
        ("llama", "model.embed_tokens.weight", Use(looked_up=True)),
        ("gpt2", "transformer.wte.weight", Use(stored={"out_in"}, looked_up=True, reads=True)),
        (
            "gpt2",
            "transformer.h.0.attn.c_attn.weight",
            Use(
                stored={"in_out"},
                reads=True,
                cuts={768, 1536},
                heads={(0, 768): (12, 64), (768, 1536): (12, 64), (1536, 2304): (12, 64)},
            ),
        ),
        ("olmoe", "model.layers.0.mlp.gate.weight", Use(stored={"out_in"}, reads=True, chooses=True)),
        ("olmoe", "model.layers.0.mlp.experts.gate_up_proj", Use(stored={"out_in"}, reads=True, cuts={2048})),
        (
            "llama4_text",
            "model.layers.0.feed_forward.experts.gate_up_proj",
            Use(stored={"in_out"}, reads=True, cuts={8192}),
        ),
        (
            "gpt_oss",
            "model.layers.0.mlp.experts.gate_up_proj",
            Use(stored={"in_out"}, reads=True, alternating=True),
        ),
        ("jamba", "model.layers.0.mamba.A_log", Use(coordinates=True)),
        ("jamba", "model.layers.0.mamba.conv1d.weight", Use(convolved=True)),
        ("jamba", "model.layers.0.mamba.x_proj.weight", Use(stored={"out_in"}, elsewhere=True, cuts={256, 272})),
        (
            "gpt_neox",
            "gpt_neox.layers.0.attention.query_key_value.weight",
            Use(
                stored={"out_in"},
                reads=True,
                heads={(0, 18432): (64, 288)},
                periods={(64, (96, 96, 96))},
                ends={24, 96},
            ),
        ),
    ],
)
def test_what_a_forward_does_with_a_weight_is_seen(model_type: str, weight: str, expected: Use) -> None:
    """As one reads it in the model's code."""
    assert known(model_type)[1].uses[weight] == expected


def test_to_follow_a_forward_leaves_the_model_as_it_was() -> None:
    model = build("olmoe")
    assert isinstance(model, nn.Module)
    follow(model)
    assert model.training
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not any(vars(parameter).get("_trace_of_use") for parameter in model.parameters())


Change = Callable[[dict[str, dict[str, Any]]], None]


def regrouped(
    model_type: str, recipe: Any, changes: dict[str, dict[str, Any]]
) -> tuple[list[dict[str, Any]], Facts, Any]:
    """A routing in which the weights named are in groups of their own, with some options changed."""
    model, facts = known(model_type)
    groups = []
    for group in route(model, recipe):
        kept = [name for name in group["param_names"] if name not in changes]
        held = dict(zip(group["param_names"], group["params"], strict=True))
        groups.append({**group, "param_names": kept, "params": [held[name] for name in kept]})
        for name in set(held) & set(changes):
            groups.append({**group, "param_names": [name], "params": [held[name]], **changes[name]})
    return groups, facts, {name: p for name, p in model.named_parameters() if p.requires_grad}


LAYER = "model.layers.0."


@pytest.mark.parametrize(
    ("model_type", "recipe", "asked", "weight", "change", "fault"),
    [
        ("olmoe", "muon", "plain", LAYER + "mlp.gate.weight", {"role": "matrix", "rule": "muon"}, "so it is a router"),
        ("olmoe", "muon", "plain", LAYER + "self_attn.q_proj.weight", {"role": "router"}, "nothing is chosen"),
        (
            "olmoe",
            "muon",
            "plain",
            LAYER + "self_attn.q_proj.weight",
            {"view": "transposed"},
            "outputs lie along the first",
        ),
        ("olmoe", "muon", "plain", LAYER + "self_attn.q_proj.weight", {"rule": "adamw"}, "no matrix rule gets"),
        ("olmoe", "muon", "plain", LAYER + "self_attn.q_norm.weight", {"rule": "muon"}, "it is a vector"),
        (
            "olmoe",
            "muon",
            "plain",
            LAYER + "mlp.experts.down_proj",
            {"view": "transposed"},
            "outputs lie along the first",
        ),
        ("olmoe", "muon", "plain", LAYER + "mlp.experts.gate_up_proj", {"view": "gate_up_stacked"}, "no pairs"),
        (
            "olmoe",
            "muon",
            "plain",
            "model.embed_tokens.weight",
            {"role": "matrix", "rule": "muon"},
            "it is an embedding",
        ),
        ("olmoe", "muon", "plain", "lm_head.weight", {"role": "matrix", "rule": "muon"}, "its output embedding"),
        (
            "olmoe",
            "muon",
            "plain",
            LAYER + "mlp.experts.down_proj",
            {"role": "embedding"},
            "no rows of it are looked up",
        ),
        (
            "olmoe",
            "olmoe",
            "heads",
            LAYER + "self_attn.q_proj.weight",
            {"view": {"heads": 8, "dim": 0}},
            "heads have sizes",
        ),
        (
            "olmoe",
            "olmoe",
            "heads",
            LAYER + "self_attn.o_proj.weight",
            {"view": {"heads": 16, "dim": 0}},
            "along dimension 1",
        ),
        ("olmoe", "olmoe", "heads", LAYER + "self_attn.k_proj.weight", {"view": "as_stored"}, "the view has none"),
        (
            "olmoe",
            RESIDUAL,
            "residual",
            LAYER + "self_attn.o_proj.weight",
            {"view": "transposed"},
            "the residual stream lies",
        ),
        (
            "olmoe",
            RESIDUAL,
            "residual",
            LAYER + "self_attn.q_proj.weight",
            {"view": "as_stored"},
            "the residual stream lies",
        ),
        ("olmoe", RESIDUAL, "residual", "model.embed_tokens.weight", {"view": "as_stored"}, "along its columns"),
        (
            "llama4_text",
            "muon",
            "plain",
            LAYER + "feed_forward.experts.down_proj",
            {"view": "as_stored"},
            "along the last",
        ),
        ("jamba", "muon", "plain", LAYER + "mamba.A_log", {"rule": "muon"}, "each element is to be taken for itself"),
        ("jamba", "muon", "plain", LAYER + "mamba.conv1d.weight", {"rule": "muon"}, "each element is to be taken"),
        (
            "qwen2_moe",
            "muon",
            "plain",
            LAYER + "mlp.shared_expert_gate.weight",
            {"role": "router"},
            "a gate of one row",
        ),
        (
            *("bamba", "muon", "plain", LAYER + "mamba.in_proj.weight"),
            *({"view": {"sections": [8192, 8192, 640]}}, "also cut at [16640, 16896]"),
        ),
        (
            *("bamba", "muon", "plain", LAYER + "mamba.in_proj.weight"),
            *({"view": {"sections": [8192, 8192, 256, 256, 64, 64]}}, "is cut at"),
        ),
        (
            *("bamba", "muon", "plain", LAYER + "mamba.in_proj.weight"),
            *({"view": {"sections": [8192, 8192, 256, 256]}}, "16896 rows, and it has 17024"),
        ),
        ("bamba", "muon", "plain", LAYER + "mamba.in_proj.weight", {"view": "as_stored"}, "several matrices"),
        ("gpt_oss", "muon", "plain", LAYER + "mlp.router.bias", {"rule": "muon"}, "it is a vector"),
        (
            "gpt_oss",
            "muon",
            "plain",
            LAYER + "mlp.experts.down_proj_bias",
            {"rule": "muon"},
            "each element is to be taken",
        ),
    ],
)
def test_a_routing_that_is_wrong_is_found_out(
    model_type: str, recipe: Any, asked: ViewKind, weight: str, change: dict[str, Any], fault: str
) -> None:
    groups, facts, trainable = regrouped(model_type, recipe, {})
    assert judge(facts, groups, trainable, asked) == []
    groups, facts, trainable = regrouped(model_type, recipe, {weight: change})
    found = judge(facts, groups, trainable, asked)
    assert any(line.startswith(weight) and fault in line for line in found), found


def test_every_parameter_is_in_one_group_under_its_name() -> None:
    weight = "model.layers.3.self_attn.q_proj.weight"
    groups, facts, trainable = regrouped("olmoe", "muon", {weight: {}})
    own = next(group for group in groups if group["param_names"] == [weight])
    assert any("is routed unlike model.layers.0" in line for line in judge(facts, groups, trainable, "plain"))
    groups = [group for group in groups if group is not own]
    assert any(line.startswith(weight) and "in 0 groups" in line for line in judge(facts, groups, trainable, "plain"))
    twice = [*groups, own, {**own}]
    assert any(line.startswith(weight) and "in 2 groups" in line for line in judge(facts, twice, trainable, "plain"))
    renamed = [*groups, {**own, "param_names": ["q"]}]
    assert any("is called q" in line for line in judge(facts, renamed, trainable, "plain"))
    other = [*groups, own, {**own, "param_names": ["x"], "params": [torch.empty(2)]}]
    assert any("is no trainable parameter" in line for line in judge(facts, other, trainable, "plain"))
