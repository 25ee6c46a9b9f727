"""Judges what `symdist.route` says of a model, by what the model itself does with its weights.

Nothing of the router is used but its groups. The facts are those of `uses.py` (one forward pass, followed), the classes
of modules where a weight has no part in that pass, and the numbers of the configuration.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.architectures.uses import Followed, Use

ViewKind = Literal["plain", "heads", "residual"]
Side = Literal["first", "last", "pairs"]

LOOKED_UP = ("embedding", "tied_embedding", "position_embedding", "per_layer_embedding")
APART = (*LOOKED_UP, "head", "router")
ATTENTION = ("attention_q", "attention_k", "attention_v", "attention_o", "attention_qkv")
FEW = 8
# Rules that take each element for itself; all others take a weight for matrices.
COORDINATEWISE = ("adamw",)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model without its routing.

    Attributes:
        uses: What the forward pass does with each weight; empty for one without a part in it.
        twins: See `Followed`.
        modules: The module that holds each parameter.
        shapes: The shape of each parameter.
        vocabularies: The sizes of vocabularies: those that the configuration names, and that of the input embedding.
        experts: The numbers of experts that the configuration names.
        heads: The numbers of heads that the configuration names.
        sizes: The sizes of heads that the configuration names, or that follow from it.
        output: The name of the weight that the model declares as its output embedding; None if there is none.
    """

    uses: Mapping[str, Use]
    twins: Mapping[str, str]
    modules: Mapping[str, nn.Module]
    shapes: Mapping[str, tuple[int, ...]]
    vocabularies: frozenset[int]
    experts: frozenset[int]
    heads: frozenset[int]
    sizes: frozenset[int]
    output: str | None


def facts_of(model: nn.Module, followed: Followed) -> Facts:
    """Collect the facts of a model."""
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    modules = {
        f"{path}.{leaf}" if path else leaf: module
        for path, module in model.named_modules()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    vocabularies = set(_numbers(config, r"vocab"))
    if embedding is not None:
        vocabularies.add(embedding.weight.shape[0])
    return Facts(
        uses={name: followed.uses.get(name, Use()) for name in shapes if name not in followed.twins},
        twins=followed.twins,
        modules=modules,
        shapes=shapes,
        vocabularies=frozenset(vocabularies),
        experts=frozenset(_numbers(config, r"expert")),
        heads=frozenset(_numbers(config, r"(attention_heads|key_value_heads|^num_heads|^n_heads?)$")),
        sizes=frozenset(_numbers(config, r"head_?dim|head_size|kv_channels|d_kv")),
        output=None if head is None else names.get(id(head.weight)),
    )


def _numbers(config: Any, key: str) -> Iterator[int]:
    """Yield all whole numbers of a configuration whose key, or that of the list they are in, matches."""
    for name, value in config.items() if isinstance(config, Mapping) else ():
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, Mapping):
                yield from _numbers(each, key)
            elif isinstance(each, int) and not isinstance(each, bool) and re.search(key, str(name)):
                yield each


def judge(
    facts: Facts, groups: Sequence[Mapping[str, Any]], trainable: Mapping[str, Any], asked: ViewKind
) -> list[str]:
    """Return what is wrong with a routing, one line for each kind of weight; an empty list if it is right.

    Args:
        facts: The facts of the model.
        groups: What `route` returned for a recipe whose matrices all have a matrix rule.
        trainable: The trainable parameters, by name.
        asked: The view that the recipe asks for: "plain" if none, "heads" of attention, or the "residual" stream.
    """
    wrong = dict(_partition(groups, trainable))
    placed = {name: group for group in groups for name in group["param_names"] if name in facts.shapes}
    for name, group in placed.items():
        twin = facts.twins.get(name)
        if twin is not None:
            if twin in placed and placed[twin] is not group:
                wrong.setdefault(name, f"is routed unlike {twin}, though their layers are built alike")
            continue
        for line in _of_weight(name, group, facts, asked):
            wrong.setdefault(name, line)
    kinds: dict[tuple[str, str], tuple[str, int]] = {}
    for name, line in wrong.items():
        key = re.sub(r"\.\d+(?=\.)", ".N", name), line
        first, count = kinds.get(key, (name, 0))
        kinds[key] = first, count + 1
    return [
        f"{first} {list(facts.shapes.get(first, ()))}{f' and {count - 1} like it' if count > 1 else ''}: {line}"
        for (_, line), (first, count) in kinds.items()
    ]


