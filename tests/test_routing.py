"""Roles, recipes and groups: the five model families, plain transformers, overrides, and every refusal."""

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from symdist import build_optimizer, load_recipe, recipe_names, route
from symdist.routing.residual_stream import ResidualStage, residual_stage
from symdist.routing.roles import FALLBACK
from symdist.routing.route import UnroutedError
from symdist.routing.sites import find_sites
from symdist.routing.words import norm_role
from symdist.tools.models import build, names

BLOCK = {
    "self_attn.q_proj.weight": "attention_q",
    "self_attn.k_proj.weight": "attention_k",
    "self_attn.v_proj.weight": "attention_v",
    "self_attn.o_proj.weight": "attention_o",
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "input_norm",
}
DENSE = {"mlp.gate_proj.weight": "mlp_gate", "mlp.up_proj.weight": "mlp_up", "mlp.down_proj.weight": "mlp_down"}
EXPERTS = {"mlp.experts.gate_up_proj": "expert_gate_up", "mlp.experts.down_proj": "expert_down"}
NORMS = {"self_attn.q_norm.weight": "qk_norm", "self_attn.k_norm.weight": "qk_norm"}
FAMILIES = {
    "qwen3-tiny": BLOCK | DENSE | NORMS,
    "gemma3-tiny": BLOCK
    | DENSE
    | NORMS
    | {
        "post_attention_layernorm.weight": "output_norm",
        "pre_feedforward_layernorm.weight": "input_norm",
        "post_feedforward_layernorm.weight": "output_norm",
    },
    "olmoe-tiny": BLOCK | EXPERTS | NORMS | {"mlp.gate.weight": "router"},
    "qwen3-moe-tiny": BLOCK | EXPERTS | NORMS | {"mlp.gate.weight": "router"},
    "gpt-oss-tiny": BLOCK
    | EXPERTS
    | {f"self_attn.{x}_proj.bias": "bias" for x in "qkvo"}
    | {
        "self_attn.sinks": "sink",
        "mlp.router.weight": "router",
        "mlp.router.bias": "router_bias",
        "mlp.experts.gate_up_proj_bias": "bias",
        "mlp.experts.down_proj_bias": "bias",
    },
}


def roles(model: nn.Module) -> dict[str, str | None]:
    return {name: site.role for name, (_, site) in find_sites(model).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_the_families_has_its_role(family: str) -> None:
    model = build(family, device="meta")
    expected = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "input_norm", "lm_head.weight": "head"}
    layers = model.config.num_hidden_layers
    expected |= {f"model.layers.{i}.{name}": role for i in range(layers) for name, role in FAMILIES[family].items()}
    assert roles(model) == expected


def test_tied_embedding_is_one_parameter_that_is_not_centred() -> None:
    model = build("gemma3-tiny", device="meta", overrides={"tie_word_embeddings": True})
    found = roles(model)
    assert found["model.embed_tokens.weight"] == "tied_embedding"
    assert "lm_head.weight" not in found
    group = next(group for group in route(model, "gemma3") if group["role"] == "tied_embedding")
    assert not group.get("centered", False)
    with pytest.raises(ValueError, match="tied embedding must not be centred"):
        route(model, "gemma3", overrides={"tied_embedding": {"centered": True}})


