"""What the user sees while runs work."""

import io
import math
import re

import pytest
from rich.console import Console

from dissect_optax.dissection import Measurement, Monitor, SilentMonitor

CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


def measurement(training_loss, test_accuracy=None):
    values = {"training_loss": training_loss, "learning_rate": 0.3}
    if test_accuracy is not None:
        values["test_accuracy"] = test_accuracy
    return Measurement(20, 1.5, values)


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


@pytest.fixture
def file():
    """What is not a terminal."""
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def lines_in(console):
    # An older Rich ends what it does not show with an empty line.
    return list(filter(None, console.file.getvalue().splitlines()))


def test_a_short_group_leaves_its_closing_line_in_a_file(file):
    with Monitor(file).group("ADAM, seed 1", 20) as report:
        report.begin(0, [measurement(2.5, 0.1)])
        report(10, [measurement(1.5, 0.5)])
        report(20, [measurement(1.25, 0.75)])
    (line,) = lines_in(file)
    assert line.startswith("ADAM, seed 1: ")
    assert line.endswith("1 run, 0 diverged; loss 1.25, acc. 75.0%")


def test_a_long_group_leaves_a_line_a_minute_in_a_file(file, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    with Monitor(file).group("ADAM, seed 1", 100) as report:
        report.begin(0, [measurement(2.5, 0.1)])
        for step in range(1, 101):
            now[0] = 10.0 * step
            report(step, [measurement(1.0 + 1 / step, 0.5), measurement(math.nan)])
    *lines, closing = lines_in(file)
    assert lines == [
        f"ADAM, seed 1: step {step} of 100, 2 runs, 1 diverged;"
        f" best loss {1 + 1 / step:.3g}, acc. 50.0%"
        for step in range(6, 101, 6)
    ]
    assert closing.startswith("ADAM, seed 1: 1000.0 s, ")


def test_a_terminal_gets_no_such_lines(terminal, monkeypatch):
    monkeypatch.setattr("time.perf_counter", iter(range(0, 100_000, 100)).__next__)
    with Monitor(terminal).group("ADAM, seed 1", 20) as report:
        report.begin(0, [measurement(2.5, 0.1)])
        report(10, [measurement(1.5, 0.5)])
    assert "step 10 of 20" not in terminal.file.getvalue()


def test_a_run_without_metrics_is_shown_by_its_loss(file):
    with Monitor(file).group("ADAM, seed 1", 20) as report:
        report.begin(0, [measurement(2.5)])
        report(20, [measurement(1.25)])
    (line,) = lines_in(file)
    assert line.endswith("1 run, 0 diverged; loss 1.25")


def test_a_silent_monitor_shows_nothing(capfd):
    monitor = SilentMonitor()
    monitor.say("Another process works.")
    with monitor.group("ADAM, seed 1", 20) as report:
        report.begin(0, [measurement(2.5)])
        report(20, [measurement(1.25)])
    assert capfd.readouterr() == ("", "")


def test_a_path_is_said_as_it_is(terminal):
    Monitor(terminal).say("Another process works in /tmp/runs[1]/digits[/b]; waiting.")
    assert "/tmp/runs[1]/digits[/b]" in terminal.file.getvalue()
