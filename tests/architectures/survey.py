"""Route every causal language model of the installed transformers and judge it: verdicts, one by one, and cached."""

import functools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from symdist import load_recipe
from symdist.routing.route import route_sites
from symdist.routing.sites import find_sites
from tests.architectures.judge import Facts, ViewKind, facts_of, judge
from tests.architectures.models import Unbuilt, build
from tests.architectures.uses import Use, follow

# Of embeddings and heads, too, the residual stream is one side.
RESIDUAL: dict[str, Any] = {
    "default": {"rule": "aro", "view": "residual", "lr": 0.01},
    "other": {"rule": "adamw", "lr": 0.01},
    "router": {"rule": "adamw", "lr": 0.01},
}
RECIPES: tuple[tuple[str | dict[str, Any], ViewKind], ...] = (
    ("muon", "plain"),
    ("olmoe", "heads"),
    ("small-moe", "heads"),
    (RESIDUAL, "residual"),
)
Status = Literal["right", "needs a line", "wrong", "not built"]

SPECIAL = {
    "tied_embedding": "tied embedding",
    "position_embedding": "learned positions",
    "per_layer_embedding": "embeddings by layer",
    "attention_qkv": "fused q, k and v",
    "attention_gate": "attention gates",
    "indexer": "indexer",
    "adapter": "adapters",
    "gate": "gates of few rows",
    "router_bias": "router with bias",
    "sink": "attention sinks",
    "convolution": "convolutions",
    "state_space": "state-space parameters",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What routing does with an architecture at its default configuration.

    Attributes:
        model_type: Its name in transformers.
        status: "right"; "needs a line" if routing refuses weights and takes them with the patterns that it prints;
            "wrong"; or "not built".
        faults: What is wrong, a line for each kind of weight.
        lines: The kinds of weights for which patterns are needed, and whether only by the view "residual".
        special: What is special about how it stores its weights.
        reason: Why it does not build; empty if it does.
        raised_by: The module that raised that error; empty if it builds.
        seen: The number of weights of two or more dimensions that the forward pass that was followed came to.
        unseen: The number of those that it did not come to, which are judged by their classes.
        ended: The error that ended that pass early; empty if it ran through.
    """

    model_type: str
    status: Status
    faults: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    special: tuple[str, ...] = ()
    reason: str = ""
    raised_by: str = ""
    seen: int = 0
    unseen: int = 0
    ended: str = ""


@functools.cache
def verdict(model_type: str, *, thorough: bool = False) -> Verdict:
    """Route an architecture by a recipe of each kind of view, or by all if `thorough`, and judge the groups."""
    model = build(model_type)
    if isinstance(model, Unbuilt):
        return Verdict(model_type=model_type, status="not built", reason=model.reason, raised_by=model.module)
    followed = follow(model)
    facts = facts_of(model, followed)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    faults: dict[str, None] = {}
    lines: dict[str, str] = {}
    special: tuple[str, ...] = ()
    sites = find_sites(model)  # `symdist.route` in its two halves, so that the model is searched once.
    for recipe, asked in RECIPES:
        if recipe == "small-moe" and not thorough:
            continue
        try:
            groups, pasted = routed(sites, recipe)
        except ValueError as error:
            faults[f"{asked}: {' '.join(str(error).split())}"] = None
            continue
        # The view "residual" has no meaning for a weight that neither reads the stream nor writes to it.
        needed = (name for name in pasted if asked != "residual" or not _apart(name, facts))
        for kind in dict.fromkeys(map(kind_of, needed)):
            lines.setdefault(kind, f"`{kind}`{' by view `residual`' if asked == 'residual' else ''}")
        # What is pasted is a guess, which the message asks to check.
        found = [line for line in judge(facts, groups, trainable, asked) if line.split()[0] not in pasted]
        faults |= dict.fromkeys(f"{asked}: {line}" for line in found)
        if asked == "plain":
            special = tuple(_special(facts, groups))
    return Verdict(
        model_type=model_type,
        status="wrong" if faults else "needs a line" if lines else "right",
        faults=tuple(faults),
        lines=tuple(lines.values()),
        special=special,
        seen=sum(len(facts.shapes[name]) > 1 and use != Use() for name, use in facts.uses.items()),
        unseen=sum(len(facts.shapes[name]) > 1 and use == Use() for name, use in facts.uses.items()),
        ended=followed.error or "",
    )


def routed(
    sites: Mapping[str, Any], recipe: str | Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """Route what is in a model, with the patterns that refusals print pasted into the recipe.

    Returns:
        The groups, and the patterns that were pasted, by the name of the weight.

    Raises:
        ValueError: If a refusal prints no patterns, or these do not help.
    """
    base = load_recipe(recipe)
    pasted: dict[str, dict[str, Any]] = {}
    for _ in range(4):
        try:
            # One pattern may be for the weights of many layers.
            patterns = {pattern["match"]: pattern for pattern in pasted.values()}.values()
            return route_sites(sites, replace(base, patterns=(*patterns, *base.patterns))), pasted
        except ValueError as error:
            message = str(error)
            if "[[patterns]]" not in message:
                raise
            patterns = tomllib.loads(message[message.index("[[patterns]]") :])["patterns"]
            pasted |= {name: pattern for pattern in patterns for name in sites if fnmatchcase(name, pattern["match"])}
    raise ValueError(f"with what it prints pasted four times, it is still refused: {message}")


def kind_of(name: str) -> str:
    """Return a parameter's name with N for the number of its layer."""
    return re.sub(r"\.\d+(?=\.)", ".N", name)


def _apart(name: str, facts: Facts) -> bool:
    """Whether a weight was seen to have no part in the residual stream."""
    use = facts.uses[facts.twins.get(name, name)]
    return use != Use() and not use.reads and not use.writes


def _special(facts: Facts, groups: list[dict[str, Any]]) -> list[str]:
    """Say how a model stores its weights where it is not one [out, in] matrix for each, by what its forward does."""
    roles = {name: group["role"] for group in groups for name in group["param_names"]}
    views = {name: group["view"] for group in groups for name in group["param_names"]}
    found: dict[str, None] = {}
    heads: dict[str, set[int]] = {}
    for name, use in facts.uses.items():
        role = roles.get(name, "")
        if role.startswith("expert") and len(facts.shapes[name]) == 3:
            found["experts stored [in, out]" if use.stored == {"in_out"} else "experts stored [out, in]"] = None
            if use.alternating:
                found["gate and up of an expert alternate"] = None
        elif use.stored == {"in_out"} and len(facts.shapes[name]) == 2:
            found["weights stored [in, out]"] = None
        if role == "mixer_in" and isinstance(views[name], Mapping) and "sections" in views[name]:
            found[f"fused in-projection: {', '.join(map(str, views[name]['sections']))} rows"] = None
        if role == "attention_qkv" and use.periods:
            found["fused q, k and v, head by head"] = None
        elif role in SPECIAL:
            found[SPECIAL[role]] = None
        if role in ("attention_q", "attention_o"):
            sizes = {shape[-1] for shape in use.heads.values()} or {size for _, size in use.heads_in}
            heads.setdefault(role, set()).update(sizes)
    q, v = heads.get("attention_q", set()), heads.get("attention_o", set())
    for sizes, letter in ((q, "q"), (v, "v")):
        if len(sizes) > 1:
            found[f"heads of {letter} differ by layer: {_listed(sizes)}"] = None
    if q and q == {2 * size for size in v}:
        found["q and its gate in one weight, head by head"] = None
    elif q and v and not q & v:
        found[f"heads of q and v differ: {_listed(q)} and {_listed(v)}"] = None
    return list(found)


def _listed(sizes: set[int]) -> str:
    return ", ".join(map(str, sorted(sizes)))
