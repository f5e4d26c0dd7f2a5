"""Progress of runs: bars on a terminal, a line now and then elsewhere."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dissect_optax.dissection._records import Measurement

# Seconds between two lines where there is no terminal.
_LINE_INTERVAL = 60.0


class Monitor:
    """Progress of one group of runs after the other.

    Args:
      console: Where it is shown; the default is standard error, so that tables can
        be piped.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, sentence: str) -> None:
        """Shows a line of its own."""
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def group(self, title: str, steps: int) -> Iterator["GroupReport"]:
        """Shows the progress of one group.

        Args:
          title: Description of the group.
          steps: Number of steps in all.

        Yields:
          The report to call with the group's measurements.
        """
        start = time.perf_counter()
        bar = _TitledProgress(
            title,
            # Narrow, so that a line fits a terminal of 80 columns.
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]} steps/s"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            # A file or a pipe gets lines.
            disable=not self.console.is_terminal,
        )
        with bar:
            report = GroupReport(self, title, bar, steps)
            yield report
        seconds = time.perf_counter() - start
        self.say(f"{title}: {seconds:.1f} s, {report.status}")


class SilentMonitor(Monitor):
    """A monitor that shows nothing."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


class _TitledProgress(Progress):
    """A bar below its title, which is longer than what a line has room for."""

    def __init__(self, title: str, *columns: ProgressColumn, **options: Any) -> None:
        # The constructor renders at once.
        self._title = Text(title, no_wrap=True, overflow="ellipsis")
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The title, and the bar."""
        yield self._title
        yield from super().get_renderables()


class GroupReport:
    """Shows the measurements of one group."""

    def __init__(self, monitor: Monitor, title: str, bar: Progress, steps: int) -> None:
        self._monitor = monitor
        self._title = title
        self._bar = bar
        self._steps = steps
        self._task = bar.add_task("", total=steps, rate="…", status="")
        self._first_step = 0
        self._start = time.perf_counter()
        self._last_line = self._start
        self.status = ""

    def begin(self, step: int, newest: Sequence[Measurement]) -> None:
        """Starts the clock at this step, where an earlier process stopped or at 0."""
        self._first_step = step
        self._start = time.perf_counter()
        self._show(step, newest, rate="…")

    def __call__(self, step: int, newest: Sequence[Measurement]) -> None:
        """Shows how far the group is.

        Args:
          step: Steps taken.
          newest: The last measurement of every run.
        """
        rate = (step - self._first_step) / (time.perf_counter() - self._start)
        self._show(step, newest, f"{rate:.0f}" if rate >= 100 else f"{rate:.2g}")
        is_due = time.perf_counter() - self._last_line >= _LINE_INTERVAL
        if is_due and not self._monitor.console.is_terminal:
            self._last_line = time.perf_counter()
            self._monitor.say(
                f"{self._title}: step {step} of {self._steps}, {self.status}"
            )

    def _show(self, step: int, newest: Sequence[Measurement], rate: str) -> None:
        """Brings the bar up to date."""
        alive = [line for line in newest if math.isfinite(line["training_loss"])]
        best = ""
        if alive:
            best = "best " if len(newest) > 1 else ""
            best += f"loss {min(line['training_loss'] for line in alive):.3g}"
            accuracies = [line.values.get("test_accuracy") for line in alive]
            known = [accuracy for accuracy in accuracies if accuracy is not None]
            if known:
                best += f", acc. {max(known):.1%}"
        self._bar.update(self._task, completed=step, rate=rate, status=best)
        runs = "1 run" if len(newest) == 1 else f"{len(newest)} runs"
        self.status = f"{runs}, {len(newest) - len(alive)} diverged; {best}"
