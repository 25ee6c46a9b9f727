"""The error that this package raises for data problems that the user can fix."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from symdist.tools.texts import printable

_LINE_CHARACTERS = 1000
_SHOWN_CHARACTERS = 200
_SHOWN_NAMES = 3


class DataError(ValueError):
    """A source, shard or setting cannot be used; the message names it and the remedy, on one printable line."""

    def __init__(self, message: str) -> None:
        line = printable(message)
        half = _LINE_CHARACTERS // 2
        super().__init__(line if len(line) <= 2 * half else f"{line[:half]}…{line[-half:]}")


def reason(error: BaseException) -> str:
    """Return the beginning of an error's message, on one line."""
    text = " ".join(str(error).split())
    return text[:_SHOWN_CHARACTERS] + "…" * (len(text) > _SHOWN_CHARACTERS) if text else type(error).__name__


def some_of(names: Sequence[object]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return printable(", ".join(str(name) for name in names[:_SHOWN_NAMES]) + more)


@contextmanager
def errors_as(problem: str, remedy: str) -> Iterator[None]:
    """Raise whatever goes wrong inside as a DataError; libraries raise many kinds for bytes they cannot read."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{problem} ({reason(error)}); {remedy}") from error
