"""What all ranks do together or not at all: each tells the others how it went before any goes on."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launch.checkpoints.directory import CheckpointError, DamagedCheckpointError
from symdist.engines.agreement import gather

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This rank and their number."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_all_ranks(function: Callable[[], T], failed: str, remedy: str, group: dist.ProcessGroup | None = None) -> T:
    """Call ``function``, which must not communicate; raise on all ranks what went wrong on any of them.

    That is a DamagedCheckpointError only where each trouble is one.
    """
    result: T | None = None
    failure: tuple[str, bool] | None = None
    cause: Exception | None = None
    try:
        result = function()
    except CheckpointError as error:
        failure, cause = (str(error), isinstance(error, DamagedCheckpointError)), error
    except Exception as error:  # whatever it is, the other ranks are waiting to hear of it
        failure, cause = (f"{failed}: {_told(error, rank_and_world()[0])}; {remedy}", False), error
    # Ranks that met the same trouble say so once; a dict keeps their order.
    failures = dict.fromkeys(told for told in gather(failure, group) if told is not None)
    if failures:
        kind = DamagedCheckpointError if all(damaged for _, damaged in failures) else CheckpointError
        raise kind("\n".join(text for text, _ in failures)) from cause
    return cast(T, result)


def on_rank_0(function: Callable[[], None], failed: str, remedy: str, group: dist.ProcessGroup | None = None) -> None:
    """Have the first rank call ``function``; raise on all ranks where it failed."""
    on_all_ranks(function if rank_and_world()[0] == 0 else lambda: None, failed, remedy, group)


def with_dcp(function: Callable[[], object], failed: str, remedy: str) -> None:
    """Run a collective of DCP, which gathers failures itself, but in a BaseException full of tracebacks."""
    try:
        function()
    except CheckpointException as error:
        reasons = [_told(cause, rank) for rank, (cause, _) in sorted(error.failures.items())]
        raise CheckpointError(f"{failed}: {'; '.join(reasons)}; {remedy}") from error


def _told(error: BaseException, rank: int) -> str:
    return f"{type(error).__name__} on rank {rank}: {error}"
