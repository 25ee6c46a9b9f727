"""The registry of rules: each rule's name, its options, and the splits of a matrix under which it runs in place."""

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from symdist.rules.requests import Asking

MatrixAxis: TypeAlias = Literal["rows", "columns"]
Accumulator: TypeAlias = Literal["ema", "heavy_ball", "adam"]
SplitsOf: TypeAlias = Callable[[Mapping[str, Any], int, int], tuple[MatrixAxis, ...]]
StateOf: TypeAlias = Callable[[Mapping[str, Any]], tuple[str, ...]]
Couples: TypeAlias = Callable[[Mapping[str, Any]], bool]

# The options of each accumulator and their defaults; param groups give them beside the rule's own.
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

    Attributes:
        name: What param groups and recipes call it.
        update: The generator `update(matrix, **options)`. It yields requests and returns the update of `matrix.values`,
            or the update and the new state by name.
        accumulator: How gradients are accumulated before the rule runs: "ema", "heavy_ball" or "adam".
        defaults: The rule's own options and their defaults.
        choices: The allowed values of options annotated with `Literal`.
        splits_of: `splits_of(options, rows, columns)` names the splits under which the requests can be answered without
            moving the matrix.
        check: Raises ValueError for options that contradict each other.
        remembers: `remembers(options)` names the state the rule keeps between steps.
        couples: `couples(options)` tells whether the rule couples the matrices of a stage of the residual stream.
        ordered: Whether the rule depends on the positions of columns.
        matrices: False for a coordinate-wise rule, which also takes vectors.
    """

    name: str
    update: Callable[..., Asking]
    accumulator: Accumulator
    defaults: Mapping[str, Any]
    choices: Mapping[str, tuple[Any, ...]]
    splits_of: SplitsOf
    check: Callable[[Mapping[str, Any]], None]
    remembers: StateOf
    couples: Couples
    ordered: bool
    matrices: bool

    def options(self, given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """Complete and check options.

        Args:
            given: Options that override the defaults of the rule and of its accumulator.
            where: Where the options come from, to start error messages with.

        Returns:
            Every option of the rule and its accumulator, and whatever else `given` holds.

        Raises:
            ValueError: If a value is not one of its choices, is of the wrong kind or out of range, or is refused by
                `check`.
        """
        options = {**ACCUMULATOR_OPTIONS[self.accumulator], **self.defaults, **given}
        for key, choices in self.choices.items():
            if options[key] not in choices:
                raise ValueError(f"{where}: {key}={options[key]!r} is not one of {', '.join(map(repr, choices))}")
        defaults = {**ACCUMULATOR_OPTIONS[self.accumulator], **self.defaults}
        try:
            for key, default in defaults.items():
                if key not in self.choices:
                    _check_value(key, options[key], default)
            self.check(options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return options

    def state_names(self, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """List the names of all state shaped like the parameter, the accumulator's first.

        Args:
            options: The options the state depends on; the rule's defaults if not given.
        """
        return (*ACCUMULATOR_STATE[self.accumulator], *self.remembers(self.defaults if options is None else options))

    def update_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Select from `options` those that `update` takes."""
        return {key: options[key] for key in self.defaults}


_RULES: dict[str, Rule] = {}
_NOT_NEGATIVE = {"eps", "damping", "alpha", "ns_steps", "momentum", "sinkhorn_steps", "beta2"}
_BELOW_ONE = {"momentum", "beta2"}


def _check_value(key: str, value: Any, default: Any) -> None:
    """Raise ValueError for a value that is not of the default's kind, or is out of its range."""
    if value is default:
        return
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif isinstance(default, float) or default is None:
        fits, kind = _is_number(value), "a finite number"
    elif key == "betas":
        fits = isinstance(value, Sequence) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)
        kind = "two numbers in [0, 1)"
    else:
        return
    if fits and key in _NOT_NEGATIVE:
        fits, kind = value >= 0, "0 or more"
    if fits and key in _BELOW_ONE:
        fits, kind = value < 1, "in [0, 1)"
    if not fits:
        raise ValueError(f"{key}={value!r} must be {kind}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def rule(
    name: str,
    *,
    splits: tuple[MatrixAxis, ...] | SplitsOf,
    accumulator: Accumulator = "ema",
    check: Callable[[Mapping[str, Any]], None] = lambda options: None,
    state: tuple[str, ...] | StateOf = (),
    couples: Couples = lambda options: False,
    ordered: bool = False,
    matrices: bool = True,
) -> Callable[[Callable[..., Asking]], Callable[..., Asking]]:
    """Register a generator `f(matrix, *, option=default, …)` as the rule `name`.

    Its keyword-only parameters become the rule's options; one annotated with `Literal` allows only those values. The
    requests it yields must not depend on data: all ranks must ask the same, and planning runs the rule on meta tensors.

    Args:
        name: What param groups and recipes call the rule.
        splits: The splits of the matrix under which the rule's requests are enough: a tuple of "rows" and "columns", or
            a function of (options, rows, columns) that returns one. Under any other split the whole matrix goes to an
            owner.
        accumulator: How gradients are accumulated before the rule runs: "ema" (default) or "heavy_ball" momentum, or
            "adam" for the bias-corrected Adam direction.
        check: Raises ValueError for options that contradict each other; by default accepts all.
        state: Names of what the rule remembers between steps, or a function of the options that returns them; none by
            default. Each is a tensor of the parameter's shape and layout, zero at first, found in `matrix.state`. A
            rule with state returns `(update, {name: new})`.
        couples: Function of the options that tells whether the rule asks for a `StageSum`; by default it never does.
            All matrices of a stage must then make the same requests in the same order.
        ordered: Whether to refuse views that mix columns, so that neighbours in a piece are not neighbours in the
            matrix; False by default.
        matrices: Whether the rule needs matrices and refuses vectors; True by default.

    Returns:
        A decorator that registers the generator and returns it unchanged.

    Raises:
        ValueError: If the name is already taken.

    Example:
        >>> @rule("rms_rows", splits=("rows", "columns"))
        ... def rms_rows(matrix, *, eps: float = 1e-8):
        ...     squares = yield Sum(values=matrix.values.square().sum(-1, keepdim=True), across="columns")
        ...     return matrix.values / ((squares / matrix.columns).sqrt() + eps)
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
            remembers=state if callable(state) else lambda options: state,
            couples=couples,
            ordered=ordered,
            matrices=matrices,
        )
        return update

    return register


def get_rule(name: str) -> Rule:
    """Look up the rule registered as `name`.

    Raises:
        ValueError: If there is none; the message lists all names.
    """
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(rule_names())}")
    return _RULES[name]


def rule_names() -> list[str]:
    """List all registered names, sorted."""
    return sorted(_RULES)
