"""Shared by all tests: what a run leaves out, the order of tests, and sets of ranks, started when first asked for."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gate import check_patterns, left_out
from tests.grids import GRIDS
from tests.processes import end_with_parent, warm_start
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parent.parent
# The optimizer comes first, whole jobs last: a fault is shown where it is, not by what stands on it. Of the jobs the
# longest file comes first, so that no worker ends long after the other.
ENGINES = ("symdist_deepspeed", "symdist_megatron", "trainers")
MODELS = ("models", "architectures", "beyond_transformers")
ORDER = ("rules", "", *MODELS, "diagnostics", *ENGINES, "launch/test_survival.py", "launch", "attacks", "gpu")

# What gives a test ranks.
RANKS = {"ranks", "many", "worlds", "pair"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --all."""
    parser.addoption("--all", action="store_true", help="run every case, not only those of tests/gate.py")


def pytest_configure(config: pytest.Config) -> None:
    """With --all, let the run that loses ranks lose more of them, unless told how many. Workers end with the run."""
    if hasattr(config, "workerinput"):
        end_with_parent()
    if config.getoption("--all"):
        os.environ.setdefault("SYMDIST_TEST_KILLS", "20")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort by ORDER, leave out what tests/gate.py leaves to --all, and get ready to start ranks."""
    if any(RANKS & {*getattr(item, "fixturenames", ())} for item in items) and not config.option.collectonly:
        warm_start()
    items.sort(key=_place)
    if config.getoption("--all"):
        return
    cases: dict[str, set[str]] = {}
    for item in items:
        cases.setdefault(_test(item), set()).add(_case(item))
    if not any("::" in argument for argument in config.args):
        check_patterns(cases)
    later = [item for item in items if left_out(_test(item), _case(item))]
    if later:
        config.hook.pytest_deselected(items=later)
        items[:] = [item for item in items if item not in set(later)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each of several workers whole folders, whose tests share ranks, and of the jobs whole files."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            folder = path.split("/")[1]
            return path if folder in ("launch", "attacks") else folder if folder in ENGINES else "core"

    return ByFolder(config, log)


def _place(item: pytest.Item) -> int:
    file = item.path.relative_to(ROOT / "tests").as_posix()
    return ORDER.index(file if file in ORDER else _folder(item))


def _folder(item: pytest.Item) -> str:
    folder, *more = item.path.relative_to(ROOT / "tests").parts
    return folder if more else ""


def _test(item: pytest.Item) -> str:
    return f"{item.path.relative_to(ROOT).as_posix()}::{getattr(item, 'originalname', item.name)}"


def _case(item: pytest.Item) -> str:
    return item.callspec.id if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ""


def pytest_report_collectionfinish(config: pytest.Config) -> str:
    """Say how to run what is left out."""
    return (
        "" if config.getoption("--all") else "of the largest tests, the cases of tests/gate.py; --all runs every case"
    )


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Four real gloo ranks, shared by the whole session."""
    started = Ranks(4)
    yield started
    started.close()


@pytest.fixture(scope="session")
def many() -> Iterator[Ranks]:
    """Eight real gloo ranks, with meshes of two and three dimensions."""
    started = Ranks(8, GRIDS)
    yield started
    started.close()
