"""How many runs are trained at a time, on this CPU and on devices that are made up."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from experiments import group_size as module
from experiments.data import Dataset, Examples
from experiments.group_size import group_size
from experiments.methods import get_method
from experiments.problems import get_problem

IMAGES = Examples(jnp.zeros((16, 28, 28, 1), jnp.uint8), jnp.zeros(16, jnp.int32))
DATASET = Dataset(training=IMAGES, test=IMAGES)


def size_for(method="m_sgd", wanted=10):
    problem = get_problem("mnist")
    return group_size(problem, get_method(method), problem.smoke, DATASET, wanted)


@pytest.fixture
def accelerator(monkeypatch):
    """Gives the device so much memory, or lets it not say."""

    def set_memory(limit):
        stats = None if limit is None else {"bytes_limit": limit}
        device = SimpleNamespace(memory_stats=lambda: stats)
        monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(module.jax, "devices", lambda: [device])

    return set_memory


def test_cpu_is_filled_by_its_cores(monkeypatch):
    problem = get_problem("mnist")
    # 1.3 million weights, 8 examples: 64 megaflops, more than two cores need.
    monkeypatch.setattr(module, "_cores", lambda: 2)
    assert size_for() == 1
    monkeypatch.setattr(module, "_cores", lambda: 32)
    assert 4 <= size_for(wanted=2) <= 7
    assert size_for(wanted=1) == 1
    monkeypatch.setattr(module, "_cores", lambda: 1000)
    assert size_for() == 10
    # A mini-batch of the real size is 16 times as much.
    dataset, method = DATASET, get_method("m_sgd")
    monkeypatch.setattr(module, "_cores", lambda: 32)
    assert group_size(problem, method, problem.settings, dataset, 10) == 1


def test_accelerator_is_filled_by_its_memory(accelerator):
    # Parameters, gradients and the optimizer's buffers: some ten times 5.3 megabytes.
    accelerator(10**12)
    assert size_for() == 10
    assert size_for(wanted=3) == 3
    accelerator(10**6)
    assert size_for() == 1
    accelerator(600 * 10**6)
    assert size_for(wanted=100) in range(2, 12)


def test_variance_needs_memory_too(accelerator):
    accelerator(10**10)
    assert size_for("m_svag_mb", wanted=1000) < size_for("m_svag", wanted=1000)


def test_device_that_does_not_say_takes_all_at_once(accelerator):
    accelerator(None)
    assert size_for(wanted=7) == 7
