"""Bivariate normal orthant probabilities against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.theory import oracle
from jax.test_util import check_grads
from scipy import stats

from dissect_optax import theory


def random_pairs(count, largest):
    """Means of all sizes, half of them close to each other, and correlations."""
    rng = np.random.default_rng(2)
    h, k = rng.normal(size=(2, count)) * rng.choice([0.1, 1.0, 3.0, 10.0], (2, count))
    near = rng.random(count) < 0.5
    k = np.where(near, h + rng.normal(size=count) * 10 ** rng.uniform(-6, 0, count), k)
    side = rng.choice([-1.0, 1.0], count)
    r = np.where(rng.random(count) < 0.5, rng.uniform(0, largest, count), 0.0)
    close = 1 - (1 - largest) * 10 ** rng.uniform(0, 4, count)
    return h, side * k, side * np.where(r == 0, np.clip(close, 0, largest), r)


def test_orthants_agree_with_owens_function(x64):
    h, k, r = random_pairs(100_000, largest=1 - 1e-5)
    error = theory.orthant_probability(h, k, r) - oracle.both_positive(h, k, r)
    assert float(jnp.max(jnp.abs(error))) < 1e-12


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12, 2.0**-52])
def test_orthants_agree_with_quadrature_up_to_the_last_correlation(gap, x64):
    rng = np.random.default_rng(3)
    for side in (-1.0, 1.0):
        r = side * (1 - gap)
        for h in rng.normal(size=5):
            for k in (side * h, side * (h + np.sqrt(gap)), rng.normal()):
                expected = oracle.both_positive_by_quadrature(h, k, r)
                ours = float(theory.orthant_probability(h, k, r))
                assert ours == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("r", [-1.0, 1.0])
def test_orthants_of_complete_correlation(r, x64):
    h, k = np.meshgrid(*[[-50.0, -1.5, -0.3, 0.0, 0.3, 2.0, 50.0]] * 2)
    expected = oracle.both_positive_degenerate(h, k, r)
    np.testing.assert_allclose(
        theory.orthant_probability(h, k, r), expected, rtol=0, atol=1e-15
    )


def test_orthants_agree_with_the_multivariate_normal_of_scipy(x64):
    for r in np.linspace(-0.99, 0.99, 12):
        covariance = [[1.0, r], [r, 1.0]]
        for point in ([0.0, 0.0], [0.7, -1.1], [-2.0, 0.4], [1.0, 1.01]):
            expected = stats.multivariate_normal.cdf(
                point, cov=covariance, abseps=1e-12, releps=1e-12
            )
            ours = float(theory.orthant_probability(*point, r))
            assert ours == pytest.approx(expected, abs=1e-10)


def test_orthants_in_float32():
    h, k, r = (x.astype(np.float32) for x in random_pairs(20_000, largest=1 - 1e-3))
    ours = theory.orthant_probability(h, k, r)
    assert ours.dtype == jnp.float32
    expected = oracle.both_positive(*(x.astype(np.float64) for x in (h, k, r)))
    assert float(np.max(np.abs(ours - expected))) < 1e-6


def test_the_product_of_signs_counts_agreement_and_disagreement(x64):
    h, k, r = random_pairs(1000, largest=0.999)
    agree = oracle.both_positive(h, k, r) + oracle.both_positive(-h, -k, r)
    np.testing.assert_allclose(
        theory.expected_sign_product(h, k, r), 2 * agree - 1, atol=1e-12
    )


def test_a_certain_sign_leaves_the_sign_of_the_other():
    k, r = jnp.array([-1.0, 0.0, 2.0]), jnp.array([-0.99, 0.5, 0.96])
    ours = theory.expected_sign_product(jnp.inf, k, r)
    np.testing.assert_allclose(ours, theory.expected_sign(k, 1.0), atol=1e-6)


@pytest.mark.parametrize("r", [-0.999, -0.96, -0.3, 0.0, 0.94, 0.96, 0.9999])
def test_derivatives_are_those_of_the_function(r, x64):
    arguments = (jnp.array([0.3, -1.0]), jnp.array([0.35, 1.2]), jnp.array([r, r]))
    check_grads(theory.expected_sign_product, arguments, 1, rtol=1e-5, eps=1e-7)


@pytest.mark.parametrize("r", [-1.0, 1.0])
@pytest.mark.parametrize("h", [0.0, 1e30, jnp.inf])
def test_derivatives_at_the_edges_are_finite(h, r):
    slopes = jax.grad(theory.expected_sign_product, (0, 1, 2))(h, 0.0, r)
    assert bool(jnp.all(jnp.isfinite(jnp.stack(slopes))))


def test_an_impossible_correlation_is_an_error():
    with pytest.raises(ValueError, match=r"`correlation` must lie in \[-1, 1\]"):
        theory.orthant_probability(0.0, 0.0, 1.5)