SPLIT = {
    "default": {"rule": "adamw", "lr": 0.01},
    "other": {"rule": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "output_norm": {"rule": "adamw", "lr": 0.01, "weight_decay": 0.0},
    "qk_norm": {"rule": "adamw", "lr": 0.01, "weight_decay": 0.0},
}


@pytest.mark.parametrize("family", ["gemma3-tiny", "qwen3-tiny"])
def test_decay_reaches_the_scales_of_input_norms_only(family: str) -> None:
    model = build(family, seed=0)
    kept = {name for name, role in FAMILIES[family].items() if role in ("output_norm", "qk_norm")}
    norms = {name: parameter for name, parameter in model.named_parameters() if "norm" in name}
    decays = {
        name: 0.0 if any(name.endswith(f".{each}") for each in kept) and ".layers." in name else 0.1 for name in norms
    }
    assert decays["model.norm.weight"] == 0.1
    optimizer = build_optimizer(model, SPLIT)
    roles_of_groups = [group["role"] for group in optimizer.param_groups]
    assert len(set(roles_of_groups)) == len(roles_of_groups)
    found = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name: found[name] for name in norms} == decays
    with torch.no_grad():
        for parameter in norms.values():
            parameter.uniform_(0.5, 1.5)
    before = {name: parameter.detach().clone() for name, parameter in norms.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in norms.items():
        assert torch.equal(parameter, before[name] * (1 - 0.01 * decays[name])), name


RESIDUAL = {
    "default": {"rule": "aro", "view": "residual", "lr": 0.01},
    "other": {"rule": "adamw", "lr": 0.01},
    "router": {"rule": "adamw", "lr": 0.01},
}


@pytest.mark.parametrize(
    ("name", "transposed"),
    [("qwen3-tiny", ()), ("olmoe-tiny", ()), ("gpt-oss-tiny", ("experts.",)), ("deepseek-v3-tiny", ())],
)
def test_the_residual_stream_is_the_rows_whatever_the_shape(name: str, transposed: tuple[str, ...]) -> None:
    """By what a matrix does, not by which of its sides is smaller: what writes to the stream has it as its output."""
    model = build(name, device="meta")
    named = dict(model.named_parameters())
    seen = {
        parameter: (group["view"], named[parameter])
        for group in route(model, RESIDUAL)
        if group["rule"] == "aro"
        for parameter in group["param_names"]
    }
    assert {"transposed", "as_stored"} <= {view for view, _ in seen.values()}
    for parameter, (view, weight) in seen.items():
        writes = any(word in parameter for word in ("o_proj", "down_proj"))
        flipped = any(word in parameter for word in transposed)
        assert view == ("as_stored" if writes != flipped else "transposed"), parameter
        rows = weight.shape[-2] if view == "as_stored" else weight.shape[-1]
        if not any(word in parameter for word in ("q_b_proj", "kv_b_proj")):
            assert rows == model.config.hidden_size, parameter


def test_a_matrix_of_unknown_side_is_told() -> None:
    model = nn.Module()
    model.gizmo = nn.Parameter(torch.zeros(4, 4))
    patterns = {"patterns": [{"match": "gizmo", "role": "matrix"}]}
    with pytest.raises(ValueError, match=r"gizmo: view 'residual' does not know which dimension"):
        route(model, RESIDUAL | patterns)
    patterns["patterns"][0]["view"] = "as_stored"
    assert route(model, RESIDUAL | patterns)[0]["view"] == "as_stored"


def test_kinds_of_norms_are_one_group_unless_the_recipe_tells_them_apart() -> None:
    model = build("gemma3-tiny", device="meta")
    norms = {name for name, role in roles(model).items() if str(role).endswith("norm")}

    def grouped(recipe: dict[str, Any]) -> dict[str, int]:
        return {
            group["role"]: len(group["param_names"])
            for group in route(model, recipe)
            if norms.intersection(group["param_names"])
        }

    plain = {"default": {"rule": "adamw", "lr": 0.01}}
    layers = model.config.num_hidden_layers
    assert grouped(plain) == {"norm": len(norms)}
    assert grouped(plain | {"output_norm": {"rule": "adamw", "lr": 0.01}}) == {
        "norm": len(norms) - 2 * layers,
        "output_norm": 2 * layers,
    }
    scheduled = plain | {"schedule": {"qk_norm": {"shape": "constant"}}}
    assert grouped(scheduled) == {"norm": len(norms) - 2 * layers, "qk_norm": 2 * layers}


def test_a_schedule_of_all_norms_holds_for_each_kind() -> None:
    recipe = load_recipe(SPLIT | {"schedule": {"norm": {}, "qk_norm": {}, "default": {}}})
    found = {role: recipe.kind_of(role, "adamw")[1] for role in ("norm", "output_norm", "qk_norm", "bias")}
    assert found == {"norm": "norm", "output_norm": "norm", "qk_norm": "qk_norm", "bias": "default"}


def holding(*children: str, **attributes: Any) -> nn.Module:
    holder = nn.Module()
    for child in children:
        holder.add_module(child, nn.LayerNorm(4))
    for name, value in attributes.items():
        setattr(holder, name, value)
    return holder


PRE = "input_layernorm"


@pytest.mark.parametrize(
    ("name", "holder", "expected"),
    [
        ("post_attention_layernorm", holding(PRE, "post_attention_layernorm"), "input_norm"),
        ("post_attention_layernorm", holding(PRE, "pre_feedforward_layernorm"), "output_norm"),
        ("post_attention_layernorm", holding(PRE, "pre_mlp_layernorm", "post_mlp_layernorm"), "output_norm"),
        ("post_attention_layernorm", holding("post_feedforward_layernorm"), "output_norm"),
        # GLM 4 norms the attention's output under another name.
        ("post_attention_layernorm", holding(PRE, "post_self_attn_layernorm", "post_mlp_layernorm"), "input_norm"),
        ("post_mlp_layernorm", holding(PRE, "post_self_attn_layernorm"), "output_norm"),
        # After the residual sum, as in BERT.
        ("post_attention_layernorm", holding("post_mlp_layernorm"), "norm"),
        ("post_mlp_layernorm", holding("post_attention_layernorm"), "norm"),
        ("input_layernorm", holding(PRE, "post_attention_layernorm", norm_after=True), "norm"),
        ("norm", holding("norm"), "norm"),
        ("norm", holding("norm", layers=nn.ModuleList()), "input_norm"),
        ("q_layernorm", holding("q_layernorm", "k_layernorm"), "qk_norm"),
        ("q_layernorm", holding("q_layernorm", "kv_layernorm"), "input_norm"),
        ("layer_norm_weight", nn.Linear(4, 4), "input_norm"),
        ("layer_norm_bias", nn.Linear(4, 4), "norm"),
        ("sandwich_norm", holding(PRE, "sandwich_norm"), "norm"),
    ],
)
def test_norms_are_told_apart_by_name_and_what_lies_beside_them(name: str, holder: nn.Module, expected: str) -> None:
    assert norm_role(name, holder) == expected


def view_of(model: str, recipe: dict[str, Any], role: str) -> Any:
    groups = route(build(model, device="meta"), recipe)
    return next(group["view"] for group in groups if group["role"] == role)


@pytest.mark.parametrize(
    ("model", "view", "role", "expected"),
    [
        ("gpt-oss-tiny", "heads", "attention_q", {"heads": 8, "dim": 0}),
        ("gpt-oss-tiny", "heads", "attention_v", {"heads": 2, "dim": 0}),
        ("gpt-oss-tiny", "heads", "attention_o", {"heads": 8, "dim": 1}),
        ("olmoe-tiny", "neurons", "expert_gate_up", "gate_up_stacked"),
        ("olmoe-tiny", "neurons", "expert_down", "transposed"),
        ("gpt-oss-tiny", "neurons", "expert_gate_up", "gate_up_interleaved"),
        ("gpt-oss-tiny", "neurons", "expert_down", "as_stored"),
        ("gpt-oss-tiny", None, "expert_down", "transposed"),
        ("olmoe-tiny", None, "expert_down", "as_stored"),
        ("qwen3-tiny", "neurons", "mlp_gate", "as_stored"),
        ("qwen3-tiny", "neurons", "mlp_down", "transposed"),
    ],
)
def test_views_follow_how_a_family_stores_its_weights(model: str, view: Any, role: str, expected: Any) -> None:
    section = {"rule": "polar", "lr": 1.0} | ({} if view is None else {"view": view})
    base = "attention" if role.startswith("attention") else "experts" if role.startswith("expert") else "mlp"
    assert view_of(model, {"default": {"rule": "adamw", "lr": 1.0}, base: section}, role) == expected


@pytest.mark.parametrize("recipe", recipe_names())
@pytest.mark.parametrize("model", [name for name in names() if name.endswith("-tiny")])
def test_every_recipe_builds_on_every_family(model: str, recipe: str) -> None:
    built = build(model)
    # The recipes of dense models say nothing of routers.
    says = load_recipe(recipe).options("router") is not None
    overrides = {} if says else {"router": {"rule": "row_norm", "centered": True, "lr": 0.01}}
    optimizer = build_optimizer(built, recipe, overrides=overrides)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in built.parameters())
    assert len(optimizer.strategies()) == len(held)


