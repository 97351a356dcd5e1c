"""A SIGTERM that unwinds the stack, so that ``with`` blocks end what they have started."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Let a SIGTERM raise ``SystemExit`` in the main thread, unless the caller handles it already.

    Outside of the main thread, where Python allows no signal handlers, this does nothing.
    """
    is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _: object) -> None:
    sys.exit(128 + number)
