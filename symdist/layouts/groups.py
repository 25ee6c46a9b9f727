"""Groups of ranks, from what PyTorch has for them."""

from typing import Any, TypeAlias

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from symdist.layouts.dtensor import mesh_group
from symdist.layouts.grid import Group

Ranks: TypeAlias = dist.ProcessGroup | DeviceMesh
"""How a user names ranks."""


def group_of(option: str, ranks: Ranks | None) -> Group | None:
    """The group that an option names; ValueError, naming the option, for what is neither group nor mesh."""
    try:
        return None if ranks is None else group_from(ranks)
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from None


def group_from(ranks: Any) -> Group:
    """The group of a `ProcessGroup` or of all ranks of a `DeviceMesh`; TypeError for anything else."""
    if isinstance(ranks, DeviceMesh):
        return mesh_group(ranks)
    if not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(f"{ranks!r} is neither a ProcessGroup nor a DeviceMesh")
    members = tuple(sorted(dist.get_process_group_ranks(ranks)))
    return Group(ranks=members, index=members.index(dist.get_rank()), handle=ranks, through=(ranks,))


def ascending(group: Any) -> Group:
    """The group of a `ProcessGroup`; ValueError where it does not number its ranks in ascending order."""
    found = group_from(group)
    if dist.get_process_group_ranks(group) != list(found.ranks):
        raise ValueError(f"process group of ranks {dist.get_process_group_ranks(group)}: they must ascend")
    return found
