"""How many heads an attention weight consists of, and which rows of a fused weight belong to which projection."""

from typing import Any

from torch import nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.param_names import class_name
from symdist.routing.facts import ModelFacts, ModuleChain, is_linear, sources
from symdist.routing.words import ATTENTION, CONTIGUOUS, KEYS_AND_VALUES

_QUERIES = (
    *("num_heads", "n_heads", "n_head", "num_attention_heads", "nheads", "num_q_heads", "num_query_heads"),
    *("num_attn_heads", "attention_heads"),
)
_KEYS = (
    *("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head", "num_k_heads", "n_head_kv", "kv_n_heads"),
    *("kv_heads", "n_kv", "num_kv", "n_query_groups", "num_query_groups"),
)
_VALUES = ("num_v_heads", "num_value_heads")
_STATES = ("A_log", "dt_bias", "x_proj")
_SIZES = ("head_dim", "attention_head_size", "head_size", "d_head", "d_kv", "dim_per_head", "attn_head_dim")
_KEY_SIZES = ("qk_head_dim", "head_k_dim", "key_head_dim")
_VALUE_SIZES = ("v_head_dim", "head_v_dim", "value_head_dim")


def modules_of_attention(chain: ModuleChain, facts: ModelFacts) -> list[Any]:
    """Return the modules around an attention weight and their configs, nearest first, that describe its attention.

    Args:
        chain: The modules around the weight, without its own layer.
        facts: What is known of the model.

    Returns:
        Modules and configs, without those that count query heads otherwise than the nearest: they describe another
        tower of the model.
    """
    around = list(sources(chain))
    queries = facts.numbers(around, _QUERIES)[:1]
    return [source for source in around if facts.numbers([source], _QUERIES)[:1] in ([], queries)]


def head_counts(role: str, around: list[Any], facts: ModelFacts) -> list[int]:
    """Return the numbers of heads that the modules around an attention weight, or their configs, name.

    Args:
        role: The role of the weight.
        around: See `modules_of_attention`.
        facts: What is known of the model.

    Returns:
        The numbers, the likeliest first.
    """
    near = _nearest(around, facts)
    own = {"attention_k": _KEYS, "attention_v": (*_VALUES, *_KEYS), "attention_q": ()}.get(role, _VALUES)
    found = [(near, own), (near, _QUERIES), (around, own), (around, (*_QUERIES, *_KEYS))]
    return list(dict.fromkeys(count for where, names in found for count in facts.numbers(where, names)))


def head_sizes(role: str, around: list[Any], facts: ModelFacts) -> list[int]:
    """Return the sizes of a head that the modules around an attention weight, or their configs, name.

    Args:
        role: The role of the weight.
        around: See `modules_of_attention`.
        facts: What is known of the model.

    Returns:
        The sizes, the likeliest first.
    """
    first = _KEY_SIZES if role in ("attention_q", "attention_k") else _VALUE_SIZES
    return list(dict.fromkeys([*facts.numbers(around, first), *facts.numbers(around, _SIZES)]))


def _nearest(around: list[Any], facts: ModelFacts) -> list[Any]:
    """Return the modules and configs up to the nearest that counts query heads, and the config of that module."""
    depth = next((i for i, source in enumerate(around) if facts.numbers([source], _QUERIES)), len(around))
    counts_itself = isinstance(around[depth], nn.Module) if depth < len(around) else False
    has_config = counts_itself and depth + 1 < len(around) and not isinstance(around[depth + 1], nn.Module)
    return around[: depth + 1 + has_config]


