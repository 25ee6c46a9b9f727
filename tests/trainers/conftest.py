"""Two ranks for the trainers, which take all of a process group for their own."""

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


@pytest.fixture(scope="package")
def pair() -> Iterator[Ranks]:
    """Two ranks that are the whole world, shared by all tests of trainers."""
    started = Ranks(2)
    yield started
    started.close()
