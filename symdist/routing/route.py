"""Build param groups from a model and a recipe: each parameter gets a role, and the role decides its rule."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from symdist.layouts.fsdp1 import whole_shape
from symdist.param_groups import COMMON
from symdist.routing.recipes import Recipe, RecipeLike, load_recipe
from symdist.routing.residual_stream import READS_RESIDUAL, WRITES_RESIDUAL
from symdist.routing.sites import ParamSite, find_sites
from symdist.rules import get_rule

_LOOKED_UP = ("embedding", "tied_embedding")


def route(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    lr: float | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return the param groups of a model by a recipe.

    There is one group for each role and set of options; its parameters are in the order of the model. Frozen parameters
    are left out. The groups can be inspected or changed before they are passed to `symdist.SymDist`. No collectives
    run.

    A recipe may name these views in addition to those of a param group; each parameter gets the concrete view that
    results:

    - "heads": each attention head is a matrix of its own.
    - "groups": each query group of a fused q, k and v is a matrix of its own.
    - "neurons": rows are the hidden neurons of an MLP.
    - "residual": rows are the residual stream.
    - "apart": gate and up projections that share a tensor are two matrices.
    - no view: the tensor as `[out, in]`.

    Args:
        model: The model, sharded or not.
        recipe: A recipe's name, the path of a TOML file, a mapping of the same form, or a `Recipe`.
        lr: The learning rate of the matrices; all others are scaled by the same factor. None (default) uses the
            recipe's.
        overrides: Options by role that replace the recipe's. Learning rates in it are used as they are, not scaled.
            None by default.

    Returns:
        The param groups, with the keys `params`, `param_names`, `role`, `rule`, `view` and further options.

    Raises:
        ValueError: If a matrix has no known role, a role has no section, a pattern matches no parameter, or a view does
            not fit. The message names the parameter and what to do.

    Example:
        >>> groups = symdist.route(model, "olmoe", overrides={"router": {"rule": "left_spectral"}})
        >>> optimizer = symdist.SymDist(groups)
    """
    return route_sites(find_sites(model), load_recipe(recipe).adjusted(lr=lr, overrides=overrides))


def route_sites(
    sites: Mapping[str, tuple[Any, ParamSite]], recipe: Recipe, *, taken: set[int] | None = None
) -> list[dict[str, Any]]:
    """Return the param groups of parameters whose sites are known already, see `route`.

    Args:
        sites: Parameters by name, each with its site. Instead of a parameter, any object with a `shape` is accepted.
        recipe: The recipe.
        taken: If the sites are only a part of a model, such as one pipeline stage: a set to which the indices of the
            patterns in use are added. Pass it to `check_patterns` when all parts are known. None (default) means that
            the sites are the whole model, and unused patterns are reported at once.

    Returns:
        The param groups.

    Raises:
        ValueError: As `route`.
    """
    used: set[int] = set() if taken is None else taken
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    lost: list[tuple[str, tuple[int, ...], ParamSite]] = []
    for name, (parameter, site) in sites.items():
        shape = whole_shape(parameter) if isinstance(parameter, Tensor) else tuple(parameter.shape)
        found = _options(name, site, recipe, used)
        if found is None:
            lost.append((name, shape, site))
            continue
        role, options = found
        options["view"] = _view(name, options, role, site)
        key = (role, repr(sorted(options.items(), key=lambda item: item[0])))
        group = groups.setdefault(key, {"params": [], "param_names": [], "role": role, **options})
        group["params"].append(parameter)
        group["param_names"].append(name)
    if lost:
        raise ValueError(_advice(lost, recipe))
    if taken is None:
        check_patterns(recipe, used, list(sites))
    return list(groups.values())


def check_patterns(recipe: Recipe, taken: set[int], names: Sequence[str]) -> None:
    """Check that every pattern of a recipe applies to some parameter.

    Args:
        recipe: The recipe.
        taken: The indices of the patterns that apply to some parameter.
        names: Names of parameters, some of which are shown in the error message.

    Raises:
        ValueError: If a pattern is not used.
    """
    unused = [pattern["match"] for i, pattern in enumerate(recipe.patterns) if i not in taken]
    if unused:
        raise ValueError(
            f"recipe {recipe.name!r}: pattern {unused[0]!r} takes no parameter (none matches, or an earlier pattern "
            "took them); names look like " + ", ".join(names[:3])
        )


