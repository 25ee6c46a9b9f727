"""Roles: what a parameter may be used for, and the symmetry of each use.

A symmetry is a change of basis that the model does not notice. A rule fits a role if its update changes basis along
with the gradient (Lau & Su, arXiv 2605.18106).

- `embedding`, `tied_embedding`: rows are looked up, one for each token. Tokens may be renamed (a permutation of the
  rows), and the residual stream may be rotated (the columns).
- `position_embedding`, `per_layer_embedding`: tables looked up by position, segment or distance, or by token for every
  layer. As `embedding`; rows of a table for all layers are features of each layer, one after another.
- `head`: a row for each token; a constant may be added to all logits, so rows may be centred. The heads of multi-token
  prediction are heads as well.
- `router`: a row for each expert, among which a softmax or a top-k chooses. Experts may be renamed, the stream rotated,
  and a constant added to all scores.
- `gate`: a few rows, often one, that a sigmoid turns into factors, as of a shared expert. The input may be rotated, but
  no constant may be added, so it must not be centred like a router: of one row, nothing would be left.
- `matrix`: a linear map between two spaces, each of which may be rotated. `adapter`: one factor of a low-rank map;
  `indexer`: the projections that choose keys in sparse attention; the latents of multi-head latent attention are plain
  matrices as well.
- `attention_q`, `attention_k`, `attention_v`, `attention_o`, `attention_qkv`: maps to and from heads. Each head may be
  rotated on its own, and heads renamed, so each head is a matrix. So it is in linear attention.
- `attention_gate`: factors for every head, or for each of its elements: a matrix for each head. With one row a head,
  that is a row of its own length.
- `mixer_in`, `mixer_out`, `mixer`: projections to and from the channels of a state-space model, recurrence or gated
  short convolution. The stream may be rotated; channels may only be renamed. Projections that share a weight (Mamba's
  z, x, B, C and dt) are matrices of their own.
- `mlp_gate`, `mlp_up`, `mlp_gate_up`, `mlp_down` and, for each routed expert, `expert_gate`, `expert_up`,
  `expert_gate_up`, `expert_down`: the stream may be rotated, neurons only renamed.
- `norm` and its kinds, `bias`, `router_bias`, `sink`, `convolution` (a short filter for each channel, or patches of
  pictures and sounds), `state_space` (`A_log`, `D`, `dt_bias` and other numbers of a channel), `other`: channels may be
  renamed, nothing more, so rules treat every element alone.
"""

from collections.abc import Iterator

FALLBACK: dict[str, str] = {
    "embedding": "default",
    "tied_embedding": "embedding",
    "position_embedding": "embedding",
    "per_layer_embedding": "embedding",
    "head": "default",
    "router": "default",
    "matrix": "default",
    "gate": "matrix",
    "adapter": "matrix",
    "indexer": "matrix",
    "attention": "matrix",
    "attention_q": "attention",
    "attention_k": "attention",
    "attention_v": "attention",
    "attention_qkv": "attention",
    "attention_o": "attention",
    "attention_gate": "attention",
    "mixer": "matrix",
    "mixer_in": "mixer",
    "mixer_out": "mixer",
    "mlp": "matrix",
    "mlp_gate": "mlp",
    "mlp_up": "mlp",
    "mlp_gate_up": "mlp",
    "mlp_down": "mlp",
    "experts": "matrix",
    "expert_gate": "experts",
    "expert_up": "experts",
    "expert_gate_up": "experts",
    "expert_down": "experts",
    "other": "default",
    "norm": "other",
    "input_norm": "norm",
    "output_norm": "norm",
    "qk_norm": "norm",
    "bias": "other",
    "router_bias": "other",
    "sink": "other",
    "convolution": "other",
    "state_space": "other",
}
"""For each role, the section to use if the recipe has none for the role itself. Every chain ends at "default"."""


def roles_up(role: str) -> Iterator[str]:
    """Yield a role and then the roles it falls back to, nearest first.

    Args:
        role: The role to start from.

    Yields:
        The roles, usually down to "default".
    """
    current: str | None = role
    while current is not None:
        yield current
        current = FALLBACK.get(current)
