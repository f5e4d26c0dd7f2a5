"""The two aspects themselves: the sign, and the factors of the relative variance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats

import dissect_optax as do
from tests.transformations.streams import as_arrays

Factor = Callable[[jax.Array], jax.Array]
every_factor = pytest.mark.parametrize(
    "factor", [do.inverse, do.inverse_sqrt, do.gaussian_sign]
)
TINY = float(jnp.finfo(jnp.float32).tiny)


def updated(tx: optax.GradientTransformation, mean: Any, variance: Any) -> Any:
    """What a stateless transformation makes of an Estimate, compiled."""

    @jax.jit
    def update(mean: Any, variance: Any) -> Any:
        return as_arrays(tx.update(do.Estimate(mean, variance), tx.init(None))[0])

    return update(jnp.asarray(mean), jnp.asarray(variance))


# ---- scale_by_sign ------------------------------------------------------------------


def test_sign_of_plain_updates() -> None:
    tx = do.scale_by_sign()
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        g = jnp.array([3.0, -1e-4, 0.0, -0.0], dtype)
        signs, _ = tx.update(g, tx.init(g))
        assert signs.dtype == dtype
        np.testing.assert_array_equal(signs.astype(jnp.float32), [1, -1, 0, 0])


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e12])
def test_sign_of_complex_updates_keeps_the_phase(size: float) -> None:
    tx = do.scale_by_sign()
    g = jnp.array([3 + 4j, -2j, 0], jnp.complex64) * size
    signs, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(signs, [0.6 + 0.8j, -1j, 0], rtol=1e-6)


def test_sign_of_an_estimate_divides_the_variance_by_the_square() -> None:
    mean, variance = updated(
        do.scale_by_sign(), [2.0, -0.5, 1e-15, 1e10], [1.0, 1.0, 1e-30, -1e19]
    )
    np.testing.assert_array_equal(mean, [1, -1, 1, 1])
    np.testing.assert_allclose(variance, [0.25, 4.0, 1.0, -0.1], rtol=1e-6)


def test_sign_of_zero_is_zero_and_so_is_its_variance() -> None:
    mean, variance = updated(do.scale_by_sign(), [0.0, -0.0, 0.0], [0.0, 1.0, np.inf])
    np.testing.assert_array_equal(mean, np.zeros(3))
    np.testing.assert_array_equal(variance, np.zeros(3))


def test_sign_takes_a_variance_below_the_smallest_normal_number_as_zero() -> None:
    direction = np.float32(1e-17)
    _, variance = updated(do.scale_by_sign(), [direction] * 2, [TINY / 2, 4 * TINY])
    assert variance[0] == 0
    assert variance[1] > 0


def test_sign_does_not_change_the_factor() -> None:
    mean, variance = jnp.array([2.0, -0.5]), jnp.array([1.0, 4.0])
    signs = updated(
        optax.chain(do.scale_by_sign(), do.adapt_to_variance()), mean, variance
    )
    plain = updated(do.adapt_to_variance(), mean, variance)
    np.testing.assert_allclose(signs, plain / np.abs(mean), rtol=1e-6)


# ---- The factors --------------------------------------------------------------------


ADAPTED_BY_ONE_DIVISION = pytest.mark.parametrize(
    "factor", [do.inverse, do.inverse_sqrt]
)


def by_eta2(factor: Factor) -> Factor:
    """The same factor as one of your own, which is computed from η²."""
    return lambda eta2: factor(eta2)


def pairs_of_every_size() -> tuple[np.ndarray, np.ndarray]:
    """Directions from below the floor up, with η² from -0.9 to beyond overflow."""
    size = 10.0 ** np.arange(-20, 19, 2)
    eta2 = np.array([-0.9, 0.0, 1e-9, 1e-3, 0.7, 1.0, 30.0, 1e9, 1e25, np.inf])
    mean = np.repeat(size, eta2.size) * np.tile([1, -1], size.size * eta2.size // 2)
    with np.errstate(over="ignore"):
        return (
            np.append(mean, [0.0, 0.0, 0.0]).astype(np.float32),
            np.append(np.tile(eta2, size.size) * mean**2, [0, 1, np.inf]).astype(
                np.float32
            ),
        )


@ADAPTED_BY_ONE_DIVISION
def test_factor_by_one_division_is_the_factor_of_eta2(factor: Factor) -> None:
    mean, variance = pairs_of_every_size()
    actual = updated(do.adapt_to_variance(factor), mean, variance)
    expected = updated(do.adapt_to_variance(by_eta2(factor)), mean, variance)
    assert np.all(np.isfinite(expected))
    # η² = -0.9 leaves a tenth of 1+η², and so ten rounding units. What is below the
    # smallest normal number comes out as zero on one side only.
    np.testing.assert_allclose(actual, expected, rtol=3e-6, atol=TINY)
    np.testing.assert_array_equal(actual[np.abs(mean) < 1e-19], 0)


@ADAPTED_BY_ONE_DIVISION
def test_factor_by_one_division_at_its_limits(factor: Factor) -> None:
    """η² at and below -1, and what is not a number."""
    mean = np.array([1e-15, 3.0, -1e9, np.nan, 1.0], np.float32)
    variance = np.array([-1, -1, -2, 1, 1], np.float32) * mean**2
    variance[-1] = np.nan
    actual = updated(do.adapt_to_variance(factor), mean, variance)
    expected = updated(do.adapt_to_variance(by_eta2(factor)), mean, variance)
    assert np.all(np.isfinite(expected[:3]))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@ADAPTED_BY_ONE_DIVISION
def test_factor_by_one_division_of_a_complex_direction(factor: Factor) -> None:
    mean = np.array([3 + 4j, -1e-9j, 0], np.complex64)
    variance = np.array([25, 3e-18, 1], np.float32)
    actual = updated(do.adapt_to_variance(factor), mean, variance)
    expected = updated(do.adapt_to_variance(by_eta2(factor)), mean, variance)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@ADAPTED_BY_ONE_DIVISION
def test_factor_by_one_division_has_the_derivatives_of_the_factor(
    factor: Factor,
) -> None:
    mean, variance = pairs_of_every_size()

    def slopes(factor: Factor) -> Any:
        tx = do.adapt_to_variance(factor)

        def update(mean: Any, variance: Any) -> Any:
            return tx.update(do.Estimate(mean, variance), tx.init(None))[0]

        slope = jax.grad(update, argnums=(0, 1))
        return jax.jit(jax.vmap(slope))(jnp.asarray(mean), jnp.asarray(variance))

    for actual, expected in zip(slopes(factor), slopes(by_eta2(factor)), strict=True):
        assert np.all(np.isfinite(expected))
        np.testing.assert_array_equal(actual, expected)


def test_factors_at_their_ends() -> None:
    ends = jnp.array([0.0, 1e-30, 1e30, jnp.inf])
    for factor, far in (
        (do.inverse, 1e-30),
        (do.inverse_sqrt, 1e-15),
        (do.gaussian_sign, np.sqrt(2 / np.pi) * 1e-15),
    ):
        for call in (factor, jax.jit(factor)):
            np.testing.assert_allclose(call(ends), [1, 1, far, 0], rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_factors_are_equations_6_14_and_15() -> None:
    eta2 = np.geomspace(1e-6, 1e6, 200)
    np.testing.assert_allclose(do.inverse(jnp.array(eta2)), 1 / (1 + eta2), rtol=1e-14)
    np.testing.assert_allclose(
        do.inverse_sqrt(jnp.array(eta2)), (1 + eta2) ** -0.5, rtol=1e-14
    )
    np.testing.assert_allclose(
        do.gaussian_sign(jnp.array(eta2)),
        2 * scipy.stats.norm.cdf(1 / np.sqrt(eta2)) - 1,
        rtol=1e-9,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("eta", [0.3, 1.0, 3.0])
def test_factors_minimise_their_expected_error(eta: float) -> None:
    """Lemma 1, with the expectations over a Gaussian p̂ by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    p, p_hat = 1.0, 1.0 + eta * nodes
    weights = weights / np.sum(weights)
    # E[sign(p̂)] jumps, which quadrature does not see: from the distribution instead.
    mean_sign = scipy.special.erf(1 / (np.sqrt(2) * eta))

    def error(gamma: float) -> float:
        return float(np.sum(weights * (gamma * p_hat - p) ** 2))

    def sign_error(gamma: float) -> float:
        return gamma**2 - 2 * gamma * mean_sign + 1

    for factor, loss in ((do.inverse, error), (do.gaussian_sign, sign_error)):
        best = float(factor(jnp.array(eta**2)))
        assert loss(best) < min(loss(best * 0.98), loss(best * 1.02))


