"""What tells the use of a weight: its module's class, the residual stream, counts in the config, and at last its name.

The order is a principle. A class says what a module computes. Whoever has the width of the residual stream on one side
reads or writes it, whatever it is called. Names only choose between what these leave open.
"""

from __future__ import annotations

import functools
import inspect
import re
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.param_names import class_name
from symdist.routing import words
from symdist.routing.facts import ModelFacts, ModuleChain, is_linear, is_table
from symdist.routing.heads import count_heads, fused_heads, head_counts, head_sizes, mixer_sections
from symdist.routing.param_site import Evidence, Fusion, ParamSite, Stream

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_SHAPE_SUFFIX = re.compile(r"_([A-Z]{2,3})$")
"""How torchtitan ends the names of raw parameters: a letter for each dimension, D for the residual stream."""
_BIAS = re.compile(r"(^|_)bias$")
_ROUTER_NAMES = ("router", "gate", "classifier", "wg")
_ROUTER_CLASS = re.compile(r"(Router|RouterMLP|Gating)$")
_ATTENTION = re.compile(r"attn|attention|(^|_)att($|_)|mla$", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)
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
    weight = _Weight(leaf, shape, chain, facts or ModelFacts())
    return weight.by_class() or weight.by_block() or weight.by_type()


class _Weight:
    """A parameter and what is around it."""

    def __init__(self, leaf: str, shape: tuple[int, ...], chain: ModuleChain, facts: ModelFacts):
        self.leaf, self.shape, self.chain, self.facts = leaf, shape, chain, facts
        self.attribute, self.module = chain[-1]
        self.parent = chain[-2][1] if len(chain) > 1 else self.module
        self.kind = class_name(self.module)
        self.linear = len(shape) == 2 and leaf == "weight" and is_linear(self.module)
        self.conv1d = self.kind.endswith("Conv1D") and len(shape) == 2

    @cached_property
    def word(self) -> str:
        """The name that says what the weight is for.

        The weight of a linear layer is identified by the layer's attribute, or that of the module around it if the
        layer is all that this holds; a parameter that its module holds directly by its own.
        """
        if self.leaf != "weight":
            return _SHAPE_SUFFIX.sub("", self.leaf).removesuffix("_weight")
        names = [name for name, _ in reversed(self.chain) if name not in words.HOLDERS and not name.isdecimal()]
        return names[0] if names else self.attribute

    @cached_property
    def width(self) -> int | None:
        return self.facts.width(self.chain)

    @cached_property
    def holder(self) -> nn.Module:
        """The block that the weight belongs to: the module around its linear layer, or the one that holds it."""
        depth = len(self.chain) - 1
        if self.leaf == "weight" and (self.linear or self.conv1d):
            depth -= 1
            while depth > 0 and (self.chain[depth + 1][0] in words.HOLDERS or self.chain[depth + 1][0].isdecimal()):
                depth -= 1
        return self.chain[max(depth, 0)][1]

    @cached_property
    def block(self) -> Literal["attention", "mlp"] | None:
        """Whether the weight is one of attention or of an MLP, by the nearest module around it that says so."""
        for depth, (name, module) in enumerate(reversed(self.chain)):
            # The class of a module further out may name all that it holds.
            kinds = (name, class_name(module)) if depth < 2 else (name,)
            if any(_ATTENTION.search(kind) for kind in kinds):
                return "attention"
            if any(_MLP.search(kind) for kind in kinds):
                return "mlp"
        return None

    # The class of a module

    def by_class(self) -> ParamSite | None:
        """Return the site if the class of a module, or the shape, tells it."""
        if is_table(self.module) and self.leaf == "weight":
            return self._of_table()
        if (evidence := self.router_evidence()) is not None:
            return ParamSite(role="router", stream=self.stream or "input", evidence=evidence)
        if _BIAS.search(_SHAPE_SUFFIX.sub("", self.leaf)):
            return ParamSite(role="router_bias" if self._is_router_bias() else "bias", evidence="class")
        if self.leaf.endswith("sinks"):
            return ParamSite(role="sink", evidence="name")
        if self._is_norm():
            name = self.leaf if "norm" in self.leaf else self.attribute
            return ParamSite(role=words.norm_role(name, self.parent), evidence="class")
        mixes = any(_is_mixer(module) for _, module in self.chain[-2:])
        if self.leaf in words.STATE_SPACE and (mixes or self.leaf in words.SURE_STATE_SPACE or len(self.shape) < 2):
            return ParamSite(role="state_space", evidence="name")
        if self._convolves():
            return ParamSite(role="convolution", evidence="class")
        if not self.linear and sum(size > 1 for size in self.shape) < 2:
            return ParamSite(role="state_space" if mixes else "other", evidence="class")
        if not self.linear and not self.conv1d and words.POSITIONS.search(self.leaf):
            rows = len(self.shape) == 2 or (
                len(self.shape) == 3 and (self.shape[-1] == self.width or self.shape[0] == 1)
            )
            return ParamSite(role="position_embedding" if rows else "other", evidence="name")
        if not self.linear and len(self.shape) > 3:
            return ParamSite(role="other", evidence="class")
        return None

    def _of_table(self) -> ParamSite:
        """Return the site of a table whose rows are looked up."""
        rows, columns = self.shape
        vocabularies = self.facts.vocabularies
        name = self.attribute.lower() if not self.attribute.isdecimal() else self.word.lower()
        per_layer = "per_layer" in name or (self.attribute.isdecimal() and columns != self.width)
        if per_layer:
            return ParamSite(role="per_layer_embedding", stream="input", evidence="class")
        positions = any(words.POSITIONS.search(around) for around, _ in self.chain[-2:])
        if rows not in vocabularies and (positions or rows < min(vocabularies, default=0)):
            return ParamSite(role="position_embedding", stream="input", evidence="config")
        return ParamSite(role="embedding", stream="input", evidence="config" if rows in vocabularies else "class")

    def router_evidence(self) -> Evidence | None:
        """Return what tells that the weight scores experts; None if it does not."""
        if len(self.shape) != 2 or self.shape[0] == 1 or self.leaf != "weight":
            return None
        counts = self.facts.expert_counts(self.chain)
        for _, module in self.chain[-3:]:
            if _ROUTER_CLASS.search(class_name(module)):
                # One matrix scores experts; others, if any, lead up to it, or scale noise.
                named = [(name, whole_shape(p)) for name, p in module.named_parameters() if "noise" not in name]
                shapes = [shape for _, shape in named if len(shape) == 2 and shape[0] > 1]
                scores = [shape for shape in shapes if shape[0] in counts] or shapes
                is_score = self.shape == scores[-1] if scores else False
                return "class" if is_score and "noise" not in self.attribute else None
        if not self.linear:
            return None
        # Where the layer is all that a gate holds, its place is that of the gate.
        name, holder = (self.attribute, self.parent) if not self._held else (self.word, self.holder)
        own = _experts_in(holder)
        experts = None if own is None else _count_experts(own)
        if experts is not None and not _has_router(holder) and self.shape[0] == experts:
            return "config"
        if name not in _ROUTER_NAMES:
            return None
        if experts is not None and self.shape[0] != experts:
            # A shared expert's gate may lie beside, too.
            others: list[Any] = [m for m in holder.children() if is_linear(m) and m is not self.module]
            return "name" if all(whole_shape(other.weight)[0] != experts for other in others) else None
        if self.shape[0] in counts:
            return "config"
        beside = any(_experts_in(module) is not None for _, module in self.chain[-3:-1])
        few = name == "router" and self.width is not None and self.shape[0] < self.width
        return "name" if beside or few else None

    @property
    def _held(self) -> bool:
        return self.attribute in words.HOLDERS or self.attribute.isdecimal()

    def _is_router_bias(self) -> bool:
        if sum(size > 1 for size in self.shape) != 1:
            return False
        own = getattr(self.module, "weight", None)
        if isinstance(own, Tensor):
            return _Weight("weight", whole_shape(own), self.chain, self.facts).router_evidence() is not None
        in_router = any(_ROUTER_CLASS.search(class_name(module)) for _, module in self.chain[-3:])
        routes = in_router or hasattr(self.module, "experts")
        return routes and (
            max(self.shape) in self.facts.expert_counts(self.chain) or "correction" in self.leaf or in_router
        )

    def _is_norm(self) -> bool:
        if self.linear or len(self.shape) > 2:
            return False
        if sum(size > 1 for size in self.shape) < 2:
            return "norm" in f"{self.kind} {self.leaf} {self.attribute}".lower()
        # Norms by heads have a row for each.
        named = self.kind.endswith("Norm") or self.attribute.endswith("norm")
        return named and self.leaf in ("weight", "scale", "gamma")

    def _convolves(self) -> bool:
        if isinstance(self.module, _CONVOLUTIONS) or "Convolution" in self.kind:
            return not self.linear
        return "conv" in f"{self.kind} {self.attribute}".lower() and len(self.shape) > 2

    # The residual stream

    @cached_property
    def outputs_first(self) -> bool | None:
        """Whether the weight is stored `[…, out, in]`; None if nothing tells."""
        if self.linear or self.conv1d:
            return self.linear
        letters = _SHAPE_SUFFIX.search(self.leaf)
        if letters and letters[1].count("D") == 1 and self.word.lower() in words.MLP:
            return (letters[1][-2] == "D") == (words.MLP[self.word.lower()] == "down")
        declared = getattr(self.module, "is_transposed", None)
        if isinstance(declared, bool):
            return not declared
        sizes = [
            (self.facts.number(self.module, inside), self.facts.number(self.module, outside))
            for inside, outside in (("in_features", "out_features"), ("input_size", "output_size"))
        ]
        for inside, outside in sizes:
            if inside is not None and outside is not None and inside != outside:
                return (outside, inside) == self.shape[-2:]
        return None

    def sides(self, p: int, q: int) -> set[str]:
        """Return which of two dimensions have the width of the residual stream: "p", "q", both or neither."""
        return {name for name, size in (("p", p), ("q", q)) if size == self.width}

    @cached_property
    def stream(self) -> Stream | None:
        """The side of the matrix `[out, in]` that alone has the width of the residual stream."""
        found = self.sides(*self.shape[-2:])
        if len(found) != 1 or self.outputs_first is None:
            return None
        return "output" if (found == {"p"}) == self.outputs_first else "input"

    # The block around it

    def by_block(self) -> ParamSite | None:
        """Return the site if the block around the weight, and the weight's part in it, tell it."""
        matrix = self.linear or self.conv1d
        if not matrix and len(self.shape) not in (2, 3):
            return None
        word = self.word.lower()
        near = (self.leaf, *(name for name, _ in self.chain[-3:]))
        if any(mark in name.lower() for name in near for mark in words.ADAPTERS):
            return self._matrix("adapter", "name") if matrix or len(self.shape) == 2 else None
        if any("indexer" in name.lower() or "Indexer" in class_name(module) for name, module in self.chain):
            site = self._matrix("indexer", "name")
            return replace(site, stream="input") if matrix else None
        if self.linear and self.shape[0] == 1 and "gate" in word:
            return self._matrix("gate", "name")
        experts = any("experts" in name and "shared" not in name for name, _ in self.chain)
        if experts or "Expert" in self.kind or (len(self.shape) == 3 and any("expert" in n for n, _ in self.chain)):
            return self._of_expert(word)
        mixes = self.block != "mlp" and any(_is_mixer(module) for _, module in self.chain[-3:])
        attends = self.block == "attention" or (self.block is None and self._beside_queries())
        if mixes and not (attends and self._has_heads()):
            if word in words.MIXER_IN | words.MIXER_OUT:
                return self._of_mixer(word)
        elif attends and word in words.ATTENTION:
            return self._of_attention(word)
        elif attends and matrix and "gate" in word and "gate" in word.split("_")[-1]:
            return self._of_attention(word, role="attention_gate")
        return self._of_mlp(word, "mlp_") if word in words.MLP and matrix else None

    def _has_heads(self) -> bool:
        counts, sizes = (f("attention_q", self.around, self.facts) for f in (head_counts, head_sizes))
        return bool(counts or sizes)

    def _beside_queries(self) -> bool:
        holds = self.holder._modules
        return any(name in holds for name in ("q_proj", "c_q", "wq", "q_a_proj")) or holds.keys() >= {"q", "k", "v"}

    def _matrix(self, role: str, evidence: Evidence) -> ParamSite:
        # Of a linear layer that neither reads nor writes the stream, the input counts as the stream.
        both = len(self.sides(*self.shape)) == 2
        stream = self.stream or (None if both else "input")
        return ParamSite(role=role, transposed=self.outputs_first is False, stream=stream, evidence=evidence)

    def _of_mixer(self, word: str) -> ParamSite | None:
        block = next(module for _, module in reversed(self.chain) if _is_mixer(module))
        role = "mixer_out" if word in words.MIXER_OUT else "mixer_in"
        if self.linear:
            sections = (
                mixer_sections(word, self.shape[0], self.shape[1], block, self.facts) if role == "mixer_in" else ()
            )
            stream = self.stream or self._by_part("input" if role == "mixer_in" else "output") or "input"
            return ParamSite(role=role, stream=stream, sections=sections, evidence="name")
        if len(self.shape) == 3 and self.shape[-2] == self.shape[-1] and "LRU" in self.kind.upper():
            # Blocks on a diagonal, applied from the left: x @ W.
            return ParamSite(role="mixer", transposed=True, stream="input", evidence="name")
        return None

    def _by_part(self, side: Stream) -> Stream | None:
        """Return a side that has the width of the residual stream, as both sides of this weight may."""
        out, into = self.shape[-2:] if self.outputs_first is not False else self.shape[:-3:-1]
        return side if (into if side == "input" else out) == self.width else None

    def _of_attention(self, word: str, *, role: str = "") -> ParamSite | None:
        role = role or words.ATTENTION[word]
        if not (self.linear or self.conv1d or isinstance(self.module, nn.MultiheadAttention)):
            return None
        if role == "attention_o" and self.stream == "input":
            return None
        transposed = self.outputs_first is False
        along_output = role != "attention_o"
        index = int(along_output == transposed)
        size = self.shape[-2:][index]
        stream: Stream | None = self._by_part("output" if role == "attention_o" else "input")
        site = ParamSite(
            role=role, head_dim_index=index, transposed=transposed, stream=stream, latent=word in words.LATENT
        )
        blocks = self.facts.number(self.module, "n_groups")
        if word in words.LATENT:
            if word in ("o_b_proj", "wo_b"):
                site = replace(site, stream=self._by_part("output"))
            if blocks is not None and size % blocks == 0 and blocks > 1:
                # Every group of heads has a projection of its own.
                site = replace(site, sections=(size // blocks,) * blocks)
            return site
        if role == "attention_qkv":
            heads, sections, section_heads = fused_heads(
                self.word, size, self.shape[-2:][1 - index], self.around, self.facts
            )
            sections = () if transposed and len(set(sections)) > 1 else sections
            groups = self.facts.number(self.holder, "heads_per_kv")
            if heads is not None and groups is not None and heads % (groups + 2) == 0:
                site = replace(site, groups=heads // (groups + 2))
            return replace(site, heads=heads, sections=sections, section_heads=section_heads if sections else ())
        return replace(site, heads=count_heads(role, size, self.around, self.facts))

    @cached_property
    def around(self) -> ModuleChain:
        """The modules around the weight, without its own layer, which knows no heads."""
        return self.chain[:-1] if (self.linear or self.conv1d) and len(self.chain) > 1 else self.chain

    def _of_mlp(self, word: str, prefix: str) -> ParamSite:
        part = words.MLP[word]
        # Whoever alone has the residual stream as its output is a down projection, whatever its name.
        if self.stream == "output":
            part = "down"
        elif self.stream == "input" and part == "down":
            part = "up"
        fused = self._fused(self.holder) if part == "gate_up" else None
        side: Stream = "output" if part == "down" else "input"
        evidence: Evidence = "name" if part == words.MLP[word] else "residual stream"
        transposed = self.outputs_first is False
        stream = self._by_part(side)
        return ParamSite(role=prefix + part, transposed=transposed, fused=fused, stream=stream, evidence=evidence)

    def _of_expert(self, word: str) -> ParamSite | None:
        if word not in words.MLP:
            return None
        if len(self.shape) < 3:
            return self._of_mlp(word, "expert_") if self.linear or self.conv1d else None
        part = words.MLP[word]
        stored = self._stored_outputs_first(part)
        role = f"expert_{part}"
        if stored is None:
            return ParamSite(
                role=None,
                likely=(role, "experts", "other"),
                doubt="both of its sides are as wide as the residual stream, or neither, and its module does not say "
                "which is the output",
            )
        fused = self._fused(self.module) if part == "gate_up" else None
        stream: Stream = "output" if part == "down" else "input"
        evidence: Evidence = "residual stream" if self.outputs_first is None else "class"
        return ParamSite(role=role, transposed=not stored, fused=fused, stream=stream, evidence=evidence)

    def _stored_outputs_first(self, part: str) -> bool | None:
        """Return whether stacked experts are stored `[expert, out, in]`, by the side that is the residual stream."""
        declared = isinstance(getattr(self.module, "is_transposed", None), bool)
        found = None if declared else self._told_by(part, self.shape)
        found = self.outputs_first if found is None else found
        if found is not None:
            return found
        # Both sides are as wide as the stream. The other weights of the module are stored alike.
        for name, parameter in self.module.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            other = words.MLP.get(name.lower().removesuffix("_weight"))
            if len(shape) == 3 and other is not None and (found := self._told_by(other, shape)) is not None:
                return found
        return None

    def _told_by(self, part: str, shape: tuple[int, ...]) -> bool | None:
        sides = self.sides(*shape[-2:])
        return None if len(sides) != 1 else (sides == {"p"}) == (part == "down")

    def _fused(self, module: nn.Module) -> Fusion:
        """Return how the output of a module's weight is cut into gates and ups, by what it declares or by its code."""
        declared = getattr(module, "is_concatenated", None)
        if isinstance(declared, bool):
            return "stacked" if declared else "interleaved"
        kinds: list[Any] = [type(module), *([type(self.parent)] if module is self.module else [])]
        code = "".join(map(_code, kinds))
        if "::2" in code:
            return "interleaved"
        return "stacked" if re.search(r"(chunk|split)\(", code) else "unknown"

    # The type

    def by_type(self) -> ParamSite:
        """Return the site of a weight of which no more is known than its type and sides."""
        if self.linear or self.conv1d:
            evidence: Evidence = "type" if self.stream is None else "residual stream"
            site = self._matrix("gate" if self.shape[0] == 1 else "matrix", evidence)
            if site.stream is None:
                # Both sides are as wide as the stream, and at last names tell which of them it is.
                side = self._by_name()
                site = replace(site, stream=side, evidence="name" if side is not None else evidence)
            return site
        known = self._known_raw()
        if known is not None:
            return known
        if len(self.shape) == 2:
            likely = ("matrix", "position_embedding", "other")
            if self.shape[0] in self.facts.expert_counts(self.chain):
                likely = ("router", "matrix", "other")
            return ParamSite(role=None, likely=likely)
        # Whoever has the stream as its first dimension is no stack of matrices, but one matrix by heads.
        stack = self.shape[0] != self.width
        return ParamSite(role=None, likely=("matrix", "experts", "other") if stack else ("other", "matrix", "experts"))

    def _by_name(self) -> Stream | None:
        word, names = self.word.lower(), [name for name, _ in self.chain]
        if any(_BEFORE_HEAD.search(name) for name in (*names, class_name(self.holder))) or word in words.MIXER_IN:
            return "input"
        # What a tower has seen is written into the stream of the text.
        return "output" if word in words.MIXER_OUT or any(_PROJECTOR.search(name) for name in names) else None

    def _known_raw(self) -> ParamSite | None:
        """Return the site of a matrix that its module holds itself, if its module's class tells its use."""
        if self.kind.endswith("AttentionResidual") and self.leaf == "query":
            # Each row weighs the elements of earlier states of the residual stream, one by one.
            return ParamSite(role="other", evidence="class")
        if len(self.shape) != 2 or self.width is None:
            return None
        rows, columns = self.shape
        if "Relative" in self.kind and self.leaf == "proj":
            # From what a query says of distances to a number for each: x @ W.
            return ParamSite(role="matrix", transposed=True, stream="input", evidence="class")
        if "Hyper" in self.kind and columns % self.width == 0 and rows < self.width:
            # Reads all copies of the residual stream at once (hyper-connections, arXiv 2409.19606).
            return ParamSite(role="matrix", stream="input", evidence="class")
        if "Projector" in self.kind and len(self.sides(rows, columns)) == 1:
            # Writes what another tower has seen into the residual stream.
            return ParamSite(role="matrix", transposed=columns == self.width, stream="output", evidence="class")
        return None


def _has_router(module: nn.Module) -> bool:
    """Return whether a module holds what its name or class calls a router."""
    children = module.named_children()
    return any(name in _ROUTER_NAMES or _ROUTER_CLASS.search(class_name(child)) for name, child in children)


def _experts_in(module: nn.Module) -> nn.Module | None:
    for name, child in module.named_children():
        if "experts" in name and "shared" not in name and not is_linear(child):
            return child
    return None


def _count_experts(experts: nn.Module) -> int | None:
    """Return the number of experts in a list of them, or in a module that stacks their weights."""
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    shapes = (whole_shape(parameter) for parameter in experts.parameters())
    return next((shape[0] for shape in shapes if len(shape) == 3), None)


def _is_mixer(module: Any) -> bool:
    """Return whether a module mixes tokens along the sequence with a state or a short convolution."""
    return any(name in module._parameters or name in module._modules for name in _MIXER_ATTRIBUTES)


@functools.cache
def _code(module_class: Any) -> str:
    """Return the code of a module's methods and of the functions that they call; empty if it cannot be read."""
    # fully_shard makes a class of its own, on top of the module's.
    kinds = [kind for kind in module_class.__mro__ if not kind.__module__.startswith("torch.")]
    methods = [method for kind in kinds for method in vars(kind).values() if inspect.isfunction(method)]
    called = [method.__globals__.get(name) for method in methods for name in method.__code__.co_names]
    return "\n".join(map(_source, (*methods, *filter(inspect.isfunction, called))))


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
