"""Build param groups from a model and a recipe: each parameter gets a role, and the role decides its rule."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.param_groups import COMMON
from symdist.routing.param_site import ParamSite
from symdist.routing.recipes import Recipe, RecipeLike, load_recipe
from symdist.routing.residual_stream import READS_RESIDUAL, WRITES_RESIDUAL
from symdist.routing.sites import find_sites
from symdist.rules import get_rule

_PARTS = {
    "attention_qkv": ("attention_q", "attention_k", "attention_v"),
    "mlp_gate_up": ("mlp_gate", "mlp_up"),
    "expert_gate_up": ("expert_gate", "expert_up"),
}
# A forward pass reads single rows of these, so a shift of all their rows changes its result.
_LOOKED_UP = ("embedding", "tied_embedding", "position_embedding", "per_layer_embedding")


class UnroutedError(ValueError):
    """Weights have no role, or none of the view that the recipe gives them.

    Args:
        reason: What is not known of the first of them, and how many others there are.
        snippet: TOML, to paste into a recipe: a pattern for each of these weights.

    Attributes:
        reason: As given.
        snippet: As given.
    """

    def __init__(self, reason: str, snippet: str):
        super().__init__(reason, snippet)
        self.reason, self.snippet = reason, snippet

    def __str__(self) -> str:
        return (
            f"{self.reason}. Put a pattern for each before the recipe's others. These are guesses, so check them:\n\n"
            + self.snippet
        )


def route(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    lr: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    strict: bool = False,
) -> list[dict[str, Any]]:
    """Return the param groups of a model by a recipe.

    There is one group for each role and set of options; its parameters are in the order of the model. Frozen parameters
    are left out. The groups can be inspected or changed before they are passed to `symdist.SymDist`. No collectives
    run, but all ranks must call it with the same recipe.

    A recipe may name these views in addition to those of a param group; each parameter gets the concrete view that
    results:

    - "heads": each attention head is a matrix of its own.
    - "groups": each query group of a fused q, k and v is a matrix of its own.
    - "neurons": rows are the hidden neurons of an MLP.
    - "residual": rows are the residual stream.
    - "apart": gate and up projections that share a tensor are two matrices.
    - no view: the tensor as `[out, in]`; of several in one tensor, such as q, k and v one after another, each.

    Args:
        model: The model, sharded or not.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        lr: The learning rate of the matrices; all others are scaled by the same factor. None (default) uses the
            recipe's.
        overrides: Options by role that replace the recipe's. Learning rates in it are used as they are, not scaled.
            None by default.
        strict: Whether to refuse linear layers of which no more is known than that they are matrices, as a recipe with
            `strict = true` does. False (default) gives them the role "matrix" unless the recipe is strict.

    Returns:
        The param groups, with the keys `params`, `param_names`, `role`, `rule`, `view` and further options.

    Raises:
        UnroutedError: If nothing tells what a weight is for, or what its view means for it. The message has patterns to
            paste into the recipe.
        ValueError: If a role has no section, a pattern matches no parameter, or a view does not fit. The message names
            the parameter and what to do.

    Example:
        >>> groups = symdist.route(model, "olmoe", overrides={"router": {"rule": "left_spectral"}})
        >>> optimizer = symdist.SymDist(groups)
    """
    adjusted = load_recipe(recipe).adjusted(lr=lr, overrides=overrides)
    return route_sites(find_sites(model), replace(adjusted, strict=adjusted.strict or strict))


def route_sites(
    sites: Mapping[str, tuple[Any, ParamSite]],
    recipe: Recipe,
    *,
    used_patterns: set[int] | None = None,
) -> list[dict[str, Any]]:
    """Return the param groups of parameters whose sites are known already, see `route`.

    Args:
        sites: Parameters by name, each with its site. Instead of a parameter, any object with a `shape` is accepted.
        recipe: The recipe.
        used_patterns: If the sites are only a part of a model, such as one pipeline stage: a set to which the indices
            of the patterns in use are added. Pass it to `check_patterns` when all parts are known. None (default) means
            that the sites are the whole model, and an unused pattern is an error at once.

    Returns:
        The param groups.

    Raises:
        ValueError: As `route`.
    """
    used: set[int] = set() if used_patterns is None else used_patterns
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    unplaced: list[_Unplaced] = []
    for name, (parameter, site) in sites.items():
        shape = whole_shape(parameter) if isinstance(parameter, Tensor) else tuple(parameter.shape)
        assigned = _options(name, site, recipe, used)
        if assigned is None:
            unplaced.append(_without_role(name, shape, site, recipe))
            continue
        role, options = assigned
        view = _view(name, shape, options, role, site, recipe)
        if isinstance(view, _Unplaced):
            unplaced.append(view)
            continue
        options["view"] = view
        key = (role, repr(sorted(options.items(), key=lambda item: item[0])))
        group = groups.setdefault(key, {"params": [], "param_names": [], "role": role, **options})
        group["params"].append(parameter)
        group["param_names"].append(name)
    if unplaced:
        raise _advice(unplaced, list(sites))
    if used_patterns is None:
        check_patterns(recipe, used, list(sites))
    return list(groups.values())


def check_patterns(recipe: Recipe, used_patterns: set[int], names: Sequence[str]) -> None:
    """Check that every pattern of a recipe applies to some parameter.

    Args:
        recipe: The recipe.
        used_patterns: The indices of the patterns that apply to some parameter of any part of the model.
        names: Names of parameters, some of which are shown in the error message.

    Raises:
        ValueError: If a pattern is not used.
    """
    unused = [pattern["match"] for i, pattern in enumerate(recipe.patterns) if i not in used_patterns]
    if unused:
        raise ValueError(
            f"recipe {recipe.name!r}: pattern {unused[0]!r} applies to no parameter: either it matches no name, or "
            "earlier patterns match all that it does; correct or remove it. Parameters have names like "
            + ", ".join(names[:3])
        )


def _escaped(name: str) -> str:
    return re.sub(r"([\[*?])", r"[\1]", name)


@dataclass(frozen=True, kw_only=True)
class _Unplaced:
    """A weight that cannot be placed: why, and the lines of a pattern that would place it."""

    name: str
    shape: tuple[int, ...]
    reason: str
    lines: str


def _without_role(name: str, shape: tuple[int, ...], site: ParamSite, recipe: Recipe) -> _Unplaced:
    role, *others = (site.role,) if site.role is not None else site.likely
    if recipe.options(role) is None:
        lines = 'rule = "adamw"\nlr = 1e-3'
    else:
        lines = f'role = "{role}"' + (f"  # or {', '.join(others)}" if others else "")
        if site.doubt:
            lines += '\nview = "as_stored"  # or "transposed", if it is stored [in, out]'
    if site.doubt:
        reason = f"{name} {shape} cannot be placed: {site.doubt}"
    elif site.role is not None:
        reason = f"{name} {shape} is a linear layer of which no more is known, and strict routing refuses those"
    else:
        reason = (
            f"{name} {shape} has no role: symdist does not recognize this kind of weight; the likeliest are "
            + ", ".join(site.likely)
        )
    return _Unplaced(name=name, shape=shape, reason=reason, lines=lines)


def _advice(unplaced: Sequence[_Unplaced], names: Sequence[str]) -> UnroutedError:
    """Return an error about weights that cannot be placed, with patterns that can be pasted into the recipe.

    Weights that differ in the numbers of layers only have one pattern, if that matches none of the other names.
    """
    alike: dict[tuple[str, str], list[_Unplaced]] = {}
    for each in unplaced:
        alike.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", _escaped(each.name)), each.lines), []).append(each)
    patterns = []
    for (match, lines), members in alike.items():
        if len(members) > 1 and sum(fnmatchcase(name, match) for name in names) == len(members):
            patterns.append(f'[[patterns]]  # {len(members)} of {members[0].shape}\nmatch = "{match}"\n{lines}')
        else:
            found = (f'[[patterns]]  # {each.shape}\nmatch = "{_escaped(each.name)}"\n{lines}' for each in members)
            patterns += found
    more = len(unplaced) - 1
    others = f" (and {more} other{'s' if more > 1 else ''})" if more else ""
    return UnroutedError(unplaced[0].reason + others, "\n\n".join(patterns))


def _options(name: str, site: ParamSite, recipe: Recipe, used: set[int]) -> tuple[str, dict[str, Any]] | None:
    """Return the role and options of a parameter, or None if its role is unknown and no pattern gives one.

    The index of the pattern that applies, if any, is added to `used`. Raises ValueError, naming the parameter, if the
    recipe has no rule for it or names an unknown rule.
    """
    unknown = site.role is None or (recipe.strict and site.evidence == "type")
    role, pattern_options = None if unknown else recipe.grouped_role(str(site.role)), {}
    if (index := recipe.pattern_of(name)) is not None:
        used.add(index)
        pattern = recipe.patterns[index]
        role = pattern.get("role", role)
        pattern_options = {key: value for key, value in pattern.items() if key not in ("match", "role")}
    if role is None and "rule" not in pattern_options:
        return None
    role = role or "other"
    parts = [part for part in _PARTS.get(role, ()) if part in recipe.sections]
    if parts and role not in recipe.sections:
        raise ValueError(
            f"{name} holds {', '.join(_PARTS[role])} in one tensor, and recipe {recipe.name!r} has a section for "
            f"{parts[0]} that it cannot get: add a section [{role}], or leave [{parts[0]}] out"
        )
    options = recipe.options(role)
    if options is None and "rule" not in pattern_options:
        raise ValueError(
            f"{name} has role {role!r}, for which recipe {recipe.name!r} has no section and no [default]; add one"
        )
    options = {**(options or {}), **pattern_options}
    if "rule" not in options:
        raise ValueError(
            f'recipe {recipe.name!r} names no rule for role {role!r} ({name}); add one, such as rule = "muon"'
        )
    try:
        get_rule(options["rule"])
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name!r}, role {role!r} ({name}): {error}") from None
    if role in _LOOKED_UP and options.get("centered"):
        raise ValueError(
            f"{name}: an {role.replace('_', ' ')} must not be centred, because a shift of all its rows changes the "
            f"model's output; remove centered = true from the options of role {role!r}"
        )
    return role, options


def _view(
    name: str, shape: tuple[int, ...], options: Mapping[str, Any], role: str, site: ParamSite, recipe: Recipe
) -> Any:
    """Return the param-group view that the recipe's view means for this parameter."""
    view = options.get("view")
    if not get_rule(options["rule"]).matrices:
        # A coordinate-wise rule ignores the view, so a section that several rules share may name any.
        return COMMON["view"]
    cuts = view in ("apart", "neurons") or (view is None and role == "mlp_gate_up" and role not in recipe.sections)
    if cuts and site.fused == "unknown" and role == site.role:
        halves = _heads(2, site.transposed, dim=int(site.transposed))
        stacked = {"gate_up": 1, "dim": int(site.transposed)} if view == "neurons" else halves
        return _Unplaced(
            name=name,
            shape=shape,
            reason=f"{name}: to take gates and ups apart or in pairs, it must be known whether all gates come before "
            "all ups or both alternate, and the code of its module does not show that",
            lines=f'role = "{role}"\nview = {_toml(stacked)}  # if all gates come before all ups',
        )
    match view:
        case "apart" if site.fused is not None:
            if site.fused != "stacked":
                raise ValueError(
                    f"{name}: view 'apart' needs a tensor that holds all gates before all ups; in this one they "
                    "alternate, so choose another view"
                )
            return _heads(2, site.transposed, dim=int(site.transposed))
        case None | "apart":
            return _as_it_is(role, site, recipe)
        case "residual":
            found = _residual(role, site, recipe)
            if found is not None:
                return found
            reads, writes = ("as_stored", "transposed") if site.transposed else ("transposed", "as_stored")
            return _Unplaced(
                name=name,
                shape=shape,
                reason=f"{name}: view 'residual' does not know which dimension of a matrix of role {role!r} is the "
                "residual stream",
                lines=f'role = "{role}"\nview = "{reads}"  # or "{writes}", if it writes to the residual stream',
            )
        case "groups":
            if site.groups is None:
                raise ValueError(
                    f"{name}: view 'groups' is only for a tensor that holds q, k and v by query groups; choose another "
                    f"view for role {role!r}"
                )
            return {"heads": site.groups, "dim": 0}
        case "heads":
            if site.heads is not None:
                return _heads(site.heads, site.transposed, dim=site.head_dim_index)
            if site.section_heads:
                return {"sections": list(site.sections), "heads": list(site.section_heads)}
            return _Unplaced(
                name=name,
                shape=shape,
                reason=f"{name}: view 'heads' needs the number of heads, which neither its modules nor their configs "
                "give",
                lines=f'role = "{role}"\nview = "{"transposed" if site.transposed else "as_stored"}"  # or '
                "{ heads = ..., dim = 0 } for heads along rows, dim = 1 for columns",
            )
        case "neurons":
            kind = role.partition("_")[2]
            if role.partition("_")[0] not in ("mlp", "expert") or not kind:
                raise ValueError(
                    f"{name} has role {role!r}, but view 'neurons' is only for MLP and expert matrices; choose another "
                    "view"
                )
            if site.fused == "stacked" and (site.blocks > 1 or site.transposed):
                return {"gate_up": site.blocks, "dim": 1 if site.transposed else 0}
            if site.fused == "interleaved" and not site.transposed:
                # A block for each neuron.
                return {"gate_up": shape[-2] // 2, "dim": 0}
            if site.fused is not None:
                return f"gate_up_{site.fused}"
            return "transposed" if (kind == "down") != site.transposed else "as_stored"
    return view


def _toml(view: Mapping[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {str(value).lower()}" for key, value in view.items()) + " }"


def _heads(count: int, transposed: bool, *, dim: int) -> dict[str, Any]:
    return {"heads": count, "dim": dim, **({"transposed": True} if transposed else {})}


def _as_it_is(role: str, site: ParamSite, recipe: Recipe) -> Any:
    """Return the view of a weight as `[out, in]`; one that holds several matrices is each of them.

    A section of the recipe for the whole of a fused weight takes it as one matrix.
    """
    whole = role in ("attention_qkv", "mlp_gate_up") and role in recipe.sections
    if not whole and site.fused == "stacked" and role == "mlp_gate_up" and site.blocks == 1:
        return _heads(2, site.transposed, dim=int(site.transposed))
    if not whole and site.sections:
        if len(set(site.sections)) == 1:
            return _heads(len(site.sections), site.transposed, dim=int(site.transposed))
        return {"sections": list(site.sections)}
    return "transposed" if site.transposed else "as_stored"


def _residual(role: str, site: ParamSite, recipe: Recipe) -> Any:
    """Return the view whose rows are the residual stream; None if nothing tells which side that is."""
    stream = site.stream if role == site.role else None
    if stream is None and (site.latent or role in READS_RESIDUAL):
        stream = "input"
    elif stream is None and role in WRITES_RESIDUAL:
        stream = "output"
    if stream is None:
        return None
    view = _as_it_is(role, site, recipe)
    if stream == "output":
        return view
    if isinstance(view, str):
        return "as_stored" if view == "transposed" else "transposed"
    kept = {key: value for key, value in view.items() if key != "transposed"}
    return kept if "transposed" in view else {**kept, "transposed": True}