@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_has_a_rule_for_every_role_and_none_for_a_vector_that_needs_a_matrix(recipe: str) -> None:
    rules = {role: (load_recipe(recipe).options(role) or {}).get("rule") for role in FALLBACK}
    without = {role for role, rule in rules.items() if rule is None}
    assert without <= ({"router"} if recipe in ("qwen3", "gemma3") else set())
    vectors = ("norm", "bias", "router_bias", "sink", "convolution", "state_space", "other")
    assert {rules[role] for role in vectors} == {"adamw"}
    of_matrices = {rules[role] for role in ("gate", "adapter", "indexer", "mixer_in", "mixer_out", "attention_gate")}
    assert of_matrices == {rules["matrix"]}
    assert rules["position_embedding"] == rules["per_layer_embedding"] == rules["embedding"]


def test_tables_of_tokens_and_of_positions_write_to_the_first_stage() -> None:
    stages = {residual_stage("wte.weight", "embedding"), residual_stage("wpe.weight", "position_embedding")}
    assert stages == {ResidualStage(tower=None, number=0)}
    assert residual_stage("h.2.mamba.out_proj.weight", "mixer_out") == ResidualStage(tower="h", number=3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = 4, 2
        self.wq, self.wk = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.wv, self.wo = nn.Linear(16, 8, bias=False), nn.Linear(16, 16, bias=False)
        self.attn_gate = nn.Linear(16, 4)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList([FeedForward() for _ in range(3)])


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(11, 16)
        self.attention, self.mixture = Attention(), Mixture()
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32)
        self.ln = nn.LayerNorm(16)
        self.output = nn.Linear(16, 11, bias=False)


