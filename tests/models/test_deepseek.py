"""DeepSeek-V3's latent attention and shared experts have roles, so every recipe for mixtures takes the model."""

import pytest

from symdist import recipe_names, route
from symdist.routing.sites import find_sites
from symdist.tools.models import build

EVERYWHERE = {
    "self_attn.q_a_proj.weight": "matrix",
    "self_attn.q_a_layernorm.weight": "input_norm",
    "self_attn.q_b_proj.weight": "attention_q",
    "self_attn.kv_a_proj_with_mqa.weight": "matrix",
    "self_attn.kv_a_layernorm.weight": "input_norm",
    "self_attn.kv_b_proj.weight": "matrix",
    "self_attn.o_proj.weight": "attention_o",
    "input_layernorm.weight": "input_norm",
    "post_attention_layernorm.weight": "input_norm",
}
DENSE = {"mlp.gate_proj.weight": "mlp_gate", "mlp.up_proj.weight": "mlp_up", "mlp.down_proj.weight": "mlp_down"}
ROUTED = {
    "mlp.gate.weight": "router",
    "mlp.experts.gate_up_proj": "expert_gate_up",
    "mlp.experts.down_proj": "expert_down",
    "mlp.shared_experts.gate_proj.weight": "mlp_gate",
    "mlp.shared_experts.up_proj.weight": "mlp_up",
    "mlp.shared_experts.down_proj.weight": "mlp_down",
}


def test_every_parameter_has_its_role() -> None:
    sites = find_sites(build("deepseek-v3-tiny", device="meta"))
    expected = {"model.embed_tokens.weight": "embedding", "model.norm.weight": "input_norm", "lm_head.weight": "head"}
    for layer, roles in enumerate([DENSE, ROUTED, ROUTED, ROUTED]):
        expected |= {f"model.layers.{layer}.{name}": role for name, role in (EVERYWHERE | roles).items()}
    assert {name: site.role for name, (_, site) in sites.items()} == expected
    heads = {name.removeprefix("model.layers.1.self_attn."): site.heads for name, (_, site) in sites.items()}
    assert (heads["q_b_proj.weight"], heads["o_proj.weight"], heads["kv_b_proj.weight"]) == (4, 4, None)


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name not in ("gemma3", "qwen3")])
def test_recipes_for_mixtures_take_it(recipe: str) -> None:
    model = build("deepseek-v3-tiny", device="meta")
    taken = [name for group in route(model, recipe) for name in group["param_names"]]
    assert sorted(taken) == sorted(name for name, _ in model.named_parameters())
