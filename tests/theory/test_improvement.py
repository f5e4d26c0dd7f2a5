"""Expected improvements: closed forms, Monte Carlo, bounds and Theorem 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.theory import oracle

from dissect_optax import theory

SAMPLES = 200_000


def make_problem(size=6, noise=0.7, rotated=True, seed=0):
    spectrum_key, rotation_key = jax.random.split(jax.random.key(seed))
    eigenvalues = jax.random.uniform(spectrum_key, (size,), minval=0.1, maxval=3.0)
    basis = theory.random_rotation(rotation_key, size) if rotated else None
    return theory.quadratic_problem(eigenvalues, basis, noise=noise)


def start(size=6):
    return jnp.linspace(-1.0, 1.5, size)


def factors_of(name, gradient, std):
    return {
        "none": jnp.ones_like(gradient),
        "optimal": theory.optimal_factor(gradient, std),
        "certainty": theory.sign_certainty(gradient, std),
        "adam": theory.adam_factor(gradient, std),
    }[name]


def sampled_gradients(problem, theta):
    """Stochastic gradients Q(θ-x) from NumPy's own normal numbers."""
    rng = np.random.default_rng(12)
    hessian = np.asarray(problem.hessian)
    data = rng.normal(size=(SAMPLES, theta.size)) * float(problem.noise)
    return (np.asarray(theta) - data) @ hessian


def assert_is_the_mean_of(samples, value, *, and_not):
    """The mean agrees within five standard errors, and tells the wrong value apart."""
    error = samples.std(axis=0) / np.sqrt(samples.shape[0])
    assert np.all(np.abs(samples.mean(axis=0) - value) < 5 * error)
    assert np.any(np.abs(samples.mean(axis=0) - and_not) > 10 * error)


@pytest.mark.parametrize(
    ("make", "take", "factors"),
    [
        (theory.gaussian_direction, np.positive, "none"),
        (theory.gaussian_direction, np.positive, "optimal"),
        (theory.sign_direction, np.sign, "none"),
        (theory.sign_direction, np.sign, "certainty"),
        (theory.sign_direction, np.sign, "adam"),
    ],
)
def test_directions_have_the_moments_of_their_samples(make, take, factors, x64):
    problem, theta = make_problem(), start()
    gradient = problem.gradient(theta)
    gamma = factors_of(factors, gradient, problem.gradient_std)
    direction = make(gradient, problem.gradient_covariance, gamma)
    samples = np.asarray(gamma) * take(sampled_gradients(problem, theta))

    mean = np.asarray(direction.mean)
    assert_is_the_mean_of(samples, mean, and_not=2 / 3 * mean)
    # Without correlation the off-diagonal moments would be products of the means.
    moment = np.asarray(direction.second_moment)
    independent = np.outer(mean, mean) + np.diag(np.diagonal(moment) - mean**2)
    products = samples[:, :, None] * samples[:, None, :]
    off_diagonal = ~np.eye(6, dtype=bool)
    assert_is_the_mean_of(
        products[:, off_diagonal],
        moment[off_diagonal],
        and_not=independent[off_diagonal],
    )
    np.testing.assert_allclose(
        np.diagonal(moment), (samples**2).mean(0), rtol=2e-2, atol=1e-12
    )


@pytest.mark.parametrize("make", [theory.gaussian_direction, theory.sign_direction])
def test_the_expected_change_is_that_of_the_sampled_losses(make, x64):
    problem, theta = make_problem(), start()
    gradient, hessian = problem.gradient(theta), problem.hessian
    direction = make(gradient, problem.gradient_covariance)
    step = 0.7 * theory.optimal_step_size(direction, gradient, hessian)
    change = theory.expected_loss_change(direction, gradient, hessian, step)
    take = np.sign if make is theory.sign_direction else np.positive
    after = np.asarray(theta) - float(step) * take(sampled_gradients(problem, theta))
    losses = 0.5 * np.einsum("ni,ij,nj->n", after, np.asarray(hessian), after)
    samples = losses - float(problem.excess_loss(theta))
    # With the bound Σ|q_ij| for E[sᵀQs], or without noise, it would be another one.
    wrong = -step * jnp.sum(gradient * direction.mean) + 0.5 * step**2 * (
        jnp.sum(jnp.abs(hessian))
        if make is theory.sign_direction
        else problem.curvature_along(gradient)
    )
    assert_is_the_mean_of(samples, float(change), and_not=float(wrong))


