"""A lock between processes that may want to write the same files."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def only_process(path: Path, say: Callable[[str], None], notice: str) -> Iterator[None]:
    """Waits until no other process is inside.

    Args:
      path: The file that stands for the lock; its directory exists.
      say: Shows a sentence to the user.
      notice: The sentence, said once if another process is inside.
    """
    # The operating system frees the lock of a process that was killed.
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        say(notice)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
