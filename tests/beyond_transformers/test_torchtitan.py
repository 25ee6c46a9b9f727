"""torchtitan's models: every weight by what torchtitan itself says of it, and by what its forward does with it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from symdist import build_optimizer, route
from symdist.routing.sites import find_sites
from tests.beyond_transformers.matrices import Matrices
from tests.ranks import Ranks

pytest.importorskip("torchtitan")
pytest.importorskip("triton")

from tests.beyond_transformers import titan, titan_ranks

# By the ends of the names that weights have in transformers' checkpoints.
PUBLISHED: dict[str, str] = {
    "embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "layernorm.weight": "input_norm",
    "_model.norm.weight": "input_norm",
    "model.norm.weight": "input_norm",
    "shared_head.norm.weight": "input_norm",
    "enorm.weight": "input_norm",
    "hnorm.weight": "input_norm",
    "self_attn.q_norm.weight": "qk_norm",
    "self_attn.k_norm.weight": "qk_norm",
    "self_attn.q_proj.weight": "attention_q",
    "self_attn.k_proj.weight": "attention_k",
    "self_attn.v_proj.weight": "attention_v",
    "self_attn.o_proj.weight": "attention_o",
    "self_attn.gate_proj.weight": "attention_gate",
    "self_attn.q_a_proj.weight": "matrix",
    "self_attn.q_b_proj.weight": "attention_q",
    "self_attn.kv_a_proj_with_mqa.weight": "matrix",
    "self_attn.kv_b_proj.weight": "matrix",
    "self_attn.sinks": "sink",
    "mlp.gate_proj.weight": "mlp_gate",
    "mlp.up_proj.weight": "mlp_up",
    "mlp.down_proj.weight": "mlp_down",
    "post_feedforward_layernorm.weight": "output_norm",
    "mlp.experts.{}.gate_proj.weight": "expert_gate",
    "mlp.experts.{}.up_proj.weight": "expert_up",
    "mlp.experts.{}.down_proj.weight": "expert_down",
    "mlp.experts.gate_up_proj_blocks": "expert_gate_up",
    "mlp.experts.down_proj_blocks": "expert_down",
    "mlp.experts.down_proj": "expert_down",
    "shared_experts.gate_proj.weight": "mlp_gate",
    "shared_experts.up_proj.weight": "mlp_up",
    "shared_experts.down_proj.weight": "mlp_down",
    "shared_expert.gate_proj.weight": "mlp_gate",
    "shared_expert.up_proj.weight": "mlp_up",
    "shared_expert.down_proj.weight": "mlp_down",
    "shared_expert_gate.weight": "gate",
    "mlp.gate.weight": "router",
    "mlp.router.weight": "router",
    "mlp.router.bias": "router_bias",
    "eh_proj.weight": "matrix",
    "linear_attn.in_proj_z.weight": "attention_gate",
    "linear_attn.in_proj_a.weight": "attention_gate",
    "linear_attn.in_proj_b.weight": "attention_gate",
    "linear_attn.out_proj.weight": "attention_o",
    "linear_attn.A_log": "state_space",
    "linear_attn.norm.weight": "norm",
    "patch_embed.pos_emb.weight": "position_embedding",
    "visual.pos_embed.weight": "position_embedding",
    "position_embedding_table.weight": "position_embedding",
    "attn.q_proj.weight": "attention_q",
    "attn.k_proj.weight": "attention_k",
    "attn.v_proj.weight": "attention_v",
    "attn.proj.weight": "attention_o",
    "blocks.{}.wo.weight": "attention_o",
    "mlp.fc0.weight": "mlp_up",
    "blocks.{}.mlp.fc1.weight": "mlp_down",
    "layers.{}.mlp.fc1.weight": "mlp_up",
    "layers.{}.mlp.fc2.weight": "mlp_down",
    "mlp.linear_fc1.weight": "mlp_up",
    "mlp.linear_fc2.weight": "mlp_down",
    # An MLP between two towers, which both call an adapter.
    "vision_adapter.fc1.weight": "adapter",
    "vision_adapter.fc2.weight": "adapter",
    "vision_projection.weight": "matrix",
    # Stored as matrices by torchtitan, as convolutions in checkpoints.
    "patch_embed.proj.weight": "matrix",
    "patch_embedding.weight": "matrix",
    "visual.merger.linear_fc1.weight": "mlp_up",
    "visual.merger.linear_fc2.weight": "mlp_down",
    "mm_projector.proj.0.weight": "matrix",
    "mm_projector.proj.2.weight": "matrix",
    ".bias": "bias",
    "_bias": "bias",
}
# What torchtitan's adapters split or join in code.
IN_CODE = {
    "attn.wq.weight": "attention_q",
    "attn.wk.weight": "attention_k",
    "attn.wv.weight": "attention_v",
    "inner_experts.w1": "expert_gate",
    "inner_experts.w3": "expert_up",
    "attn.in_proj_q.weight": "attention_q",
    "attn.in_proj_k.weight": "attention_k",
    "attn.in_proj_v.weight": "attention_v",
    "attn.conv_q.weight": "convolution",
    "attn.conv_k.weight": "convolution",
    "attn.conv_v.weight": "convolution",
    ".bias": "bias",
}


def expected(name: str) -> dict[str, str]:
    """The role of every parameter, by what it is called in checkpoints; of norms in vision towers, "norm"."""
    model, found = titan.on_meta(name), {}
    names = titan.published(name)
    for parameter, _ in model.named_parameters():
        key = titan.abstract(parameter)
        table = PUBLISHED if key in names else IN_CODE
        ends = {_of(table, theirs) for theirs in names.get(key, [key])}
        if ends == {"attention_q", "attention_k", "attention_v"}:
            ends = {"attention_qkv"}
        (found[parameter],) = ends
        if key.endswith("post_attention_norm.weight"):
            # Where there is a norm before the MLP as well, the one after attention is before the sum.
            assert "layers.{}.ffn_norm.weight" in names
            found[parameter] = "output_norm"
    if model.config.enable_weight_tying:
        found["tok_embeddings.weight"] = "tied_embedding"
    return found


def _of(table: dict[str, str], name: str) -> str:
    """What the longest end of a name that is in the table says."""
    ends = [end for end in table if name.endswith(end)]
    if not ends and any(word in name for word in ("norm", "ln_")):
        return "norm"
    return table[max(ends, key=len)]


@pytest.mark.parametrize("name", titan.MODELS)
def test_every_weight_is_what_its_name_in_checkpoints_says(name: str) -> None:
    found = {parameter: site.role for parameter, (_, site) in find_sites(titan.on_meta(name)).items()}
    roles = expected(name)
    assert found.keys() == roles.keys()
    for parameter, role in roles.items():
        said = str(found[parameter])
        if role == "norm":  # In vision towers its kind may be left open.
            said = "norm" if said.endswith("norm") else said
        if "shared_experts." in parameter:  # A shared expert is an MLP, which may count as an expert.
            said = said.replace("expert_", "mlp_")
        assert said == role, parameter


@pytest.mark.parametrize("name", titan.MODELS)
def test_no_linear_map_is_left_to_adamw(name: str) -> None:
    model = titan.on_meta(name)
    rules = {parameter: group["rule"] for group in route(model, "muon") for parameter in group["param_names"]}
    assert rules.keys() == dict(model.named_parameters()).keys()
    roles = expected(name)
    left = {"head", "router", "tied_embedding"}
    linear = {f"{each}.weight" for each, module in model.named_modules() if isinstance(module, nn.Linear)}
    experts = {parameter for parameter, role in roles.items() if role.startswith("expert_")}
    matrices = {each for each in linear & roles.keys() | experts if roles[each] not in left}
    assert {parameter for parameter, rule in rules.items() if rule == "muon"} == matrices


# The layers that a CPU runs: the kernels of linear attention are for others.
RUN = {
    "llama3": slice(1),
    "qwen3": slice(1),
    "qwen3 apart": slice(1),
    "qwen3 experts": slice(1),
    "deepseek_v3": slice(1, 2),
    "gpt_oss": slice(1),
    "muse_glimmer": slice(1),
    "qwen3_5 experts": slice(3, 4),
}


def stream(model: Any) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    shape = 2, titan.LENGTH, model.config.dim
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(model.lm_head.weight.dtype)


def feed_forwards(model: nn.Module) -> Iterator[tuple[Any, nn.Module]]:
    """What may be run by itself, and the part of it that is one set of neurons."""
    from torchtitan.models.common.feed_forward import FeedForward
    from torchtitan.models.common.moe import MoE

    for module in model.modules():
        if isinstance(module, FeedForward):
            yield module, module
        if isinstance(module, MoE):
            yield module, module.routed_experts


@pytest.mark.parametrize("name", RUN)
def test_what_comes_out_of_a_silent_neuron_is_lost(name: str) -> None:
    """A neuron is a row of all its matrices, wherever torchtitan stores it."""
    # torchtitan multiplies experts in bfloat16, and of these not all know another dtype.
    model = titan.trainable(name, RUN[name], torch.bfloat16 if name == "gpt_oss" else torch.float64)
    parts = list(feed_forwards(model))
    assert parts
    for module, part in parts:
        neurons = [weight.shape[-1] for name, weight in part.named_parameters() if "w2" in name or "mlp2_w" in name]
        Matrices(model, part).check_neurons(lambda run=module: run(stream(model)), *neurons)


@pytest.mark.parametrize("name", RUN)
def test_what_comes_out_of_a_silent_head_is_lost(name: str) -> None:
    """A head is a matrix of its query, key, value and output, by the numbers of heads in torchtitan's config."""
    model = titan.trainable(name, RUN[name])
    block, config = next(iter(model.layers.values())), model.config.layers[0].attention
    attention = getattr(block, "attention", None) or block.attn
    matrices = Matrices(model, attention)
    found = set(matrices.weights)
    groups = getattr(config, "n_kv_heads", None) or config.n_heads
    matrices.check_heads(
        lambda: attention(stream(model), None, titan.batch(0)[1]), config.n_heads, groups, grouped=True
    )
    prefix = f"layers.{RUN[name].start or 0}.att"
    roles = {role for parameter, role in expected(name).items() if parameter.startswith(prefix)}
    assert {role for role in roles if role.startswith("attention_")} == found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama3", "float64"), ("qwen3", "float64"), ("deepseek_v3", "float64"), ("gpt_oss", "bfloat16")],
)
def test_a_step_moves_every_weight(name: str, dtype: str) -> None:
    model = titan.trainable(name, RUN[name], getattr(torch, dtype))
    before = {parameter: weight.detach().clone() for parameter, weight in model.named_parameters()}
    optimizer = build_optimizer(model, "olmoe")
    tokens, positions = titan.batch(0)
    titan.loss(model(tokens, positions=positions), tokens).backward()
    optimizer.step()
    for parameter, weight in model.named_parameters():
        assert not torch.equal(weight, before[parameter]), parameter
        assert weight.isfinite().all(), parameter


