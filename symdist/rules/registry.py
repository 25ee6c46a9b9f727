"""The registry of rules: the name and options of each rule, and the splits of a matrix under which it runs in place."""

import inspect
import sys
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

# The options of each accumulator with their defaults. Param groups set them in addition to the rule's own options.
ACCUMULATOR_OPTIONS: dict[Accumulator, dict[str, Any]] = {
    "ema": {"momentum": 0.95, "state_dtype": None},
    "heavy_ball": {"momentum": 0.95, "nesterov": True, "state_dtype": None},
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
        name: The name by which param groups and recipes refer to the rule.
        update: The generator `update(matrix, **options)`. It yields requests and returns the update of `matrix.values`,
            or the update and the new state by name.
        accumulator: How gradients are accumulated before the rule runs: "ema", "heavy_ball" or "adam".
        defaults: The rule's own options with their defaults.
        choices: The allowed values of each option that is annotated with `Literal`.
        splits_of: `splits_of(options, rows, columns)` returns the splits under which the rule's requests can be
            answered without moving the matrix.
        check: Raises ValueError for options that contradict each other.
        remembers: `remembers(options)` returns the names of the state that the rule keeps between steps.
        couples: `couples(options)` returns whether the rule couples the matrices of a stage of the residual stream.
        ordered: Whether the rule depends on the positions of columns.
        matrices: Whether the rule needs matrices. False for a coordinate-wise rule, which also accepts vectors.
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

    def options(self, chosen: Mapping[str, Any], *, where: str) -> dict[str, Any]:
        """Fill in default options and check all of them.

        Args:
            chosen: Options that override the defaults of the rule and of its accumulator.
            where: Where the options come from, for example "group 'mine'"; error messages start with it.

        Returns:
            Every option of the rule and of its accumulator, and any other keys of `chosen`.

        Raises:
            ValueError: If a value is not among the allowed choices, has the wrong type, is out of range, or is rejected
                by `check`.

        Example:
            >>> get_rule("muon").options({"momentum": 0.9}, where="group 'mine'")["momentum"]
            0.9
        """
        options = {**ACCUMULATOR_OPTIONS[self.accumulator], **self.defaults, **chosen}
        for key, choices in self.choices.items():
            if type(options[key]) not in map(type, choices) or options[key] not in choices:
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
        """List the names of all state tensors that have the shape of the parameter.

        Args:
            options: The options that the state depends on; None (default) means the rule's defaults.

        Returns:
            The accumulator's names, followed by the rule's own.
        """
        return (*ACCUMULATOR_STATE[self.accumulator], *self.remembers(self.defaults if options is None else options))

    def update_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Select the options that `update` accepts.

        Args:
            options: Options by name; every option of the rule must be among them.

        Returns:
            The rule's own options.
        """
        return {key: options[key] for key in self.defaults}


_RULES: dict[str, Rule] = {}
# The largest values that make sense: with many times more, a step takes hours, or an update vanishes or overflows.
_MOST = {
    **{"eps": 1, "damping": 1, "alpha": 10, "radius": 1e6, "rms": 1e6},
    **{"ns_steps": 100, "sinkhorn_steps": 100, "iterations": 100},
}
_NOT_NEGATIVE = {"eps", "damping", "alpha", "ns_steps", "momentum", "sinkhorn_steps", "beta2"}
_BELOW_ONE = {"momentum", "beta2"}


def _check_value(key: str, value: Any, default: Any) -> None:
    """Raise ValueError if a value does not have the type of the default, or is out of range."""
    if value is default:
        return
    if isinstance(default, bool):
        valid, requirement = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        valid, requirement = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif key == "state_dtype":
        valid, requirement = value == "bfloat16", "'bfloat16', or None for that of the arithmetic"
    elif isinstance(default, float) or default is None:
        valid, requirement = _is_number(value), "a finite number"
    elif key == "betas":
        valid = isinstance(value, Sequence) and len(value) == 2 and all(_is_number(b) and 0 <= b < 1 for b in value)
        requirement = "two numbers in [0, 1)"
    else:
        return
    if valid and key in _NOT_NEGATIVE:
        valid, requirement = value >= 0, "0 or more"
    if valid and key in _MOST:
        valid, requirement = value <= _MOST[key], f"at most {_MOST[key]:g}"
    if valid and key in _BELOW_ONE:
        valid, requirement = value < 1, "in [0, 1)"
    if not valid:
        raise ValueError(f"{key}={value!r} must be {requirement}")


def _is_number(value: Any) -> bool:
    # A whole number may be too large for a float, and then for any arithmetic.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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

    Its keyword-only parameters become the rule's options. An option annotated with `Literal` allows only the values
    listed there. The requests that the generator yields must not depend on the data: all ranks must make the same
    requests, and planning runs the rule on meta tensors.

    Args:
        name: The name by which param groups and recipes refer to the rule.
        splits: The splits of the matrix under which the rule can run in place, by its requests alone: a tuple of "rows"
            and "columns", or a function of (options, rows, columns) that returns one. Under any other split, the whole
            matrix is sent to an owner.
        accumulator: How gradients are accumulated before the rule runs: "ema" (default) or "heavy_ball" momentum, or
            "adam" for the bias-corrected Adam direction.
        check: A function of the options that raises ValueError if they contradict each other. By default, all are
            accepted.
        state: The names of the state that the rule keeps between steps, or a function of the options that returns them;
            none by default. Each state tensor has the shape and layout of the parameter, is initially zero, and is
            passed to the rule in `matrix.state`. A rule with state returns `(update, {name: new})`.
        couples: A function of the options that returns whether the rule requests a `StageSum`; by default it never
            does. If it does, all matrices of a stage must make the same requests in the same order.
        ordered: Whether to reject views that mix columns, which the rule needs if neighbouring columns of a piece must
            also be neighbours in the matrix; False by default.
        matrices: Whether the rule needs matrices and rejects vectors; True by default.

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
            raise ValueError(f"rule {name!r} is already registered; choose another name")
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
    """Look up a registered rule.

    Args:
        name: The rule's name.

    Returns:
        The rule.

    Raises:
        ValueError: If no rule has this name. The message lists all registered names.

    Example:
        >>> get_rule("aro").state_names()
        ('momentum', 'rotation')
    """
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"there is no rule {name!r}; the rules are {', '.join(rule_names())}")
    return _RULES[name]


def rule_names() -> list[str]:
    """List the names of all registered rules in alphabetical order."""
    return sorted(_RULES)
