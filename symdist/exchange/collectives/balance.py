"""Load balancing over ranks."""

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], *, parts: int, loads: list[float] | None = None) -> list[int]:
    """Distribute items over parts so that the parts' total costs come out about equal.

    Items are assigned in order of decreasing cost, each to the part with the smallest load so far; ties go to the lower
    index. The result depends on the arguments alone, so every rank that calls this with the same arguments gets the
    same result. Source: Graham 1969 (longest processing time).

    Args:
        costs: The cost of each item.
        parts: The number of parts.
        loads: The load that each part already carries; updated in place. Zeros by default.

    Returns:
        The part of each item.

    Example:
        >>> balance([3.0, 2.0, 2.0], parts=2)
        [0, 1, 1]
    """
    loads = [0.0] * parts if loads is None else loads
    assert len(loads) == parts
    heap = [(load, part) for part, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, part = heap[0]
        owners[item] = part
        loads[part] = load + costs[item]
        heapq.heapreplace(heap, (loads[part], part))
    return owners
