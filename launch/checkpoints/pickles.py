"""What a checkpoint holds as pickles, read or looked through without running any code that they name."""

from __future__ import annotations

import contextlib
import io
import pathlib
import pickle  # nosec B403
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from launch.checkpoints.manifest import CHOOSE, DamagedCheckpointError

METADATA = ".metadata"

_CLASSES: tuple[Any, ...] = (
    *(Metadata, MetadataIndex, TensorStorageMetadata, BytesStorageMetadata),
    *(metadata.ChunkStorageMetadata, metadata.StorageMeta, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING),
    *(planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData),
    *(filesystem._StorageInfo, torch.Size, torch.serialization._get_layout, pathlib.PosixPath, pathlib.WindowsPath),
)
# By name, so that nothing is imported to look a name up. Newer releases of Python have the paths elsewhere.
_HARMLESS = {(one.__module__, one.__qualname__): one for one in _CLASSES}
_HARMLESS |= {("pathlib", path.__name__): path for path in (pathlib.PosixPath, pathlib.WindowsPath)}
_HARMLESS |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _HARMLESS:
            return _HARMLESS[module, name]
        raise pickle.UnpicklingError(
            f"it refers to {module}.{name}, which no checkpoint needs; it was not loaded, as it could run code"
        )


@contextlib.contextmanager
def _classes_unchanged() -> Iterator[None]:
    """Refuse a pickle that changes a class, such as how two keys compare; the classes are as before in any case."""
    before = {one: dict(vars(one)) for one in _CLASSES if isinstance(one, type)}
    changed = []
    try:
        yield
    finally:
        for one, attributes in before.items():
            for name in vars(one).keys() | attributes.keys():
                if vars(one).get(name) is not attributes.get(name):
                    changed.append(f"{one.__name__}.{name}")
                    if name in attributes:
                        setattr(one, name, attributes[name])
                    else:
                        delattr(one, name)
    if changed:
        raise pickle.UnpicklingError(f"it changes {', '.join(changed)}; it was not loaded, as it could run code")


def read_metadata(path: Path) -> Metadata:
    """Read the ``.metadata`` of ``torch.distributed.checkpoint`` (DCP), and check that it holds what DCP writes.

    Args:
        path: The checkpoint's directory.

    Returns:
        The metadata. Every tensor in it is stored whole, in files of this directory.

    Raises:
        DamagedCheckpointError: If it refers to anything but DCP's own types, or its fields have other types or ranges.
    """
    file = path / METADATA
    try:
        with open(file, "rb") as stream, _classes_unchanged():
            content = _Unpickler(stream).load()
        problem = _problem(content, path)
    except Exception as error:  # whatever a pickle can be made to raise
        raise DamagedCheckpointError(f"{file} cannot be read ({type(error).__name__}: {error}); {CHOOSE}") from error
    if problem is not None:
        raise DamagedCheckpointError(f"{file} is damaged: {problem}; {CHOOSE}")
    return content


def _problem(content: Any, path: Path) -> str | None:
    """Describe what in the metadata is not as DCP writes it; None if all is."""
    if type(content) is not Metadata:
        return f"it holds {type(content).__name__} and not DCP's metadata"
    entries, places = content.state_dict_metadata, content.storage_data
    if type(entries) is not dict or type(places) is not dict:
        return "its tables are no tables"
    for name, entry in entries.items():
        if type(name) is not str or type(entry) not in (TensorStorageMetadata, BytesStorageMetadata):
            return f"{name!r} is stored as {type(entry).__name__}"
        if type(entry) is TensorStorageMetadata and not _is_whole(entry):
            return f"the pieces of {name} do not make up a tensor of shape {tuple(entry.size)}"
    sizes: dict[str, int] = {}
    for index, place in places.items():
        if (
            type(index) is not MetadataIndex
            or type(place) is not filesystem._StorageInfo
            or place.transform_descriptors
        ):
            return f"{index!r} is stored as {place!r}"
        # A key that was changed after it became one would be found under another name than it shows.
        shown = MetadataIndex(index.fqn, index.offset) if type(index.fqn) is str else None
        if shown is None or id(places.get(shown)) != id(place):
            return f"{index!r} is not found under its own name"
        name = place.relative_path
        if type(name) is not str or name != Path(name).name:
            return f"{name!r} is not the name of a file in the checkpoint"
        size = sizes[name] if name in sizes else sizes.setdefault(name, (path / name).stat().st_size)
        if not (_is_natural(place.offset) and _is_natural(place.length) and place.offset + place.length <= size):
            return f"{index.fqn} is said to be at {place.offset!r} of {name}, {place.length!r} bytes of {size}"
    return None


