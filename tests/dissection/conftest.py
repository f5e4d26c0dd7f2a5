"""Interrupts of runs of the engine."""

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def quick_compilation() -> Iterator[None]:
    """Runs are short here, and compiling them takes longer than they do."""
    jax.config.update("jax_disable_most_optimizations", True)
    # Processes of their own must end with the same records.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    jax.config.update("jax_disable_most_optimizations", False)


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