def test_gaussian_sign_takes_what_is_not_positive_as_zero() -> None:
    np.testing.assert_array_equal(
        do.gaussian_sign(jnp.array([-np.inf, -0.5, -0.0, 0.0])), np.ones(4)
    )


@pytest.mark.parametrize(
    ("factor", "expected"), [(do.inverse, 4.0), (do.inverse_sqrt, 2.0)]
)
def test_factors_of_a_negative_relative_variance(
    factor: Factor, expected: float
) -> None:
    np.testing.assert_allclose(factor(jnp.array(-0.75)), expected)


# ---- adapt_to_variance --------------------------------------------------------------


@every_factor
def test_adapted_update_is_factor_times_direction(factor: Factor) -> None:
    mean, variance = np.array([2.0, -3.0, 0.1]), np.array([1.0, 18.0, 0.0])
    updates = updated(do.adapt_to_variance(factor), mean, variance)
    expected = factor(jnp.array([0.25, 2.0, 0.0])) * jnp.asarray(mean)
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_inverse_is_the_default_factor() -> None:
    np.testing.assert_allclose(updated(do.adapt_to_variance(), [2.0], [4.0]), [1.0])


@every_factor
def test_a_zero_direction_gives_zero_whatever_its_variance(factor: Factor) -> None:
    variances = np.array([0.0, 1.0, TINY / 2, 1e38, np.inf])
    updates = updated(do.adapt_to_variance(factor), np.zeros(5), variances)
    np.testing.assert_array_equal(updates, np.zeros(5))


