"""The names by which models call their weights, as far as no better evidence says what these are for."""

import re

from torch import nn

HEADS = {"lm_head", "output", "head", "unembed", "embed_out", "output_layer", "heads", "lm_heads", "decoder"}
SURE_HEADS = {"lm_head", "lm_heads", "unembed", "embed_out", "output_layer"}
# Words of a module that only holds a weight: what it is for is said by the module around it.
HOLDERS = {"linear", "layer", "lin", "base_layer", "inner"}
# Rows of these projections of multi-head latent attention are not one head after another, so they get the plain role
# "matrix".
LATENT = dict.fromkeys(
    (
        *("q_a_proj", "q_gate_proj", "kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "o_a_proj", "o_b_proj"),
        *("wq_a", "wkv_a", "wkv_b", "wo_a", "wo_b"),
    ),
    "matrix",
)
ATTENTION = {
    **LATENT,
    **dict.fromkeys(("q_proj", "wq", "query", "q_b_proj", "wq_b", "to_q", "q", "q_lin", "project_q"), "attention_q"),
    **dict.fromkeys(("query_proj", "linear_q", "c_q", "q_linear", "in_proj_q"), "attention_q"),
    **dict.fromkeys(("k_proj", "wk", "key", "to_k", "k", "k_lin", "project_k", "key_proj", "c_k"), "attention_k"),
    **dict.fromkeys(("linear_k", "k_linear", "in_proj_k"), "attention_k"),
    **dict.fromkeys(("v_proj", "wv", "value", "to_v", "v", "v_lin", "project_v", "value_proj", "c_v"), "attention_v"),
    **dict.fromkeys(("linear_v", "v_linear", "in_proj_v"), "attention_v"),
    **dict.fromkeys(("o_proj", "wo", "out_proj", "dense", "c_proj", "proj", "attention_out", "o"), "attention_o"),
    **dict.fromkeys(("out_lin", "to_out", "linear_out", "output"), "attention_o"),
    **dict.fromkeys(("qkv_proj", "qkv", "c_attn", "in_proj", "wqkv", "query_key_value"), "attention_qkv"),
    **dict.fromkeys(
        ("in_proj_qkv", "in_proj_qkvz", "kv_proj", "wkv", "c_kv", "linear_kv", "linear_qkv"), "attention_qkv"
    ),
    **dict.fromkeys(("g_proj", "output_gate", "attn_gate", "gate_proj", "in_proj_z"), "attention_gate"),
    **dict.fromkeys(("in_proj_a", "in_proj_b", "in_proj_ba", "a_proj", "b_proj", "sink_proj"), "attention_gate"),
    **dict.fromkeys(("ogate_preact", "igate_preact", "fgate_preact", "f_proj", "f_b_proj"), "attention_gate"),
    **dict.fromkeys(("g_b_proj", "o_gate"), "attention_gate"),
}
# Of these, q, k and v lie one after another. In others every head has its own, as in GPT-NeoX's query_key_value, or
# every query group, as in torchtitan's wqkv.
CONTIGUOUS = {"qkv_proj", "qkv", "c_attn", "in_proj", "Wqkv", "in_proj_qkv"}
KEYS_AND_VALUES = {"kv_proj", "c_kv", "linear_kv"}
MLP = {
    **dict.fromkeys(("gate_proj", "w1", "wg", "gate", "proj_up_gate", "w_0", "linear_v"), "gate"),
    **dict.fromkeys(
        ("up_proj", "w3", "fc1", "c_fc", "linear1", "dense_h_to_4h", "fc_in", "lin1", "proj_up", "up"), "up"
    ),
    **dict.fromkeys(("intermediate", "layer_1", "w_1", "wi", "linear_fc1"), "up"),
    **dict.fromkeys(("down_proj", "w2", "fc2", "c_proj", "linear2", "dense_4h_to_h", "fc_out", "wo", "lin2"), "down"),
    **dict.fromkeys(("output", "layer_2", "w_out", "output_linear", "proj_down", "linear_fc2", "mlp2", "down"), "down"),
    **dict.fromkeys(("gate_up_proj", "input_linear", "mlp1"), "gate_up"),
}
MIXER_IN = {
    *("in_proj", "x_proj", "dt_proj", "linear_x", "linear_y", "input_gate", "recurrent_gate"),
    *("key", "value", "receptance"),
}
MIXER_OUT = {"out_proj", "linear_out", "o_proj", "output"}
# Others of these names, of two dimensions, are state-space parameters only beside a convolution or a state.
SURE_STATE_SPACE = {"A_log", "a_log", "dt_bias", "time_decay", "time_first", "recurrent_param"}
STATE_SPACE = {"A_log", "a_log", "D", "dt_bias", "A", "dt", "time_decay", "time_first", "recurrent_param"}
POSITIONS = re.compile(r"(^|_)(pos|posi\w*|wpe|rel|relative|types?|segments?|ngram)(_|\d|$)", re.I)
ADAPTERS = ("lora_", "adapter")
# Whether weight decay of a norm's scale helps depends on whether the norm comes before or after a linear map
# (arXiv 2605.26895).
NORMS = {
    **dict.fromkeys(("input_layernorm", "pre_self_attn_layernorm", "pre_cross_attn_layernorm"), "input_norm"),
    **dict.fromkeys(("pre_mlp_layernorm", "pre_feedforward_layernorm", "pre_ff_layernorm"), "input_norm"),
    **dict.fromkeys(("q_a_layernorm", "kv_a_layernorm", "kv_layernorm", "enorm", "hnorm"), "input_norm"),
    **dict.fromkeys(("layer_norm_weight", "attention_norm", "ffn_norm", "mtp_norm"), "input_norm"),
    **dict.fromkeys(("post_self_attn_layernorm", "post_cross_attn_layernorm"), "output_norm"),
    **dict.fromkeys(("post_feedforward_layernorm", "post_attention_norm", "post_ffn_norm"), "output_norm"),
    **dict.fromkeys(("q_norm", "k_norm", "qk_norm", "query_norm", "key_norm", "norm_q", "norm_k"), "qk_norm"),
    **dict.fromkeys(("q_layernorm", "k_layernorm", "query_layernorm", "key_layernorm"), "qk_norm"),
}


def norm_role(name: str, holder: nn.Module) -> str:
    """Return the role of a norm from the name a block gives it.

    Args:
        name: The attribute under which the block holds the norm.
        holder: The block. Its other attributes decide where models use the same name for different kinds of norm.

    Returns:
        "input_norm" (before a linear map), "output_norm" (after one, before the residual sum), "qk_norm", or "norm" if
        the kind is not known.
    """

    def has(*names: str) -> bool:
        return any(getattr(holder, attribute, None) is not None for attribute in names)

    if "Swin" in type(holder).__name__ or getattr(holder, "norm_after", False):
        # These blocks of Chameleon and Molmo 2 normalize their outputs, under names that elsewhere mean input norms.
        return "norm"
    match name:
        case "norm" | "final_norm" | "final_layernorm" | "final_layer_norm":
            # The final norm of a stack of layers, or a norm in a multi-token prediction module. Elsewhere these names
            # do not show the kind.
            return "input_norm" if has("layers", "eh_proj") else "norm"
        case "post_attention_layernorm":
            if has("pre_feedforward_layernorm", "pre_mlp_layernorm", "post_feedforward_layernorm"):
                return "output_norm"
            # In blocks without a norm before attention, this norm comes after the residual sum.
            return "input_norm" if has("input_layernorm") else "norm"
        case "post_mlp_layernorm":
            return "output_norm" if has("pre_mlp_layernorm", "post_self_attn_layernorm") else "norm"
        case "q_layernorm" if has("kv_layernorm"):
            # Normalizes the latent of multi-head latent attention, which then goes into an up projection.
            return "input_norm"
        case "q_norm" | "kv_norm" if has("wkv_b", "kv_b_proj"):
            return "input_norm"
        case "q_norm" if has("kv_norm"):
            # In DeepSeek's own code, where this may be the norm of a latent instead.
            return "norm"
    return NORMS.get(name, "norm")
