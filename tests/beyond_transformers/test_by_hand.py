"""Models written by hand: every weight has the role, and the matrices, that its forward gives it."""

import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import build_optimizer, route
from symdist.matrix_views import bind_view
from symdist.routing.sites import find_sites
from tests.beyond_transformers import by_hand
from tests.beyond_transformers.matrices import RECIPE, Matrices

ATTENTION = {f"attention.w{part}.weight": f"attention_{part}" for part in "qkvo"}
SWIGLU = {"w1.weight": "gate", "w2.weight": "down", "w3.weight": "up"}
NORMS = {"attention_norm.weight": "input_norm", "ffn_norm.weight": "input_norm"}


def within(prefix: str, roles: dict[str, str], kind: str = "") -> dict[str, str]:
    return {f"{prefix}.{name}": kind + role for name, role in roles.items()}


FEED_FORWARD = within("feed_forward", SWIGLU, "mlp_")
ENDS = {"tok_embeddings.weight": "embedding", "norm.weight": "input_norm", "output.weight": "head"}
LLAMA = {**ENDS, **within("layers.{}", ATTENTION | NORMS | FEED_FORWARD)}
RAW = {"router.weight": "router", "experts.w1": "expert_gate", "experts.w2": "expert_down", "experts.w3": "expert_up"}
GATE_UP = {
    "router.weight": "router",
    "experts.gate_up_proj": "expert_gate_up",
    "experts.down_proj": "expert_down",
}
MIXTURE = {
    "gate.weight": "router",
    **within("experts.{}", SWIGLU, "expert_"),
    **within("shared_expert", SWIGLU, "mlp_"),
    "shared_expert_gate.weight": "gate",
}


def with_mixture(roles: dict[str, str]) -> dict[str, str]:
    block = within("layers.{}", ATTENTION | NORMS | within("feed_forward", roles))
    return ENDS | block


def mixture_of(experts: Any) -> Any:
    return partial(by_hand.Transformer, partial(by_hand.Stacked, experts))


def biased(*names: str) -> dict[str, str]:
    return {f"{name}.bias": "bias" for name in names}


