"""Ctrl-C while a group trains: its steps end, and a checkpoint keeps them."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event; a second one raises as usual.

    An exception from a signal handler would be lost when the signal arrives in a
    callback of JAX, as it often does while a program is compiled.

    Yields:
      The event, which the training loop looks at.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Python handles signals in the main thread only.
        return
    note = _Note(interrupted)
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class _Note:
    """The handler of the first Ctrl-C."""

    def __init__(self, interrupted: threading.Event) -> None:
        self._interrupted = interrupted

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Sets the event, and says that it did."""
        del frame
        self._interrupted.set()
        signal.signal(number, signal.default_int_handler)
        print(
            "\nStopping after these steps. Ctrl-C again stops at once.", file=sys.stderr
        )
