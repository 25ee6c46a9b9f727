"""Full, read-only and fileless disks: a run loses checkpoints and nothing else, or says why it cannot start."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.checkpoints.directory import verify_sizes
from tests.launch.runs import lines, mounted, options, trained, warm, write_corpus

STEPS, EVERY = 6, 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run(corpus: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    own = ("--checkpoint-every", str(EVERY), "--accumulation", "1", "--keep", "2")
    return warm("launch.pretrain", *options(corpus, output, steps=STEPS), *own, *more, ranks=1)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = run(corpus, output)
    assert done.returncode == 0, done.stderr
    return output


def checkpoint_bytes(whole: Path) -> int:
    newest = whole / "checkpoints" / f"step-{STEPS:08d}"
    return sum(path.stat().st_size for path in newest.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", size="100m") as disk:
        yield disk


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def goes_on(corpus: Path, whole: Path, output: Path, disk: Path) -> None:
    """Once the disk is in order, the run comes to its end, each step in the log once."""
    for checkpoint in output.glob("checkpoints/step-????????"):
        verify_sizes(checkpoint)
    remount(disk, "rw,size=100m,nr_inodes=100k")
    done = run(corpus, output, "--resume", "auto", "--start-over")
    assert done.returncode == 0, done.stderr
    assert trained(output) == trained(whole)
    assert [line["step"] for line in lines(output) if line["kind"] == "train"] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("background", [True, False], ids=["background", "waited for"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.98, 1.5, 2.5])
def test_a_full_disk(corpus: Path, whole: Path, disk: Path, part: float, background: bool) -> None:
    remount(disk, f"size={int(part * checkpoint_bytes(whole))}")
    (disk / "run").mkdir()
    done = run(corpus, disk / "run", f"--{'' if background else 'no-'}background-checkpoints")
    assert "Traceback" not in done.stderr, done.stderr
    # The last checkpoint of two must fit beside the first.
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "were free there" in done.stderr or "cannot be written" in done.stderr
    goes_on(corpus, whole, disk / "run", disk)


@pytest.mark.parametrize("files", [4, 8, 14])
def test_a_disk_out_of_files(corpus: Path, whole: Path, disk: Path, files: int) -> None:
    remount(disk, f"nr_inodes={files}")
    (disk / "run").mkdir()
    done = run(corpus, disk / "run")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    goes_on(corpus, whole, disk / "run", disk)


def test_a_disk_that_is_read_only(corpus: Path, whole: Path, disk: Path) -> None:
    (disk / "run").mkdir()
    remount(disk, "ro")
    done = run(corpus, disk / "run")
    assert done.returncode == 2, done.stderr
    assert f"error: --output {disk / 'run'} cannot be written (Read-only file system)" in done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    goes_on(corpus, whole, disk / "run", disk)


def test_a_disk_for_checkpoints_that_is_read_only(corpus: Path, whole: Path, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (disk / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(disk / "checkpoints")
    remount(disk, "ro")
    done = run(corpus, tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert trained(tmp_path / "run") == trained(whole)
    goes_on(corpus, whole, tmp_path / "run", disk)