ADAMW = {"default": {"rule": "adamw", "lr": 1.0}}
GATE = {"patterns": [{"match": "*.wq.weight", "role": "attention_q"}]}


def test_plain_modules() -> None:
    found = roles(Plain())
    expected = {
        "tok.weight": "embedding",
        "output.weight": "head",
        "attention.wq.weight": "attention_q",
        "attention.wk.weight": "attention_k",
        "attention.wo.weight": "attention_o",
        "mixture.gate.weight": "router",
        "mixture.gate.bias": "router_bias",
        "mixture.experts.2.w1.weight": "expert_gate",
        "mixture.experts.2.w2.weight": "expert_down",
        "mixture.experts.0.w3.bias": "bias",
        "encoder.self_attn.in_proj_weight": "attention_qkv",
        "encoder.self_attn.out_proj.weight": "attention_o",
        "encoder.linear1.weight": "mlp_up",
        "encoder.linear2.weight": "mlp_down",
        "ln.weight": "norm",
        "attention.attn_gate.weight": "attention_gate",
    }
    assert {name: found[name] for name in expected} == expected
    groups = route(Plain(), ADAMW | GATE | {"attention": {"rule": "muon", "lr": 1.0, "view": "heads"}})
    views = {name: group["view"] for group in groups for name in group["param_names"]}
    assert views["attention.wq.weight"] == {"heads": 4, "dim": 0}
    assert views["attention.wk.weight"] == {"heads": 2, "dim": 0}
    assert views["encoder.self_attn.in_proj_weight"] == {"heads": 12, "dim": 0}
    assert views["encoder.self_attn.out_proj.weight"] == {"heads": 4, "dim": 1}


def test_a_gate_that_is_no_router_is_a_matrix_by_heads() -> None:
    heads = {"attention": {"rule": "muon", "lr": 1.0, "view": "heads"}}
    views = {name: group["view"] for group in route(Plain(), ADAMW | heads) for name in group["param_names"]}
    assert views["attention.attn_gate.weight"] == {"heads": 4, "dim": 0}


def test_patterns_come_first_and_in_order() -> None:
    patterns = [
        {"match": "tok.*", "lr": 7.0},
        {"match": "*experts.1.*.weight", "role": "experts", "rule": "row_norm"},
    ]
    groups = route(Plain(), ADAMW | {"patterns": patterns})
    of = {name: group for group in groups for name in group["param_names"]}
    assert of["tok.weight"]["lr"] == 7.0
    assert of["tok.weight"]["role"] == "embedding"
    assert of["mixture.experts.1.w1.weight"]["rule"] == "row_norm"
    assert of["mixture.experts.2.w1.weight"]["rule"] == "adamw"


