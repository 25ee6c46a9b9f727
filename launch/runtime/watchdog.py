"""Ends a process that stands still, and says at what."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

STOOD_STILL = 3
"""The exit code."""

# What is done once, or waits for a disk, may take as long whatever a collective may.
SLOW_SECONDS = 1800.0
_TELLING_SECONDS = 30.0


class Watchdog:
    """Watches from a thread that `doing` is called at least every `seconds`; else the process ends with `STOOD_STILL`.

    What is said to be `slow` may take half an hour, if that is more.

    A rank that waits for one that is lost or hung cannot say so itself: it is inside a collective. What it says goes to
    stderr, with the stack of every thread after it, and to `report`. `detail` adds where in its work it is.
    """

    def __init__(
        self,
        seconds: float,
        *,
        rank: int,
        detail: Callable[[], str] = lambda: "",
        report: Callable[[str], None] = lambda text: None,
    ):
        self.seconds = seconds
        self.detail = detail
        self.report = report
        self._rank = rank
        self._doing = ("starting", time.monotonic(), max(seconds, SLOW_SECONDS))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._stop.set()

    def doing(self, what: str, *, slow: bool = False) -> None:
        """This process goes on, with `what`."""
        self._doing = (what, time.monotonic(), max(self.seconds, SLOW_SECONDS) if slow else self.seconds)

    def where(self) -> str:
        """What this process is at."""
        what, _, _ = self._doing
        try:
            detail = self.detail()
        except Exception:
            # A device that has failed cannot be asked how far it came.
            detail = ""
        return f"{what}, {detail}" if detail else what

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 10)):
            _, since, allowed = self._doing
            if time.monotonic() - since < allowed:
                continue
            text = (
                f"rank {self._rank} has stood still for {allowed:g} s in {self.where()}: a rank is lost or hung, "
                "or --timeout is shorter than this takes"
            )
            # Where the output hangs as well, nothing is told, but the process ends.
            ending = threading.Timer(_TELLING_SECONDS, os._exit, (STOOD_STILL,))
            ending.daemon = True
            ending.start()
            print(f"error: {text}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            try:
                self.report(text)
            finally:
                # Nothing gentler: the main thread does not return from its collective.
                os._exit(STOOD_STILL)
