"""Ctrl-C: it ends a command at once, or a group that trains after some steps or images.

An exception from a signal handler is lost when the signal arrives in a callback of
JAX, as it often does while a program is compiled. So every Ctrl-C is noted, and
`check` raises what was lost.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_arrived = threading.Event()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Notes every Ctrl-C inside, and raises it: at once, or at the end if it was lost.

    Raises:
      KeyboardInterrupt: There was a Ctrl-C.
    """
    with _handled_by(_note_and_raise):
        try:
            yield
            check()
        except Exception as error:
            if _arrived.is_set():
                # What it interrupted may have made an error of its own of it.
                raise KeyboardInterrupt from error
            raise
        finally:
            _arrived.clear()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only notes the first Ctrl-C inside; a second one raises as usual."""
    with _handled_by(_note):
        yield


def arrived() -> bool:
    """Whether there was a Ctrl-C since the command began."""
    return _arrived.is_set()


def check() -> None:
    """Raises the Ctrl-C that was noted, if there was one.

    Raises:
      KeyboardInterrupt: There was one.
    """
    if _arrived.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has Ctrl-C handled by this function."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only.
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _note_and_raise(number: int, frame: FrameType | None) -> None:
    """Takes a Ctrl-C that ends the command at once."""
    del number, frame
    _arrived.set()
    raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    """Takes the first Ctrl-C that is deferred."""
    del frame
    _arrived.set()
    signal.signal(number, _note_and_raise)
    print("\nStopping in a moment. Ctrl-C again stops at once.", file=sys.stderr)
