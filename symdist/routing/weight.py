"""A parameter with what is around it: its names, the block that it belongs to, and its sides."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, Literal

from torch import nn

from symdist.param_names import class_name
from symdist.routing import words
from symdist.routing.facts import ModelFacts, ModuleChain, is_linear
from symdist.routing.heads import modules_of_attention
from symdist.routing.param_site import Stream

_SHAPE_SUFFIX = re.compile(r"_([A-Z]{2,3})$")
"""How torchtitan ends the names of raw parameters: a letter for each dimension, D for the residual stream."""
_ATTENTION = re.compile(r"attn|attention|(^|_)att($|_)|mla$", re.IGNORECASE)
_MLP = re.compile(r"mlp|feed_?forward|ffn", re.IGNORECASE)


class Weight:
    """A parameter with what is around it.

    Args:
        leaf: The name under which its module holds it, such as "weight".
        shape: The shape of the whole parameter.
        chain: The modules around it.
        facts: What is known of the model as a whole.

    Attributes:
        attribute: The name under which its module is held.
        module: Its module.
        parent: The module around that.
        kind: The name of its module's class.
        linear: Whether it is the weight of a linear layer, `[out, in]`.
        conv1d: Whether it is that of a `Conv1D` of transformers, `[in, out]`.
        plain_leaf: Its own name without letters for its dimensions.
    """

    def __init__(self, leaf: str, shape: tuple[int, ...], chain: ModuleChain, facts: ModelFacts):
        self.leaf, self.shape, self.chain, self.facts = leaf, shape, chain, facts
        self.attribute, self.module = chain[-1]
        self.parent = chain[-2][1] if len(chain) > 1 else self.module
        self.kind = class_name(self.module)
        self.plain_leaf = _SHAPE_SUFFIX.sub("", leaf)
        self.linear = len(shape) == 2 and leaf == "weight" and is_linear(self.module)
        self.conv1d = self.kind.endswith("Conv1D") and len(shape) == 2

    @cached_property
    def word(self) -> str:
        """The name that says what the weight is for.

        The weight of a linear layer is identified by the layer's attribute, or that of the module around it if the
        layer is all that this holds; a parameter that its module holds directly by its own.
        """
        if self.leaf != "weight":
            return self.plain_leaf.removesuffix("_weight")
        names = [name for name, _ in reversed(self.chain) if name not in words.HOLDERS and not name.isdecimal()]
        return names[0] if names else self.attribute

    @cached_property
    def width(self) -> int | None:
        """The width of the residual stream around the weight; None if nothing tells it."""
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

    @cached_property
    def attention(self) -> list[Any]:
        """The modules and configs that describe its attention; its own layer knows no heads."""
        own_layer = (self.linear or self.conv1d) and len(self.chain) > 1
        return modules_of_attention(self.chain[:-1] if own_layer else self.chain, self.facts)

    @property
    def held(self) -> bool:
        """Whether its layer may be all that the module around this holds, which then says what it is for."""
        return self.attribute in words.HOLDERS or self.attribute.isdecimal()

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
        """Return which of two dimensions have the width of the residual stream.

        Args:
            p: The first dimension.
            q: The second.

        Returns:
            "p", "q", both or neither.
        """
        return {name for name, size in (("p", p), ("q", q)) if size == self.width}

    @cached_property
    def stream(self) -> Stream | None:
        """The side of the matrix `[out, in]` that alone has the width of the residual stream."""
        found = self.sides(*self.shape[-2:])
        if len(found) != 1 or self.outputs_first is None:
            return None
        return "output" if (found == {"p"}) == self.outputs_first else "input"

    def by_part(self, side: Stream) -> Stream | None:
        """Return a side of the matrix if it has the width of the residual stream, as both of them may.

        Args:
            side: The side that its part in the block would have there.

        Returns:
            The side, or None.
        """
        out, into = self.shape[-2:] if self.outputs_first is not False else self.shape[:-3:-1]
        return side if (into if side == "input" else out) == self.width else None
