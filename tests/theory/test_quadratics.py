"""Stochastic quadratic problems and rotations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.theory import oracle
from scipy import stats

from dissect_optax import theory


def rotated_problem(size=5, noise=0.3):
    rotation = theory.random_rotation(jax.random.key(4), size)
    eigenvalues = jnp.linspace(0.5, 4.0, size)
    minimizer = jnp.arange(size, dtype=float)
    return theory.quadratic_problem(
        eigenvalues, rotation, noise=noise, minimizer=minimizer
    )


def test_loss_gradient_and_constants_follow_from_the_matrix(x64):
    problem = rotated_problem()
    hessian = np.asarray(problem.hessian)
    theta = np.array([1.0, -2.0, 0.5, 3.0, 0.0])
    expected = oracle.quadratic_loss(hessian, np.asarray(problem.minimizer), 0.3, theta)
    assert float(problem.loss(theta)) == pytest.approx(expected, rel=1e-13)
    np.testing.assert_allclose(
        problem.gradient(theta), hessian @ (theta - problem.minimizer), rtol=1e-12
    )
    np.testing.assert_allclose(
        problem.gradient(theta), jax.grad(problem.loss)(theta), rtol=1e-12
    )
    np.testing.assert_allclose(
        problem.curvature_along(theta), theta @ hessian @ theta, rtol=1e-13
    )
    spectrum = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(spectrum, problem.eigenvalues, rtol=1e-12)
    assert float(problem.lipschitz) == pytest.approx(spectrum[-1])
    assert float(problem.strong_convexity) == pytest.approx(spectrum[0])
    dominance = np.trace(np.abs(hessian)) / np.sum(np.abs(hessian))
    assert float(problem.diagonal_dominance) == pytest.approx(dominance)


def test_the_excess_loss_is_zero_at_the_minimum_and_the_noise_remains():
    problem = rotated_problem()
    assert float(problem.excess_loss(problem.minimizer)) == 0.0
    noise_floor = 0.5 * 0.3**2 * float(jnp.sum(problem.eigenvalues))
    assert float(problem.loss(problem.minimizer)) == pytest.approx(noise_floor)


def test_the_covariance_is_that_of_the_matrix_squared(x64):
    problem = rotated_problem()
    expected = 0.3**2 * np.asarray(problem.hessian) @ np.asarray(problem.hessian)
    np.testing.assert_allclose(problem.gradient_covariance, expected, rtol=1e-11)
    np.testing.assert_allclose(
        problem.gradient_std, np.sqrt(np.diagonal(expected)), rtol=1e-12
    )


def test_sampled_gradients_have_that_mean_and_covariance(x64):
    problem, theta, count = rotated_problem(), jnp.ones(5), 40_000
    keys = jax.random.split(jax.random.key(5), count)
    samples = np.asarray(
        jax.vmap(problem.sample_gradient, in_axes=(0, None))(keys, theta)
    )
    centred = samples - np.asarray(problem.gradient(theta))
    covariance = np.asarray(problem.gradient_covariance)
    std = np.sqrt(np.diagonal(covariance))
    assert np.all(np.abs(centred.mean(0)) < 4.5 * std / np.sqrt(count))
    products = centred[:, :, None] * centred[:, None, :]
    error = products.std(0) / np.sqrt(count)
    assert np.all(np.abs(products.mean(0) - covariance) < 4.5 * error)
    # The ν²I of the paper's Eq. (9) is not what these samples have.
    assert np.any(np.abs(products.mean(0) - 0.3**2 * np.eye(5)) > 20 * error)


def test_axis_aligned_is_the_default_and_fully_dominant():
    problem = theory.quadratic_problem(jnp.array([1.0, 30.0]), noise=4.0)
    np.testing.assert_array_equal(problem.hessian, np.diag([1.0, 30.0]))
    assert float(problem.diagonal_dominance) == 1.0
    assert float(problem.noise) == 4.0


def test_problems_are_pytrees_for_jit_and_vmap():
    batch = jax.vmap(lambda nu: theory.quadratic_problem(jnp.ones(3), noise=nu))(
        jnp.array([0.0, 1.0, 2.0])
    )
    losses = jax.jit(jax.vmap(lambda problem: problem.loss(jnp.zeros(3))))(batch)
    np.testing.assert_allclose(losses, [0.0, 1.5, 6.0])


def test_a_problem_can_be_made_from_concrete_numbers_inside_jit():
    eigenvalues, noise = jnp.array([1.0, 2.0]), jnp.array(0.5)

    def loss(theta):
        return theory.quadratic_problem(eigenvalues, noise=noise).loss(theta)

    np.testing.assert_allclose(jax.jit(loss)(jnp.ones(2)), loss(jnp.ones(2)))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"`eigenvalues` must be positive, got 0\.0"):
        theory.quadratic_problem(jnp.array([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"`eigenvalues` must be a vector"):
        theory.quadratic_problem(jnp.eye(2))
    with pytest.raises(ValueError, match=r"`basis` must have shape \(2, 2\)"):
        theory.quadratic_problem(jnp.ones(2), jnp.eye(3))
    with pytest.raises(ValueError, match=r"`noise` must not be negative, got -1\.0"):
        theory.quadratic_problem(jnp.ones(2), noise=-1.0)
    with pytest.raises(ValueError, match=r"`params` must have shape \(2,\)"):
        theory.quadratic_problem(jnp.ones(2)).loss(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`size` must be at least one, got 0"):
        theory.random_rotation(jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"square matrix, got shape \(2, 3\)"):
        theory.partial_rotation(jnp.ones((2, 3)), 0.5)


# ---- Rotations --------------------------------------------------------------------


def rotations(seed, count, size):
    keys = jax.random.split(jax.random.key(seed), count)
    draw = functools.partial(theory.random_rotation, size=size)
    return np.asarray(jax.vmap(draw)(keys))


def angles(matrices):
    """The angle of rotation in three dimensions."""
    trace = np.trace(matrices, axis1=1, axis2=2)
    return np.arccos(np.clip((trace - 1) / 2, -1, 1))


def uniform_angle_distribution(angle):
    """Distribution function of the angle of a uniform rotation of space."""
    return (angle - np.sin(angle)) / np.pi


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_rotations_are_rotations(size, x64):
    drawn = rotations(6, 50, size)
    identity = np.broadcast_to(np.eye(size), drawn.shape)
    np.testing.assert_allclose(drawn @ drawn.transpose(0, 2, 1), identity, atol=1e-13)
    np.testing.assert_allclose(np.linalg.det(drawn), 1.0, rtol=1e-12)


def test_rotations_are_uniform():
    drawn = rotations(7, 4000, 3)
    assert stats.kstest(angles(drawn), uniform_angle_distribution).pvalue > 0.01
    # Turning them all by one fixed rotation must not change the distribution,
    turned = drawn @ rotations(8, 1, 3)
    assert stats.kstest(angles(turned), uniform_angle_distribution).pvalue > 0.01
    # and each axis ends anywhere on the sphere: its height is uniform.
    for row in range(3):
        for column in range(3):
            height = stats.uniform(-1, 2).cdf
            assert stats.kstest(drawn[:, row, column], height).pvalue > 1e-3


def test_the_test_of_uniformity_rejects_an_uncorrected_decomposition():
    normal = np.random.default_rng(9).normal(size=(4000, 3, 3))
    naive, _ = np.linalg.qr(normal)
    naive[:, :, 0] *= np.linalg.det(naive)[:, None]
    assert stats.kstest(angles(naive), uniform_angle_distribution).pvalue < 1e-10


def test_a_partial_rotation_goes_from_the_identity_to_the_rotation(x64):
    rotation = theory.random_rotation(jax.random.key(10), 40)
    part = functools.partial(theory.partial_rotation, rotation)
    np.testing.assert_allclose(part(0.0), np.eye(40), atol=1e-12)
    np.testing.assert_allclose(part(1.0), rotation, atol=1e-10)
    np.testing.assert_allclose(part(0.3) @ part(0.7), rotation, atol=1e-10)
    np.testing.assert_allclose(part(0.3).T @ part(0.3), np.eye(40), atol=1e-12)


def test_a_partial_rotation_has_its_fraction_of_the_angle():
    drawn = rotations(11, 20, 3)
    third = jax.vmap(theory.partial_rotation, in_axes=(0, None))(drawn, 1 / 3)
    np.testing.assert_allclose(angles(third), angles(drawn) / 3, atol=2e-3)