def _is_whole(entry: TensorStorageMetadata) -> bool:
    """Whether a tensor's chunks are inside it and together as large as it is."""
    if type(entry.properties) is not metadata.TensorProperties or not isinstance(entry.properties.dtype, torch.dtype):
        return False
    if type(entry.size) is not torch.Size or type(entry.chunks) is not list:
        return False
    elements, seen = 0, set()
    for chunk in entry.chunks:
        if type(chunk) is not metadata.ChunkStorageMetadata:
            return False
        offsets, sizes = chunk.offsets, chunk.sizes
        if type(offsets) is not torch.Size or type(sizes) is not torch.Size or len(offsets) != len(sizes):
            return False
        if len(offsets) != len(entry.size) or min((*offsets, *sizes), default=0) < 0:
            return False
        if any(first + size > whole for first, size, whole in zip(offsets, sizes, entry.size, strict=True)):
            return False
        elements += sizes.numel() if offsets not in seen else 0
        seen.add(offsets)
    return elements == entry.size.numel()


def _is_natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def check_objects(path: Path, content: Metadata) -> None:
    """Check what DCP stores beside tensors, before an engine unpickles it; see `check_torch_file`.

    Args:
        path: The checkpoint's directory.
        content: Its metadata, from `read_metadata`.

    Raises:
        DamagedCheckpointError: If an object refers to anything but plain data and tensors.
    """
    for index, place in content.storage_data.items():
        if type(content.state_dict_metadata.get(index.fqn)) is BytesStorageMetadata:
            with open(path / place.relative_path, "rb") as stream:
                stream.seek(place.offset)
                check_torch_file(io.BytesIO(stream.read(place.length)), f"{index.fqn} in {path / place.relative_path}")


def check_torch_file(
    file: Path | io.BytesIO, name: str, *, harmless: Collection[str] = (), remedy: str = CHOOSE
) -> None:
    """Check that a file of `torch.save` refers to nothing that could run code, without loading it.

    Args:
        file: The file, or its content.
        name: Its name, for the message.
        harmless: Names of classes that it may refer to, beside those that PyTorch takes for safe.
        remedy: The end of the message.

    Raises:
        DamagedCheckpointError: If it refers to others, or is no such file.
    """
    # Those that libraries have registered are safe to read with PyTorch's restricted reader, which engines do not use.
    registered = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - set(harmless)
    except Exception as error:  # whatever a damaged archive can be made to raise
        raise DamagedCheckpointError(f"{name} is no file of torch.save ({error}); {CHOOSE}") from error
    finally:
        torch.serialization.add_safe_globals(registered)
    if unknown:
        raise DamagedCheckpointError(
            f"{name} refers to {', '.join(sorted(unknown))}, which could run code; it was not loaded; {remedy}"
        )


class PlainPlanner(DefaultLoadPlanner):
    """Reads tensors and refuses everything else, which DCP would unpickle without restrictions."""

    def load_bytes(self, read_item: planner.ReadItem, value: io.BytesIO) -> None:
        """Refuse an object.

        Args:
            read_item: What DCP wants to read.
            value: Its pickle.

        Raises:
            UnpicklingError: Always.
        """
        raise pickle.UnpicklingError(
            f"{read_item.dest_index.fqn} is no tensor; it was not loaded, as it could run code"
        )
