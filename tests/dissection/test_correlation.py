"""Correlation of neighbours in the data: planted, absent, and merely shuffled away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dissect_optax.dissection import Settings
from dissect_optax.dissection._correlation import (
    correlation_of_pairs,
    neighbour_correlation,
)
from dissect_optax.dissection._user_problem import user_problem
from dissect_optax.dissection._warnings import CorrelatedExamples
from tests.dissection.small_problems import init, loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETTINGS = Settings(steps=20, batch_size=8, evaluation_interval=1)


def sequences(rho, length=8, count=64, size=3, seed=0):
    """Rows `[count · length, size]` with correlation `rho` within a sequence."""
    rng = np.random.default_rng(seed)
    shared = np.repeat(rng.normal(size=(count, size)), length, axis=0)
    own = rng.normal(size=(count * length, size))
    return (np.sqrt(rho) * shared + np.sqrt(1 - rho) * own).astype(np.float32)


def moments(rows):
    """Both moments of pairs of rows, in NumPy."""
    centred = (rows - rows.mean(0)).reshape(-1, 2, rows.shape[1])
    first, second = centred[:, 0], centred[:, 1]
    return (first * second).sum(1), ((first**2).sum(1) + (second**2).sum(1)) / 2


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("pairs", [16, 64])
def test_the_interval_holds_a_planted_correlation(rho, pairs):
    found = [
        correlation_of_pairs(*moments(sequences(rho, 2, pairs, 5, seed)))
        for seed in range(400)
    ]
    assert np.mean([c.value for c in found]) == pytest.approx(rho, abs=0.01)
    if rho < 1:
        covered = np.mean([c.low <= rho <= c.high for c in found])
        # 95 % claimed; the interval of a ratio is short where there are few pairs.
        assert covered > (0.92 if pairs == 64 else 0.9)
        wrong = np.mean([c.low <= rho - 0.4 <= c.high for c in found])
        assert wrong < 0.9 * covered


def test_gradients_of_neighbours_are_compared():
    """A linear loss, whose gradient is the example, in two arrays."""
    rows = sequences(0.5, 2, 64)

    def gradient(params, example, key):
        scale = params["w"]
        return {"w": scale * example["a"], "v": scale * example["b"]}

    data = {"a": rows[:, :1], "b": rows[:, 1:]}
    params = {"w": jnp.float32(3.0), "v": jnp.zeros(2)}
    found = neighbour_correlation(gradient, params, data)
    expected = correlation_of_pairs(*moments(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_said_without_pairs_or_differences():
    def gradient(params, example, key):
        return params * example

    assert neighbour_correlation(gradient, jnp.ones(()), np.ones(31)) is None
    assert neighbour_correlation(gradient, jnp.ones(()), np.ones(32)) is None
    broken = np.append(np.ones(31), np.nan)
    assert neighbour_correlation(gradient, jnp.ones(()), broken) is None


def warned(inputs, targets):
    data = (inputs.astype(np.float32), targets.astype(np.float32))
    _, warnings = user_problem(loss, init, data, None, SETTINGS)
    return [w for w in warnings if isinstance(w, CorrelatedExamples)]


def test_tokens_of_sequences_are_a_warning_and_sequences_are_not():
    """Points along walks, whose neighbours have similar inputs and errors."""
    rng = np.random.default_rng(1)
    start = np.repeat(rng.normal(size=(32, 1, 2)), 16, axis=1)
    inputs = start + 0.2 * np.cumsum(rng.normal(size=(32, 16, 2)), axis=1)
    inputs = inputs.reshape(-1, 2)
    targets = inputs @ [1.0, -1.0]
    (warning,) = warned(inputs, targets)
    assert 0.5 < warning.low < warning.correlation < warning.high <= 1.0
    assert "tokens of a sequence" in warning.sentence
    order = rng.permutation(len(inputs))
    assert warned(inputs[order], targets[order]) == []
    # One point of each walk.
    assert warned(inputs[::16], targets[::16]) == []


def test_independent_examples_are_no_warning():
    count = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        inputs = rng.normal(size=(128, 2))
        count += len(warned(inputs, inputs @ [1.0, -1.0] + rng.normal(size=128)))
    assert count == 0


def test_a_random_loss_has_other_numbers_for_each_example():
    """Gradients that are noise from the key alone do not correlate."""

    def gradient(params, example, key):
        return params * jax.random.normal(key, (4,))

    data = np.ones((128, 1), np.float32)
    found = neighbour_correlation(gradient, jnp.ones(4), data)
    assert found.low < 0 < found.high