def test_frozen_parameters_are_left_out() -> None:
    model = Plain()
    model.tok.weight.requires_grad_(False)
    assert "tok.weight" not in roles(model)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("nothing", {}, "there is no recipe 'nothing'"),
        ("missing.toml", {}, "does not exist"),
        ({"gates": {"rule": "adamw"}}, {}, "'gates', which is no role"),
        ({"router": 3}, {}, "should be a section"),
        ({"embedding": {"rule": "adamw", "lr": 1.0}}, {}, "has role .* no section and no \\[default\\]"),
        (ADAMW | {"patterns": [*GATE["patterns"], {"match": "x.*", "lr": 1}]}, {}, "'x.\\*' applies to no parameter"),
        (ADAMW | {"patterns": [{"lr": 1}]}, {}, "has no 'match'"),
        (ADAMW | GATE, {"routers": {"lr": 1}}, "'routers', which is no role"),
        (ADAMW | GATE, {"router": 0.1}, "give its options"),
        (ADAMW | GATE | {"embedding": {"rule": "row_norm", "lr": 1, "centered": True}}, {}, "must not be centred"),
        (ADAMW | GATE | {"router": {"rule": "row_norm", "lr": 1, "view": "neurons"}}, {}, "for MLP and expert"),
        (ADAMW | GATE | {"router": {"rule": "muon", "lr": 1, "view": "heads"}}, {}, "needs the number of heads"),
        ({"default": {"lr": 1.0}} | GATE, {}, "names no rule for role"),
        (ADAMW | {"patterns": 5}, {}, "patterns should consist of tables"),
        (ADAMW | {"patterns": [5]}, {}, "patterns should consist of tables"),
        (ADAMW | {"router": {"rule": "adamw", "lr": "fast"}}, {}, r"\[router\]: lr='fast' must be a finite number"),
        (ADAMW | {"patterns": [{"match": "x", "lr": math.nan}]}, {}, "pattern 'x': lr=nan must be a finite number"),
        ({5: {}}, {}, "names 5, which is no role"),
        (ADAMW | {"strict": "yes"}, {}, "strict = 'yes' should be true or false"),
    ],
)
def test_what_cannot_be_routed_is_refused(recipe: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(Plain(), recipe, overrides=overrides)


def test_an_option_no_rule_knows_names_group_and_option() -> None:
    with pytest.raises(ValueError, match=r"'router': rule 'row_norm' knows no option 'alpha'"):
        build_optimizer(Plain(), ADAMW | GATE | {"router": {"rule": "row_norm", "lr": 1.0, "alpha": 1.0}})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"ns_steps": 99_999_999}, "ns_steps=99999999 must be at most 100"),
        ({"damping": 1e300}, r"damping=1e\+300 must be at most 1"),
        ({"lr": 1e300}, r"lr=1e\+300 must be a finite number, 0 or more and at most 1e\+09"),
        ({"weight_decay": True}, "weight_decay=True must be a finite number"),
        ({"padding_rows": True}, "padding_rows=True must be a whole number"),
    ],
)
def test_an_option_out_of_range_is_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_optimizer(Plain(), ADAMW | GATE | {"router": {"rule": "muon", "lr": 1.0} | option})


def test_all_rates_are_scaled_by_a_positive_number() -> None:
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a positive number"):
            load_recipe("olmoe").adjusted(lr=lr)


def test_overriding_the_rule_leaves_the_old_rules_options_behind() -> None:
    recipe = load_recipe({"router": {"rule": "hybrid", "order": "polar_then_row", "lr": 0.5, "centered": True}})
    assert recipe.overridden({"router": {"rule": "left_spectral"}}).options("router") == {
        "rule": "left_spectral",
        "lr": 0.5,
        "centered": True,
    }


def test_recipe_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[default]\nrule = "adamw"\nlr = 0.1\n')
    assert route(nn.Sequential(nn.Embedding(3, 2)), path)[0]["lr"] == 0.1
    path.write_text("[default")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_recipe(path)


def test_wrappers_leave_names_as_they_are() -> None:
    wrapped = nn.Module()
    wrapped.module = Plain()
    assert roles(wrapped)["output.weight"] == "head"
    assert torch.equal(wrapped.module.tok.weight, find_sites(wrapped)["tok.weight"][0])


