"""Load recipes, which give the rule and options of each parameter role."""

import difflib
import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from symdist.param_groups import A_RATE, COMMON, is_rate
from symdist.routing.roles import FALLBACK, roles_up
from symdist.rules import get_rule, rule_names
from symdist.rules.registry import ACCUMULATOR_OPTIONS
from symdist.toml_file import read_toml

RecipeLike: TypeAlias = "str | Path | Mapping[str, Any] | Recipe"

_FOLDER = Path(__file__).parent
_LOADED: set[Path] = set()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The rules and options of a model's parameters, by role.

    Attributes:
        name: The recipe's name, used in error messages and reports.
        sections: The options of each role: `rule`, `lr`, and further options of the rule and the param group.
        patterns: Exceptions by parameter name, such as `{"match": "layers.*.weird.weight", "role": "matrix"}`. A
            pattern may name a role, give options of its own, or both. The first pattern that matches a name applies.
        schedules: Learning-rate schedules by role, rule or "default", for the training loop to use.
        strict: Whether linear layers of which no more is known than that they are matrices are refused; False by
            default.
    """

    name: str
    sections: Mapping[str, Mapping[str, Any]]
    patterns: tuple[Mapping[str, Any], ...] = ()
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    strict: bool = False

    def options(self, role: str) -> dict[str, Any] | None:
        """Return the options of a role, or of the nearest role it falls back to.

        Args:
            role: The role, such as "attention_q".

        Returns:
            A copy of the options, or None if neither the role nor any role it falls back to has a section.

        Example:
            >>> symdist.load_recipe("olmoe").options("router")["rule"]
            'row_norm'
        """
        return next((dict(self.sections[name]) for name in roles_up(role) if name in self.sections), None)

    def grouped_role(self, role: str) -> str:
        """Return the role under which parameters of a role are grouped.

        This is the role itself, but "norm" for a kind of norm ("input_norm", "output_norm", "qk_norm") that has neither
        a section nor a schedule in the recipe.

        Args:
            role: The role found in the model.

        Returns:
            The role to group by.
        """
        is_named = role in self.sections or role in self.schedules
        return "norm" if FALLBACK.get(role) == "norm" and not is_named else role

    def pattern_of(self, name: str) -> int | None:
        """Return which pattern applies to a parameter: the first that matches its name.

        Args:
            name: The parameter's name.

        Returns:
            The pattern's index; None if none matches.
        """
        return next((i for i, pattern in enumerate(self.patterns) if fnmatchcase(name, pattern["match"])), None)

    def kind_of(self, role: str, rule: str) -> tuple[int, str | None]:
        """Return what parameters must have in common to be stored in one flat vector by an engine.

        Args:
            role: The role of the parameters.
            rule: The name of their rule.

        Returns:
            The number of state tensors of the rule, and the key of the schedule (None if there is none).
        """
        return len(get_rule(rule).state_names()), schedule_key(self.schedules, role, rule)

    def at_rate(self, lr: float | None) -> tuple["Recipe", float]:
        """Scale all learning rates so that the recipe's matrices have the learning rate `lr`.

        The learning rate of the matrices is that of the role "matrix"; without one, the first learning rate in a
        section, or else 1.

        Args:
            lr: The new learning rate of the matrices; None leaves all learning rates as they are.

        Returns:
            The scaled recipe, and the learning rate its matrices have now.

        Raises:
            ValueError: If `lr`, or the recipe's learning rate for matrices, is not a positive number.
        """
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"lr={lr!r} must be a positive number")
        matrix_lr = (self.options("matrix") or {}).get("lr")
        if matrix_lr is None:
            matrix_lr = next((float(section["lr"]) for section in self.sections.values() if "lr" in section), 1.0)
        if not matrix_lr > 0:
            raise ValueError(
                f"recipe {self.name!r}: lr={matrix_lr!r} of its matrices must be positive, because all other learning "
                "rates are scaled relative to it"
            )
        base = matrix_lr if lr is None else float(lr)
        return self.multiplied("lr", base / matrix_lr), base

    def adjusted(
        self, *, lr: float | None = None, overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> "Recipe":
        """Return the recipe with scaled learning rates and with options of some roles replaced.

        Args:
            lr: The learning rate of the matrices; all others are scaled by the same factor. None (default) leaves them.
            overrides: Options by role that replace the recipe's, such as `{"router": {"rule": "left_spectral"}}`.
                Learning rates in it are used as they are, not scaled. None by default.

        Returns:
            The changed recipe.

        Raises:
            ValueError: For an unknown role or rule, or if the recipe's own learning rate for matrices is not positive.
        """
        recipe = self if lr is None else self.at_rate(lr)[0]
        return recipe.overridden(overrides or {})

    def multiplied(self, option: str, factor: float) -> "Recipe":
        """Return the recipe with a numeric option multiplied in every section and pattern that gives it.

        Args:
            option: The option, such as "lr".
            factor: The number to multiply it by.

        Returns:
            The changed recipe.
        """

        def multiply(options: Mapping[str, Any]) -> dict[str, Any]:
            return {key: value * factor if key == option else value for key, value in options.items()}

        return replace(
            self,
            sections={role: multiply(section) for role, section in self.sections.items()},
            patterns=tuple(multiply(pattern) for pattern in self.patterns),
        )

    def overridden(self, overrides: Mapping[str, Mapping[str, Any]]) -> "Recipe":
        """Return the recipe with options of some roles replaced.

        A role without a section of its own starts from the section it falls back to. If an override names another rule,
        options that this rule does not know are dropped. Other unknown options are reported when the optimizer is
        built.

        Args:
            overrides: The new options by role.

        Returns:
            The changed recipe.

        Raises:
            ValueError: For an unknown role or rule, options that are no mapping, or a learning rate that is no number.
        """
        sections = {role: dict(options) for role, options in self.sections.items()}
        for role, changes in overrides.items():
            _check_role(role, f"recipe {self.name!r}: override")
            if not isinstance(changes, Mapping):
                raise ValueError(
                    f"the override of role {role!r} is {changes!r}, which is no mapping; give its options, like "
                    "{'lr': 0.01}"
                )
            _check_rate(changes, f"recipe {self.name!r}: override of {role!r}")
            base = self.options(role) or {}
            if "rule" in changes and changes["rule"] != base.get("rule"):
                rule = get_rule(changes["rule"])
                known = {*rule.defaults, *ACCUMULATOR_OPTIONS[rule.accumulator], *COMMON, "lr"}
                base = {key: value for key, value in base.items() if key in known}
            sections[role] = {**base, **changes}
        return replace(self, sections=sections)


def schedule_key(schedules: Mapping[str, Any], role: str, rule: str) -> str | None:
    """Return the key of the schedule that applies to a role and rule.

    Args:
        schedules: The schedules by role, rule or "default".
        role: The role of the parameters.
        rule: The name of their rule.

    Returns:
        The nearest key among the role and the roles it falls back to, else the rule, else "default"; None if there is
        no schedule under any of these.
    """
    roles = (name for name in roles_up(role) if name != "default")
    return next((key for key in (*roles, rule, "default") if key in schedules), None)


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with symdist, sorted.

    Returns:
        Names that `load_recipe`, `route` and `build_optimizer` accept.

    Example:
        >>> "olmoe" in symdist.recipe_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(recipe: RecipeLike) -> Recipe:
    """Load a recipe: which rule, with which options, each parameter role gets.

    Args:
        recipe: A name (see `recipe_names`), the path of a TOML file, a mapping of the same form, or a `Recipe`, which
            is returned as it is. Its key `rules` may list Python files that register rules; their paths are relative to
            the recipe's file. These files are executed, each once per process.

    Returns:
        The recipe.

    Raises:
        ValueError: If the name, a role or a schedule is unknown, the file is missing or not valid TOML, a pattern has
            no `match`, or a rules file fails or registers no rule.

    Example:
        >>> symdist.load_recipe("olmoe").options("router")["rule"]
        'row_norm'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _parse(dict(recipe), name=str(recipe.get("name", "given")))
    path = Path(recipe)
    if path.suffix != ".toml":
        if str(recipe) not in recipe_names():
            raise ValueError(
                f"there is no recipe {str(recipe)!r}; there are {', '.join(recipe_names())}. For a file of your own, "
                "give its path, which ends in .toml"
            )
        path = _FOLDER / f"{recipe}.toml"
    return _parse(read_toml(path, what="recipe file"), name=path.stem, folder=path.parent)


