"""Parse options given on a command line as `role.option=value`, where the value is written as in TOML."""

from collections.abc import Sequence
from typing import Any

from symdist.toml_file import parse_toml


def parse_value(text: str) -> Any:
    """Parse a value as TOML, or keep it as a string if it is not valid TOML.

    Args:
        text: The value, such as `0.01`, `true` or `left_spectral`.

    Returns:
        What TOML reads, such as a number, boolean, list or table; otherwise `text`.

    Example:
        >>> parse_value("0.01"), parse_value("left_spectral")
        (0.01, 'left_spectral')
    """
    try:
        content = parse_toml(f"value = {text}")
    except ValueError:
        return text
    return content["value"] if len(content) == 1 else text


def parse_overrides(words: Sequence[str], *, option: str = "--override") -> dict[str, dict[str, Any]]:
    """Parse words of the form `role.option=value`.

    Args:
        words: The words, such as `router.rule=left_spectral`.
        option: The name of the command-line option, for the error message.

    Returns:
        The values by role and option, as `Recipe.overridden` takes them.

    Raises:
        ValueError: If a word has another form.

    Example:
        >>> parse_overrides(["router.rule=left_spectral", "head.lr=0.1"])
        {'router': {'rule': 'left_spectral'}, 'head': {'lr': 0.1}}
    """
    overrides: dict[str, dict[str, Any]] = {}
    for word in words:
        target, equals, text = word.partition("=")
        role, dot, key = target.partition(".")
        if not (equals and dot and role and key):
            raise ValueError(f"{option} {word}: should be role.option=value, like router.rule=left_spectral")
        overrides.setdefault(role, {})[key] = parse_value(text)
    return overrides
