"""What attacks have in common: hostile values, files made of them, and the one line that is allowed to come of it."""

import contextlib
import copy
import datetime
import io
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

# After so many seconds a case counts as hanging; the slowest takes a few.
_HANGING = 120

NUMBERS: list[Any] = [
    *(0, 1, -1, 2, 3, 7, 1000, 99_999_999, 10**11, 2**31, 2**63 - 1, -(2**63)),
    *(0.0, -0.0, 0.5, 1e-320, 1e-30, 1e9, 1e30, 1e308, math.inf, -math.inf, math.nan),
]
TEXTS = [
    "",
    " ",
    "abc",
    "1",
    "nan",
    "a\nb",
    "\x1b[31mred",
    "[/x]",
    "[bold]",
    ":x:",
    "\u202eabc",
    "../..",
    "/",
    "x" * 5000,
]
OTHERS: list[Any] = [
    *(True, False, [], [[]], [1], ["abc"], [[1, 2], ["a"]], {}, {"a": 1}, [{}], {"a": {"b": [1]}}),
    *(datetime.date(2026, 1, 1), datetime.time(12), datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)),
]
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(TEXTS), st.sampled_from(OTHERS), st.floats(), st.text())

# Files that are no table of settings at all.
RAW = {
    "empty": b"",
    "binary": bytes(range(256)) * 4,
    "NUL": b"a = 'b\0'\n",
    "not UTF-8": b"a = '\xff\xfe'\n",
    "no TOML": b"]]][[[ = = =\n",
    "deep lists": b"a = " + b"[" * 5000 + b"]" * 5000,
    "deep tables": b"a = " + b"{a = " * 5000 + b"1" + b"}" * 5000,
    "deep keys": b".".join([b"a"] * 50_000) + b" = 1\n",
    "a large number": b"a = 0x" + b"f" * 20_000,
    "a large file": b"# a comment\n" * 200_000,
}


class Hanging(BaseException):
    """A case that took longer than any should."""


def as_toml(table: Mapping[str, Any]) -> str:
    """A table as the text of a TOML file; tables in it are written inline."""
    return "".join(f"{json.dumps(key, ensure_ascii=False)} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(key, ensure_ascii=False)} = {_value(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def _places(table: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


@st.composite
def spoilt(draw: Callable[[Any], Any], table: Mapping[str, Any], keys: Sequence[str] = ()) -> dict[str, Any]:
    """A table with one to three of its values replaced or left out, or with further ones, some of them under `keys`."""
    content: dict[str, Any] = copy.deepcopy(dict(table))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([("",), *_places(content)]))
        holder: Any = content
        for key in path[:-1]:
            holder = holder[key]
        values = _alike(holder[path[-1]]) if path != ("",) and draw(st.booleans()) else VALUES
        value = copy.deepcopy(draw(values))
        match draw(st.sampled_from(["replace", "replace", "add", "leave out"])):
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(keys) if keys else st.text(max_size=5))] = value
            case "leave out" if isinstance(holder, dict):
                holder.pop(path[-1], None)
            case _:
                holder[path[-1]] = value
    return content


def _alike(value: Any) -> st.SearchStrategy[Any]:
    """Values of the same type, which only their size or what else there is can make wrong."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(-2, 200)
    if isinstance(value, float):
        return st.floats(-2, 100) | st.sampled_from([value / 3, value * 3])
    return VALUES


def attack(case: st.SearchStrategy[Any], check: Callable[[Any], None], *, batch: int, cases: int) -> None:
    """Run a check on as many cases; another `batch` has others, and one always has the same."""

    @seed(batch)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        # A case that fails is printed as it was drawn; to shrink it may take hours.
        phases=(Phase.generate,),
    )
    @given(case)
    def run(drawn: Any) -> None:
        check(drawn)

    run()


def outcome(program: Callable[[], int | None], folder: Path) -> str:
    """Run a program as a user would, and hold it to what must come of any input.

    Returns:
        What it printed as an error; empty if it succeeded.
    """
    before = sorted(folder.rglob("*"))
    out, err, code = io.StringIO(), io.StringIO(), None
    with _limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program()
        except SystemExit as exit:
            code = exit.code  # type: ignore[assignment]
    for text in (out.getvalue(), err.getvalue()):
        assert all(each.isprintable() or each == "\n" for each in text), repr(text)
    if code in (None, 0):
        return ""
    assert code == 2, err.getvalue()
    assert sorted(folder.rglob("*")) == before
    return err.getvalue()


def one_line(error: str) -> None:
    """Check that an error is one line."""
    assert not error or (error.count("\n") == 1 and error.endswith("\n")), error


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise Hanging

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_HANGING)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