def _parse(content: dict[str, Any], *, name: str, folder: Path = Path()) -> Recipe:
    content.pop("name", None)
    content.pop("description", None)
    _load_rules(content.pop("rules", []), folder, name=name)
    strict = content.pop("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"recipe {name!r}: strict = {strict!r} should be true or false")
    schedules = content.pop("schedule", {})
    patterns = content.pop("patterns", ())
    for role, options in content.items():
        _check_role(role, f"recipe {name!r}")
        if not isinstance(options, Mapping):
            raise ValueError(
                f"recipe {name!r}: {role!r} should be a section of options, like [{role}], not the value {options!r}"
            )
        _check_rate(options, f"recipe {name!r}: [{role}]")
    if not isinstance(schedules, Mapping) or not all(isinstance(value, Mapping) for value in schedules.values()):
        raise ValueError(f"recipe {name!r}: schedule should consist of sections, like [schedule.default]")
    for key in schedules:
        if key not in (*FALLBACK, *rule_names(), "default"):
            raise ValueError(
                f"recipe {name!r}: {key!r} in [schedule.{key}] is neither a role nor a rule nor 'default'; correct it"
            )
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, Mapping) for pattern in patterns):
        raise ValueError(f"recipe {name!r}: patterns should consist of tables, like [[patterns]]")
    for pattern in patterns:
        if not isinstance(pattern.get("match"), str):
            raise ValueError(
                f"recipe {name!r}: pattern {dict(pattern)!r} has no 'match'; add the parameters' name, like "
                'match = "layers.*.weight"'
            )
        if "role" in pattern:
            _check_role(pattern["role"], f"recipe {name!r}: pattern {pattern['match']!r}")
        _check_rate(pattern, f"recipe {name!r}: pattern {pattern['match']!r}")
    return Recipe(name=name, sections=content, patterns=tuple(patterns), schedules=schedules, strict=strict)


