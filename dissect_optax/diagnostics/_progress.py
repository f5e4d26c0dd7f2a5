"""Progress of a measurement: a function of the caller, or a bar where Rich is there."""

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Of a short measurement nothing is shown.
SECONDS_WITHOUT_BAR = 3.0

Callback = Callable[[int, int], None]


class Progress:
    """Counts steps; calls a function of (done, total), or draws a bar.

    Without a function, and with `progress` not False, a bar appears on a terminal after
    three seconds if Rich is installed.
    """

    def __init__(self, total: int, progress: Callback | bool | None):
        """Start the clock."""
        if not (progress is None or isinstance(progress, bool) or callable(progress)):
            raise TypeError(
                "`progress` must be a function of (done, total), True, False or None, "
                f"got {progress!r}."
            )
        self._total, self._done = total, 0
        self._callback = progress if callable(progress) else None
        terminal = sys.stderr is not None and sys.stderr.isatty()
        wanted = progress is True or (progress is None and terminal)
        self._wants_bar = (
            self._callback is None
            and wanted
            and importlib.util.find_spec("rich") is not None
        )
        self._start = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One step more is done."""
        self._done += 1
        if self._callback is not None:
            self._callback(self._done, self._total)
        if not self._wants_bar:
            return
        if self._bar is None:
            if time.monotonic() - self._start < SECONDS_WITHOUT_BAR:
                return
            rich = importlib.import_module("rich.progress")
            console = importlib.import_module("rich.console")
            stderr = console.Console(stderr=True)
            # In a file, what is removed at the end would never be seen.
            self._bar = rich.Progress(console=stderr, transient=stderr.is_terminal)
            self._bar.start()
            self._task = self._bar.add_task("Measuring", total=self._total)
        self._bar.update(self._task, completed=self._done)
