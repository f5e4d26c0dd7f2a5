"""How many runs are trained at a time, on this CPU and on devices that are made up."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from dissect_optax.dissection import Data, Problem, Settings, get_method
from dissect_optax.dissection import _replicas as module
from dissect_optax.dissection._replicas import replicas_per_program

# Of MNIST's size: 1.3 million weights.
WIDTHS = (784, 1000, 500, 100, 10)
DATA = Data({"input": jnp.zeros((16, 784)), "label": jnp.zeros(16, jnp.int32)})
SETTINGS = Settings(steps=4, batch_size=8, evaluation_interval=2)


def init(key):
    del key
    return [jnp.zeros(shape) for shape in itertools.pairwise(WIDTHS)]


def loss(params, example, key):
    del key
    activation = example["input"]
    for kernel in params:
        activation = jnp.tanh(activation @ kernel)
    return jnp.square(activation[example["label"]])


def batch_loss(params, batch, key):
    del key
    activation = batch["input"]
    for kernel in params:
        activation = jnp.tanh(activation @ kernel)
    return jnp.mean(jnp.square(activation))


PROBLEM = Problem(
    name="wide",
    title="Wide",
    settings=SETTINGS,
    init=init,
    loss=loss,
    batch_loss=batch_loss,
    evaluate=lambda params, example: (loss(params, example, None), {}),
    load_data=lambda _: DATA,
)


def size_for(method="m_sgd", wanted=10, settings=SETTINGS):
    return replicas_per_program(PROBLEM, get_method(method), settings, DATA, wanted)


@pytest.fixture
def accelerator(monkeypatch):
    """Gives the device so much memory, or lets it not say."""

    def set_memory(limit):
        stats = None if limit is None else {"bytes_limit": limit}
        device = SimpleNamespace(memory_stats=lambda: stats)
        monkeypatch.setattr(module.jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(module.jax, "local_devices", lambda: [device])

    return set_memory


def test_cpu_is_filled_by_its_cores(monkeypatch):
    # 1.3 million weights, 8 examples: 64 megaflops, more than two cores need.
    monkeypatch.setattr(module, "_cores", lambda: 2)
    assert size_for() == 1
    monkeypatch.setattr(module, "_cores", lambda: 32)
    assert 4 <= size_for(wanted=2) <= 7
    assert size_for(wanted=1) == 1
    monkeypatch.setattr(module, "_cores", lambda: 1000)
    assert size_for() == 10
    # A mini-batch of MNIST's size is 16 times as much.
    monkeypatch.setattr(module, "_cores", lambda: 32)
    assert size_for(settings=dataclasses.replace(SETTINGS, batch_size=128)) == 1


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