def count_heads(role: str, size: int, around: list[Any], facts: ModelFacts) -> int | None:
    """Return how many heads, one after another, a projection of attention consists of.

    Args:
        role: The role of the projection: "attention_q", "attention_k", "attention_v", "attention_o" or
            "attention_gate".
        size: The size of the dimension along which the heads lie.
        around: See `modules_of_attention`.
        facts: What is known of the model.

    Returns:
        The number of heads. Queries that share a weight with a gate of their size, head by head, count as two. None if
        nothing tells.
    """
    counts, sizes = head_counts(role, around, facts), head_sizes(role, around, facts)
    if role == "attention_gate":
        # A gate has a number for each head, or one for each element of each head of the values or of the queries.
        sizes = [*sizes, *facts.numbers(around, _KEY_SIZES), 1]
    for count in counts:
        if size % count == 0 and size // count in sizes:
            return count
    for count in counts:
        if size % (2 * count) == 0 and size // (2 * count) in sizes:
            return 2 * count
    if role == "attention_gate" and size < min(filter(lambda each: each > 1, sizes), default=0):
        return size
    fitting = (size // head_size for head_size in sizes if head_size > 1 and size % head_size == 0)
    counted, sized = (
        next((depth for depth, source in enumerate(around) if facts.numbers([source], names)), len(around))
        for names in ((*_QUERIES, *_KEYS, *_VALUES), (*_KEY_SIZES, *_VALUE_SIZES, *_SIZES))
    )
    if sizes and sized <= counted:
        return next(fitting, None)
    if role in ("attention_k", "attention_v"):
        if keys := facts.numbers(around, (*_KEYS, *_VALUES)):
            return next((count for count in keys if size % count == 0), None)
        if any(size < rows for rows in _rows_of_queries(around[0])):
            # Fewer heads than queries have, and nothing says how many.
            return None
    return next((count for count in counts if size % count == 0), None)


def fused_heads(
    word: str, size: int, into: int, around: list[Any], facts: ModelFacts
) -> tuple[int | None, tuple[int, ...], tuple[int, ...]]:
    """Return how queries, keys and values share a weight.

    Args:
        word: The name of the weight.
        size: The size of the dimension along which they lie.
        into: The size of the other dimension.
        around: See `modules_of_attention`.
        facts: What is known of the model.

    Returns:
        The number of heads, if all have the same size; the sizes of q, k and v, if they lie one after another; and the
        number of heads of each. What is not known is None or empty.
    """
    attention = around[0]
    queries, choices = _fused_counts(around, facts)
    key_sizes, value_sizes = (head_sizes(role, around, facts)[:1] for role in ("attention_q", "attention_v"))
    if not key_sizes:
        # All of one size. If no number of key heads is known, there are as many as query heads where all are square.
        for q, k, v in choices or ([(queries,) * 3] if queries is not None and size == 3 * into else []):
            if size % (q + k + v) == 0:
                head_size = size // (q + k + v)
                return q + k + v, *_sections(word, attention, (q, k, v), (head_size,) * 3)
        return None, (), ()
    key_size, value_size = key_sizes[0], (value_sizes or key_sizes)[0]
    heads = size // key_size if key_size == value_size and size % key_size == 0 else None
    for q, k, v in (*choices, *([(queries,) * 3] if queries is not None else [])):
        if word in KEYS_AND_VALUES and size == k * key_size + v * value_size and _counts_keys(attention, facts):
            return heads, (k * key_size, v * value_size), (k, v)
        if (q + k) * key_size + v * value_size == size:
            return heads, *_sections(word, attention, (q, k, v), (key_size, key_size, value_size))
    return (heads if queries is not None else None), (), ()


def _fused_counts(around: list[Any], facts: ModelFacts) -> tuple[int | None, list[tuple[int, int, int]]]:
    """Return the number of query heads, and what the numbers of query, key and value heads may be, likeliest first."""
    attention = around[0]
    linear, values = facts.number(attention, "num_k_heads"), facts.number(attention, "num_v_heads")
    if linear is not None and values is not None:
        return linear, [(linear, linear, values)]
    queries = next(iter(facts.numbers(around, _QUERIES)), None)
    if queries is None:
        return None, []
    # Falcon's one key head, which its new architecture does not have.
    one = getattr(attention, "multi_query", False) is True and not getattr(attention, "new_decoder_architecture", False)
    keys = [1] if one else [*facts.numbers(_nearest(around, facts), _KEYS), *facts.numbers(around, _KEYS)]
    return queries, [(queries, count, count) for count in dict.fromkeys(keys)]


def _counts_keys(attention: nn.Module, facts: ModelFacts) -> bool:
    return any(facts.number(attention, name) is not None for name in _KEYS)


def _rows_of_queries(module: Any) -> list[int]:
    queries = [child for name, child in module.named_children() if ATTENTION.get(name.lower()) == "attention_q"]
    return [whole_shape(child.weight)[0] for child in queries if is_linear(child)]


def _sections(
    word: str, attention: nn.Module, heads: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    # CodeGen cuts q, v and k for ranks of another time, and puts those of each rank one after another.
    if word not in CONTIGUOUS or "CodeGen" in class_name(attention):
        return (), ()
    return tuple(count * size for count, size in zip(heads, sizes, strict=True)), heads


def mixer_sections(word: str, rows: int, columns: int, mixer: nn.Module, facts: ModelFacts) -> tuple[int, ...]:
    """Return which rows of a projection of a state-space or short-convolution block belong to which of its inputs.

    Sources: Mamba (arXiv 2312.00752) projects to x and z, and from x to dt, B and C; Mamba 2 (arXiv 2405.21060)
    projects to z, x, B, C and dt at once; a gated short convolution to B, C and x.

    Args:
        word: The name of the projection.
        rows: Its rows.
        columns: Its columns.
        mixer: The block.
        facts: What is known of the model.

    Returns:
        The rows of each, in order; empty if the block does not say.
    """

    def size(*names: str) -> int:
        return next((value for name in names if (value := facts.number(mixer, name)) is not None), 0)

    inner = size("intermediate_size", "d_inner", "mamba_intermediate_size")
    out: Any = getattr(mixer, "out_proj", None)
    if not inner and is_linear(out):
        inner = whole_shape(out.weight)[1]
    state, groups = size("ssm_state_size", "d_state", "state_size"), size("n_groups", "ngroups", "num_groups") or 1
    heads, rank = size("num_heads", "nheads", "mamba_num_heads"), size("time_step_rank", "dt_rank")
    forms: list[tuple[int, ...]] = [(rank, state, state)]
    if word != "x_proj":
        forms = [(inner, inner), (inner, inner, groups * state, groups * state, heads)]
        forms += [] if any(hasattr(mixer, name) for name in _STATES) else [(columns,) * 3]
    return next((form for form in forms if all(form) and sum(form) == rows), ())
