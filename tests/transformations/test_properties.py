"""Properties that hold for every stream, every number and every batch."""

from typing import Any

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dissect_optax as do
from tests import oracles
from tests.transformations.streams import as_arrays

# Derandomised: what fails once fails always. A deadline would time compilation.
few = hypothesis.settings(
    max_examples=25, derandomize=True, deadline=None, database=None
)

# Hypothesis and the compiler both like one shape.
STEPS, WIDTH = 6, 4
elements = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)
streams = hypothesis.extra.numpy.arrays(np.float32, (STEPS, WIDTH), elements=elements)
# Powers of smaller ones underflow, and then the scale of the gradients counts.
decays = st.just(0.0) | st.floats(0.0625, float(np.float32(0.999)), width=32)
scales = st.integers(-20, 20).map(lambda n: np.float32(2.0**n))


def compiled(make: Any) -> Any:
    """Stream, variances and decay to the updates of a learning rate of one."""

    def run(gradients: Any, variances: Any, decay: Any) -> Any:
        tx = make(decay)

        def step(state: Any, inputs: Any) -> Any:
            gradient, variance = inputs
            updates, state = tx.update(gradient, state, grad_variance=variance)
            return state, as_arrays(updates)

        state = tx.init(jnp.zeros(WIDTH))
        return jax.lax.scan(step, state, (gradients, variances))[1]

    return jax.jit(run)


OPTIMIZERS = {
    "sgd": compiled(lambda _: do.sgd(1.0)),
    "ssd": compiled(lambda _: do.ssd(1.0)),
    "svag": compiled(lambda decay: do.svag(1.0, decay)),
    "m_sgd": compiled(lambda decay: do.m_sgd(1.0, decay)),
    "m_ssd": compiled(lambda decay: do.m_ssd(1.0, decay)),
    "m_svag": compiled(lambda decay: do.m_svag(1.0, decay)),
    "m_svag debiased": compiled(
        lambda decay: do.m_svag(1.0, decay, debias_variance=True)
    ),
    "adam": compiled(lambda decay: do.adam(1.0, decay)),
    "adam without eps": compiled(lambda decay: do.adam(1.0, decay, eps=0.0)),
    "adam_star": compiled(lambda decay: do.adam_star(1.0, decay)),
    "m_svag_mb": compiled(lambda decay: do.m_svag_mb(1.0, decay)),
    "adam_star_mb": compiled(lambda decay: do.adam_star_mb(1.0, decay)),
}
moving_averages = compiled(do.moving_average_estimate)
SIGN_METHODS = ["ssd", "m_ssd", "adam without eps", "adam_star", "adam_star_mb"]
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def run(name: str, gradients: Any, decay: Any, variances: Any = None) -> np.ndarray:
    if variances is None:
        variances = np.square(gradients) / 2
    return np.asarray(OPTIMIZERS[name](gradients, variances, decay))


# ---- Symmetries ---------------------------------------------------------------------


@every_optimizer
@few
@hypothesis.given(gradients=streams, decay=decays)
def test_turning_the_gradients_turns_the_updates(
    name: str, gradients: np.ndarray, decay: float
) -> None:
    np.testing.assert_array_equal(
        run(name, -gradients, decay), -run(name, gradients, decay)
    )


@every_optimizer
@few
@hypothesis.given(gradients=streams, decay=decays)
def test_elements_do_not_see_each_other(
    name: str, gradients: np.ndarray, decay: float
) -> None:
    order = np.array([2, 0, 3, 1])
    moved = run(name, gradients[:, order], decay)
    # Each place in a vector register may round in its own way.
    np.testing.assert_allclose(moved, run(name, gradients, decay)[:, order], rtol=1e-6)


@pytest.mark.parametrize("name", SIGN_METHODS)
@few
@hypothesis.given(gradients=streams, decay=decays, scale=scales)
def test_sign_methods_do_not_see_the_scale(
    name: str, gradients: np.ndarray, decay: float, scale: np.float32
) -> None:
    """By a power of two exactly: nothing is rounded differently."""
    np.testing.assert_array_equal(
        run(name, scale * gradients, decay), run(name, gradients, decay)
    )


@pytest.mark.parametrize(
    "name", [n for n in OPTIMIZERS if n not in (*SIGN_METHODS, "adam")]
)
@few
@hypothesis.given(gradients=streams, decay=decays, scale=scales)
def test_the_others_scale_with_the_gradients(
    name: str, gradients: np.ndarray, decay: float, scale: np.float32
) -> None:
    np.testing.assert_array_equal(
        run(name, scale * gradients, decay), scale * run(name, gradients, decay)
    )


