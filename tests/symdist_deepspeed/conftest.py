"""Ranks by how many there are: DeepSpeed takes all of a process group for its own."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks, start

pytest.importorskip("deepspeed")


@pytest.fixture(scope="package")
def worlds() -> Iterator[Callable[[int], Ranks]]:
    """The ranks of a world of some size, started when first asked for."""
    started: dict[int, Ranks] = {}

    def world(size: int) -> Ranks:
        if size not in started:
            started[size] = start(size)
        return started[size]

    yield world
    for ranks in started.values():
        ranks.close()
