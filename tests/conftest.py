"""Shared by all tests: one set of ranks a module."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks, start


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four real gloo ranks, shared by the whole session."""
    started = start(4)
    yield started
    started.close()
