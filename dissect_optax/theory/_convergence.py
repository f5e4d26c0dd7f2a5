"""Convergence of idealised SVAG, Theorem 1."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_same_shape,
    check_not_above,
    check_not_negative,
    check_positive,
)
from dissect_optax.theory._scales import quotient, quotient_of_products


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
      initial_error: e₀ = f(θ_0) - f* ≥ 0, in the unit of the loss; may be infinite.
      steps: T ≥ 0, the number of steps taken; may be infinite.
      strong_convexity: μ > 0.
      lipschitz: L ≥ μ.
      second_moment: G² > 0, a bound on E‖g‖², the squared length of the gradient plus
        the variances of its elements.

    Returns:
      The bound, of the broadcast shape of all arguments.

    Raises:
      ValueError: If a concrete constant is not positive and finite, L is smaller than
        μ by more than rounding, or e₀ or T is negative.

    Edge cases:
      * e₀ = 0: zero. T = 0: e₀. T = ∞: zero. e₀ = ∞ and finite T > 0: 1/(cT).
      * No intermediate result over- or underflows, and derivatives are finite for
        e₀ = 0 and T = 0 as well.

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
    check_positive("strong_convexity", mu, finite=True)
    check_positive("lipschitz", smoothness, finite=True)
    check_positive("second_moment", g2, finite=True)
    check_not_above("strong_convexity", mu, smoothness, "`lipschitz`")

    endless, unbounded = jnp.isinf(t), jnp.isinf(e0)
    t, e0 = jnp.where(endless, 1.0, t), jnp.where(unbounded, 1.0, e0)
    progress = 2 * quotient_of_products((e0, t, mu, mu), (smoothness, g2))
    rate = 2 * quotient_of_products((t, mu, mu), (smoothness, g2))

    # x = e₀cT is `progress`. The reciprocal of a small e₀ and the product of large
    # numbers are both avoided by e₀/(1+x) for x ≤ 1 and 1/(cT) / (1+1/x) for x > 1.
    never = rate == 0
    limit = jnp.where(never, jnp.inf, quotient(1.0, jnp.where(never, 1.0, rate)))
    early, late = progress <= 1, progress > jnp.sqrt(jnp.finfo(progress.dtype).max)
    inverse = quotient(1.0, jnp.where(early | late, 1.0, progress))
    finite_limit = jnp.where(early, 1.0, limit)
    bound = jnp.where(
        early,
        e0 / (1 + jnp.where(early, progress, 0.0)),
        jnp.where(late, finite_limit, quotient(finite_limit, 1 + inverse)),
    )
    return jnp.where(endless, 0.0, jnp.where(unbounded, limit, bound))
