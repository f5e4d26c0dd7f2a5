"""What makes an Estimate, and what moves one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from tests import oracles
from tests.transformations.streams import stream, trajectory

SIZES = [1e-18, 1e-6, 1.0, 1e12]


def same_bits(actual: Any, desired: Any) -> None:
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(desired), strict=True)


def history_of(oracle: Any, gradients: np.ndarray, *args: Any) -> list[np.ndarray]:
    """(means, variances) over the steps from an oracle of one step."""
    pairs = [oracle(*args, history) for history in oracles.histories(gradients)]
    return [np.stack(rows) for rows in zip(*pairs, strict=True)]


# ---- moving_average_estimate --------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("imaginary", [False, True])
def test_one_decay_is_weighted_mean_and_weighted_variance(
    decay: float, imaginary: bool
) -> None:
    gradients = stream(1, imaginary=imaginary)
    mean, variance = trajectory(do.moving_average_estimate(decay), gradients)
    expected = history_of(oracles.mean_and_variance, gradients, decay)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(variance, expected[1], rtol=1e-11, atol=1e-14)
    assert variance.dtype == np.float64


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize("b2", [None, 0.5, 0.99])
def test_variance_with_noise_floor(b2: float | None, eps: float) -> None:
    """s = (√v+ε)² - m², with one decay or two."""
    gradients = stream(2)
    tx = do.moving_average_estimate(0.9, b2, eps=eps)
    mean, variance = trajectory(tx, gradients)
    for t, history in enumerate(oracles.histories(gradients)):
        m = oracles.weighted_mean(0.9, history)
        v = oracles.weighted_mean(0.9 if b2 is None else b2, history**2)
        np.testing.assert_allclose(mean[t], m, rtol=1e-11, atol=1e-14)
        expected = (np.sqrt(v) + eps) ** 2 - m**2
        np.testing.assert_allclose(variance[t], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_debias_variance_divides_by_one_minus_kappa() -> None:
    gradients = stream(3)
    tx = do.moving_average_estimate(0.9, debias_variance=True)
    _, variance = trajectory(tx, gradients)
    for t, history in enumerate(oracles.histories(gradients)):
        _, biased = oracles.mean_and_variance(0.9, history)
        expected = oracles.debiased(0.9, biased, t + 1)
        np.testing.assert_allclose(variance[t], expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("debias_variance", [False, True])
def test_debias_variance_makes_it_unbiased(debias_variance: bool) -> None:
    """Accepts the variance of independent gradients, rejects two thirds of it."""
    rng = np.random.default_rng(0)
    deviation, steps = 3.0, 8
    gradients = 5 + deviation * rng.normal(size=(steps, 20_000)).astype(np.float32)
    tx = do.moving_average_estimate(0.9, debias_variance=debias_variance)
    seen = np.mean(trajectory(tx, gradients)[1][-1], dtype=np.float64)
    bias = 1.0 if debias_variance else 1 - oracles.kappa(0.9, steps)
    expected = bias * deviation**2
    # The mean of 20 000 sample variances of 8 has a standard deviation below 0.5 %.
    assert abs(seen / expected - 1) < 0.02
    assert abs(seen / (expected * 2 / 3) - 1) > 0.02


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("debias_variance", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1, 0.9, 0.999, 0.99999])
def test_first_step_shows_no_variance(
    decay: float, debias_variance: bool, size: float
) -> None:
    gradient = jnp.float32(size) * jnp.array([1.0, -1 / 3, 0.0, 0.7])
    tx = do.moving_average_estimate(decay, debias_variance=debias_variance)
    # A huge past must leave no trace either: it has the weight zero.
    blank = tx.init(gradient)
    past = blank._replace(mean=jnp.full(4, 1e15), variance=jnp.full(4, 1e30))
    for state in (blank, past):
        estimate, _ = tx.update(gradient, state)
        same_bits(estimate.mean, gradient)
        same_bits(estimate.variance, jnp.zeros(4))


@pytest.mark.parametrize("debias_variance", [False, True])
def test_decay_zero_makes_every_step_a_first_step(debias_variance: bool) -> None:
    gradients = stream(4).astype(np.float32)
    tx = do.moving_average_estimate(0.0, debias_variance=debias_variance)
    mean, variance = trajectory(tx, gradients)
    same_bits(mean, gradients)
    same_bits(variance, np.zeros_like(gradients))


@pytest.mark.parametrize("b2", [None, 1.0])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_decay_rounded_to_one_gives_the_plain_average(
    dtype: Any, b2: float | None
) -> None:
    gradients = stream(5).astype(np.float32)

    def run(one: Any) -> Any:
        second = None if b2 is None else one
        return trajectory(do.moving_average_estimate(one, second), gradients)

    one = jnp.asarray(0.9999, jnp.bfloat16).astype(dtype)
    assert one == 1
    # Concrete bfloat16, as inject_hyperparams hands it over, or traced.
    mean, variance = run(one) if dtype == jnp.bfloat16 else jax.jit(run)(one)
    for t in range(len(gradients)):
        seen = gradients[: t + 1].astype(np.float64)
        np.testing.assert_allclose(mean[t], seen.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance[t], seen.var(0), rtol=1e-4, atol=1e-6)


def test_a_missing_gradient_keeps_its_averages_but_counts() -> None:
    tx = do.moving_average_estimate(0.5)
    params = {"always": jnp.zeros(()), "sometimes": jnp.zeros(())}
    state = tx.init(params)
    for gradients in ((1.0, 2.0), (3.0, None), (5.0, 8.0)):
        estimate, state = tx.update(
            dict(zip(params, map(_maybe_array, gradients), strict=True)), state
        )
    assert state.count == 3
    assert estimate.mean["always"] == pytest.approx((1 + 2 * 3 + 4 * 5) / 7)
    # w_3 = 4/7 for the newest gradient; the average of the others is the first alone.
    assert estimate.mean["sometimes"] == pytest.approx(2 + 4 / 7 * (8 - 2))


def _maybe_array(value: float | None) -> jax.Array | None:
    return None if value is None else jnp.asarray(value)


# ---- attach_variance ----------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
@pytest.mark.parametrize("whole_tree", [True, False])
def test_attach_variance_takes_the_part_that_belongs_to_its_gradients(
    wrapper: str, whole_tree: bool
) -> None:
    tx = optax.chain(do.attach_variance(), do.adapt_to_variance())
    gradients = {"ours": jnp.array([1.0, 2.0]), "other": jnp.array([3.0])}
    variances = {"ours": jnp.array([1.0, 12.0]), "other": jnp.array([9.0])}
    if not whole_tree:
        variances = {**variances, "other": optax.MaskedNode()}
    if wrapper == "masked":
        wrapped = optax.masked(tx, {"ours": True, "other": False})
    else:
        groups = {"ours": "ours", "other": "other"}
        wrapped = optax.partition({"ours": tx, "other": optax.identity()}, groups)
    for params in (gradients, None):
        updates, _ = wrapped.update(
            gradients, wrapped.init(gradients), params, grad_variance=variances
        )
        np.testing.assert_allclose(updates["ours"], [0.5, 0.5])
        np.testing.assert_allclose(updates["other"], [3.0])


def test_attach_variance_widens_low_precision() -> None:
    gradient = jnp.array([1.0, 2.0], jnp.bfloat16)
    tx = do.attach_variance()
    estimate, _ = tx.update(
        gradient, tx.init(gradient), grad_variance=jnp.array([0.1, 0.2])
    )
    assert estimate.mean.dtype == estimate.variance.dtype == jnp.float32
    same_bits(estimate.variance, np.array([0.1, 0.2], np.float32))


def test_multi_steps_drops_the_variance_of_all_micro_batches_but_the_last() -> None:
    """The limitation that the docstrings warn of; half the mean is what is right."""
    tx = optax.chain(do.attach_variance(), do.adapt_to_variance())
    wrapped = optax.MultiSteps(tx, every_k_schedule=2)
    gradient = jnp.ones(1)
    state = wrapped.init(gradient)
    for variance in (7.0, 1.0):
        updates, state = wrapped.update(
            gradient, state, grad_variance=jnp.array([variance])
        )
    np.testing.assert_allclose(updates, [1 / (1 + 1)])
    # Of two independent micro-batches, the mean has the variance (7+1)/4 = 2.
    right, _ = tx.update(gradient, tx.init(gradient), grad_variance=jnp.array([2.0]))
    np.testing.assert_allclose(right, [1 / (1 + 2)])


# ---- aggregate_per_example ----------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_aggregate_per_example_is_equation_44(batch_size: int) -> None:
    rng = np.random.default_rng(batch_size)
    per_example = {
        "a": rng.normal(size=(batch_size, 3)),
        "b": rng.normal(size=batch_size),
    }
    tx = do.aggregate_per_example()
    estimate, _ = tx.update(jax.tree.map(jnp.asarray, per_example), tx.init(None))
    for name, gradients in per_example.items():
        expected = oracles.minibatch_variance(gradients)
        np.testing.assert_allclose(estimate.mean[name], gradients.mean(0), rtol=1e-12)
        np.testing.assert_allclose(estimate.variance[name], expected, rtol=1e-10)


def test_aggregate_per_example_is_unbiased_for_the_variance_of_the_mean() -> None:
    """Accepts σ²/B, rejects two thirds of it; B = 3 tells B-1 from B."""
    rng = np.random.default_rng(0)
    deviation, batch_size = 3.0, 3
    per_example = 5 + deviation * rng.normal(size=(batch_size, 40_000))
    tx = do.aggregate_per_example()
    estimate, _ = tx.update(jnp.asarray(per_example, jnp.float32), tx.init(None))
    seen = float(jnp.mean(estimate.variance))
    # Standard deviation of this mean: 1 / √40 000 of its value.
    assert abs(seen / (deviation**2 / batch_size) - 1) < 0.02
    assert abs(seen / (2 / 3 * deviation**2 / batch_size) - 1) > 0.02


def test_aggregate_per_example_does_not_cancel() -> None:
    rng = np.random.default_rng(1)
    per_example = (1000 + 1e-3 * rng.normal(size=(64, 50))).astype(np.float32)
    tx = do.aggregate_per_example()
    estimate, _ = tx.update(jnp.asarray(per_example), tx.init(None))
    # By squares even float64 would lose most of its digits: deviations here, too.
    expected = np.var(per_example.astype(np.float64), axis=0, ddof=1) / 64
    np.testing.assert_allclose(estimate.variance, expected, rtol=0.01)


def test_aggregate_per_example_of_low_precision_and_complex_leaves() -> None:
    tx = do.aggregate_per_example()
    gradients = {
        "brain": jnp.array([[1.0], [3.0]], jnp.bfloat16),
        "complex": jnp.array([[1 + 1j], [1 - 1j]], jnp.complex64),
        "absent": None,
    }
    estimate, _ = tx.update(gradients, tx.init(None))
    assert estimate.mean["brain"].dtype == jnp.float32
    assert estimate.mean["complex"].dtype == jnp.complex64
    assert estimate.mean["absent"] is None
    same_bits(estimate.variance["brain"], np.array([1.0], np.float32))
    same_bits(estimate.variance["complex"], np.array([1.0], np.float32))


# ---- with_relative_variance_of ------------------------------------------------------


def test_with_relative_variance_of_keeps_the_gradient_and_eta() -> None:
    gradients = stream(6).astype(np.float32)
    source = do.moving_average_estimate(0.9)
    mean, variance = trajectory(source, gradients)
    direction, spread = trajectory(do.with_relative_variance_of(source), gradients)
    same_bits(direction, np.where(mean == 0, np.float32(0), gradients))
    moving = (direction != 0) & (mean != 0)
    assert np.mean(moving) > 0.8
    np.testing.assert_allclose(
        (spread / np.where(moving, direction, 1) ** 2)[moving],
        (variance / np.where(moving, mean, 1) ** 2)[moving],
        rtol=1e-5,
    )


def test_with_relative_variance_of_a_zero_mean_is_a_zero_direction() -> None:
    tx = do.with_relative_variance_of(do.moving_average_estimate(0.5))
    state = tx.init(jnp.zeros(2))
    for gradient in ([2.0, 2.0], [-1.0, 2.0]):  # weights 1/3 and 2/3
        estimate, state = tx.update(jnp.array(gradient), state)
    assert optax.tree.get(state, "mean")[0] == 0
    same_bits(estimate.mean, np.array([0.0, 2.0], np.float32))


def test_with_relative_variance_of_attached_variances() -> None:
    """Any estimator does; this one needs an extra argument."""
    tx = do.with_relative_variance_of(do.attach_variance())
    g, s = jnp.array([2.0, -4.0]), jnp.array([1.0, 3.0])
    estimate, _ = tx.update(g, tx.init(g), grad_variance=s)
    np.testing.assert_allclose(estimate.mean, g)
    np.testing.assert_allclose(estimate.variance, s, rtol=1e-6)


# ---- accumulate_momentum ------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_accumulate_momentum_is_equation_48(momentum: float) -> None:
    gradients, variances = stream(7), stream(8) ** 2
    tx = optax.chain(do.attach_variance(), do.accumulate_momentum(momentum))
    mean, variance = trajectory(tx, gradients, variances)
    for t, history in enumerate(oracles.histories(gradients)):
        r, s = oracles.momentum_and_variance(momentum, history, variances[: t + 1])
        np.testing.assert_allclose(mean[t], r, rtol=1e-11, atol=1e-14)
        np.testing.assert_allclose(variance[t], s, rtol=1e-11, atol=1e-14)


def test_momentum_zero_hands_the_estimate_on() -> None:
    gradients = stream(7).astype(np.float32)
    variances = gradients**2
    tx = optax.chain(do.attach_variance(), do.accumulate_momentum(0.0))
    mean, variance = trajectory(tx, gradients, variances)
    same_bits(mean, gradients)
    same_bits(variance, variances)


def test_accumulated_variance_is_the_variance_of_the_momentum() -> None:
    """Accepts the variance over 20 000 independent momenta, rejects 2/3 of it."""
    rng = np.random.default_rng(0)
    gradients = (1 + 2 * rng.normal(size=(9, 20_000))).astype(np.float32)
    tx = optax.chain(do.attach_variance(), do.accumulate_momentum(0.8))
    mean, variance = trajectory(tx, gradients, np.full_like(gradients, 4.0))
    seen = np.var(mean[-1].astype(np.float64))
    # The standard deviation of a sample variance is √(2/20 000) = 1 % of it.
    assert abs(variance[-1, 0] / seen - 1) < 0.04
    assert abs(variance[-1, 0] * 2 / 3 / seen - 1) > 0.04


# ---- correct_for_momentum -----------------------------------------------------------


def kappas(momentum: Any, steps: int = 200) -> np.ndarray:
    """κ(μ,1), κ(μ,2), ... as the transformation applies it to a variance of one."""
    tx = optax.chain(do.attach_variance(), do.correct_for_momentum(momentum))
    ones = jnp.ones(steps)
    return trajectory(tx, ones, ones)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.9, 0.999, 1 - 1e-7])
def test_kappa_is_the_ratio_of_its_sums(momentum: float) -> None:
    expected = [oracles.kappa(momentum, t) for t in range(1, 201)]
    # The oracle itself has 1/t ± 1e-9 left where the decay is next to one.
    np.testing.assert_allclose(kappas(momentum), expected, rtol=1e-9)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 0.999, 0.99999])
def test_kappa_in_float32(momentum: float) -> None:
    actual = kappas(momentum)
    same_bits(actual[0], np.float32(1))
    rounded = float(np.float32(momentum))
    expected = [oracles.kappa(rounded, t) for t in range(1, 201)]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_kappa_without_momentum_is_one() -> None:
    same_bits(kappas(0.0), np.ones(200, np.float32))


def test_kappa_of_a_traced_momentum_of_one_is_one_over_t() -> None:
    actual = jax.jit(kappas)(jnp.float32(1))
    np.testing.assert_allclose(actual, 1 / np.arange(1, 201), rtol=1e-5)


def test_kappa_is_the_variance_ratio_of_a_momentum() -> None:
    """Accepts var[m]/σ² over 20 000 independent averages, rejects 2/3 of it."""
    rng = np.random.default_rng(0)
    gradients = (1 + 2 * rng.normal(size=(9, 20_000))).astype(np.float32)
    mean, _ = trajectory(do.moving_average_estimate(0.8), gradients)
    seen = np.var(mean[-1].astype(np.float64)) / 4
    kappa = kappas(0.8, steps=9)[-1]
    assert abs(kappa / seen - 1) < 0.04
    assert abs(kappa * 2 / 3 / seen - 1) > 0.04
