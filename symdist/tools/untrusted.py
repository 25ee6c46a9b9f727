"""Reads JSON that anyone may have written: what cannot be shown, or is not of the expected form, never gets further."""

from __future__ import annotations

import functools
import json
import math
from typing import Any, get_origin

from pydantic import TypeAdapter, ValidationError

from symdist.tools.texts import printable

# What is shown of a text, and how deep values may be nested.
_CHARACTERS = 2000
_DEPTH = 32


def parse_json(text: bytes) -> Any:
    """Parse JSON, and make of it what can be shown.

    Args:
        text: The JSON; NaN and infinities are allowed.

    Returns:
        Its content. Texts and keys are printable and not too long, and integers of more than 64 bits are infinities.

    Raises:
        ValueError: If it is not JSON, or nested too deep.

    Example:
        >>> parse_json(b'{"loss": 1e999}')
        {'loss': inf}
    """
    try:
        return _shown(json.loads(text), 0)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def misfits(form: Any, content: Any) -> dict[Any, str]:
    """Return what in a value is not of a form.

    Args:
        form: The form, such as a TypedDict, whose unknown keys are allowed.
        content: The value.

    Returns:
        The problems, by the key or index of what has them.
    """
    try:
        _adapter(form).validate_python(content, strict=True)
    except ValidationError as error:
        return {next(iter(each["loc"]), ""): each["msg"] for each in error.errors(include_url=False)}
    return {}


def fitting(form: Any, content: Any) -> tuple[Any, list[str]]:
    """Return what in a table or list is of a form.

    Args:
        form: A TypedDict, or a list of them.
        content: The value.

    Returns:
        The table without the keys whose values are not of the form, and these keys; a list only as a whole.

    Raises:
        ValueError: If it is no table or list, or lacks what the form requires.
    """
    kind = list if get_origin(form) is list else dict
    if not isinstance(content, kind):
        raise ValueError(f"it holds no JSON {'list' if kind is list else 'object'}")
    wrong = misfits(form, content)
    if wrong and isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in wrong}
        wrong, left_out = misfits(form, content), list(wrong)
    else:
        left_out = []
    for key, problem in wrong.items():
        raise ValueError(f"{key}: {problem}")
    return content, left_out


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)


def _shown(content: Any, depth: int) -> Any:
    if depth > _DEPTH:
        raise ValueError("it is nested too deep")
    if isinstance(content, str):
        return printable(content if len(content) <= _CHARACTERS else content[:_CHARACTERS] + "…")
    if isinstance(content, dict):
        return {_shown(key, 0): _shown(value, depth + 1) for key, value in content.items()}
    if isinstance(content, list):
        return [_shown(item, depth + 1) for item in content]
    if isinstance(content, int) and abs(content) >= 2**63:
        return math.inf if content > 0 else -math.inf
    return content