def _advice(lost: Sequence[tuple[str, tuple[int, ...], ParamSite]], recipe: Recipe) -> str:
    """Return an error message on weights without a role, with a pattern for each that can be pasted into the recipe."""
    patterns = []
    for name, shape, site in lost:
        role = site.likely
        if recipe.options(role) is None:
            wanted = 'rule = "adamw"\nlr = 1e-3'
        else:
            wanted = f'role = "{role}"'
        match = re.sub(r"([\[*?])", r"[\1]", name)
        patterns.append(f'[[patterns]]  # {shape}\nmatch = "{match}"\n{wanted}')
    return (
        f"{lost[0][0]} {lost[0][1]} has no role: it is a weight of a kind symdist does not know"
        + (f", and so {'is' if len(lost) == 2 else 'are'} {len(lost) - 1} more" if len(lost) > 1 else "")
        + ". Name what each is in the recipe, as in these patterns, which are guesses:\n\n"
        + "\n\n".join(patterns)
    )


def _options(name: str, site: ParamSite, recipe: Recipe, used: set[int]) -> tuple[str, dict[str, Any]] | None:
    """Return the role and options of a parameter, or None if its role is unknown and no pattern gives one.

    Raises ValueError, naming the parameter, if the recipe has no rule for it or names an unknown rule.
    """
    role, own = None if site.role is None else recipe.grouped_role(site.role), {}
    for i, pattern in enumerate(recipe.patterns):
        if fnmatchcase(name, pattern["match"]):
            used.add(i)
            role = pattern.get("role", role)
            own = {key: value for key, value in pattern.items() if key not in ("match", "role")}
            break
    if role is None and "rule" not in own:
        return None
    role = role or "other"
    options = recipe.options(role)
    if options is None and "rule" not in own:
        raise ValueError(f"{name} has role {role!r}, for which recipe {recipe.name!r} has no section and no [default]")
    options = {**(options or {}), **own}
    if "rule" not in options:
        raise ValueError(f"recipe {recipe.name!r} names no rule for role {role!r} ({name})")
    try:
        get_rule(options["rule"])
    except ValueError as error:
        raise ValueError(f"recipe {recipe.name!r}, role {role!r} ({name}): {error}") from None
    if role in _LOOKED_UP and options.get("centered"):
        raise ValueError(
            f"{name}: an {role.replace('_', ' ')} must not be centred, for a look-up changes when all rows shift; "
            "remove centered = true"
        )
    return role, options


def _view(name: str, options: Mapping[str, Any], role: str, site: ParamSite) -> Any:
    """Return the param-group view that the recipe's view means for this parameter."""
    view = options.get("view")
    if not get_rule(options["rule"]).matrices:
        # A coordinate-wise rule ignores the view, so a section that several rules share may name any.
        return COMMON["view"]
    match view:
        case "apart" if site.fused is not None:
            if site.fused != "stacked" or site.transposed:
                raise ValueError(f"{name}: view 'apart' needs gate and up one after the other in rows, as [2r, d]")
            return {"heads": 2, "dim": 0}
        case None | "apart":
            return "transposed" if site.transposed else "as_stored"
        case "residual":
            if not site.latent and role not in READS_RESIDUAL | WRITES_RESIDUAL:
                raise ValueError(
                    f"{name} has role {role!r}, of which it is not known which side is the residual stream: say view = "
                    '"as_stored" or "transposed", whichever it is of the stored [out, in], in a pattern or section'
                )
            return "as_stored" if (role in WRITES_RESIDUAL) != site.transposed else "transposed"
        case "groups":
            if site.groups is None:
                raise ValueError(f"{name} has no query groups in one tensor: view 'groups' is for a fused q, k and v")
            return {"heads": site.groups, "dim": 0}
        case "heads":
            if site.heads is None:
                raise ValueError(
                    f"{name}: view 'heads' needs the number of heads, which its module does not tell; "
                    "say view = { heads = h, dim = 0 or 1 } in a pattern or section, or leave the view out"
                )
            return {"heads": site.heads, "dim": site.head_dim_index}
        case "neurons":
            kind = role.partition("_")[2]
            if role.partition("_")[0] not in ("mlp", "expert") or not kind:
                raise ValueError(f"{name} has role {role!r}: view 'neurons' is for MLP and expert matrices")
            if site.fused == "stacked" and (site.blocks > 1 or site.transposed):
                return {"gate_up": site.blocks, "dim": 1 if site.transposed else 0}
            if site.fused is not None:
                return f"gate_up_{site.fused}"
            return "transposed" if (kind == "down") != site.transposed else "as_stored"
    return view
