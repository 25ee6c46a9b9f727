"""What a simulation knows of a weight."""

from collections.abc import Callable
from dataclasses import dataclass

from symdist.layouts import FlatLayout, Group, Layout


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter of the optimizer, on ranks that do not exist.

    Attributes:
        name: Its name.
        group: The index of its param group.
        layout: Returns its layout as a rank sees it, or None if that rank holds none of it.
        copies: Returns the ranks of other pipeline stages that hold the same piece of a tied embedding, with that rank.
            None (default) if it is not tied over stages.
    """

    name: str
    group: int
    layout: Callable[[int], Layout | FlatLayout | None]
    copies: Callable[[int], Group] | None = None
