"""Load balancing over ranks."""

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], *, parts: int, loads: list[float] | None = None) -> list[int]:
    """Assign each cost to a part: the largest cost first, always to the least loaded part; ties go by index.

    It depends on its arguments alone, so every rank finds the same. Source: Graham 1969 (longest processing time).

    Args:
        costs: The costs of the items.
        parts: The number of parts.
        loads: What the parts carry already, updated in place; zeros by default.

    Returns:
        The part of each item.
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
