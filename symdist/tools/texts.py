"""Shows texts that users, files and other programs wrote."""

import contextlib
import io
import sys
from collections.abc import Iterator


def printable(text: object) -> str:
    r"""Return a text in which no character acts on a terminal or hides: such characters are written as escapes.

    These are control characters, among them newlines, tabs and ESC; those that change the direction of writing or have
    no width; and halves of characters, which no file or terminal can take.

    Args:
        text: The text, or an object whose `str` is shown.

    Returns:
        One line of text.

    Example:
        >>> printable("runs/\x1b[31mred")
        'runs/\\x1b[31mred'
    """
    shown = str(text)
    return (
        shown if shown.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown)
    )


@contextlib.contextmanager
def printable_errors() -> Iterator[None]:
    """Make what is printed to stderr printable, for a parser that repeats options as they were given."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    finally:
        sys.stderr.writelines(f"{printable(line)}\n" for line in said.getvalue().splitlines())