class Strange(nn.Module):
    """Weights of kinds that nothing explains, beside one that a linear layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.mixer = nn.Module()
        self.mixer.register_parameter("mix[0]", nn.Parameter(torch.zeros(6, 6)))
        self.mixer.stack = nn.Parameter(torch.zeros(3, 4, 5))
        self.whatever = nn.Linear(6, 6, bias=False)


@pytest.mark.parametrize(
    "recipe",
    [
        {"matrix": {"rule": "muon", "lr": 0.1}, "router": {"rule": "row_norm", "lr": 0.1}},
        {"matrix": {"rule": "muon", "lr": 0.1}, "default": {"rule": "adamw", "lr": 0.1}},
        {"other": {"rule": "adamw", "lr": 0.1}, "mlp": {"rule": "muon", "lr": 0.1}},
    ],
    ids=["no default", "default", "no matrix"],
)
def test_all_that_has_no_role_is_told_with_patterns_that_work(recipe: dict[str, Any]) -> None:
    model = Strange()
    recipe = {**recipe, "bias": {"rule": "adamw", "lr": 0.1}}
    with pytest.raises(
        UnroutedError, match=r"mixer\.mix\[0\] .* the likeliest are matrix, .* \(and 2 others\)"
    ) as error:
        route(model, recipe, strict=True)
    assert error.value.snippet in str(error.value)
    patterns = tomllib.loads(error.value.snippet)["patterns"]
    assert len(patterns) == 3
    groups = route(model, {**recipe, "patterns": patterns}, strict=True)
    rules = {name: group["rule"] for group in groups for name in group["param_names"]}
    assert set(rules) == {name for name, _ in model.named_parameters()}
    assert rules["mixer.mix[0]"] == rules["whatever.weight"] == ("muon" if "matrix" in recipe else "adamw")
    assert rules["fc1.weight"] == "muon"
    build_optimizer(model, {**recipe, "patterns": patterns}, strict=True)


def test_layers_alike_have_one_pattern() -> None:
    def layer() -> nn.Module:
        made = nn.Module()
        made.mix = nn.Parameter(torch.zeros(6, 6))
        return made

    model = nn.ModuleDict({"layers": nn.ModuleList(layer() for _ in range(12)), "fc1": nn.Linear(6, 8)})
    with pytest.raises(UnroutedError, match=r"layers\.0\.mix .* \(and 11 others\)") as error:
        route(model, "muon")
    assert error.value.snippet.splitlines()[:2] == ["[[patterns]]  # 12 of (6, 6)", 'match = "layers.*.mix"']
    patterns = tomllib.loads(error.value.snippet)["patterns"]
    assert len(patterns) == 1
    base = load_recipe("muon")
    found = route(model, {**base.sections, "patterns": patterns})
    assert sum(group["role"] == "matrix" for group in found for _ in group["params"]) == 12
    # A pattern must not take a weight along that has a role.
    model["layers"].append(nn.ModuleDict({"inner": nn.ModuleDict({"mix": nn.Linear(6, 6)})}))
    model["layers"][12].inner.mix.register_parameter("mix", nn.Parameter(torch.zeros(6, 6)))
    model["layers"][3].norm = nn.LayerNorm(6)
    with pytest.raises(UnroutedError) as error:
        route(model, "muon")
    groups = route(model, {**base.sections, "patterns": tomllib.loads(error.value.snippet)["patterns"]})
    assert {name: group["role"] for group in groups for name in group["param_names"]}["layers.3.norm.weight"] == "norm"


def test_a_linear_layer_of_which_no_more_is_known_is_a_matrix_unless_routing_is_strict() -> None:
    model = Strange()
    del model.mixer
    site = find_sites(model)["whatever.weight"][1]
    assert (site.role, site.evidence) == ("matrix", "type")
    assert {"fc1.weight", "whatever.weight"} <= {
        name for group in route(model, "muon") for name in group["param_names"]
    }
    with pytest.raises(UnroutedError, match=r"whatever\.weight .* no more is known, and strict routing refuses"):
        route(model, "muon", strict=True)
    with pytest.raises(UnroutedError, match=r"whatever\.weight .* no more is known"):
        route(model, {"default": {"rule": "adamw", "lr": 0.1}, "strict": True})


class Fused(nn.Module):
    """An attention whose queries, keys and values share a weight, with fewer key heads than query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = 4, 2, 5
        self.qkv_proj = nn.Linear(16, 40, bias=False)


def test_q_k_and_v_of_one_weight_are_each_a_matrix_or_heads() -> None:
    model = nn.ModuleDict({"tok": nn.Embedding(11, 16), "attention": Fused()})

    def view(recipe: dict[str, Any]) -> Any:
        groups = route(model, ADAMW | recipe)
        return next(group["view"] for group in groups if "attention.qkv_proj.weight" in group["param_names"])

    muon = {"rule": "muon", "lr": 1.0}
    assert view({"attention": muon}) == {"sections": [20, 10, 10]}
    assert view({"attention": muon | {"view": "heads"}}) == {"heads": 8, "dim": 0}
    assert view({"attention_qkv": muon}) == "as_stored"
    aro = {"rule": "aro", "lr": 1.0, "view": "residual"}
    assert view({"attention": aro}) == {"sections": [20, 10, 10], "transposed": True}
    with pytest.raises(
        ValueError, match=r"holds attention_q, attention_k, attention_v in one tensor.*\[attention_qkv\]"
    ):
        view({"attention": muon, "attention_k": muon})
