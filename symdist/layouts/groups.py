"""Groups of ranks, from PyTorch's process groups and device meshes."""

from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from symdist.layouts.dtensor import mesh_group
from symdist.layouts.grid import Group

Ranks: TypeAlias = dist.ProcessGroup | DeviceMesh
"""What a user can pass to name ranks."""


def group_of(option: str, ranks: Ranks | None) -> Group | None:
    """Return the group that an option gives, or None where it gives none.

    Args:
        option: The option's name, for error messages.
        ranks: The option's value.

    Raises:
        ValueError: If the value is neither a process group nor a device mesh.
    """
    try:
        return None if ranks is None else group_from(ranks)
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None


def group_from(ranks: Any) -> Group:
    """Return the group of a `ProcessGroup`, or of all ranks of a `DeviceMesh`.

    Raises:
        TypeError: For anything else.
    """
    if isinstance(ranks, DeviceMesh):
        return mesh_group(ranks)
    if not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(f"{ranks!r} is neither a ProcessGroup nor a DeviceMesh")
    members = tuple(sorted(dist.get_process_group_ranks(ranks)))
    return Group(ranks=members, index=members.index(dist.get_rank()), handle=ranks, through=(ranks,))


def ascending(group: Any) -> Group:
    """Return the group of a `ProcessGroup`.

    Raises:
        ValueError: If it does not number its ranks in ascending order.
    """
    found = group_from(group)
    if dist.get_process_group_ranks(group) != list(found.ranks):
        raise ValueError(f"process group of ranks {dist.get_process_group_ranks(group)}: they must ascend")
    return found
