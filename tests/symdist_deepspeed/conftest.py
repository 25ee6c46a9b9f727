"""Ranks by how many there are: DeepSpeed takes all of a process group for its own."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks, sets_of_ranks

pytest.importorskip("deepspeed")


@pytest.fixture(scope="package")
def worlds() -> Iterator[Callable[[int], Ranks]]:
    """The ranks of a world of some size, shared by all tests of DeepSpeed."""
    with sets_of_ranks() as found:
        yield found
