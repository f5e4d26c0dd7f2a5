"""Expected improvement of a quadratic loss by one step in a random direction, §2.1.

Here θ ← θ - αz with a step size α ≥ 0; the paper writes θ + αz, so that its step sizes
for z = g and z = sign(g) are negative.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_floats,
    check_finite,
    check_fraction,
    check_shape,
    check_vector,
    magnitude,
)
from dissect_optax.theory._directions import Direction
from dissect_optax.theory._quadratics import QuadraticProblem
from dissect_optax.theory._scales import quotient, split, times_power_of_two
from dissect_optax.theory._signs import sign_certainty


class _Scaled(NamedTuple):
    """A number m·2^e; see `_scales`."""

    mantissa: jax.Array
    exponent: jax.Array


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
      ValueError: If the shapes do not go together, or a concrete `hessian` is not
        finite.

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
    step = _Scaled(*split(alpha))
    # The two terms of the change, brought to the larger exponent of both.
    down, up = _product(step, slope), _product(step, _product(step, curvature))
    exponent = jnp.maximum(down.exponent, up.exponent)
    change = 0.5 * times_power_of_two(
        up.mantissa, up.exponent - exponent
    ) - times_power_of_two(down.mantissa, down.exponent - exponent)
    return times_power_of_two(change, exponent)


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
      ValueError: If the shapes do not go together, or a concrete `hessian` is not
        finite.

    Edge cases:
      * A direction that is always zero: zero.
      * E[zᵀQz] ≤ 0 although ∇LᵀE[z] ≠ 0: infinite, since the loss has no minimum along
        z. A positive definite Q excludes this.

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
    slope, curvature = _slope_and_curvature(direction, gradient, hessian)
    return _value(_optimal_step(slope, curvature))


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
      ValueError: If the shapes do not go together, or a concrete `hessian` is not
        finite.

    Edge cases:
      * A direction that is always zero: zero.
      * E[zᵀQz] ≤ 0 although ∇LᵀE[z] ≠ 0: infinite, since the loss has no minimum along
        z. A positive definite Q excludes this.

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
    return 0.5 * _value(_product(slope, _optimal_step(slope, curvature)))


def gradient_improvement(problem: QuadraticProblem, params: ArrayLike) -> jax.Array:
    """Expected improvement of the stochastic gradient, Eqs. (12), (20).

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
    gradient, scale = split(problem.gradient(params))
    eigenvalues, curve = split(problem.eigenvalues)
    noise, spread = split(jnp.asarray(problem.noise, gradient.dtype))
    along = problem._replace(eigenvalues=eigenvalues).curvature_along(gradient)
    cubes = jnp.square(noise) * jnp.sum(eigenvalues**3)

    # Both parts of the curvature, g̃ᵀQ̃g̃ 2^(2g+l) and ν̃² Σ λ̃³ 2^(2n+3l), brought to the
    # larger exponent; without noise there is no second part.
    along_exponent, cubes_exponent = 2 * scale + curve, 2 * spread + 3 * curve
    larger = jnp.maximum(along_exponent, cubes_exponent)
    exponent = jnp.where(noise == 0, along_exponent, larger)
    curvature = times_power_of_two(along, along_exponent - exponent)
    curvature += jnp.where(
        noise == 0, 0.0, times_power_of_two(cubes, cubes_exponent - exponent)
    )
    slope = _Scaled(jnp.sum(jnp.square(gradient)), 2 * scale)
    step = _optimal_step(slope, _Scaled(curvature, exponent))
    return 0.5 * _value(_product(slope, step))


def sign_improvement_bound(
    problem: QuadraticProblem, params: ArrayLike, dominance: ArrayLike | None = None
) -> jax.Array:
    """Lower bound on the improvement of the stochastic sign, Eqs. (12), (13), (22).

    I(s) ≥ ½ (Σ (2ρ_i-1)|∇L_i|)² / Σ_ij |q_ij|                              (12), (22)
    I(s) ≥ ½ (Σ (2ρ_i-1)|∇L_i|)² c / Σ λ_i   if Σ|q_ii| ≥ c Σ|q_ij|              (13)

    With the problem's own diagonal dominance c the two are equal, and for a diagonal Q
    they hold with equality. The exact value is `expected_improvement` of a
    `sign_direction`.

    Args:
      problem: The stochastic quadratic problem.
      params: θ, of shape [d].
      dominance: c in [0, 1] for (13), at most `problem.diagonal_dominance`; None for
        (12).

    Returns:
      The bound, a scalar in the unit of the loss.

    Raises:
      ValueError: If `params` does not have the shape of the problem, or a concrete
        `dominance` lies outside [0, 1] or exceeds the problem's own by more than
        rounding: (13) does not hold then.

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
    slope = jnp.sum(certainty * magnitude(gradient))
    (c,) = as_floats(problem.diagonal_dominance)
    if dominance is not None:
        own, (c,) = c, as_floats(dominance)
        check_fraction("dominance", c, own, "the problem's diagonal dominance")
    # The quotient has the size of the parameters; the square of the slope may overflow.
    return 0.5 * c * (slope / jnp.sum(problem.eigenvalues)) * slope


def _slope_and_curvature(
    direction: Direction, gradient: ArrayLike, hessian: ArrayLike
) -> tuple[_Scaled, _Scaled]:
    """∇LᵀE[z] and E[zᵀQz] = tr(Q E[zzᵀ])."""
    mean, moment, gradient, hessian = as_floats(
        direction.mean, direction.second_moment, gradient, hessian
    )
    size = check_vector("direction.mean", mean)
    like = f"a direction of {size} elements"
    check_shape("direction.second_moment", moment, (size, size), like)
    check_shape("gradient", gradient, (size,), like)
    check_shape("hessian", hessian, (size, size), like)
    check_finite("hessian", hessian)
    return _inner_product(gradient, mean), _inner_product(hessian, moment)


def _inner_product(first: jax.Array, second: jax.Array) -> _Scaled:
    """The sum of all products of elements."""
    (x, x_exponent), (y, y_exponent) = split(first), split(second)
    return _normalized(_Scaled(jnp.sum(x * y), x_exponent + y_exponent))


def _product(first: _Scaled, second: _Scaled) -> _Scaled:
    """The product of two numbers."""
    return _Scaled(first.mantissa * second.mantissa, first.exponent + second.exponent)


def _normalized(number: _Scaled) -> _Scaled:
    """The same number with its mantissa between 1/2 and 1, or zero."""
    mantissa, exponent = split(number.mantissa)
    return _Scaled(mantissa, number.exponent + exponent)


def _value(number: _Scaled) -> jax.Array:
    """The number itself."""
    return times_power_of_two(*number)


def _optimal_step(slope: _Scaled, curvature: _Scaled) -> _Scaled:
    """slope/curvature; zero if the slope is, infinite if only the curvature is."""
    flat = curvature.mantissa <= 0
    ratio = quotient(slope.mantissa, jnp.where(flat, 1.0, curvature.mantissa))
    limit = jnp.where(slope.mantissa == 0, 0.0, jnp.sign(slope.mantissa) * jnp.inf)
    return _Scaled(jnp.where(flat, limit, ratio), slope.exponent - curvature.exponent)
