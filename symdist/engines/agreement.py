"""Gathers values and failures of all ranks, so that either all ranks continue or all raise."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather every rank's value; all ranks of `group` must call it.

    Args:
        value: This rank's value, which must pickle.
        group: The process group; the default group if None.

    Returns:
        The values in rank order; this rank's alone if torch.distributed is not initialized.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_unless_failed(
    value: T, failure: str | None, *, error: type[Exception] = ValueError, group: dist.ProcessGroup | None = None
) -> list[T]:
    """Gather every rank's value, or raise on all ranks if any has failed; all ranks of `group` must call it.

    Args:
        value: This rank's value, which must pickle.
        failure: What went wrong on this rank; None if nothing did.
        error: The exception type to raise; its message has each distinct failure once, in rank order.
        group: The process group; the default group if None.

    Returns:
        The values in rank order.

    Raises:
        Exception: Of type `error`, on all ranks, if any rank has failed.

    Example:
        >>> failure = None if path.exists() else f"{path} does not exist"
        >>> paths = gather_unless_failed(str(path), failure)
    """
    results = gather((value, failure), group)
    failures = dict.fromkeys(reason for _, reason in results if reason is not None)
    if failures:
        raise error("\n".join(failures))
    return [result for result, _ in results]
