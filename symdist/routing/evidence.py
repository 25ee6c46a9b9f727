"""What tells the use of a weight: its module's class, the residual stream, counts in the config, and at last its name.

The order is a principle. A class says what a module computes. Whoever has the width of the residual stream on one side
reads or writes it, whatever it is called. Names only choose between what these leave open.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from symdist.param_names import class_name
from symdist.routing import words
from symdist.routing.experts import fusion, stacked_experts
from symdist.routing.facts import ModelFacts, ModuleChain, is_table
from symdist.routing.heads import count_heads, fused_heads, head_counts, head_sizes, mixer_sections
from symdist.routing.param_site import Evidence, ParamSite, Stream
from symdist.routing.routers import is_router_bias, router_evidence
from symdist.routing.weight import Weight

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_BIAS = re.compile(r"(^|_)bias$")
_BEFORE_HEAD = re.compile(r"lm_?head|Head$|predictions|HeadTransform|pooler", re.IGNORECASE)
_PROJECTOR = re.compile(r"projector|visual_projection", re.IGNORECASE)
_MIXER_ATTRIBUTES = ("A_log", "dt_bias", "conv1d", "conv_1d", "conv", "time_decay", "rg_lru")


def site_of(leaf: str, shape: tuple[int, ...], chain: ModuleChain, facts: ModelFacts | None = None) -> ParamSite:
    """Return the site of a parameter that is not the head.

    Args:
        leaf: The name under which its module holds it, such as "weight".
        shape: The shape of the whole parameter.
        chain: The modules around it.
        facts: What is known of the model as a whole. None (default) if nothing is; then no residual stream is found.

    Returns:
        The site, with role None for a weight that nothing explains.
    """
    weight = Weight(leaf, shape, chain, facts or ModelFacts())
    return _by_class(weight) or _by_block(weight) or _by_type(weight)


def _by_class(weight: Weight) -> ParamSite | None:
    """Return the site if the class of a module, or the shape, tells it."""
    if is_table(weight.module) and weight.leaf == "weight":
        return _of_table(weight)
    if (evidence := router_evidence(weight)) is not None:
        return ParamSite(role="router", stream=weight.stream or "input", evidence=evidence)
    if _BIAS.search(weight.plain_leaf):
        return ParamSite(role="router_bias" if is_router_bias(weight) else "bias", evidence="class")
    if weight.leaf.endswith("sinks"):
        return ParamSite(role="sink", evidence="name")
    if _is_norm(weight):
        name = weight.leaf if "norm" in weight.leaf else weight.attribute
        return ParamSite(role=words.norm_role(name, weight.parent), evidence="class")
    mixes = any(_is_mixer(module) for _, module in weight.chain[-2:])
    if weight.leaf in words.STATE_SPACE and (mixes or weight.leaf in words.SURE_STATE_SPACE or len(weight.shape) < 2):
        return ParamSite(role="state_space", evidence="name")
    if _convolves(weight):
        return ParamSite(role="convolution", evidence="class")
    if not weight.linear and sum(size > 1 for size in weight.shape) < 2:
        return ParamSite(role="state_space" if mixes else "other", evidence="class")
    if not weight.linear and not weight.conv1d and words.POSITIONS.search(weight.leaf):
        rows = len(weight.shape) == 2 or (
            len(weight.shape) == 3 and (weight.shape[-1] == weight.width or weight.shape[0] == 1)
        )
        return ParamSite(role="position_embedding" if rows else "other", evidence="name")
    if not weight.linear and len(weight.shape) > 3:
        return ParamSite(role="other", evidence="class")
    return None


def _of_table(weight: Weight) -> ParamSite:
    """Return the site of a table whose rows are looked up."""
    rows, columns = weight.shape
    vocabularies = weight.facts.vocabularies
    name = weight.attribute.lower() if not weight.attribute.isdecimal() else weight.word.lower()
    per_layer = "per_layer" in name or (weight.attribute.isdecimal() and columns != weight.width)
    if per_layer:
        return ParamSite(role="per_layer_embedding", stream="input", evidence="class")
    positions = any(words.POSITIONS.search(around) for around, _ in weight.chain[-2:])
    if rows not in vocabularies and (positions or rows < min(vocabularies, default=0)):
        return ParamSite(role="position_embedding", stream="input", evidence="config")
    return ParamSite(role="embedding", stream="input", evidence="config" if rows in vocabularies else "class")


def _is_norm(weight: Weight) -> bool:
    if weight.linear or len(weight.shape) > 2:
        return False
    if sum(size > 1 for size in weight.shape) < 2:
        return "norm" in f"{weight.kind} {weight.leaf} {weight.attribute}".lower()
    # Norms by heads have a row for each.
    named = weight.kind.endswith("Norm") or weight.attribute.endswith("norm")
    return named and weight.leaf in ("weight", "scale", "gamma")


def _convolves(weight: Weight) -> bool:
    if isinstance(weight.module, _CONVOLUTIONS) or "Convolution" in weight.kind:
        return not weight.linear
    return "conv" in f"{weight.kind} {weight.attribute}".lower() and len(weight.shape) > 2


def _by_block(weight: Weight) -> ParamSite | None:
    """Return the site if the block around the weight, and the weight's part in it, tell it."""
    matrix = weight.linear or weight.conv1d
    if not matrix and len(weight.shape) not in (2, 3):
        return None
    word = weight.word.lower()
    near = (weight.leaf, *(name for name, _ in weight.chain[-3:]))
    if any(mark in name.lower() for name in near for mark in words.ADAPTERS):
        return _matrix(weight, "adapter", "name") if matrix or len(weight.shape) == 2 else None
    if any("indexer" in name.lower() or "Indexer" in class_name(module) for name, module in weight.chain):
        site = _matrix(weight, "indexer", "name")
        return replace(site, stream="input") if matrix else None
    if weight.linear and weight.shape[0] == 1 and "gate" in word:
        return _matrix(weight, "gate", "name")
    experts = any("experts" in name and "shared" not in name for name, _ in weight.chain)
    if experts or "Expert" in weight.kind or (len(weight.shape) == 3 and any("expert" in n for n, _ in weight.chain)):
        if word not in words.MLP:
            return None
        if matrix:
            return _of_mlp(weight, word, "expert_")
        return stacked_experts(weight, word) if len(weight.shape) == 3 else None
    mixes = weight.block != "mlp" and any(_is_mixer(module) for _, module in weight.chain[-3:])
    attends = weight.block == "attention" or (weight.block is None and _beside_queries(weight))
    if mixes and not (attends and _has_heads(weight)):
        if word in words.MIXER_IN | words.MIXER_OUT:
            return _of_mixer(weight, word)
    elif attends and word in words.ATTENTION:
        return _of_attention(weight, word)
    elif attends and matrix and "gate" in word and "gate" in word.split("_")[-1]:
        return _of_attention(weight, word, role="attention_gate")
    return _of_mlp(weight, word, "mlp_") if word in words.MLP and matrix else None


