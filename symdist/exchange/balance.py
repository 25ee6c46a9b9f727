"""Work shared out over ranks."""

from collections.abc import Sequence


def balance(costs: Sequence[float], *, parts: int) -> list[int]:
    """The part each cost goes to: longest first, each to the part with least so far; ties by index.

    A function of its arguments alone, so every rank finds the same. Source: Graham 1969 (longest processing time).
    """
    loads = [0.0] * parts
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        part = min(range(parts), key=lambda i: (loads[i], i))
        owners[item] = part
        loads[part] += costs[item]
    return owners
