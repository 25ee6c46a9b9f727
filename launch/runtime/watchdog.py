"""Ends a process that makes no progress, and reports what it was doing."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

STOOD_STILL = 3
"""Exit code of a process that the watchdog ended."""

# Limit for work that is done once or waits for a disk, which may take longer than any collective.
SLOW_SECONDS = 1800.0
_TELLING_SECONDS = 30.0


class Watchdog:
    """Ends the process with code `STOOD_STILL` unless `doing` is called at least every `seconds`.

    It runs in a thread, since a rank that waits for a lost or hung one is stuck inside a collective. Before it ends the
    process it prints a message and the stack of every thread to stderr, and passes the message to `report`.

    Args:
        seconds: How long one activity may take; `slow` ones may take half an hour if that is longer.
        rank: This process's rank, for the message.
        detail: Returns more about the current activity, for the message.
        report: Called with the message before the process ends.
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
        """Start watching."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._stop.set()

    def doing(self, activity: str, *, slow: bool = False) -> None:
        """Report progress: the process now begins `what`, which is `slow` if it may take half an hour."""
        self._doing = (activity, time.monotonic(), max(self.seconds, SLOW_SECONDS) if slow else self.seconds)

    def where(self) -> str:
        """Return what this process is doing."""
        activity, _, _ = self._doing
        try:
            detail = self.detail()
        except Exception:
            # A failed device cannot report how far it got.
            detail = ""
        return f"{activity}, {detail}" if detail else activity

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 10)):
            _, since, allowed = self._doing
            if time.monotonic() - since < allowed:
                continue
            text = (
                f"rank {self._rank} has made no progress for {allowed:g} s in {self.where()}: a rank is lost or hung, "
                "or --timeout is too short for this"
            )
            # Ends the process even if writing the message hangs.
            ending = threading.Timer(_TELLING_SECONDS, os._exit, (STOOD_STILL,))
            ending.daemon = True
            ending.start()
            print(f"error: {text}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
            try:
                self.report(text)
            finally:
                # A normal exit is impossible, since the main thread does not return from its collective.
                os._exit(STOOD_STILL)
