"""Converts bare token ids, as nanoGPT writes them, to token shards.

``python -m launch.data.convert train.bin val.bin --dtype uint16 --output shards``
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from launch.data.cache import work_folder
from launch.data.errors import DataError
from launch.data.files import reading
from launch.data.shards import CHUNK_BYTES, ShardWriter


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Convert files of bare token ids to token shards."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Files of little-endian ids without a header. Their names are kept, so name those for validation `val`."""
    dtype: Literal["uint16", "uint32"]
    """Type of the ids."""
    output: Path
    """Folder for the shards; it must not exist yet."""


def convert(conversion: Conversion) -> None:
    """Write the shards of all files, or none of them.

    Raises:
        DataError: If a file cannot be read, is empty or ends within an id, or the folder exists already.
    """
    dtype = np.dtype(conversion.dtype).newbyteorder("<")
    names = [path.stem for path in conversion.files]
    if len(set(names)) < len(names) or not names:
        raise DataError(f"{', '.join(names) or 'no file'}: give files of different names")
    if os.path.lexists(conversion.output):
        raise DataError(f"{conversion.output}: exists already; give a new folder")
    with work_folder(conversion.output) as work:
        for path in conversion.files:
            writer = ShardWriter(work, path.stem, vocabulary=2 ** (8 * dtype.itemsize))
            with reading(path, "file of ids") as file:
                while chunk := file.read(CHUNK_BYTES):
                    if len(chunk) % dtype.itemsize:
                        raise DataError(f"{path}: ends within an id of {dtype.itemsize} bytes; give another --dtype")
                    writer.append(np.frombuffer(chunk, dtype))
            if not writer.close():
                raise DataError(f"{path}: holds no ids; leave it out")
        os.rename(work, conversion.output)


if __name__ == "__main__":
    try:
        convert(tyro.cli(Conversion))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