def test_a_zero_direction_gives_zero_whatever_the_factor_says() -> None:
    tx = do.adapt_to_variance(lambda eta2: jnp.full_like(eta2, jnp.inf))
    np.testing.assert_array_equal(updated(tx, [0.0], [1.0]), [0.0])


@every_factor
def test_a_variance_below_the_smallest_normal_number_counts_as_zero(
    factor: Factor,
) -> None:
    direction = np.array([1e-16, -1e-18, 1.2e-19], np.float32)
    updates = updated(do.adapt_to_variance(factor), direction, np.full(3, TINY / 2))
    np.testing.assert_allclose(updates, direction, rtol=1e-6)


@every_factor
@pytest.mark.parametrize("variance", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("direction", [1.2e-19, 1e-18, 1e-16, 1.0, 1e12, 1e18])
def test_no_size_of_direction_and_variance_breaks_a_factor(
    factor: Factor, direction: float, variance: float
) -> None:
    exact = np.float64(np.float32(variance)) / np.float64(np.float32(direction)) ** 2
    gamma = {
        do.inverse: 1 / (1 + exact),
        do.inverse_sqrt: 1 / np.sqrt(1 + exact),
        do.gaussian_sign: scipy.special.erf(1 / np.sqrt(2 * exact)) if exact else 1.0,
    }[factor]
    for call in (jax.jit, lambda function: function):
        tx = do.adapt_to_variance(factor)

        def update(mean: Any, variance: Any, tx: Any = tx) -> Any:
            return tx.update(do.Estimate(mean, variance), tx.init(None))[0]

        updates = call(update)(jnp.array([direction]), jnp.array([variance]))
        # Where η² overflows, the factor of infinity: zero instead of less than 1e-18.
        np.testing.assert_allclose(
            updates, [gamma * direction], rtol=1e-5, atol=1e-18 * direction + TINY
        )


@every_factor
def test_an_overflowing_relative_variance_gives_the_factor_of_infinity(
    factor: Factor,
) -> None:
    directions, variances = [1e-18, -1e-15, 1e25], [1e12, 1e38, np.inf]
    updates = updated(do.adapt_to_variance(factor), directions, variances)
    np.testing.assert_array_equal(np.abs(updates), np.zeros(3))


@every_factor
@pytest.mark.parametrize("variance", [0.0, 1e-38, 1.0, np.inf])
@pytest.mark.parametrize("direction", [1e-19, -1e-25, 1e-30, 1e-38, -1e-45])
def test_below_the_root_of_the_smallest_normal_number_there_is_no_direction(
    factor: Factor, direction: float, variance: float
) -> None:
    assert updated(do.adapt_to_variance(factor), [direction], [variance]) == 0
    for part in updated(do.scale_by_sign(), [direction], [variance]):
        assert part == 0
    for part in updated(do.scale_by_sign(), [1j * direction], [variance]):
        assert part == 0
    if variance == 0:  # The smallest direction is whole.
        least = np.float32(1.1e-19)
        np.testing.assert_allclose(
            updated(do.adapt_to_variance(factor), [least], [0.0]), [least], rtol=1e-6
        )
        assert updated(do.scale_by_sign(), [-least], [0.0])[0] == -1


@pytest.mark.usefixtures("x64")
def test_the_smallest_direction_of_float64_is_much_smaller() -> None:
    directions = np.array([1e-150, -1e-153, 1e-154, 1e-200])
    signs, variances = updated(do.scale_by_sign(), directions, directions**2)
    np.testing.assert_array_equal(signs, [1, -1, 0, 0])
    np.testing.assert_allclose(variances[:2], [1, 1], rtol=1e-12)


@every_factor
def test_a_relative_variance_that_rounding_pushed_to_minus_one_stays_finite(
    factor: Factor,
) -> None:
    variances = np.array([-1.0, -1.0000001, -2.0], np.float32)
    updates = updated(do.adapt_to_variance(factor), np.ones(3, np.float32), variances)
    eps = np.finfo(np.float32).eps
    expected = factor(jnp.full(3, eps - 1, jnp.float32))
    np.testing.assert_array_equal(updates, expected)
    assert np.all(np.isfinite(updates))


@every_factor
def test_nan_stays_in_its_element(factor: Factor) -> None:
    nan = np.nan
    updates = updated(do.adapt_to_variance(factor), [1.0, nan, 1.0], [1.0, 1.0, nan])
    np.testing.assert_array_equal(np.isnan(updates), [False, True, True])


def test_complex_directions_have_real_factors() -> None:
    mean = np.array([3 + 4j, 0], np.complex64)
    updates = updated(do.adapt_to_variance(), mean, np.array([25.0, 1.0], np.float32))
    np.testing.assert_allclose(updates, [1.5 + 2j, 0], rtol=1e-6)
    assert updates.dtype == jnp.complex64


def test_the_gradients_dtype_comes_back() -> None:
    gradients = {"brain": jnp.ones(2, jnp.bfloat16), "half": jnp.ones(2, jnp.float16)}
    tx = optax.chain(do.moving_average_estimate(), do.adapt_to_variance())
    updates, _ = tx.update(gradients, tx.init(gradients))
    assert jax.tree.map(lambda u: u.dtype, updates) == (
        jax.tree.map(lambda g: g.dtype, gradients)
    )