MODELS: dict[str, tuple[Any, dict[str, str]]] = {
    "nanoGPT": (
        by_hand.GPT,
        {
            "transformer.wte.weight": "tied_embedding",
            "transformer.wpe.weight": "position_embedding",
            **within(
                "transformer.h.{}",
                {
                    "ln_1.weight": "norm",
                    "ln_2.weight": "norm",
                    "attn.c_attn.weight": "attention_qkv",
                    "attn.c_proj.weight": "attention_o",
                    "mlp.c_fc.weight": "mlp_up",
                    "mlp.c_proj.weight": "mlp_down",
                    **biased("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
                },
            ),
            "transformer.ln_f.weight": "norm",
            **biased("transformer.ln_f"),
        },
    ),
    "nanochat": (
        by_hand.Chat,
        {
            "transformer.wte.weight": "embedding",
            "lm_head.weight": "head",
            "value_embeds.{}.weight": "per_layer_embedding",
            "resid_lambdas": "other",
            "x0_lambdas": "other",
            **within(
                "transformer.h.{}",
                {
                    **{f"attn.c_{part}.weight": f"attention_{part}" for part in "qkv"},
                    "attn.c_proj.weight": "attention_o",
                    "attn.ve_gate.weight": "attention_gate",
                    "mlp.c_fc.weight": "mlp_up",
                    "mlp.c_proj.weight": "mlp_down",
                },
            ),
        },
    ),
    "llama": (by_hand.Transformer, LLAMA),
    "experts apart": (partial(by_hand.Transformer, by_hand.Mixture), with_mixture(MIXTURE)),
    "experts [in, out]": (mixture_of(by_hand.InOutExperts), with_mixture(RAW)),
    "experts [out, in]": (mixture_of(by_hand.OutInExperts), with_mixture(RAW)),
    "experts alternating [out, in]": (mixture_of(by_hand.AlternatingExperts), with_mixture(GATE_UP)),
    "experts alternating [in, out]": (mixture_of(partial(by_hand.AlternatingExperts, True)), with_mixture(GATE_UP)),
    "mamba": (
        by_hand.Mamba,
        {
            "embedding.weight": "embedding",
            "norm_f.weight": "norm",
            "lm_head.weight": "head",
            **within(
                "layers.{}",
                {
                    "norm.weight": "norm",
                    "mixer.in_proj.weight": "mixer_in",
                    "mixer.x_proj.weight": "mixer_in",
                    "mixer.dt_proj.weight": "mixer_in",
                    "mixer.out_proj.weight": "mixer_out",
                    "mixer.conv1d.weight": "convolution",
                    "mixer.A_log": "state_space",
                    "mixer.D": "state_space",
                    **biased("mixer.conv1d", "mixer.dt_proj"),
                },
            ),
        },
    ),
    "vision": (
        by_hand.Seeing,
        {
            **within("language_model", LLAMA),
            "projector.weight": "matrix",
            **within(
                "vision_tower",
                {
                    "patch_embed.weight": "convolution",
                    "cls_token": "other",
                    "pos_embed": "position_embedding",
                    "norm.weight": "norm",
                    **within(
                        "blocks.{}",
                        {
                            "norm1.weight": "norm",
                            "norm2.weight": "norm",
                            "attn.qkv.weight": "attention_qkv",
                            "attn.proj.weight": "attention_o",
                            "mlp.fc1.weight": "mlp_up",
                            "mlp.fc2.weight": "mlp_down",
                            **biased("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
                        },
                    ),
                    **biased("patch_embed", "norm"),
                },
            ),
            **biased("projector"),
        },
    ),
    "several next tokens": (
        by_hand.Foresight,
        {
            **{name: role for name, role in within("trunk", LLAMA).items() if role != "head"},
            "next_tokens.{}.weight": "head",
        },
    ),
    "declared head": (
        by_hand.Declared,
        {
            **{name: role for name, role in within("trunk", LLAMA).items() if role != "head"},
            "scores.weight": "head",
        },
    ),
    "factored embedding": (
        by_hand.Factored,
        {
            "embed.weight": "embedding",
            "embed_proj.weight": "matrix",
            "lm_head.weight": "head",
            **{name: role for name, role in LLAMA.items() if name.startswith("layers")},
        },
    ),
    "factored embedding, tied": (
        partial(by_hand.Factored, True),
        {
            "embed.weight": "tied_embedding",
            "embed_proj.weight": "matrix",
            "head_proj.weight": "matrix",
            **{name: role for name, role in LLAMA.items() if name.startswith("layers")},
        },
    ),
    "adapters": (
        by_hand.adapted,
        within("layers.{}.attention", {f"w{part}.lora_{side}": "adapter" for part in "qkvo" for side in "AB"}),
    ),
}


def abstract(name: str) -> str:
    return re.sub(r"\.\d+\.", ".{}.", name)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_has_its_role(name: str) -> None:
    make, expected = MODELS[name]
    found: dict[str, str] = {}
    for parameter, (_, site) in find_sites(make()).items():
        assert found.setdefault(abstract(parameter), site.role) == site.role
    # The kind of a norm is told by its name or left open.
    said = {
        key: "norm" if expected.get(key) == "norm" and str(role).endswith("norm") else role
        for key, role in found.items()
    }
    assert said == expected


@pytest.mark.parametrize("name", MODELS)
def test_no_matrix_is_left_to_adamw(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    left = ("head", "router", "embedding", "tied_embedding", "norm", "bias", "other", "convolution", "state_space")
    rules = {parameter: group["rule"] for group in route(model, "muon") for parameter in group["param_names"]}
    trainable = {parameter for parameter, weight in model.named_parameters() if weight.requires_grad}
    assert rules.keys() == trainable
    muon = {parameter for parameter in trainable if not expected[abstract(parameter)].endswith(left)}
    assert {parameter for parameter, rule in rules.items() if rule == "muon"} == muon


@pytest.mark.parametrize("name", MODELS)
def test_a_step_moves_every_weight(name: str) -> None:
    model = by_hand.build(MODELS[name][0])
    before = {parameter: weight.detach().clone() for parameter, weight in model.named_parameters()}
    optimizer = build_optimizer(model, "olmoe")
    for seed in range(2):  # The second half of an adapter moves first.
        optimizer.zero_grad()
        by_hand.loss_of(model, by_hand.tokens(seed)).backward()
        optimizer.step()
    for parameter, weight in model.named_parameters():
        assert weight.isfinite().all(), parameter
        assert torch.equal(weight, before[parameter]) != weight.requires_grad, parameter


def of_width(width: int) -> Tensor:
    return torch.randn(2, by_hand.LENGTH, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "attention", "width", "groups"),
    [
        ("nanoGPT", by_hand.CausalSelfAttention, by_hand.WIDTH, by_hand.HEADS),
        ("nanochat", by_hand.ChatAttention, by_hand.WIDTH, by_hand.GROUPS),
        ("llama", by_hand.Attention, by_hand.WIDTH, by_hand.GROUPS),
        ("vision", by_hand.VisionAttention, 16, 4),
        ("factored embedding", by_hand.Attention, by_hand.WIDTH, by_hand.GROUPS),
    ],
)
def test_a_head_is_a_matrix(name: str, attention: type[nn.Module], width: int, groups: int) -> None:
    model = by_hand.build(MODELS[name][0])
    part = next(module for module in model.modules() if isinstance(module, attention))
    inputs = (of_width(width), None) if attention is by_hand.ChatAttention else (of_width(width),)
    Matrices(model, part).check_heads(lambda: part(*inputs), width // by_hand.HEAD, groups)


@pytest.mark.parametrize(
    ("name", "part", "width", "neurons"),
    [
        ("nanoGPT", by_hand.MLP, by_hand.WIDTH, 4 * by_hand.WIDTH),
        ("nanochat", by_hand.MLP, by_hand.WIDTH, 4 * by_hand.WIDTH),
        ("llama", by_hand.FeedForward, by_hand.WIDTH, by_hand.HIDDEN),
        ("experts apart", by_hand.FeedForward, by_hand.WIDTH, by_hand.HIDDEN),
        ("experts [in, out]", by_hand.InOutExperts, by_hand.WIDTH, by_hand.HIDDEN),
        ("experts [out, in]", by_hand.OutInExperts, by_hand.WIDTH, by_hand.HIDDEN),
        ("experts alternating [out, in]", by_hand.AlternatingExperts, by_hand.WIDTH, by_hand.HIDDEN),
        ("experts alternating [in, out]", by_hand.AlternatingExperts, by_hand.WIDTH, by_hand.HIDDEN),
        ("vision", by_hand.VisionMLP, 16, 48),
        # As wide as the embedding, which is not the residual stream.
        ("factored embedding", by_hand.FeedForward, by_hand.WIDTH, 16),
        ("factored embedding, tied", by_hand.FeedForward, by_hand.WIDTH, 16),
    ],
)
def test_a_neuron_is_a_row(name: str, part: type[nn.Module], width: int, neurons: int) -> None:
    model = by_hand.build(MODELS[name][0])
    module = next(module for module in model.modules() if isinstance(module, part))
    Matrices(model, module).check_neurons(lambda: module(of_width(width)), neurons)


def test_what_a_fused_weight_holds_is_told_by_its_sections() -> None:
    """Without heads, query, key and value of nanoGPT are each a matrix, and so are both halves that Mamba's holds."""
    sites = find_sites(by_hand.GPT())
    assert sites["transformer.h.0.attn.c_attn.weight"][1].sections == (by_hand.WIDTH,) * 3
    mixer = "layers.0.mixer"
    sites = find_sites(by_hand.Mamba())
    assert sites[f"{mixer}.in_proj.weight"][1].sections == (2 * by_hand.WIDTH,) * 2
    assert sites[f"{mixer}.x_proj.weight"][1].sections == (3, 5, 5)


RESIDUAL: dict[str, Any] = {
    "matrix": {"rule": "aro", "view": "residual", "lr": 0.01},
    "default": {"rule": "adamw", "lr": 0.01},
}
READS = ("_q", "_k", "_v", "_qkv", "_gate", "_up", "gate", "router")
WRITES = ("_o", "_down", "_out")
# Of a state-space block what lies within, and what looks at a part of the stream.
INSIDE = (
    "x_proj.weight",
    "dt_proj.weight",
    "ve_gate.weight",
    "projector.weight",
    "embed_proj.weight",
    "head_proj.weight",
)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "adapters"])
def test_the_residual_stream_is_the_rows(name: str) -> None:
    """By view "residual": of what writes to the stream its outputs, of what reads from it its inputs."""
    model = MODELS[name][0]()
    weights, seen = dict(model.named_parameters()), 0
    for group in route(model, RESIDUAL):
        for parameter in group["param_names"] if group["rule"] == "aro" else ():
            if parameter.endswith(INSIDE):
                continue
            width = 16 if "vision_tower" in parameter else by_hand.WIDTH
            view = bind_view(group["view"], tuple(weights[parameter].shape), name=parameter)
            assert view.rows == width, parameter
            writes = group["role"].endswith(WRITES)
            assert writes or group["role"].endswith((*READS, "_in")), parameter
            if parameter.endswith(".weight"):  # A linear layer's, so that its outputs are its rows.
                assert ("transposed" in str(group["view"])) != writes, parameter
            seen += 1
    assert seen


def test_experts_as_wide_as_the_stream_are_asked_for() -> None:
    """Nothing tells `[expert, in, out]` from `[expert, out, in]` then; a pattern does."""
    square = partial(by_hand.Stacked, partial(by_hand.InOutExperts, by_hand.WIDTH))
    model = by_hand.Transformer(square)
    with pytest.raises(
        ValueError, match=r"layers\.0\.feed_forward\.experts\.w1 .*both of its sides are as wide"
    ) as error:
        route(model, RECIPE)
    assert 'role = "expert' in str(error.value)
    patterns = [
        {"match": "*experts.w[13]", "role": "experts", "view": "transposed"},
        {"match": "*experts.w2", "role": "experts", "view": "as_stored"},
    ]
    groups = route(model, RECIPE | {"patterns": patterns})
    views = {name: group["view"] for group in groups for name in group["param_names"]}
    assert views["layers.1.feed_forward.experts.w3"] == "transposed"
    assert views["layers.1.feed_forward.experts.w2"] == "as_stored"


def test_a_strict_route_takes_no_type_for_an_answer() -> None:
    model = by_hand.Seeing()
    model.odd = nn.Linear(5, 7)
    assert find_sites(model)["odd.weight"][1].evidence == "type"
    assert any("odd.weight" in group["param_names"] and group["rule"] == "muon" for group in route(model, "muon"))
    with pytest.raises(ValueError, match=r"odd\.weight"):
        route(model, "muon", strict=True)