def _has_heads(weight: Weight) -> bool:
    counts, sizes = (f("attention_q", weight.attention, weight.facts) for f in (head_counts, head_sizes))
    return bool(counts or sizes)


def _beside_queries(weight: Weight) -> bool:
    holds = weight.holder._modules
    return any(name in holds for name in ("q_proj", "c_q", "wq", "q_a_proj")) or holds.keys() >= {"q", "k", "v"}


def _matrix(weight: Weight, role: str, evidence: Evidence) -> ParamSite:
    # Of a linear layer that neither reads nor writes the stream, the input counts as the stream.
    both = len(weight.sides(*weight.shape)) == 2
    stream = weight.stream or (None if both else "input")
    return ParamSite(role=role, transposed=weight.outputs_first is False, stream=stream, evidence=evidence)


def _of_mixer(weight: Weight, word: str) -> ParamSite | None:
    block = next(module for _, module in reversed(weight.chain) if _is_mixer(module))
    role = "mixer_out" if word in words.MIXER_OUT else "mixer_in"
    if weight.linear:
        sections = (
            mixer_sections(word, weight.shape[0], weight.shape[1], block, weight.facts) if role == "mixer_in" else ()
        )
        stream = weight.stream or weight.by_part("input" if role == "mixer_in" else "output") or "input"
        return ParamSite(role=role, stream=stream, sections=sections, evidence="name")
    if len(weight.shape) == 3 and weight.shape[-2] == weight.shape[-1] and "LRU" in weight.kind.upper():
        # Blocks on a diagonal, applied from the left: x @ W.
        return ParamSite(role="mixer", transposed=True, stream="input", evidence="name")
    return None


