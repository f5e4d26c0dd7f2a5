"""Ctrl-C, SIGTERM and SIGHUP: a group that trains stops at its next checkpoint.

An exception from a signal handler is lost when the signal arrives in a callback of
JAX, as it often does while a program is compiled. So every signal is recorded, and
`check` raises what was lost.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_arrived = threading.Event()
# Windows has no SIGHUP.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Records a signal inside, and raises it: at once, or at the end if it was lost.

    Raises:
      KeyboardInterrupt: There was a Ctrl-C, or one of the other signals.
    """
    with _handled_by(_record_and_raise):
        try:
            yield
            check()
        except Exception as error:
            if _arrived.is_set():
                # The interrupted code may have wrapped it in another exception.
                raise KeyboardInterrupt from error
            raise
        finally:
            _arrived.clear()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Only records the first signal inside; a second SIGINT or SIGTERM raises."""
    with _handled_by(_record):
        yield


def arrived() -> bool:
    """Whether there was a signal since `recorded` began."""
    return _arrived.is_set()


def check() -> None:
    """Raises the signal that was recorded, if there was one.

    Raises:
      KeyboardInterrupt: There was one.
    """
    if _arrived.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs the handler for every one of the signals."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only.
        return
    previous = {}
    for number in _SIGNALS:
        # `nohup` ignores SIGHUP, and a shell SIGINT in its background jobs.
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handled_before in previous.items():
            signal.signal(number, handled_before)


def _record_and_raise(number: int, frame: FrameType | None) -> None:
    """Handles a signal that ends the command at once."""
    del number, frame
    _arrived.set()
    raise KeyboardInterrupt


def _record(number: int, frame: FrameType | None) -> None:
    """Handles the first signal where it is deferred."""
    del frame
    is_first = not _arrived.is_set()
    _arrived.set()
    # Not SIGHUP: when a terminal is closed, a shell and the kernel both send it.
    for other in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(other) is _record:
            signal.signal(other, _record_and_raise)
    if not is_first:
        return
    how = "Ctrl-C again" if number == signal.SIGINT else "Ctrl-C"
    # After SIGHUP there may be no terminal any more, and a signal may arrive while
    # something else is printed.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        print(f"\nStopping in a moment. {how} stops at once.", file=sys.stderr)
