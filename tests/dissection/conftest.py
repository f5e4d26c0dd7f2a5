"""Interrupts of runs of the engine."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def stop_at_first_report(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., None]:
    """Runs something until its first steps are reported, where a signal arrives."""

    def stop(run: Callable[[], Any], number: int = signal.SIGINT) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(
                "dissect_optax.dissection._progress.GroupReport.__call__",
                lambda *_: os.kill(os.getpid(), number),
            )
            with pytest.raises(KeyboardInterrupt):
                run()

    return stop
