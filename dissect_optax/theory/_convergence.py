"""The convergence of idealised SVAG, Theorem 1."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_same_shape,
    check_not_negative,
    check_positive,
)


def convergence_bound(
    initial_error: ArrayLike,
    steps: ArrayLike,
    *,
    strong_convexity: ArrayLike,
    lipschitz: ArrayLike,
    second_moment: ArrayLike,
) -> jax.Array:
    """Upper bound on the expected error of idealised SVAG, Theorem 1 and §B.4.

    E[f(θ_T) - f*] ≤ 1/(1/e₀ + cT),      c = 2μ²/(LG²)

    for θ ← θ - (1/L) γ⊙g with the exact factors γ of `optimal_factor`, where f is
    μ-strongly convex and L-smooth, and E‖g_t‖² ≤ G² at every θ_t.

    Args:
      initial_error: e₀ = f(θ_0) - f* ≥ 0, in the unit of the loss.
      steps: T ≥ 0, the number of steps taken.
      strong_convexity: μ > 0.
      lipschitz: L ≥ μ.
      second_moment: G² > 0, a bound on E‖g‖², the squared length of the gradient plus
        the variances of its elements.

    Returns:
      The bound, of the broadcast shape of all arguments.

    Raises:
      ValueError: If a concrete constant is not positive, or e₀ or T negative.

    Edge cases:
      * e₀ = 0: zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> bound = theory.convergence_bound(
      ...     1.0,
      ...     jnp.array([0.0, 2.0, 2e6]),
      ...     strong_convexity=1.0,
      ...     lipschitz=1.0,
      ...     second_moment=4.0,
      ... )
      >>> print([f"{value:.1e}" for value in bound])  # 1/(cT) in the end
      ['1.0e+00', '5.0e-01', '1.0e-06']

    References:
      Balles & Hennig, "Dissecting Adam", §3.2, Theorem 1, §B.4.
    """
    e0, t, mu, smoothness, g2 = as_same_shape(
        initial_error, steps, strong_convexity, lipschitz, second_moment
    )
    check_not_negative("initial_error", e0)
    check_not_negative("steps", t)
    check_positive("strong_convexity", mu)
    check_positive("lipschitz", smoothness)
    check_positive("second_moment", g2)
    rate = 2 * (mu / smoothness) * (mu / g2)
    # In this form no product overflows, which would make the bound zero.
    solved = e0 == 0
    bound = 1 / (1 / jnp.where(solved, 1.0, e0) + rate * t)
    return jnp.where(solved, 0.0, bound)