def _partition(groups: Sequence[Mapping[str, Any]], trainable: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every trainable parameter is in exactly one group, under its own name."""
    held: dict[int, list[str]] = {}
    for group in groups:
        if len(group["params"]) != len(group["param_names"]):
            yield group["param_names"][0], "its group has not one name for each parameter"
        for name, parameter in zip(group["param_names"], group["params"], strict=False):
            held.setdefault(id(parameter), []).append(name)
    for name, parameter in trainable.items():
        found = held.pop(id(parameter), [])
        if len(found) != 1:
            yield name, f"is in {len(found)} groups, not in one"
        elif found != [name]:
            yield name, f"is called {found[0]} in its group"
    for names in held.values():
        yield names[0], "is in a group, but is no trainable parameter"


def _of_weight(name: str, group: Mapping[str, Any], facts: Facts, asked: ViewKind) -> Iterator[str]:
    role, view, as_matrix = group["role"], group["view"], group["rule"] not in COORDINATEWISE
    shape, module, use = facts.shapes[name], facts.modules[name], facts.uses[name]
    said = f"role {role!r}, rule {group['rule']!r}, view {view!r}"
    looked_up = use.looked_up or isinstance(module, nn.Embedding)
    stored = _stored(module, name, shape, use)
    if looked_up and role not in LOOKED_UP and (as_matrix or isinstance(module, nn.Embedding)):
        yield f"{said}; its rows are looked up, so it is an embedding"
    sliced = role == "position_embedding" and (use.coordinates or use == Use())
    if role in LOOKED_UP and not looked_up and not sliced:
        yield f"{said}; no rows of it are looked up"
    if name == facts.output and role not in ("head", "tied_embedding"):
        yield f"{said}; the model declares it as its output embedding"
    if role in ("embedding", "tied_embedding", "head") and not any(shape[0] % rows == 0 for rows in facts.vocabularies):
        yield f"{said}; it has {shape[0]} rows, the vocabulary {sorted(facts.vocabularies)}"
    if role.startswith("expert") and len(shape) == 3 and shape[0] not in _counts(facts):
        yield f"{said}; it holds {shape[0]} experts, the configuration says {sorted(facts.experts)}"
    yield from _router(said, role, shape, use, facts)
    if not as_matrix:
        # A module's own parameter of a few vectors, such as learned queries, may be taken for these.
        vectors = role == "other" and name.rpartition(".")[2] != "weight" and len(shape) > 1 and shape[-2] <= FEW
        if stored and "other" not in stored and role not in APART and not vectors:
            yield f"{said}; it is a matrix, which no matrix rule gets"
    elif "other" in stored:
        yield f"{said}; it is no stack of matrices in its last two dimensions"
    elif stored:
        yield from _sides(said, view, stored, use, looked_up, asked)
        yield from _parts(said, role, view, shape[_dim_of("out", stored)], use)
        if asked == "heads" and role in ATTENTION:
            yield from _heads(said, role, view, shape, stored, use, facts)
    elif looked_up:
        if asked == "residual" and view != "transposed" and role != "per_layer_embedding":
            yield f"{said}; its rows are looked up, so the residual stream lies along its columns"
    elif len(shape) < 2:
        yield f"{said}; it is a vector, so each element is to be taken for itself"
    elif not _unseen(use, module):
        yield f"{said}; nothing is multiplied by it as a matrix, so each element is to be taken for itself"


def _router(said: str, role: str, shape: tuple[int, ...], use: Use, facts: Facts) -> Iterator[str]:
    if use.chooses and role != "router":
        yield f"{said}; the largest of its outputs are chosen, so it is a router"
    if role == "router" and shape[0] == 1:
        yield f"{said}; a gate of one row chooses nothing, so it is no router"
    elif role == "router" and not use.chooses and shape[0] not in facts.experts:
        yield f"{said}; nothing is chosen by its outputs, and there are {sorted(facts.experts)} experts"
    elif role == "router" and shape[0] not in _counts(facts):
        yield f"{said}; it has {shape[0]} rows, but there are {sorted(facts.experts)} experts"


def _counts(facts: Facts) -> set[int]:
    """Return the numbers of experts: some models add experts that do nothing, or that all tokens go to."""
    return {count + more for count in facts.experts for more in (0, 1, *facts.experts)}


def _stored(module: nn.Module, name: str, shape: tuple[int, ...], use: Use) -> set[str]:
    """Return how a weight is stored: as seen, or by its class if it has no part in the pass that was followed."""
    if use.stored:
        return use.stored
    if use != Use() or name.rpartition(".")[2] != "weight" or len(shape) < 2:
        return set()
    return {"out_in"} if isinstance(module, nn.Linear) else {"in_out"} if isinstance(module, Conv1D) else set()


def _unseen(use: Use, module: nn.Module) -> bool:
    """Whether nothing is known of a weight: the pass did not come to it, and its class says nothing."""
    convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return use == Use() and not convolves and "norm" not in type(module).__name__.lower()


def _dim_of(side: Literal["out", "in"], stored: set[str]) -> int:
    return -2 if (stored == {"in_out"}) == (side == "in") else -1


def _rows(view: Any) -> Side:
    """Return which of the last two stored dimensions a view makes the rows of its matrices."""
    if view == "transposed" or (isinstance(view, Mapping) and view.get("transposed")):
        return "last"
    pairs = "gate_up" in view if isinstance(view, Mapping) else view.startswith("gate_up")
    return "pairs" if pairs else "first"


def _sides(said: str, view: Any, stored: set[str], use: Use, looked_up: bool, asked: ViewKind) -> Iterator[str]:
    """Rows are the outputs; or, if the residual stream is asked for, whichever side of the weight it is."""
    rows = _rows(view)
    if rows == "pairs":
        yield f"{said}; the recipe asks for no pairs of gate and up"
        return
    if len(stored) > 1:  # A tied weight, or one that is used both ways.
        return
    side: Literal["out", "in"] = "out"
    if asked == "residual":
        if (use.reads or looked_up) == use.writes:
            return
        side = "out" if use.writes else "in"
    expected = "first" if _dim_of(side, stored) == -2 else "last"
    if rows != expected:
        what = "the residual stream lies" if asked == "residual" else "the outputs lie"
        yield f"{said}; {what} along the {expected} of its last two dimensions, which should be the rows"


def _parts(said: str, role: str, view: Any, out: int, use: Use) -> Iterator[str]:
    """Sections begin where the model's own forward cuts the output, and make up all of it."""
    sections = view.get("sections") if isinstance(view, Mapping) else None
    if sections is not None:
        ends = {sum(sections[:i]) for i in range(1, len(sections))}
        if sum(sections) != out:
            yield f"{said}; its sections have {sum(sections)} rows, and it has {out}"
        elif use.stored and not ends <= use.cuts | use.slices:
            yield f"{said}; its output is cut at {sorted(use.cuts | use.slices)}"
        elif not use.cuts <= ends:
            yield f"{said}; its output is also cut at {sorted(use.cuts - ends)}"
    elif role in ("attention_qkv", "mixer_in") and use.cuts:
        unit = out // view["heads"] if isinstance(view, Mapping) and "heads" in view else out
        if any(cut % unit for cut in use.cuts):
            yield f"{said}; its output is cut at {sorted(use.cuts)}, so it is several matrices"


def _heads(
    said: str, role: str, view: Any, shape: tuple[int, ...], stored: set[str], use: Use, facts: Facts
) -> Iterator[str]:
    """Heads are those into which the output is viewed, or that were merged into the input."""
    side: Literal["out", "in"] = "in" if role == "attention_o" else "out"
    dim = _dim_of(side, stored)
    seen: list[tuple[int, int, tuple[int, ...]]] = [(0, shape[dim], heads) for heads in use.heads_in]
    if side == "out":
        seen = [(start, stop, heads) for (start, stop), heads in use.heads.items()]
    if not isinstance(view, Mapping) or "heads" not in view:
        if seen:
            yield f"{said}; its heads are {[heads for *_, heads in seen]}, but the view has none"
    elif "sections" in view:
        start = 0
        for rows, count in zip(view["sections"], view["heads"], strict=True):
            units = {unit for low, high, heads in seen if (low, high) == (start, start + rows) for unit in heads[-1:]}
            if units and rows // (count or 1) not in units:
                yield f"{said}; rows {start} to {start + rows} consist of heads of {sorted(units)}"
            start += rows
    elif view["dim"] != dim + 2:
        yield f"{said}; its heads lie along dimension {dim + 2}"
    elif shape[dim] % view["heads"]:
        yield f"{said}; {shape[dim]} are not {view['heads']} heads"
    else:
        unit = shape[dim] // view["heads"]
        units = {unit for *_, heads in seen for unit in _units(heads, use, role)}
        # Attention that joins heads, as a difference of two does, still has those of the configuration.
        joined = side == "in" and view["heads"] in facts.heads and all(size % unit == 0 for size in units)
        if units and unit not in units and not joined:
            yield f"{said}; its heads have sizes {sorted(units)}, those of the view {unit}"
        elif not units and not {view["heads"], view["heads"] / 3} & facts.heads and unit not in facts.sizes:
            yield f"{said}; the configuration names neither {view['heads']} heads nor a head size of {unit}"


def _units(heads: tuple[int, ...], use: Use, role: str) -> set[int]:
    """Return the sizes of a head: that of the view, or of its parts where these are q, k and v of one size."""
    parts = {sizes[0] for _, sizes in use.periods if len(set(sizes)) == 1 and sum(sizes) == heads[-1]}
    if 3 * math.gcd(*use.ends) == heads[-1]:
        parts |= {math.gcd(*use.ends)}
    return use.within or (parts if parts and role == "attention_qkv" else {heads[-1]} | parts)
