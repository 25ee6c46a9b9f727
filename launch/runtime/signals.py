"""Answers the signals that ask a run to stop, whatever the process is doing."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class StopSignals:
    """Notes that a signal asks the run to stop; before there is anything to save, ends the process at once.

    Python calls its own handlers only between two steps of the main thread, which may be waiting in a collective, on
    another rank or a disk. So a thread answers.

    Args:
        say: Called with a line that says what the signal does.
    """

    def __init__(self, say: Callable[[str], None]):
        self.requested = False
        """Whether a signal came."""
        self.training = False
        """Whether the run has something to save: then it ends after its step, and before that at once."""
        self.before_leaving: Callable[[], None] = lambda: None
        """Called before the process ends at once."""
        self._say = say

    def listen(self) -> None:
        """Begin to answer signals; the main thread must call it."""
        # Kept, so that neither end is closed while signals may come.
        self._received, self._sent = socket.socketpair()
        self._sent.setblocking(False)
        signal.set_wakeup_fd(self._sent.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # As `nohup` wants it.
            signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._answer, name="signals", daemon=True).start()

    def _answer(self) -> None:
        while True:
            number = self._received.recv(1)[0]
            if number not in STOP_SIGNALS:
                continue
            name, again = signal.Signals(number).name, self.requested
            self.requested = True
            if not self.training:
                self._say(f"stopped by {name} before there was anything to save")
                self.before_leaving()
                sys.stderr.flush()
                os._exit(0)
            if not again:
                self._say(f"{name}: the run saves a checkpoint after this step, and ends")
