"""Ranks by how many there are: Megatron has its groups for a whole process, which the stand-ins change, too."""

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks, sets_of_ranks

pytest.importorskip("megatron.core")


@pytest.fixture(scope="package")
def worlds() -> Iterator[Callable[[int], Ranks]]:
    """The ranks of a world of some size, shared by all tests of Megatron."""
    with sets_of_ranks() as found:
        yield found
