"""Writes files whole or not at all, after checking that they can be written before any work is done."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".webp")


def check_output(path: Path | None, *, option: str) -> None:
    """Check that a file can be written. Nothing is created.

    Args:
        path: The file, or None, which is always accepted.
        option: The name of the option that gives it, for the error message.

    Raises:
        ValueError: If it is a folder, or its folder cannot be made or written to.
    """
    if path is None:
        return
    above = next((folder for folder in Path(os.path.realpath(path)).parents if os.path.lexists(folder)), Path("/"))
    if path.name == "" or path.is_dir():
        raise ValueError(f"{option} {str(path)!r} is a folder; give the name of a file")
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path} cannot be written: {above} is no folder, or none that you may write to")


def check_picture(path: Path | None, *, option: str) -> None:
    """Check that a picture can be written and its name says of which kind it is; as `check_output`."""
    if path is not None and path.suffix.lower() not in _PICTURES:
        raise ValueError(f"{option} {path} names no kind of picture; end it in one of {', '.join(_PICTURES)}")
    check_output(path, option=option)


@contextmanager
def drawing(path: Path, *, dpi: int, figsize: tuple[float, float], **subplots: Any) -> Iterator[Any]:
    """Draw a picture, which is written at the end of the context.

    Args:
        path: The image file to write.
        dpi: Pixels per inch.
        figsize: Width and height in inches.
        **subplots: Further arguments of matplotlib's `Figure.subplots`, such as `ncols`.

    Yields:
        The axes, as an array of rows and columns.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A name with a dollar sign is no formula.
    with rc_context({"text.parse_math": False}):
        figure = Figure(figsize=figsize, layout="constrained")
        yield figure.subplots(squeeze=False, **subplots)
        content = io.BytesIO()
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=dpi)
    write_whole(path, content.getvalue())


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file by replacing it at once, so that nobody ever reads an incomplete one. Its folders are created.

    A pipe or device is written to as it is.

    Args:
        path: The file. A link is followed.
        content: The content; text is written in UTF-8.

    Raises:
        OSError: If it cannot be written; a file that was there before is then unchanged.
    """
    target = Path(os.path.realpath(path))
    data = content.encode() if isinstance(content, str) else content
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        # Without O_NONBLOCK, opening a pipe waits for its reader.
        with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:
            os.set_blocking(file.fileno(), True)
            file.write(data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not a file from Python's tempfile, which only its owner may read.
    written = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        written.write_bytes(data)
        os.replace(written, target)
    finally:
        written.unlink(missing_ok=True)
