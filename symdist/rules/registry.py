"""The rules by name: what each may be told, and under which splits of its matrix it can run in place."""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from symdist.rules.requests import Asking

Split: TypeAlias = Literal["rows", "columns"]
Accumulator: TypeAlias = Literal["ema", "heavy_ball", "adam"]
SplitsOf: TypeAlias = Callable[[Mapping[str, Any], int, int], tuple[Split, ...]]

# What each way of accumulating gradients is told, beside the rule's own options.
ACCUMULATOR_OPTIONS: dict[Accumulator, dict[str, Any]] = {
    "ema": {"momentum": 0.95},
    "heavy_ball": {"momentum": 0.95, "nesterov": True},
    "adam": {"betas": (0.9, 0.95), "eps": 1e-8},
}
ACCUMULATOR_STATE: dict[Accumulator, tuple[str, ...]] = {
    "ema": ("momentum",),
    "heavy_ball": ("momentum",),
    "adam": ("exp_avg", "exp_avg_sq"),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule:
    """A registered rule.

    `update(matrix, **options)` is a generator: it yields requests and returns the update of `matrix.values`.
    `defaults` are its options. `splits_of(options, rows, columns)` names the splits under which its requests
    can be answered without moving the matrix. `matrices` is False for a coordinate-wise rule.
    """

    name: str
    update: Callable[..., Asking]
    accumulator: Accumulator
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]]
    splits_of: SplitsOf
    check: Callable[[Mapping[str, Any]], None]
    matrices: bool

    def options(self, given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """Every option of this rule, `given` over the defaults.

        Raises ValueError, naming `where`, for a value that is not a choice or that the rule refuses.
        """
        options = {**ACCUMULATOR_OPTIONS[self.accumulator], **self.defaults, **given}
        for key, choices in self.choices.items():
            if options[key] not in choices:
                raise ValueError(f"{where}: {key}={options[key]!r} is not one of {', '.join(map(repr, choices))}")
        for key in ("momentum",):
            if key in options and not 0 <= options[key] < 1:
                raise ValueError(f"{where}: {key}={options[key]!r} must lie in [0, 1)")
        try:
            self.check(options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return options

    def update_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `options` that `update` itself is told."""
        return {key: options[key] for key in self.defaults}


_RULES: dict[str, Rule] = {}


def rule(
    name: str,
    *,
    splits: tuple[Split, ...] | SplitsOf,
    accumulator: Accumulator = "ema",
    check: Callable[[Mapping[str, Any]], None] = lambda options: None,
    matrices: bool = True,
) -> Callable[[Callable[..., Asking]], Callable[..., Asking]]:
    """Register a generator `f(matrix, *, option=default, …)` as the rule `name`.

    Its keyword-only parameters become the rule's options; one annotated with `Literal` admits only those values.
    `splits` is a tuple, or a function of (options, rows, columns). Raises ValueError for a name already taken.
    """

    def register(update: Callable[..., Asking]) -> Callable[..., Asking]:
        if name in _RULES:
            raise ValueError(f"rule {name!r} is already registered")
        parameters = [p for p in inspect.signature(update).parameters.values() if p.kind is p.KEYWORD_ONLY]
        hints = typing.get_type_hints(update)
        _RULES[name] = Rule(
            name=name,
            update=update,
            accumulator=accumulator,
            defaults={p.name: p.default for p in parameters},
            choices={
                p.name: typing.get_args(hints[p.name])
                for p in parameters
                if typing.get_origin(hints.get(p.name)) is Literal
            },
            splits_of=splits if callable(splits) else lambda options, rows, columns: splits,
            check=check,
            matrices=matrices,
        )
        return update

    return register


def get_rule(name: str) -> Rule:
    """The rule registered as `name`; ValueError with all names where there is none."""
    if name not in _RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(rule_names())}")
    return _RULES[name]


def rule_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_RULES)
