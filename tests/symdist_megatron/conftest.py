"""Ranks by how many there are: Megatron has its groups for a whole process, which the stand-ins change, too."""

import importlib.util
from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks, sets_of_ranks

# Not imported here: the stand-ins must come first, and are not for this process.
if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="package")
def worlds() -> Iterator[Callable[[int], Ranks]]:
    """The ranks of a world of some size, shared by all tests of Megatron."""
    with sets_of_ranks() as found:
        yield found