def _of_attention(weight: Weight, word: str, *, role: str = "") -> ParamSite | None:
    role = role or words.ATTENTION[word]
    if not (weight.linear or weight.conv1d or isinstance(weight.module, nn.MultiheadAttention)):
        return None
    if role == "attention_o" and weight.stream == "input":
        return None
    transposed = weight.outputs_first is False
    along_output = role != "attention_o"
    index = int(along_output == transposed)
    size = weight.shape[-2:][index]
    stream: Stream | None = weight.by_part("output" if role == "attention_o" else "input")
    site = ParamSite(role=role, head_dim_index=index, transposed=transposed, stream=stream, latent=word in words.LATENT)
    blocks = weight.facts.number(weight.module, "n_groups")
    if word in words.LATENT:
        if word in ("o_b_proj", "wo_b"):
            site = replace(site, stream=weight.by_part("output"))
        if blocks is not None and size % blocks == 0 and blocks > 1:
            # Every group of heads has a projection of its own.
            site = replace(site, sections=(size // blocks,) * blocks)
        return site
    if role == "attention_qkv":
        heads, sections, section_heads = fused_heads(
            weight.word, size, weight.shape[-2:][1 - index], weight.attention, weight.facts
        )
        sections = () if transposed and len(set(sections)) > 1 else sections
        groups = weight.facts.number(weight.holder, "heads_per_kv")
        if heads is not None and groups is not None and heads % (groups + 2) == 0:
            site = replace(site, groups=heads // (groups + 2))
        return replace(site, heads=heads, sections=sections, section_heads=section_heads if sections else ())
    return replace(site, heads=count_heads(role, size, weight.attention, weight.facts))


def _of_mlp(weight: Weight, word: str, prefix: str) -> ParamSite:
    part = words.MLP[word]
    # Whoever alone has the residual stream as its output is a down projection, whatever its name.
    if weight.stream == "output":
        part = "down"
    elif weight.stream == "input" and part == "down":
        part = "up"
    fused = fusion(weight, weight.holder) if part == "gate_up" else None
    side: Stream = "output" if part == "down" else "input"
    evidence: Evidence = "name" if part == words.MLP[word] else "residual stream"
    transposed = weight.outputs_first is False
    stream = weight.by_part(side)
    return ParamSite(role=prefix + part, transposed=transposed, fused=fused, stream=stream, evidence=evidence)


def _by_type(weight: Weight) -> ParamSite:
    """Return the site of a weight of which no more is known than its type and sides."""
    if weight.linear or weight.conv1d:
        evidence: Evidence = "type" if weight.stream is None else "residual stream"
        site = _matrix(weight, "gate" if weight.shape[0] == 1 else "matrix", evidence)
        if site.stream is None:
            # Both sides are as wide as the stream, and at last names tell which of them it is.
            side = _by_name(weight)
            site = replace(site, stream=side, evidence="name" if side is not None else evidence)
        return site
    known = _known_raw(weight)
    if known is not None:
        return known
    if len(weight.shape) == 2:
        likely = ("matrix", "position_embedding", "other")
        if weight.shape[0] in weight.facts.expert_counts(weight.chain):
            likely = ("router", "matrix", "other")
        return ParamSite(role=None, likely=likely)
    # Whoever has the stream as its first dimension is no stack of matrices, but one matrix by heads.
    stack = weight.shape[0] != weight.width
    return ParamSite(role=None, likely=("matrix", "experts", "other") if stack else ("other", "matrix", "experts"))


def _by_name(weight: Weight) -> Stream | None:
    word, names = weight.word.lower(), [name for name, _ in weight.chain]
    if any(_BEFORE_HEAD.search(name) for name in (*names, class_name(weight.holder))) or word in words.MIXER_IN:
        return "input"
    # What a tower has seen is written into the stream of the text.
    return "output" if word in words.MIXER_OUT or any(_PROJECTOR.search(name) for name in names) else None


def _known_raw(weight: Weight) -> ParamSite | None:
    """Return the site of a matrix that its module holds itself, if its module's class tells its use."""
    if weight.kind.endswith("AttentionResidual") and weight.leaf == "query":
        # Each row weighs the elements of earlier states of the residual stream, one by one.
        return ParamSite(role="other", evidence="class")
    if len(weight.shape) != 2 or weight.width is None:
        return None
    rows, columns = weight.shape
    if "Relative" in weight.kind and weight.leaf == "proj":
        # From what a query says of distances to a number for each: x @ W.
        return ParamSite(role="matrix", transposed=True, stream="input", evidence="class")
    if "Hyper" in weight.kind and columns % weight.width == 0 and rows < weight.width:
        # Reads all copies of the residual stream at once (hyper-connections, arXiv 2409.19606).
        return ParamSite(role="matrix", stream="input", evidence="class")
    if "Projector" in weight.kind and len(weight.sides(rows, columns)) == 1:
        # Writes what another tower has seen into the residual stream.
        return ParamSite(role="matrix", transposed=columns == weight.width, stream="output", evidence="class")
    return None


def _is_mixer(module: Any) -> bool:
    """Return whether a module mixes tokens along the sequence with a state or a short convolution."""
    return any(name in module._parameters or name in module._modules for name in _MIXER_ATTRIBUTES)
