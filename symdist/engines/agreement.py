"""What all ranks learn of each other before any goes on: values, and whether any has failed."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's value, in rank order; all ranks of `group`, or of the job, call it.

    Args:
        value: This rank's value; it is pickled.
        group: The ranks; all of them by default. Without a process group the value is the only one.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_unless_failed(
    value: T, failure: str | None, *, error: type[Exception] = ValueError, group: dist.ProcessGroup | None = None
) -> list[T]:
    """Every rank's value, in rank order, where no rank has failed; all ranks call it.

    Args:
        value: This rank's value.
        failure: What went wrong on this rank, if anything.
        error: What to raise on all ranks, with each failure once, in rank order.
        group: See `gather`.

    Raises:
        Exception: Of the kind `error`, on all ranks, where any rank has failed.
    """
    found = gather((value, failure), group)
    failures = dict.fromkeys(theirs for _, theirs in found if theirs is not None)
    if failures:
        raise error("\n".join(failures))
    return [each for each, _ in found]
