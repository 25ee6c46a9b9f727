"""Every weight of every kind of Megatron model gets its role; what nothing explains is refused by name."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.ranks import Ranks
from tests.symdist_megatron.how import How

Worlds = Callable[[int], Ranks]
Found = dict[str, tuple[str, tuple[int, ...]]]
RANKS = "tests.symdist_megatron.error_ranks:"
RECIPE: dict[str, Any] = {"default": {"rule": "muon", "lr": 0.1}, "other": {"rule": "adamw", "lr": 0.01}}
D, V, HEADS = 16, 40, 8
"""The width of the residual stream, the vocabulary and the heads of `How`."""


def found(worlds: Worlds, how: How, prefix: str) -> Found:
    """The roles and shapes of the weights whose names begin so, the same with tensor parallelism."""
    (alone,) = worlds(1).run(1, RANKS + "roles", how)
    for on_rank in worlds(2).run(2, RANKS + "roles", replace(how, tp=2, etp=2)):
        # Of vectors and filters, which tensor parallelism may cut, no rank describes the whole.
        assert {name: role for name, (role, _) in on_rank.items()} == {name: role for name, (role, _) in alone.items()}
        assert all(on_rank[name][1] == shape for name, (_, shape) in alone.items() if len(shape) == 2)
    return {name.removeprefix(prefix): site for name, site in alone.items() if name.startswith(prefix)}


def test_multi_head_latent_attention(worlds: Worlds) -> None:
    """Sizes are of `kinds.SETTINGS`: latents of 12 and 8, heads of 6 + 2 for queries and keys and of 4 for values."""
    how = How(kind="latent", moe=(0, 0))
    assert found(worlds, how, "decoder.layers.1.self_attention.") == {
        "linear_q_down_proj.weight": ("matrix", (12, D)),
        "linear_q_up_proj.weight": ("attention_q", (HEADS * 8, 12)),
        "linear_kv_down_proj.weight": ("matrix", (8 + 2, D)),
        "linear_kv_up_proj.weight": ("matrix", (HEADS * (6 + 4), 8)),
        "linear_proj.weight": ("attention_o", (D, HEADS * 4)),
        "q_layernorm.weight": ("input_norm", (12,)),
        "kv_layernorm.weight": ("input_norm", (8,)),
    }


def test_the_indexer_of_sparse_attention(worlds: Worlds) -> None:
    how = How(kind="sparse", moe=(0, 0))
    assert found(worlds, how, "decoder.layers.0.self_attention.core_attention.indexer.") == {
        "linear_wq_b.weight": ("indexer", (6 * 4, 12)),
        "linear_wk.weight": ("indexer", (4, D)),
        "linear_weights_proj.weight": ("indexer", (6, D)),
        "k_norm.weight": ("qk_norm", (4,)),
        "k_norm.bias": ("bias", (4,)),
    }


def test_multi_token_prediction(worlds: Worlds) -> None:
    """It shares embedding and head, which are not there twice; a shared expert's gate is no router."""
    found_all = found(worlds, How(kind="latent", mtp=1, shared=True), "")
    embeddings = [name for name, (role, _) in found_all.items() if role in ("embedding", "tied_embedding", "head")]
    assert sorted(embeddings) == ["embedding.word_embeddings.weight", "output_layer.weight"]
    of_mtp = {name.removeprefix("mtp.layers.0."): site for name, site in found_all.items() if name.startswith("mtp.")}
    layer = {
        re.sub(r"^(transformer_layer|mtp_model_layer)\.", "", name): site
        for name, site in of_mtp.items()
        if name.startswith(("transformer_layer.", "mtp_model_layer."))
    }
    prefix = "decoder.layers.1."
    assert layer == {name.removeprefix(prefix): found_all[name] for name in found_all if name.startswith(prefix)}
    assert layer["mlp.shared_experts.gate_weight"] == ("gate", (1, D))
    assert layer["mlp.router.weight"] == ("router", (4, D))
    assert {name: site for name, site in of_mtp.items() if name.count(".") == 1} == {
        "eh_proj.weight": ("matrix", (D, 2 * D)),
        "enorm.weight": ("input_norm", (D,)),
        "hnorm.weight": ("input_norm", (D,)),
        "final_layernorm.weight": ("input_norm", (D,)),
    }