# ---- Bounds -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m_svag", "m_svag debiased", "m_svag_mb"])
@few
@hypothesis.given(gradients=streams, decay=decays)
def test_adaptation_only_ever_shortens(
    name: str, gradients: np.ndarray, decay: float
) -> None:
    """0 ≤ γ ≤ 1: the same direction, not longer."""
    updates = run(name, gradients, decay)
    if name == "m_svag_mb":
        whole = run("m_svag_mb", gradients, decay, np.zeros_like(gradients))
    else:
        whole = -moving_averages(gradients, gradients, decay)[0]
    # The same average, compiled twice, may differ in the last digit.
    tolerance = 1e-5 * np.abs(gradients).max() + 1e-30
    assert np.all(updates * np.sign(whole) >= -tolerance)
    assert np.all(np.abs(updates) <= np.abs(whole) * (1 + 1e-5) + tolerance)


@pytest.mark.parametrize("name", ["ssd", "m_ssd", "adam_star", "adam_star_mb"])
@few
@hypothesis.given(gradients=streams, decay=decays)
def test_sign_methods_never_step_further_than_the_step_size(
    name: str, gradients: np.ndarray, decay: float
) -> None:
    updates = run(name, gradients, decay)
    assert np.all(np.abs(updates) <= 1)


@pytest.mark.parametrize("factor", [do.inverse, do.inverse_sqrt, do.gaussian_sign])
@few
@hypothesis.given(
    pair=st.tuples(*[st.floats(0, float(np.float32(3e38)), width=32)] * 2)
)
def test_factors_lie_in_the_unit_interval_and_fall(
    factor: Any, pair: tuple[float, float]
) -> None:
    low, high = sorted(pair)
    values = np.asarray(factor(jnp.array([low, high], jnp.float32)))
    assert np.all((values >= 0) & (values <= 1))
    assert values[0] >= values[1]
    if high > 1.1 * low and high > 1e-3 and values[0] > 1e-30:
        assert values[0] > values[1]


# ---- Averages -----------------------------------------------------------------------


@few
@hypothesis.given(gradients=streams, decay=decays)
def test_recursion_is_the_weighted_variance(
    gradients: np.ndarray, decay: float
) -> None:
    """West's recursion against the definition, within rounding of the largest g²."""
    mean, variance = moving_averages(gradients, gradients, decay)
    m, s = oracles.mean_and_variance(decay, gradients.astype(np.float64))
    largest = np.abs(gradients).max(axis=0)
    assert np.all(variance >= 0)
    np.testing.assert_array_less(np.abs(mean[-1] - m), 3e-6 * largest + 1e-30)
    np.testing.assert_array_less(np.abs(variance[-1] - s), 1e-5 * largest**2 + 1e-30)


@few
@hypothesis.given(
    value=elements.filter(bool), decay=decays, count=st.integers(1, STEPS)
)
def test_equal_gradients_have_exactly_no_variance(
    value: float, decay: float, count: int
) -> None:
    """Not even rounding makes a constant stream look noisy."""
    gradients = np.full((STEPS, WIDTH), value, np.float32)
    mean, variance = moving_averages(gradients, gradients, decay)
    np.testing.assert_array_equal(mean[count - 1], gradients[0])
    np.testing.assert_array_equal(variance[count - 1], np.zeros(WIDTH))


@jax.jit
def kappas(momentum: Any) -> Any:
    """κ(μ,1), κ(μ,2), ..., as it multiplies a variance of one."""
    tx = do.correct_for_momentum(momentum)

    def step(state: Any, one: Any) -> Any:
        estimate, state = tx.update(do.Estimate(one, one), state)
        return state, estimate.variance

    return jax.lax.scan(step, tx.init(jnp.zeros(())), jnp.ones(50))[1]


@few
@hypothesis.given(momentum=decays)
def test_kappa_falls_from_one_to_its_limit(momentum: float) -> None:
    values = np.asarray(kappas(momentum))
    assert values[0] == 1
    assert np.all((values > 0) & (values <= 1))
    assert np.all(np.diff(values) <= 1e-6)
    limit = (1 - momentum) / (1 + momentum)
    assert np.all(values >= limit * (1 - 1e-5))
    expected = [oracles.kappa(momentum, t) for t in range(1, 51)]
    np.testing.assert_allclose(values, expected, rtol=2e-5)


@few
@hypothesis.given(
    per_example=hypothesis.extra.numpy.arrays(np.float32, (5, 3), elements=elements)
)
def test_variance_of_the_mean_does_not_see_the_order_of_examples(
    per_example: np.ndarray,
) -> None:
    tx = do.aggregate_per_example()
    estimate, _ = tx.update(jnp.asarray(per_example), tx.init(None))
    turned, _ = tx.update(jnp.asarray(per_example[::-1]), tx.init(None))
    largest = np.abs(per_example).max(axis=0)
    expected = np.var(per_example.astype(np.float64), axis=0, ddof=1) / 5
    for actual in (estimate.variance, turned.variance):
        assert np.all(actual >= 0)
        np.testing.assert_array_less(
            np.abs(actual - expected), 1e-5 * largest**2 + 1e-30
        )
