"""The rules by name: what each may be told, and under which splits of its matrix it can run in place."""

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

    `update(matrix, **options)` is a generator: it yields requests and returns the update of `matrix.values`, or that
    and its new state by name. `defaults` are its options. `splits_of(options, rows, columns)` names the splits under
    which its requests can be answered without moving the matrix. `remembers(options)` names its state.
    `couples(options)` says whether it couples the matrices of a stage of the residual stream. `ordered` says that it
    goes by the places of columns. `matrices` is False for a coordinate-wise rule.
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
        """Every option of this rule, `given` over the defaults.

        Raises ValueError, naming `where`, for a value that is not a choice or that the rule refuses.
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
        """Names of all state that has the shape of the parameter, that of accumulating gradients first."""
        return (*ACCUMULATOR_STATE[self.accumulator], *self.remembers(self.defaults if options is None else options))

    def update_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The part of `options` that `update` itself is told."""
        return {key: options[key] for key in self.defaults}


_RULES: dict[str, Rule] = {}
_NOT_NEGATIVE = {"eps", "damping", "alpha", "ns_steps", "momentum", "sinkhorn_steps", "beta2"}
_BELOW_ONE = {"momentum", "beta2"}


def _check_value(key: str, value: Any, default: Any) -> None:
    """ValueError for a value that is not of the default's kind, or out of its range."""
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

    Its keyword-only parameters become the rule's options; one annotated with `Literal` admits only those values. Which
    requests it yields must not depend on data.

    Args:
        name: What param groups and recipes call it.
        splits: Under which splits of the matrix its requests are enough, a tuple of "rows" and "columns", or a function
            of (options, rows, columns) that gives one. Under any other the rule runs whole at an owner.
        accumulator: What becomes of the gradient first: "ema" and "heavy_ball" momentum, or "adam"'s direction.
        check: Raises ValueError for options that contradict each other.
        state: What the rule remembers between steps, by name, or a function of the options that says so. Each is a
            tensor of the parameter's shape and layout, zero at the start, found in `matrix.state`; the rule then
            returns `(update, {name: new})`.
        couples: Whether, by its options, it asks for a `StageSum`; then all matrices of a stage ask for the same ones,
            in one order.
        ordered: Whether to refuse views under which the columns of a piece are not next to each other in the matrix.
        matrices: Whether it needs a matrix, and refuses vectors.

    Raises:
        ValueError: For a name already taken.

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
    """Return the rule registered as `name`; ValueError with all names where there is none."""
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(rule_names())}")
    return _RULES[name]


def rule_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_RULES)
