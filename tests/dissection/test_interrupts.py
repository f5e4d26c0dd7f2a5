"""Ctrl-C, SIGTERM and SIGHUP are never lost, and wait where they are told to."""

import contextlib
import signal

import pytest

from dissect_optax.dissection import _interrupts as interrupts

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def arrive(request):
    """Sends the signal to this process."""
    return lambda: signal.raise_signal(request.param)


def swallow(arrive):
    with contextlib.suppress(KeyboardInterrupt):
        arrive()


def turn_into_an_error(arrive):
    try:
        arrive()
    except KeyboardInterrupt as interrupt:
        raise RuntimeError("INTERNAL: callback failed") from interrupt


@pytest.mark.parametrize(
    "command", [lambda arrive: arrive(), swallow, turn_into_an_error]
)
def test_signal_is_raised_whatever_became_of_it(command, arrive):
    with pytest.raises(KeyboardInterrupt), interrupts.recorded():
        command(arrive)


def test_another_error_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), interrupts.recorded():
        print(1 / 0)


def test_signal_that_was_swallowed_is_raised_at_the_next_check(arrive):
    with contextlib.suppress(KeyboardInterrupt), interrupts.recorded():
        interrupts.check()  # Nothing yet, nor anything of an earlier command.
        swallow(arrive)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


@pytest.mark.parametrize("second", SIGNALS[:2], ids=lambda number: number.name)
def test_deferred_signal_waits_and_a_second_does_not(arrive, second, capsys):
    with (
        contextlib.suppress(KeyboardInterrupt),
        interrupts.recorded(),
        interrupts.deferred(),
    ):
        arrive()
        assert interrupts.arrived()
        assert "Stopping in a moment" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
    assert not interrupts.arrived()  # The next command begins anew.


def test_terminal_that_is_closed_sends_its_signal_twice(arrive, capsys):
    with (
        contextlib.suppress(KeyboardInterrupt),
        interrupts.recorded(),
        interrupts.deferred(),
    ):
        arrive()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert capsys.readouterr().err.count("Stopping in a moment") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signal_is_deferred_although_nobody_can_be_told(arrive, monkeypatch):
    """As after SIGHUP, when the terminal has gone."""

    def fail(*_):
        raise OSError(5, "Input/output error")

    with contextlib.suppress(KeyboardInterrupt), interrupts.recorded():
        with interrupts.deferred(), monkeypatch.context() as patch:
            patch.setattr("sys.stderr.write", fail)
            arrive()
        assert interrupts.arrived()


def test_handlers_are_those_before_when_a_command_has_ended():
    before = [signal.getsignal(number) for number in SIGNALS]
    with interrupts.recorded(), interrupts.deferred():
        for number, handler in zip(SIGNALS, before, strict=True):
            assert signal.getsignal(number) is not handler
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signal_that_is_ignored_stays_ignored(number):
    """`nohup` ignores SIGHUP, and a shell SIGINT in its background jobs."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interrupts.recorded(), interrupts.deferred():
            signal.raise_signal(number)
            assert not interrupts.arrived()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