def test_the_sign_at_a_hundred_dimensions_against_samples(x64):
    # Figure 2's size, with the orthants of all 4950 pairs.
    problem, theta = make_problem(size=100, noise=1.0, seed=13), jnp.ones(100)
    gradient, hessian = problem.gradient(theta), np.asarray(problem.hessian)
    direction = theory.sign_direction(gradient, problem.gradient_covariance)
    signs = np.sign(sampled_gradients(problem, theta)[:20_000])
    samples = np.einsum("ni,ni->n", signs @ hessian, signs)
    curvature = float(jnp.sum(problem.hessian * direction.second_moment))
    assert_is_the_mean_of(samples, curvature, and_not=np.sum(np.abs(hessian)))


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1, 4.0])
def test_the_closed_form_of_the_gradient_is_its_expected_improvement(
    rotated, noise, x64
):
    problem, theta = make_problem(noise=noise, rotated=rotated), start()
    gradient = problem.gradient(theta)
    direction = theory.gaussian_direction(gradient, problem.gradient_covariance)
    np.testing.assert_allclose(
        theory.gradient_improvement(problem, theta),
        theory.expected_improvement(direction, gradient, problem.hessian),
        rtol=1e-12,
    )
    # Eq. (20), in NumPy.
    g, q = np.asarray(gradient), np.asarray(problem.hessian)
    cubes = np.sum(np.linalg.eigvalsh(q) ** 3)
    expected = 0.5 * (g @ g) ** 2 / (g @ q @ g + noise**2 * cubes)
    np.testing.assert_allclose(
        theory.gradient_improvement(problem, theta), expected, rtol=1e-11
    )


def sign_improvement(problem, theta):
    gradient = problem.gradient(theta)
    direction = theory.sign_direction(gradient, problem.gradient_covariance)
    return theory.expected_improvement(direction, gradient, problem.hessian)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.0, 0.1, 4.0])
def test_the_bounds_lie_below_the_exact_improvement(seed, noise, x64):
    problem, theta = make_problem(noise=noise, seed=seed), start()
    exact = sign_improvement(problem, theta)
    bound = theory.sign_improvement_bound(problem, theta)
    assert float(bound) < float(exact)
    # Eq. (13) with the problem's own dominance is Eq. (12); with less it is looser.
    hessian = np.asarray(problem.hessian)
    dominance = np.trace(hessian) / np.sum(np.abs(hessian))
    np.testing.assert_allclose(
        theory.sign_improvement_bound(problem, theta, dominance), bound, rtol=1e-12
    )
    np.testing.assert_allclose(
        theory.sign_improvement_bound(problem, theta, dominance / 2),
        bound / 2,
        rtol=1e-12,
    )
    # Eq. (22), in NumPy.
    g = np.asarray(problem.gradient(theta))
    certainty = np.ones_like(g)
    if noise:
        std = noise * np.sqrt(np.diagonal(hessian @ hessian))
        certainty = 2 * oracle.success_probability(g, std) - 1
    expected = 0.5 * np.sum(certainty * np.abs(g)) ** 2 / np.sum(np.abs(hessian))
    np.testing.assert_allclose(bound, expected, rtol=1e-10)


@pytest.mark.parametrize("noise", [0.0, 0.1, 4.0])
def test_the_bounds_hold_with_equality_for_a_diagonal_matrix(noise, x64):
    problem, theta = make_problem(noise=noise, rotated=False), start()
    np.testing.assert_allclose(
        theory.sign_improvement_bound(problem, theta),
        sign_improvement(problem, theta),
        rtol=1e-12,
    )


def test_without_noise_the_sign_is_deterministic():
    problem, theta = make_problem(noise=0.0), start()
    gradient = problem.gradient(theta)
    signs = jnp.sign(gradient)
    direction = theory.sign_direction(gradient, problem.gradient_covariance)
    np.testing.assert_array_equal(direction.mean, signs)
    np.testing.assert_array_equal(direction.second_moment, jnp.outer(signs, signs))
    step = theory.optimal_step_size(direction, gradient, problem.hessian)
    expected = jnp.sum(jnp.abs(gradient)) / problem.curvature_along(signs)
    np.testing.assert_allclose(step, expected, rtol=1e-5)


def test_the_optimal_step_size_minimises_the_expected_loss(x64):
    problem, theta = make_problem(), start()
    gradient, hessian = problem.gradient(theta), problem.hessian
    for make in (theory.gaussian_direction, theory.sign_direction):
        direction = make(gradient, problem.gradient_covariance)
        change = functools.partial(
            theory.expected_loss_change, direction, gradient, hessian
        )
        best = theory.optimal_step_size(direction, gradient, hessian)
        assert float(jax.grad(change)(best)) == pytest.approx(0.0, abs=1e-12)
        assert float(change(best)) == pytest.approx(
            -float(theory.expected_improvement(direction, gradient, hessian))
        )


def test_scaling_a_direction_does_not_change_its_improvement(x64):
    problem, theta = make_problem(), start()
    gradient, covariance = problem.gradient(theta), problem.gradient_covariance
    plain = theory.sign_direction(gradient, covariance)
    scaled = theory.sign_direction(gradient, covariance, 0.01)
    np.testing.assert_allclose(
        theory.expected_improvement(scaled, gradient, problem.hessian),
        theory.expected_improvement(plain, gradient, problem.hessian),
        rtol=1e-12,
    )