def _load_rules(files: Any, folder: Path, *, name: str) -> None:
    """Execute the Python files in which a recipe registers rules, each once per process."""
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"recipe {name!r}: rules = {files!r} should list Python files, like ['my_rules.py']")
    for file in files:
        # Unlike Path.resolve, this takes links that lead to themselves.
        path = Path(os.path.realpath(folder / file))
        if path in _LOADED:
            continue
        spec = importlib.util.spec_from_file_location(f"symdist_rules_{path.stem}_{len(_LOADED)}", path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ValueError(
                f"recipe {name!r}: rules file {path} does not exist, or is no Python file; paths are relative to the "
                "recipe's file"
            )
        before = set(rule_names())
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"recipe {name!r}: rules file {path} failed: {reason}") from error
        if set(rule_names()) == before:
            raise ValueError(f"recipe {name!r}: rules file {path} registers no rule; mark one with @symdist.rule(…)")
        _LOADED.add(path)


def _check_rate(options: Mapping[str, Any], where: str) -> None:
    """Check a learning rate, by which others are scaled; other options are checked where the optimizer is built."""
    if not is_rate(lr := options.get("lr", 0)):
        raise ValueError(f"{where}: lr={lr!r} {A_RATE}")


def _check_role(role: Any, where: str) -> None:
    if not isinstance(role, str) or role not in (*FALLBACK, "default"):
        matches = difflib.get_close_matches(str(role), (*FALLBACK, "default"), n=1)
        raise ValueError(
            f"{where} names {role!r}, which is no role; "
            + (f"did you mean {matches[0]!r}? The roles are " if matches else "the roles are ")
            + ", ".join([*FALLBACK, "default"])
        )