@pytest.mark.parametrize("name", ["llama3", "qwen3", "deepseek_v3"])
def test_sharded_by_torchtitan_it_trains_as_in_one_process(ranks: Ranks, name: str) -> None:
    start = {parameter: weight.detach() for parameter, weight in titan.trainable(name, RUN[name]).named_parameters()}
    alone = titan_ranks.alone(name, RUN[name])
    for groups, weights in ranks.run(2, titan_ranks.trained, name, RUN[name]):
        assert groups == titan_ranks.described(titan.trainable(name, RUN[name]))
        assert weights.keys() == alone.keys() == start.keys()
        for parameter, weight in weights.items():
            assert (weight - alone[parameter]).abs().max() < 1e-9, parameter
            assert not torch.equal(weight, start[parameter]), parameter


@pytest.fixture
def compile_settings() -> Iterator[None]:
    """Undo what torchtitan sets for the whole process where it compiles."""
    names = ("capture_scalar_outputs", "skip_fwd_side_effects_in_bwd_under_checkpoint")
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        yield
    torch._C._dynamo.eval_frame._set_lru_cache(True)


@pytest.mark.usefixtures("compile_settings")
@pytest.mark.parametrize("policy", ["FullAC", "SelectiveAC"])
def test_checkpointing_and_compiling_change_no_name(policy: str) -> None:
    from torchtitan.config import CompileConfig
    from torchtitan.distributed import ParallelDims, activation_checkpoint
    from torchtitan.distributed.compile import apply_compile

    checkpointing = getattr(activation_checkpoint, policy)
    for name in ("deepseek_v3", "qwen3_5 experts"):
        with torch.device("meta"):
            model = titan.spec(name).model.build()
        plain = titan_ranks.described(model)
        checkpointing(checkpointing.Config()).apply(model)
        dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=1, pp=1, ep=1, world_size=1)
        apply_compile(model, compile_config=CompileConfig(enable=True), parallel_dims=dims)
        assert any("_checkpoint_wrapped_module" in parameter for parameter, _ in model.named_parameters())
        assert titan_ranks.described(model) == plain