@pytest.mark.parametrize("make", [theory.gaussian_direction, theory.sign_direction])
@pytest.mark.parametrize("noise", [0.0, 1e-30, 1e-15, 1e15])
def test_improvements_have_finite_derivatives_at_the_minimum_and_elsewhere(make, noise):
    problem = make_problem(noise=noise)

    def improvement(theta):
        gradient = problem.gradient(theta)
        direction = make(gradient, problem.gradient_covariance)
        return theory.expected_improvement(direction, gradient, problem.hessian)

    for theta in (jnp.zeros(6), start()):
        value, slope = jax.jit(jax.value_and_grad(improvement))(theta)
        assert bool(jnp.isfinite(value))
        assert bool(jnp.all(jnp.isfinite(slope)))
    assert float(improvement(jnp.zeros(6))) == 0.0


def test_the_derivative_with_respect_to_the_covariance_is_finite_without_noise():
    def curvature(covariance):
        direction = theory.sign_direction(jnp.array([1.0, -2.0]), covariance)
        return jnp.sum(direction.second_moment)

    slope = jax.grad(curvature)(jnp.zeros((2, 2)))
    assert bool(jnp.all(jnp.isfinite(slope)))


def test_a_hundred_steps_go_through_jit_and_vmap():
    problem = make_problem()
    steps = jnp.linspace(0.5, 2.0, 4)[:, None] * start()[None, :]
    batched = jax.jit(jax.vmap(functools.partial(sign_improvement, problem)))(steps)
    one_by_one = [float(sign_improvement(problem, theta)) for theta in steps]
    np.testing.assert_allclose(batched, one_by_one, rtol=1e-5)


def test_errors_name_the_argument():
    with pytest.raises(
        ValueError, match=r"`mean` must be a vector, got shape \(2, 2\)"
    ):
        theory.sign_direction(jnp.eye(2), jnp.eye(2))
    with pytest.raises(ValueError, match=r"`covariance` must have shape \(2, 2\)"):
        theory.sign_direction(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match=r"`factors` must have shape \(2,\)"):
        theory.gaussian_direction(jnp.ones(2), jnp.eye(2), jnp.ones(3))
    direction = theory.gaussian_direction(jnp.ones(2), jnp.eye(2))
    with pytest.raises(ValueError, match=r"`hessian` must have shape \(2, 2\)"):
        theory.expected_improvement(direction, jnp.ones(2), jnp.eye(3))


# ---- Theorem 1 --------------------------------------------------------------------


def svag_error_after_one_step(problem, theta):
    """E[f] - f* after θ ← θ - γ⊙g/L with the exact factors, in closed form."""
    gradient = problem.gradient(theta)
    factors = theory.optimal_factor(gradient, problem.gradient_std)
    direction = theory.gaussian_direction(
        gradient, problem.gradient_covariance, factors
    )
    change = theory.expected_loss_change(
        direction, gradient, problem.hessian, 1 / problem.lipschitz
    )
    return problem.excess_loss(theta) + change


@pytest.mark.parametrize("noise", [0.0, 0.1, 4.0])
def test_one_step_never_violates_the_bound_of_theorem_1(noise, x64):
    for seed in range(5):
        problem = make_problem(noise=noise, seed=seed)
        for scale in (1e-3, 1.0, 30.0):
            theta = scale * jax.random.normal(jax.random.key(seed), (6,))
            gradient = problem.gradient(theta)
            second_moment = jnp.sum(gradient**2 + problem.gradient_std**2)
            error = problem.excess_loss(theta)
            bound = theory.convergence_bound(
                error,
                1,
                strong_convexity=problem.strong_convexity,
                lipschitz=problem.lipschitz,
                second_moment=second_moment,
            )
            assert float(svag_error_after_one_step(problem, theta)) <= float(bound)


def test_the_bound_of_theorem_1_is_its_formula(x64):
    steps = np.array([0, 1, 10, 10_000])
    bound = theory.convergence_bound(
        3.0, steps, strong_convexity=0.5, lipschitz=2.0, second_moment=7.0
    )
    rate = 2 * 0.5**2 / (2.0 * 7.0)
    np.testing.assert_allclose(bound, 1 / (1 / 3.0 + rate * steps), rtol=1e-14)


def test_the_bound_of_theorem_1_does_not_overflow():
    constants = {"strong_convexity": 1.0, "lipschitz": 1.0, "second_moment": 1.0}
    bound = theory.convergence_bound(1e30, 1e10, **constants)
    np.testing.assert_allclose(bound, 5e-11, rtol=1e-6)


def test_the_bound_of_theorem_1_at_the_minimum_and_with_wrong_constants():
    constants = {"strong_convexity": 1.0, "lipschitz": 1.0, "second_moment": 1.0}
    assert float(theory.convergence_bound(0.0, 5, **constants)) == 0.0
    with pytest.raises(ValueError, match=r"`lipschitz` must be positive, got 0\.0"):
        theory.convergence_bound(1.0, 5, **{**constants, "lipschitz": 0.0})
