"""Gives an output folder to one launch at a time, on whatever node of whatever job it runs."""

import contextlib
import errno
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEAT = 5.0
"""Seconds between signs of life of the launch that holds a folder."""
DEAD = 60.0
"""Seconds without a sign of life after which a launch on another host is taken for dead."""

_FILE = ".launch"
# What file systems without hard links say.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


class FolderLock:
    """The file `.launch` in an output folder, which says which launch the folder belongs to; held by its rank 0.

    A file and not a lock of the kernel's, which many shared file systems know only within one host. Launches on the
    same host see whether the holder's process lives. Elsewhere they wait for its next sign of life, a new time of the
    file, so clocks need not agree.

    Args:
        folder: The run's output folder.
        launch: Name of this launch, the same for all its restarts.
        say: Called with a line when a lock is taken over.
    """

    def __init__(self, folder: Path, *, launch: str, say: Callable[[str], None]):
        self.begun = False
        """Whether an earlier attempt of this launch had begun the run."""
        self._folder, self._path, self._say = folder, folder / _FILE, say
        self._own: dict[str, Any] = {
            "launch": launch,
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "host": platform.node(),
            "place": _place(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "lock": uuid.uuid4().hex,
            "begun": False,
        }
        self._ended, self._made = threading.Event(), False

    def acquire(self) -> None:
        """Take the folder, or wait up to a minute to see whether another host's launch that holds it is dead.

        Raises:
            ValueError: If another launch holds it, or the folder cannot be written.
        """
        try:
            self._made = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._take_over()
        except OSError as error:
            raise ValueError(
                f"--output {self._folder} cannot be written ({error.strerror}); give another folder, or mend this one"
            ) from error
        threading.Thread(target=self._beat, name="folder lock", daemon=True).start()

    def begin(self) -> None:
        """Note that this launch has begun the run, for its later attempts; a disk that is full is no matter."""
        self._own["begun"] = True
        with contextlib.suppress(OSError):
            self._write(self._path.with_name(f"{_FILE}.writing"))
            os.replace(self._path.with_name(f"{_FILE}.writing"), self._path)

    def release(self, *, failed: bool = False) -> None:
        """Give the folder back, so that a launch on another host need not wait.

        Args:
            failed: Whether the run has failed. If it had begun, the file stays for the launch's later attempts; if not,
                a folder that was made for it goes too.
        """
        self._ended.set()
        if failed and self._own["begun"]:
            return
        with contextlib.suppress(OSError):
            if self._is_own():
                self._path.unlink()
            if failed and self._made:
                self._folder.rmdir()

    def _write(self, path: Path) -> None:
        path.write_text(json.dumps(self._own))

    def _create(self) -> bool:
        """Create the file with its content in one step, and return whether there was none."""
        writing = self._path.with_name(f"{_FILE}.{self._own['lock']}")
        self._write(writing)
        try:
            os.link(writing, self._path)
        except FileExistsError:
            # A network file system may have made the link and lost its answer.
            return self._is_own()
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with contextlib.suppress(FileExistsError), open(self._path, "x") as stream:
                json.dump(self._own, stream)
            return self._is_own()
        finally:
            writing.unlink()
        return True

    def _is_own(self) -> bool:
        try:
            return self._holder(self._path)[0].get("lock") == self._own["lock"]
        except FileNotFoundError:
            return False

    def _take_over(self) -> None:
        """Move the file of a dead launch out of the way; refuse if the launch lives."""
        try:
            holder, beat = self._holder(self._path)
        except FileNotFoundError:
            return
        line = ""
        if "lock" not in holder:
            line = f"{self._path} is damaged and says of no run that holds the folder: it is passed over"
        elif self._lives(holder, beat):
            job = f", job {holder['job']}" if holder.get("job") else ""
            raise ValueError(
                f"another run is training in {self._folder}: process {holder.get('pid')} on {holder.get('host')}{job}, "
                f"last heard of at {time.strftime('%H:%M:%S', time.localtime(beat))}; give another --output, or end it"
            )
        elif holder.get("launch") == self._own["launch"]:
            self.begun = self._own["begun"] = bool(holder.get("begun"))
        else:
            line = (
                f"the run that held {self._folder}, process {holder.get('pid')} on {holder.get('host')}, is dead: "
                "this one takes the folder over"
            )
        if self._replace(holder) and line:
            self._say(line)

    def _replace(self, holder: dict[str, Any]) -> bool:
        """Put this launch's file in the place of a dead one's, and return whether no other launch has done so."""
        if self._path.is_dir():
            os.rename(self._path, self._path.with_name(f"{_FILE}.{self._own['lock']}.before"))
            return True
        lock = str(holder.get("lock", ""))
        # Whoever makes this file, whose name only one dead launch has, is alone in replacing that launch's.
        taken = self._path.with_name(f"{_FILE}.{lock if lock.isalnum() else 'damaged'}.taken")
        try:
            os.close(os.open(taken, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            self._wait_for(taken)
            return False
        writing = self._path.with_name(f"{_FILE}.{self._own['lock']}")
        try:
            with contextlib.suppress(FileNotFoundError):
                if self._holder(self._path)[0] == holder:
                    self._write(writing)
                    os.replace(writing, self._path)
                    return True
        finally:
            taken.unlink(missing_ok=True)
        return False

    def _wait_for(self, taken: Path) -> None:
        """Wait until another launch has taken over, or is taken for dead itself."""
        deadline = time.monotonic() + DEAD
        while taken.exists():
            if time.monotonic() > deadline:
                taken.unlink(missing_ok=True)
                return
            time.sleep(0.01)

    def _lives(self, holder: dict[str, Any], beat: float) -> bool:
        if holder.get("place") == self._own["place"]:
            return holder.get("started") is not None and _started(holder.get("pid")) == holder["started"]
        self._say(f"waiting up to {DEAD:g} s to see whether the run that holds {self._folder} lives")
        deadline = time.monotonic() + DEAD
        while time.monotonic() < deadline:
            time.sleep(min(BEAT / 5, DEAD / 5))
            try:
                now, later = self._holder(self._path)
            except FileNotFoundError:
                return False
            if now != holder or later != beat:
                return True
        return False

    def _holder(self, path: Path) -> tuple[dict[str, Any], float]:
        """Return what a lock file says of its holder, nothing if it is damaged, and when it was last heard of."""
        # Opened anew, so that a network file system asks its server.
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return {}, 0.0
            raise
        try:
            beat = os.fstat(handle).st_mtime
            holder = json.loads(os.read(handle, 1 << 16))
        except (ValueError, RecursionError, IsADirectoryError, BlockingIOError):
            holder = {}
        finally:
            os.close(handle)
        return (holder if isinstance(holder, dict) else {}), beat

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                if self._holder(self._path)[0].get("lock") == self._own["lock"]:
                    os.utime(self._path)
                    continue
                text = "another run has taken it over, as this one showed no sign of life"
            except FileNotFoundError:
                text = f"its file {_FILE} is gone"
            except OSError:
                continue
            if not self._ended.is_set():
                print(f"error: this run has lost {self._folder}: {text}", flush=True)
                # Nothing more may be written into a folder that belongs to another run.
                os._exit(2)


def _place() -> str:
    """Name this boot of this host and its space of process numbers, in which `_started` knows all processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.uuid4()}"


def _started(pid: Any) -> int | None:
    """Return when a process started, in ticks since the boot; None if it is gone or unknown."""
    try:
        state, *fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if state in "ZX" else int(fields[18])


def launch_id() -> str:
    """Name this launch, from torchrun's name for it; the same for all its restarts, and no other launch's.

    Where all ranks have one agent, the name is that of its process, since torchrun calls most launches alike.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1" or run == "none":
        return f"{run} {_place()} {os.getppid()} {_started(os.getppid())}"
    return run
