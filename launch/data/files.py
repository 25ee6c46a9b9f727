"""Files as they are found on a disk: perhaps links to nowhere, pipes, or gone since they were listed."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.data.errors import DataError, errors_as


def open_file(path: Path, *, links: bool = True) -> io.BufferedReader:
    """Open a regular file for reading.

    Args:
        path: The file.
        links: Whether it may be a symbolic link.

    Raises:
        DataError: If it cannot be read, or is something else, such as a pipe, which would be waited for forever.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        kind = "a link, and it " if path.is_symlink() else ""
        problem = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: {kind}cannot be read ({problem}); check its path, or take it out") from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise DataError(f"{path}: not a regular file; take it out")


@contextmanager
def reading(path: Path, kind: str, *, links: bool = True) -> Iterator[io.BufferedReader]:
    """Open a file as `open_file` does, and raise whatever goes wrong with it as a DataError, by what it should be."""
    problem = f"{path}: not a readable {kind}"
    with errors_as(problem, "fetch it again, or take it out"), open_file(path, links=links) as file:
        yield file


def list_files(root: Path, *, pruned: frozenset[str] = frozenset()) -> list[Path]:
    """List the files below `root` that are not hidden, and links to folders, which are not followed.

    Args:
        root: The folder.
        pruned: Names of folders to leave out.

    Raises:
        DataError: If a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or take it out")

    files = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        # Pruned during the walk, since site-packages can hold a hundred times as many files as the standard library.
        folders[:] = [name for name in folders if name not in pruned | {"__pycache__"} and not name.startswith(".")]
        files += [Path(folder, name) for name in names + links if not name.startswith(".")]
    return sorted(files)


def listing(root: Path, files: list[Path]) -> str:
    """Return the directory with the names, sizes and times of its files.

    Raises:
        DataError: If one of them is not a file.
    """
    lines = []
    for path in files:
        try:
            found = path.stat()
        except OSError as error:
            kind = "a link, and it " if path.is_symlink() else ""
            raise DataError(f"{path}: {kind}cannot be read ({error.strerror}); take it out") from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: not a regular file; take it out")
        lines.append(f"{path.relative_to(root).as_posix()} {found.st_size} {found.st_mtime_ns}")
    return "\n".join([str(root.resolve()), *lines])
