"""Reads the files that users write, TOML or JSON, so that whatever they hold becomes plain values or one line."""

from __future__ import annotations

import errno
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# The largest file that symdist ships has 5 kB.
_BYTES = 2**20
_DEPTH = 32
# tomllib takes time that grows with the square of the parts of a dotted key, and a key ends with its line.
_DOTS = 200


def read_toml(path: Path, *, what: str) -> dict[str, Any]:
    """Read a TOML file, or a `.json` file of the same form.

    Args:
        path: The file. It is read as JSON if its name ends in `.json`.
        what: What the file is, such as "recipe"; error messages start with it.

    Returns:
        The table that the file holds. All values in it are booleans, integers of at most 64 bits, floats (NaN and
        infinities included), texts without NUL, lists, tables with texts as keys, and in JSON None.

    Raises:
        ValueError: If there is no such file, it cannot be read, is no regular file, has more than 1 MiB, is not valid,
            is nested deeper than 32 levels, or holds a date, a text with NUL or a number of more than 64 bits. The
            message is `what`, the path and the remedy.

    Example:
        >>> read_toml(Path("launch/configs/olmoe-tiny.toml"), what="config")["model"]
        'olmoe-tiny'
    """
    try:
        content = parse_toml(_read(path), json_form=path.suffix == ".json")
    except FileNotFoundError:
        raise ValueError(f"{what} {path} does not exist; correct the path") from None
    except OSError as error:
        raise ValueError(
            f"{what} {path} cannot be read: {error.strerror}; correct the path or its permissions"
        ) from None
    except ValueError as error:
        raise ValueError(f"{what} {path} {error}") from None
    return content


def parse_toml(text: str, *, json_form: bool = False) -> dict[str, Any]:
    """Parse the text of a TOML file, as `read_toml` does.

    Args:
        text: The text.
        json_form: Whether it is JSON instead. False by default.

    Returns:
        The table.

    Raises:
        ValueError: As `read_toml`; the message continues a sentence that begins with the name of the text.
    """
    form = "JSON" if json_form else "TOML"
    if not json_form and max(line.count(".") for line in text.split("\n")) > _DOTS:
        raise ValueError(f"has a line with more than {_DOTS} dots; divide it")
    try:
        content = json.loads(text) if json_form else tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"is nested too deep; no setting is nested deeper than {_DEPTH} levels") from None
    except ValueError as error:
        raise ValueError(f"is not valid {form}: {error}; correct it") from None
    if not isinstance(content, dict):
        raise ValueError(f"is not valid {form}: it holds no table of settings; correct it")
    for key, problem in _problems(content):
        raise ValueError(f"has {problem} at {key}; correct it")
    return content


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading in bytes, unless it is a pipe or a device, whose reading may never end.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    # Without O_NONBLOCK, opening a pipe waits for its other end.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def _read(path: Path) -> str:
    with open_regular(path) as file:
        content = file.read(_BYTES + 1)
    if len(content) > _BYTES:
        raise ValueError(f"has more than {_BYTES // 2**20} MiB, which no settings have; give another file")
    try:
        return content.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _problems(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the key and the problem of each value that no setting can have."""
    left: list[tuple[str, Any, int]] = [("", table, 0)]
    while left:
        key, value, depth = left.pop()
        if depth > _DEPTH:
            yield key.partition(".")[0], f"tables or lists nested deeper than {_DEPTH} levels"
        elif isinstance(value, dict):
            for name, item in value.items():
                if not _is_text(name):
                    yield key or "the top", f"the key {name!r}, which has a NUL or is no Unicode text,"
                left.append((f"{key}.{name}" if key else name, item, depth + 1))
        elif isinstance(value, list):
            left += ((f"{key}[{i}]", item, depth + 1) for i, item in enumerate(value))
        elif isinstance(value, str):
            if not _is_text(value):
                yield key, "a text with a NUL, or that is no Unicode text,"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            yield key, "a number of more than 64 bits"
        elif not isinstance(value, int | float | None):
            yield key, "a date or time, which no setting is,"


def _is_text(text: str) -> bool:
    """Whether a text has no NUL and no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
