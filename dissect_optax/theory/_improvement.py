"""What one step in a random direction is expected to gain on a quadratic loss, §2.1.

Here θ ← θ - αz with a step size α ≥ 0; the paper writes θ + αz, so that its step sizes
for z = g and z = sign(g) are negative.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import as_floats, check_shape, check_vector
from dissect_optax.theory._directions import Direction
from dissect_optax.theory._quadratics import QuadraticProblem
from dissect_optax.theory._signs import quotient, sign_certainty


def expected_loss_change(
    direction: Direction,
    gradient: ArrayLike,
    hessian: ArrayLike,
    step_size: ArrayLike,
) -> jax.Array:
    """Expected change of a quadratic loss by one step, Eq. (10).

    E[L(θ-αz)] - L(θ) = -α ∇LᵀE[z] + α²/2 E[zᵀQz]

    Args:
      direction: The moments of z, e.g. from `gaussian_direction`.
      gradient: ∇L(θ), the exact gradient, of shape [d].
      hessian: Q, of shape [d, d].
      step_size: α, a scalar.

    Returns:
      The change, a scalar in the unit of the loss; negative is progress.

    Raises:
      ValueError: If the shapes do not go together.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> gradient, hessian = jnp.array([2.0, 1.0]), jnp.diag(jnp.array([4.0, 1.0]))
      >>> z = theory.gaussian_direction(gradient, jnp.eye(2))
      >>> step = theory.optimal_step_size(z, gradient, hessian)
      >>> best = theory.expected_loss_change(z, gradient, hessian, step)
      >>> bool(jnp.isclose(best, -theory.expected_improvement(z, gradient, hessian)))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §2.1.
    """
    slope, curvature = _slope_and_curvature(direction, gradient, hessian)
    (alpha,) = as_floats(step_size)
    return alpha * (0.5 * alpha * curvature - slope)


def optimal_step_size(
    direction: Direction, gradient: ArrayLike, hessian: ArrayLike
) -> jax.Array:
    """The step size of the largest expected decrease, before Eq. (11).

    α* = ∇LᵀE[z] / E[zᵀQz]

    Args:
      direction: The moments of z, e.g. from `sign_direction`.
      gradient: ∇L(θ), the exact gradient, of shape [d].
      hessian: Q, positive definite, of shape [d, d].

    Returns:
      α*, a scalar; not negative for directions that point uphill, as g and sign(g) do.

    Raises:
      ValueError: If the shapes do not go together.

    Edge cases:
      * A direction that is always zero: zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> gradient = jnp.array([3.0, -1.0])
      >>> z = theory.sign_direction(gradient, jnp.zeros((2, 2)))
      >>> print(theory.optimal_step_size(z, gradient, jnp.eye(2)))
      2.0

    References:
      Balles & Hennig, "Dissecting Adam", §2.1.
    """
    return _optimal_step(*_slope_and_curvature(direction, gradient, hessian))


def expected_improvement(
    direction: Direction, gradient: ArrayLike, hessian: ArrayLike
) -> jax.Array:
    """The expected decrease by one step of the optimal step size, Eq. (11).

    I(z) = (∇LᵀE[z])² / (2 E[zᵀQz])

    Args:
      direction: The moments of z: `gaussian_direction` for SGD and SVAG,
        `sign_direction` for SSD and Adam.
      gradient: ∇L(θ), the exact gradient, of shape [d].
      hessian: Q, positive definite, of shape [d, d].

    Returns:
      I(z) ≥ 0, a scalar in the unit of the loss. Scaling z does not change it.

    Raises:
      ValueError: If the shapes do not go together.

    Edge cases:
      * A direction that is always zero: zero.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> problem = theory.quadratic_problem(jnp.array([1.0, 9.0]), noise=0.5)
      >>> g = problem.gradient(jnp.ones(2))
      >>> cov = problem.gradient_covariance
      >>> std = jnp.sqrt(jnp.diagonal(cov))
      >>> svag = theory.gaussian_direction(g, cov, theory.optimal_factor(g, std))
      >>> sgd = theory.gaussian_direction(g, cov)
      >>> gain = jax.vmap(theory.expected_improvement, in_axes=(0, None, None))
      >>> both = jax.tree.map(lambda *leaves: jnp.stack(leaves), svag, sgd)
      >>> improvements = gain(both, g, problem.hessian)
      >>> bool((improvements > 0).all())
      True

    References:
      Balles & Hennig, "Dissecting Adam", §2.1.
    """
    slope, curvature = _slope_and_curvature(direction, gradient, hessian)
    return 0.5 * slope * _optimal_step(slope, curvature)


def gradient_improvement(problem: QuadraticProblem, params: ArrayLike) -> jax.Array:
    """The improvement of the stochastic gradient in closed form, Eqs. (12), (20).

    I(g) = ½ (∇Lᵀ∇L)² / (∇LᵀQ∇L + ν² Σ λ_i³)

    Args:
      problem: The stochastic quadratic problem.
      params: θ, of shape [d].

    Returns:
      I(g), a scalar in the unit of the loss.

    Raises:
      ValueError: If `params` does not have the shape of the problem.

    Edge cases:
      * At the minimum: zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> problem = theory.quadratic_problem(jnp.array([2.0, 2.0]))
      >>> theta = jnp.array([1.0, -1.0])
      >>> improvement = theory.gradient_improvement(problem, theta)
      >>> bool(improvement == problem.loss(theta))  # one step solves a round bowl
      True

    References:
      Balles & Hennig, "Dissecting Adam", §2.1, §B.1.
    """
    gradient = problem.gradient(params)
    variance = jnp.square(jnp.asarray(problem.noise, gradient.dtype))
    curvature = problem.curvature_along(gradient) + variance * jnp.sum(
        problem.eigenvalues**3
    )
    slope = jnp.sum(jnp.square(gradient))
    return 0.5 * slope * _optimal_step(slope, curvature)


def sign_improvement_bound(
    problem: QuadraticProblem, params: ArrayLike, dominance: ArrayLike | None = None
) -> jax.Array:
    """A lower bound on the improvement of the stochastic sign, Eqs. (12), (13), (22).

    I(s) ≥ ½ (Σ (2ρ_i-1)|∇L_i|)² / Σ_ij |q_ij|                              (12), (22)
    I(s) ≥ ½ (Σ (2ρ_i-1)|∇L_i|)² c / Σ λ_i   if Σ|q_ii| ≥ c Σ|q_ij|              (13)

    With the problem's own diagonal dominance c both are the same number, and a diagonal
    Q attains it. The exact value is `expected_improvement` of a `sign_direction`.

    Args:
      problem: The stochastic quadratic problem.
      params: θ, of shape [d].
      dominance: c in [0, 1] for (13), a number that does not exceed the problem's own;
        None for (12).

    Returns:
      The bound, a scalar in the unit of the loss.

    Raises:
      ValueError: If `params` does not have the shape of the problem.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> problem = theory.quadratic_problem(jnp.array([1.0, 9.0]), noise=0.5)
      >>> theta = jnp.array([1.0, 2.0])
      >>> tight = theory.sign_improvement_bound(problem, theta)
      >>> loose = theory.sign_improvement_bound(problem, theta, dominance=0.5)
      >>> bool(jnp.isclose(loose, tight / 2))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §2.1, §B.1.
    """
    gradient = problem.gradient(params)
    certainty = sign_certainty(gradient, problem.gradient_std)
    slope = jnp.sum(certainty * jnp.abs(gradient))
    (c,) = as_floats(problem.diagonal_dominance if dominance is None else dominance)
    return 0.5 * jnp.square(slope) * c / jnp.sum(problem.eigenvalues)


def _slope_and_curvature(
    direction: Direction, gradient: ArrayLike, hessian: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """∇LᵀE[z] and E[zᵀQz] = tr(Q E[zzᵀ])."""
    gradient, hessian = as_floats(gradient, hessian)
    size = check_vector("direction.mean", direction.mean)
    like = f"a direction of {size} elements"
    check_shape("gradient", gradient, (size,), like)
    check_shape("hessian", hessian, (size, size), like)
    slope = jnp.sum(gradient * direction.mean)
    return slope, jnp.sum(hessian * direction.second_moment)


def _optimal_step(slope: jax.Array, curvature: jax.Array) -> jax.Array:
    """slope/curvature, and zero for a direction without either."""
    empty = curvature <= 0
    return jnp.where(empty, 0.0, quotient(slope, jnp.where(empty, 1.0, curvature)))
