"""Shared by all tests: sets of ranks, started when first asked for."""

from collections.abc import Iterator

import pytest

from tests.grids import GRIDS
from tests.ranks import Ranks, start


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four real gloo ranks, shared by the whole session."""
    started = start(4)
    yield started
    started.close()


@pytest.fixture(scope="session")
def many() -> Iterator[Ranks]:
    """Eight real gloo ranks, with meshes of two and three dimensions."""
    started = start(8, GRIDS)
    yield started
    started.close()
