"""Options on a command line: `role.option=value`, the value as TOML would read it."""

import tomllib
from collections.abc import Sequence
from typing import Any


def parse_value(text: str) -> Any:
    """A number, boolean, list or table where TOML reads one; else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(words: Sequence[str], *, option: str = "--override") -> dict[str, dict[str, Any]]:
    """`role.option=value` words by role and option; ValueError, naming the command's `option`, for another form."""
    overrides: dict[str, dict[str, Any]] = {}
    for word in words:
        target, equals, text = word.partition("=")
        role, dot, key = target.partition(".")
        if not (equals and dot and role and key):
            raise ValueError(f"{option} {word}: should be role.option=value, as in router.rule=left_spectral")
        overrides.setdefault(role, {})[key] = parse_value(text)
    return overrides
