"""Processes of tests that end with the test run, whatever ends it."""

import ctypes
import signal


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent ends, even by SIGKILL; on Linux only.

    A killed test run would otherwise leave ranks behind that wait for each other until their collectives time out.
    """
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):
        return
    PR_SET_PDEATHSIG = 1
    prctl(PR_SET_PDEATHSIG, int(how), 0, 0, 0)


def agent_ends_with_parent() -> None:
    """As `end_with_parent`, for torchrun and scripts, which end their own ranks when told to."""
    end_with_parent(signal.SIGTERM)
