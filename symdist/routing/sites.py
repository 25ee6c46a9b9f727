"""Find every parameter of a model, and what it is used for."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from symdist.layouts.fsdp1 import read_units, whole_shape
from symdist.param_names import is_wrapped, plain_name, unwrapped
from symdist.routing.evidence import site_of
from symdist.routing.facts import ModelFacts, ModuleChain, is_linear, is_table
from symdist.routing.param_site import ParamSite
from symdist.routing.words import HEADS, SURE_HEADS


def find_sites(model: nn.Module) -> dict[str, tuple[nn.Parameter, ParamSite]]:
    """Find every trainable parameter of a model and what it is used for.

    Args:
        model: The model, sharded or not.

    Returns:
        Parameter and site by name. Names are without what wrappers add, see `symdist.param_names`. Tied parameters
        appear once, under their first name.

    Raises:
        ValueError: If FSDP has joined parameters into one flat parameter, or a parameter has no shape yet.

    Example:
        >>> find_sites(model)["model.layers.3.self_attn.q_proj.weight"][1].role
        'attention_q'
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"{name} has no shape before the first forward pass: run one, and then route the model")
    read_units(model)
    facts = ModelFacts([model])
    tables = {id(module.weight) for module in model.modules() if is_table(module)}
    heads = {id(weight) for weight in _output_weights(model, facts)}
    found: dict[str, tuple[nn.Parameter, ParamSite]] = {}
    for name, parameter, chain in walk([model]):
        if id(parameter) in heads:
            role = "tied_embedding" if id(parameter) in tables else "head"
            counted = whole_shape(parameter)[0] in facts.vocabularies
            site = ParamSite(role=role, stream="input", evidence="config" if counted else "name")
        else:
            site = site_of(name.rsplit(".", 1)[-1], whole_shape(parameter), chain, facts)
            if site.role is None and id(parameter) in tables:
                site = replace(site, role="embedding", stream="input", evidence="class")
        found[name] = (parameter, site)
    # Without what wrappers add, names might be equal.
    plain = Counter(map(plain_name, found))
    return {plain_name(name) if plain[plain_name(name)] == 1 else name: each for name, each in found.items()}


def walk(models: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Parameter, ModuleChain]]:
    """Yield every trainable parameter once, under its first name.

    Args:
        models: The models, or the parts of one.

    Yields:
        The name, which includes what wrappers add; the parameter; and the modules around it. In their chain, a wrapped
        module takes the place of its wrapper.
    """
    visited: set[int] = set()
    for model in models:
        for prefix, chain in _modules(model, "", [("", model)]):
            for leaf, parameter in chain[-1][1].named_parameters(recurse=False, remove_duplicate=False):
                if parameter.requires_grad and id(parameter) not in visited:
                    visited.add(id(parameter))
                    yield prefix + leaf, parameter, chain


def _modules(module: nn.Module, prefix: str, chain: ModuleChain) -> Iterator[tuple[str, ModuleChain]]:
    """Yield every module as the last of its chain, with what the names of its parameters begin with."""
    yield prefix, chain
    for attribute, child in module.named_children():
        around = chain[:-1] if is_wrapped(attribute, module) else chain
        place = chain[-1][0] if is_wrapped(attribute, module) else attribute
        yield from _modules(child, f"{prefix}{attribute}.", [*around, (place, child)])


def _output_weights(model: nn.Module, facts: ModelFacts) -> Iterator[Tensor]:
    """Yield the weights that turn the residual stream into a number for each token of a vocabulary.

    Beside the declared one, these are linear layers as long as a vocabulary that are called a head or lie in no
    numbered layer, as those for several next tokens do.
    """
    top = unwrapped(model)
    declared: object = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        declared = getattr(top, "get_output_embeddings", lambda: None)()
    if isinstance(weight := getattr(declared, "weight", None), Tensor):
        yield weight
    linear: list[tuple[list[str], Tensor, int | None]] = []
    for _, chain in _modules(model, "", [("", model)]):
        module: Any = chain[-1][1]
        if is_linear(module):
            linear.append(([name for name, _ in chain[1:]], module.weight, facts.width(chain)))
    inner = {whole_shape(weight)[0] for words, weight, _ in linear if _in_layer(words)}
    for words, weight, width in linear:
        rows, columns = whole_shape(weight)
        last = words[-1] if words else ""
        if rows == 1 or (rows not in facts.vocabularies | facts.tables and len(words) > 1):
            continue
        named = last in HEADS and (len(words) == 1 or last in SURE_HEADS or not _in_layer(words))
        # Where other layers are as large as the vocabulary, only a name tells.
        fits = rows in facts.vocabularies and columns == width
        only = not (_in_layer(words) or rows == width or rows in inner)
        if named or (fits and (only or last in HEADS - {"output", "decoder"})):
            yield weight


def _in_layer(words: list[str]) -> bool:
    return any(word.isdecimal() for word in words[:-1])
