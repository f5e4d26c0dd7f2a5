"""Settings of every test: no silent broadcasting, float64 by fixture only."""

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import pytest

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # JAX before 0.8
    from jax.experimental import enable_x64


# A background process inherits that Ctrl-C is ignored, with `nohup` also SIGHUP.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def rank_promotion_raises() -> Iterator[None]:
    """A vector that meets a matrix is a mistake until it says otherwise."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with enable_x64(True):
        yield


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """For tests that do not depend on how hard the compiler works."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_optimization() -> Iterator[None]:
    """For a test that does, among others that do not."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def small_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small sets named as MNIST and the CIFARs, for `--data-dir`; to be read only."""
    # Imported here: most tests need no data set.
    from tests.experiments.small_tfds import write_small_sets

    data_dir = tmp_path_factory.mktemp("tfds")
    write_small_sets(data_dir)
    return data_dir


@pytest.fixture
def interrupt_at_first_report(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Sequence[str]], None]:
    """Runs a command of the experiments until its first steps are reported."""
    return functools.partial(_interrupt, monkeypatch)


def _interrupt(monkeypatch: pytest.MonkeyPatch, command: Sequence[str]) -> None:
    # Imported here: most tests need no experiments.
    from dissect_optax.dissection._exit_status import INTERRUPTED
    from experiments.command_line import main

    with monkeypatch.context() as patch:
        patch.setattr(
            "dissect_optax.dissection._progress.GroupReport.__call__",
            lambda *_: os.kill(os.getpid(), signal.SIGINT),
        )
        assert main(command) == INTERRUPTED