def test_a_gated_delta_net(worlds: Worlds) -> None:
    """Two heads of 4 for queries and for keys, four of 6 for values; beside it, attention with gates and a sink."""
    how = How(kind="delta", moe=(0, 0))
    assert found(worlds, how, "decoder.layers.0.self_attention.") == {
        "in_proj.weight[query]": ("attention_q", (8, D)),
        "in_proj.weight[key]": ("attention_k", (8, D)),
        "in_proj.weight[value]": ("attention_v", (24, D)),
        "in_proj.weight[z]": ("attention_gate", (24, D)),
        "in_proj.weight[beta]": ("attention_gate", (4, D)),
        "in_proj.weight[alpha]": ("attention_gate", (4, D)),
        "conv1d.weight": ("convolution", (8 + 8 + 24, 1, 4)),
        "A_log": ("state_space", (4,)),
        "dt_bias": ("state_space", (4,)),
        "out_norm.weight": ("norm", (6,)),
        "out_proj.weight": ("attention_o", (D, 24)),
    }
    assert found(worlds, how, "decoder.layers.1.self_attention.") == {
        "linear_qkv.weight[q]": ("attention_q", (HEADS * 4, D)),
        "linear_qkv.weight[gate]": ("attention_gate", (HEADS * 4, D)),
        "linear_qkv.weight[k]": ("attention_k", (4 * 4, D)),
        "linear_qkv.weight[v]": ("attention_v", (4 * 4, D)),
        "linear_proj.weight": ("attention_o", (D, HEADS * 4)),
        "core_attention.softmax_offset": ("sink", (HEADS,)),
        "q_layernorm.weight": ("qk_norm", (4,)),
        "k_layernorm.weight": ("qk_norm", (4,)),
    }


def test_mamba_and_what_is_beside_it(worlds: Worlds) -> None:
    """Twice as wide as the stream, eight heads of 4, two groups with states of 3; learned positions are no tokens."""
    how = How(kind="mamba", layers=4)
    of_all = found(worlds, how, "")
    # Since 0.18 the filter is the mixer's own.
    layer = {
        re.sub(r"conv1d[._]", "conv1d.", name.removeprefix("decoder.layers.2.")): site
        for name, site in of_all.items()
        if name.startswith("decoder.layers.2.")
    }
    assert layer == {
        "norm.weight": ("input_norm", (D,)),
        "mixer.in_proj.weight[z]": ("mixer_in", (32, D)),
        "mixer.in_proj.weight[x]": ("mixer_in", (32, D)),
        "mixer.in_proj.weight[B]": ("mixer_in", (6, D)),
        "mixer.in_proj.weight[C]": ("mixer_in", (6, D)),
        "mixer.in_proj.weight[dt]": ("mixer_in", (8, D)),
        "mixer.conv1d.weight": ("convolution", (32 + 6 + 6, 1, 4)),
        "mixer.conv1d.bias": ("convolution", (32 + 6 + 6,)),
        "mixer.A_log": ("state_space", (8,)),
        "mixer.D": ("state_space", (8,)),
        "mixer.dt_bias": ("state_space", (8,)),
        "mixer.norm.weight": ("norm", (32,)),
        "mixer.out_proj.weight": ("mixer_out", (D, 32)),
    }
    assert of_all["embedding.position_embeddings.weight"] == ("position_embedding", (16, D))
    assert of_all["embedding.word_embeddings.weight"] == ("embedding", (V, D))
    assert of_all["decoder.layers.3.mlp.router.weight"] == ("router", (4, D))
    assert of_all["decoder.final_norm.weight"] == ("input_norm", (D,))


def test_what_nothing_explains(worlds: Worlds) -> None:
    """A linear layer is a matrix, whose sides may tell more, unless routing is strict; a bare weight is refused."""
    how = How(dtype="float32", moe=(0, 0))
    for on_rank in worlds(2).run(2, RANKS + "extended", replace(how, tp=2, etp=2), RECIPE, ["reads", "square", "gate"]):
        assert on_rank == {
            "decoder.extra.reads.weight": "matrix",
            "decoder.extra.square.weight": "matrix",
            "decoder.extra.gate.weight": "gate",
        }
    strict = RECIPE | {"strict": True}
    (refused,) = worlds(1).run(1, RANKS + "extended", how, strict, ["reads", "square", "gate"])
    assert "decoder.extra.square.weight (16, 16) is a linear layer of which no more is known" in refused
    assert 'match = "decoder.extra.square.weight"\nrole = "matrix"' in refused
    assert "reads" not in refused
    (refused,) = worlds(1).run(1, RANKS + "extended", how, RECIPE, ["bare"])
    assert refused.startswith("decoder.extra.bare (6, 16) has no role")
    assert 'match = "decoder.extra.bare"' in refused


def test_a_filter_that_is_cut_is_stepped_element_by_element(worlds: Worlds) -> None:
    """It is not said how tensor parallelism cuts it, as by channels of several kinds."""
    how = How(dtype="float32", kind="delta", tp=2, etp=2)
    recipe = RECIPE | {"patterns": [{"match": "*.conv1d.weight", "rule": "row_norm", "lr": 0.1}]}
    said = worlds(2).run(2, RANKS + "refused", how, recipe, {}, {})
    assert said[0] == said[1]
    assert said[0].startswith(
        "decoder.layers.0.self_attention.conv1d.weight: tensor parallelism cuts it, and it is not"
    )
    assert worlds(1).run(1, RANKS + "refused", replace(how, tp=1, etp=1), recipe, {}, {}) == ["nothing was refused"]
