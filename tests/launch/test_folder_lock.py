"""One output folder belongs to one launch at a time."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.runtime import folder_lock
from launch.runtime.folder_lock import FolderLock
from tests.launch.runs import ROOT


class Launches:
    """Makes launches, and remembers what they say."""

    def __init__(self, folder: Path):
        self.folder, self.said, self.made = folder, list[str](), list[FolderLock]()

    def __call__(self, launch: str = "a", **own: object) -> FolderLock:
        lock = FolderLock(self.folder, launch=launch, say=self.said.append)
        lock._own |= own
        self.made.append(lock)
        return lock


@pytest.fixture
def launches(tmp_path: Path) -> Iterator[Launches]:
    launches = Launches(tmp_path / "run")
    yield launches
    for lock in launches.made:
        lock._ended.set()


def test_a_second_launch_is_refused_until_the_first_is_over(launches: Launches) -> None:
    first = launches()
    first.acquire()
    before = (launches.folder / ".launch").read_bytes()
    with pytest.raises(ValueError, match=rf"another run is training in .*run: process {os.getpid()} on .*--output"):
        launches("b").acquire()
    assert (launches.folder / ".launch").read_bytes() == before
    first.release()
    second = launches("b")
    second.acquire()
    assert json.loads((launches.folder / ".launch").read_text())["launch"] == "b"
    first.release()
    assert (launches.folder / ".launch").exists()
    assert launches.said == []


def test_a_dead_launch_is_taken_over_and_that_is_said(launches: Launches) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    launches(pid=process.pid, started=1).acquire()
    launches("b").acquire()
    assert launches.said == [
        f"the run that held {launches.folder}, process {process.pid} on {os.uname().nodename}, is dead: "
        "this one takes the folder over"
    ]


def test_a_number_that_another_process_has_now_is_no_life(launches: Launches) -> None:
    launches(started=1).acquire()
    launches("b").acquire()
    assert "is dead" in launches.said[0]


def test_on_another_host_a_launch_lives_while_it_beats(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT", 0.02)
    first = launches(place="elsewhere", host="elsewhere", job="17")
    first.acquire()
    with pytest.raises(ValueError, match="on elsewhere, job 17, last heard of at"):
        launches("b").acquire()
    monkeypatch.setattr(folder_lock, "DEAD", 0.2)
    first._ended.set()
    launches("b").acquire()
    assert "is dead" in launches.said[-1]


def test_a_later_attempt_knows_that_the_run_had_begun(launches: Launches) -> None:
    first = launches(started=1)
    first.acquire()
    assert not first.begun
    second = launches(started=2)
    second.acquire()
    assert not second.begun
    second.begin()
    third = launches(started=3)
    third.acquire()
    assert third.begun
    third.release(failed=True)
    fourth = launches()
    fourth.acquire()
    assert fourth.begun
    fourth._ended.set()
    fourth._own["started"] = 1
    fourth.begin()
    other = launches("b")
    other.acquire()
    assert not other.begun


def test_what_is_refused_leaves_no_folder(launches: Launches) -> None:
    lock = launches()
    lock.acquire()
    lock.release(failed=True)
    assert not launches.folder.exists()


def test_one_of_many_takes_over(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for attempt in range(60):
            launches = Launches(tmp_path / str(attempt))
            launches("dead", started=1).acquire()
            won, refused = [], []

            def start(number: int) -> None:
                try:
                    launches(str(number)).acquire()  # noqa: B023
                    won.append(number)  # noqa: B023
                except ValueError as error:
                    refused.append(str(error))  # noqa: B023

            threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for lock in launches.made:
                lock._ended.set()
            assert (len(won), len(refused), len(launches.said)) == (1, 7, 1)
            assert os.listdir(launches.folder) == [".launch"]
    finally:
        sys.setswitchinterval(interval)


def test_a_launch_that_died_taking_over_is_not_waited_for(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "DEAD", 0.05)
    dead = launches("dead", started=1)
    dead.acquire()
    (launches.folder / f".launch.{dead._own['lock']}.taken").touch()
    launches("b").acquire()
    assert json.loads((launches.folder / ".launch").read_text())["launch"] == "b"
    assert os.listdir(launches.folder) == [".launch"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = FolderLock(tmp_path / "file" / "run", launch="a", say=print)
    with pytest.raises(ValueError, match=r"--output .*file/run cannot be written \(Not a directory\)"):
        lock.acquire()


def test_a_run_that_has_lost_its_folder_ends(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from launch.runtime import folder_lock; folder_lock.BEAT = 0.02\n"
        "folder_lock.FolderLock(Path(sys.argv[1]), launch='a', say=print).acquire(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    running = subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "held\n"
    (tmp_path / ".launch").unlink()
    assert running.wait() == 2
    assert "error: this run has lost" in running.stdout.read()
