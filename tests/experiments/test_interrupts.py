"""Ctrl-C is never lost, and waits where it is told to."""

import contextlib
import signal

import pytest

from experiments import interrupts


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def swallow_ctrl_c():
    with contextlib.suppress(KeyboardInterrupt):
        press_ctrl_c()


def turn_ctrl_c_into_an_error():
    try:
        press_ctrl_c()
    except KeyboardInterrupt as interrupt:
        raise RuntimeError("INTERNAL: callback failed") from interrupt


@pytest.mark.parametrize(
    "command", [press_ctrl_c, swallow_ctrl_c, turn_ctrl_c_into_an_error]
)
def test_ctrl_c_is_raised_whatever_became_of_it(command):
    with pytest.raises(KeyboardInterrupt), interrupts.noted():
        command()


def test_another_error_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), interrupts.noted():
        print(1 / 0)


def test_ctrl_c_that_was_swallowed_is_raised_at_the_next_check():
    with contextlib.suppress(KeyboardInterrupt), interrupts.noted():
        interrupts.check()  # Nothing yet, nor anything of an earlier command.
        swallow_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_deferred_ctrl_c_waits_and_a_second_does_not():
    with (
        contextlib.suppress(KeyboardInterrupt),
        interrupts.noted(),
        interrupts.deferred(),
    ):
        press_ctrl_c()
        assert interrupts.arrived()
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()
    assert not interrupts.arrived()  # The next command begins anew.


def test_handler_is_the_one_before_when_a_command_has_ended():
    before = signal.getsignal(signal.SIGINT)
    with interrupts.noted(), interrupts.deferred():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
