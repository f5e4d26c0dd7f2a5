"""Success probabilities, factors and κ against SciPy, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.theory import oracle
from jax.test_util import check_grads
from scipy import optimize, special

import dissect_optax
from dissect_optax import theory

OF_MEAN_AND_STD = [
    theory.success_probability,
    theory.sign_certainty,
    theory.expected_sign,
    theory.optimal_factor,
    theory.adam_factor,
]
# (mean, std): nothing at all, no gradient, no noise, and ratios of 1e30 and beyond.
EDGES = [
    (0.0, 0.0),
    (0.0, 1.0),
    (1.0, 0.0),
    (-1.0, 0.0),
    (1e30, 1.0),
    (1.0, 1e30),
    (1e-30, 1.0),
    (1.0, 1e-30),
    (1e30, 1e-30),
    (1e-30, 1e30),
    (-1e-30, 1e-30),
    (1e30, 1e30),
]


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


def random_means_and_stds(count=200):
    rng = np.random.default_rng(1)
    return rng.normal(size=count), np.exp(rng.normal(scale=2.0, size=count))


def test_success_probability_is_the_distribution_function(x64):
    mean, std = random_means_and_stds()
    expected = oracle.success_probability(mean, std)
    np.testing.assert_allclose(
        theory.success_probability(mean, std), expected, rtol=1e-14
    )


def test_certainty_and_expected_sign_agree_with_the_probability(x64):
    mean, std = random_means_and_stds()
    rho = oracle.success_probability(mean, std)
    np.testing.assert_allclose(
        theory.sign_certainty(mean, std), 2 * rho - 1, rtol=0, atol=1e-15
    )
    np.testing.assert_allclose(
        theory.expected_sign(mean, std), (2 * rho - 1) * np.sign(mean), atol=1e-15
    )


@pytest.mark.parametrize("ratio", [1e-30, 1e-12, 1e-4, 0.1, 1.0, 4.0])
def test_certainty_keeps_its_digits_where_the_sign_is_hopeless(dtype, ratio):
    certainty = theory.sign_certainty(jnp.asarray(ratio, dtype), jnp.ones((), dtype))
    assert certainty.dtype == dtype
    np.testing.assert_allclose(
        certainty,
        special.erf(float(np.asarray(ratio, dtype)) / np.sqrt(2)),
        rtol=4 * np.finfo(dtype).eps,
    )


def test_adam_factor_keeps_its_digits_where_eta_squared_would_overflow(dtype):
    factor = theory.adam_factor(jnp.asarray(1e-30, dtype), jnp.ones((), dtype))
    np.testing.assert_allclose(factor, 1e-30, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("function", OF_MEAN_AND_STD)
def test_values_and_derivatives_at_the_edges_are_finite(function, dtype):
    mean, std = jnp.asarray(EDGES, dtype).T
    of_all = jax.jit(jax.vmap(jax.value_and_grad(function, (0, 1))))
    value, (by_mean, by_std) = of_all(mean, std)
    assert value.dtype == dtype
    assert bool(jnp.all(jnp.isfinite(jnp.stack([value, by_mean, by_std]))))
    assert bool(jnp.all(jnp.abs(value) <= 1))


@pytest.mark.parametrize(
    ("mean", "std", "certainty", "factor"),
    [
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 1.0, 0.0, 0.0),
        (1.0, 0.0, 1.0, 1.0),
        (-1.0, 0.0, 1.0, 1.0),
        (1e30, 1e-30, 1.0, 1.0),
        (1e-30, 1e30, 0.0, 0.0),
    ],
)
def test_the_documented_values_at_the_edges(dtype, mean, std, certainty, factor):
    mean, std = jnp.asarray(mean, dtype), jnp.asarray(std, dtype)
    assert float(theory.sign_certainty(mean, std)) == pytest.approx(certainty)
    assert float(theory.optimal_factor(mean, std)) == pytest.approx(factor)
    assert float(theory.adam_factor(mean, std)) == pytest.approx(factor)
    expected = 0.5 + 0.5 * certainty
    assert float(theory.success_probability(mean, std)) == pytest.approx(expected)


@pytest.mark.parametrize("function", OF_MEAN_AND_STD)
def test_derivatives_are_those_of_the_function(function, x64):
    mean, std = jnp.array([0.3, -1.2, 5.0]), jnp.array([1.0, 0.4, 3.0])
    check_grads(function, (mean, std), order=1)


def test_the_expected_sign_is_smooth_through_zero(x64):
    slope = jax.grad(theory.expected_sign)(0.0, 2.0)
    np.testing.assert_allclose(slope, 2 / np.sqrt(2 * np.pi) / 2.0, rtol=1e-14)


def test_factors_minimise_the_expected_distance(x64):
    # Lemma 1, with the minimum found by a search that knows no formula.
    for mean, std in zip(*random_means_and_stds(20), strict=True):
        for distance, factor in [
            (oracle.distance_to_gradient, theory.optimal_factor),
            (oracle.distance_to_sign, theory.sign_certainty),
        ]:
            best = optimize.minimize_scalar(
                distance, bounds=(-1, 2), args=(mean, std), options={"xatol": 1e-9}
            )
            assert float(factor(mean, std)) == pytest.approx(best.x, abs=1e-6)


@pytest.mark.parametrize(
    ("of_mean_and_std", "of_eta2"),
    [
        (theory.optimal_factor, dissect_optax.inverse),
        (theory.adam_factor, dissect_optax.inverse_sqrt),
        (theory.sign_certainty, dissect_optax.gaussian_sign),
    ],
)
def test_factors_are_those_of_the_library(of_mean_and_std, of_eta2, x64):
    mean, std = random_means_and_stds()
    np.testing.assert_allclose(
        of_mean_and_std(mean, std), of_eta2(jnp.square(std / mean)), rtol=1e-12
    )


def test_adams_factor_is_close_to_the_optimal_one(x64):
    eta = jnp.geomspace(1e-3, 1e3, 10_001)
    gap = theory.adam_factor(1.0, eta) - theory.sign_certainty(1.0, eta)
    assert 0.064 < float(jnp.max(jnp.abs(gap))) < 0.065


@pytest.mark.parametrize("momentum", [0.0, 1e-9, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_momentum_correction_is_the_variance_of_the_weighted_sum(momentum, x64):
    counts = [1, 2, 3, 10, 500]
    expected = [oracle.momentum_variance_ratio(momentum, count) for count in counts]
    kappa = theory.momentum_correction(momentum, jnp.array(counts))
    np.testing.assert_allclose(kappa, expected, rtol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 1000])
def test_momentum_correction_has_a_derivative_without_momentum(count, dtype):
    slope = jax.grad(theory.momentum_correction)(jnp.zeros((), dtype), count)
    assert float(slope) == pytest.approx(0.0 if count == 1 else -2.0)


@pytest.mark.parametrize("function", OF_MEAN_AND_STD)
def test_functions_broadcast_and_go_through_vmap(function):
    mean, std = jnp.array([-2.0, 0.0, 1.0]), jnp.array([0.5, 1.0, 2.0])
    scalars = [[float(function(m, s)) for m in mean] for s in std]
    over_both = jax.vmap(lambda s: function(mean, s))(std)
    np.testing.assert_allclose(over_both, scalars, rtol=1e-6)


@pytest.mark.parametrize("function", OF_MEAN_AND_STD)
def test_a_negative_deviation_is_an_error(function):
    with pytest.raises(ValueError, match=r"`std` must not be negative, got -0\.5"):
        function(1.0, jnp.array([1.0, -0.5]))


def test_momentum_correction_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"`momentum` must lie in \[0, 1\), got 1\.0"):
        theory.momentum_correction(1.0, 3)
    with pytest.raises(ValueError, match=r"starts at one, got 0"):
        theory.momentum_correction(0.9, 0)
