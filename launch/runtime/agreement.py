"""Makes ranks agree on failures: all of them continue, or all of them raise."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from launch.checkpoints.manifest import CheckpointError, DamagedCheckpointError
from symdist.engines.agreement import gather

T = TypeVar("T")

_LONGEST = 400


def rank_and_world() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_all_ranks(function: Callable[[], T], failed: str, remedy: str, group: dist.ProcessGroup | None = None) -> T:
    """Call ``function`` on all ranks; if it fails on any of them, raise on all of them.

    All ranks of ``group`` must call this.

    Args:
        function: What to do; it must not communicate.
        failed: What failed, the start of the message about an unexpected exception.
        remedy: What the user can do, the end of that message.
        group: The process group; the default group if None.

    Returns:
        What ``function`` returned on this rank.

    Raises:
        DamagedCheckpointError: If every failure is one.
        CheckpointError: If there is any other failure.
    """
    result: T | None = None
    failure: tuple[str, bool] | None = None
    cause: Exception | None = None
    try:
        result = function()
    except CheckpointError as error:
        failure, cause = (str(error), isinstance(error, DamagedCheckpointError)), error
    except Exception as error:  # any exception, since the other ranks wait for the outcome
        failure, cause = (f"{failed}: {_describe_error(error, rank_and_world()[0])}; {remedy}", False), error
    # A dict removes duplicate messages and keeps their order.
    failures = dict.fromkeys(outcome for outcome in gather(failure, group) if outcome is not None)
    if failures:
        kind = DamagedCheckpointError if all(damaged for _, damaged in failures) else CheckpointError
        raise kind("\n".join(text for text, _ in failures)) from cause
    return cast(T, result)


def on_rank_0(function: Callable[[], None], failed: str, remedy: str, group: dist.ProcessGroup | None = None) -> None:
    """Call ``function`` on rank 0 only; if it fails, raise on all ranks, as `on_all_ranks`, which all must call."""
    on_all_ranks(function if rank_and_world()[0] == 0 else lambda: None, failed, remedy, group)


def with_dcp(function: Callable[[], object], failed: str, remedy: str, *, read: bool = False) -> None:
    """Run a collective of ``torch.distributed.checkpoint`` (DCP); all ranks must call it.

    DCP gathers failures from all ranks itself, but raises them as a BaseException full of tracebacks.

    Args:
        function: Calls DCP.
        failed: What failed, the start of the message.
        remedy: What the user can do, the end of the message.
        read: Whether it reads a checkpoint; False (default) if it writes one.

    Raises:
        CheckpointError: On all ranks, if any of them failed.
        DamagedCheckpointError: Likewise, if what it read is to blame, and not the disk or a lack of memory.
    """
    try:
        function()
    except CheckpointException as error:
        causes = {rank: cause for rank, (cause, _) in sorted(error.failures.items())}
        reasons = [_describe_error(cause, rank) for rank, cause in causes.items()]
        innocent = (OSError, MemoryError, torch.OutOfMemoryError, CheckpointError)
        damaged = read and not any(isinstance(cause, innocent) for cause in causes.values())
        kind = DamagedCheckpointError if damaged else CheckpointError
        raise kind(f"{failed}: {'; '.join(reasons)}; {remedy}") from error


def _describe_error(error: BaseException, rank: int) -> str:
    # In one line, and without the advice that PyTorch adds to some of its messages.
    text = " ".join(str(error).split())
    return f"{type(error).__name__} on rank {rank}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"
