"""What the user sees while runs work."""

import io
import math
import re

import pytest
from rich.console import Console

from experiments.progress import Monitor
from experiments.records import Measurement

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


def measurement(training_loss, test_accuracy):
    return Measurement(20, training_loss, 0.1, 0.2, 0.1, test_accuracy, 0.3, 1.5)


@pytest.fixture
def terminal():
    """A terminal of 80 columns."""
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def test_a_bar_has_room_for_everything_in_80_columns(terminal, monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter(range(1000)).__next__)
    title = "M-SVAG-mb, tuning, step sizes 0.006 to 600, seeds 1 to 10"
    with Monitor(terminal).group(title, 60_000) as report:
        report.begin(0, [measurement(2.5, 0.1)])
        report(20_000, [measurement(12.345, 0.875), measurement(math.nan, 0.1)])
        report._bar.refresh()
    *lines, last = CONTROL.sub("", terminal.file.getvalue()).splitlines()
    assert any(line.endswith(title) for line in lines)
    # Percent, rate, time left, and news.
    bar = [line for line in lines if " 33% " in line][-1]
    assert re.search(
        r"20000 steps/s [\d-]:[\d-]{2}:[\d-]{2} best loss 12\.3, acc\. 87\.5%", bar
    )
    # The line that stays.
    assert last.startswith(f"{title}: ")
    assert last.endswith("2 runs, 1 diverged; best loss 12.3, acc. 87.5%")


def test_what_is_no_terminal_gets_the_closing_line_only():
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with Monitor(console).group("ADAM, seed 1", 20) as report:
        report.begin(0, [measurement(2.5, 0.1)])
        report(10, [measurement(1.5, 0.5)])
        report(20, [measurement(1.25, 0.75)])
    # An older Rich ends what it does not show with an empty line.
    (line,) = filter(None, console.file.getvalue().splitlines())
    assert line.startswith("ADAM, seed 1: ")
    assert line.endswith("1 run, 0 diverged; loss 1.25, acc. 75.0%")


def test_a_path_is_said_as_it_is(terminal):
    Monitor(terminal).say("Another process works in /tmp/runs[1]/digits[/b]; waiting.")
    assert "/tmp/runs[1]/digits[/b]" in terminal.file.getvalue()
