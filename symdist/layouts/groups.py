"""Groups of ranks made from PyTorch process groups and device meshes."""

from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from symdist.layouts.dtensor import mesh_group
from symdist.layouts.grid import Group

Ranks: TypeAlias = dist.ProcessGroup | DeviceMesh
"""The value of an option that names ranks."""


def group_of(option: str, ranks: Ranks | None) -> Group | None:
    """Return the group that a user names in an option.

    Args:
        option: The option's name, for error messages.
        ranks: The option's value.

    Returns:
        The group, or None if the value is None.

    Raises:
        ValueError: If the value is neither None, a process group nor a device mesh.
    """
    try:
        return None if ranks is None else group_from(ranks)
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None


def group_from(ranks: Any) -> Group:
    """Return the group of the ranks of a process group or device mesh.

    Args:
        ranks: A `ProcessGroup`, or a `DeviceMesh`, which stands for all its ranks. This rank must be one of them.

    Returns:
        The group.

    Raises:
        TypeError: If `ranks` is neither a `ProcessGroup` nor a `DeviceMesh`.

    Example:
        >>> group_from(init_device_mesh("cuda", (8,))).size
        8
    """
    if isinstance(ranks, DeviceMesh):
        return mesh_group(ranks)
    if not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(f"{ranks!r} is neither a torch.distributed ProcessGroup nor a DeviceMesh")
    members = tuple(sorted(dist.get_process_group_ranks(ranks)))
    return Group(ranks=members, index=members.index(dist.get_rank()), handle=ranks, through=(ranks,))


def ascending(group: Any) -> Group:
    """Return the group of a process group whose ranks must be in ascending order.

    Args:
        group: The `ProcessGroup`; this rank must be in it.

    Returns:
        The group.

    Raises:
        ValueError: If the ranks of the process group are not in ascending order.
    """
    ranks = group_from(group)
    if dist.get_process_group_ranks(group) != list(ranks.ranks):
        raise ValueError(
            f"the process group has ranks {dist.get_process_group_ranks(group)}, which are not in ascending order; "
            "create it with torch.distributed.new_group(sorted(ranks))"
        )
    return ranks
