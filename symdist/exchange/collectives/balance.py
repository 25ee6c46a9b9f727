"""Work shared out over ranks."""

import heapq
from collections.abc import Sequence


def balance(costs: Sequence[float], *, parts: int, loads: list[float] | None = None) -> list[int]:
    """The part each cost goes to: longest first, each to the part with least so far; ties by index.

    `loads` is what the parts carry already; the costs are added to it. A function of its arguments alone, so every
    rank finds the same. Source: Graham 1969 (longest processing time).
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
