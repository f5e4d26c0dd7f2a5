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
from dissect_optax.theory._scales import quotient_of_products


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
    return _bound(e0, t, mu, smoothness, g2)


@jax.custom_jvp
def _bound(
    e0: jax.Array, t: jax.Array, mu: jax.Array, smoothness: jax.Array, g2: jax.Array
) -> jax.Array:
    """The bound as e₀/(1+x) for x = e₀cT ≤ 1, and 1/(cT) / (1+1/x) beyond.

    In these forms neither the reciprocal of a small e₀ nor a product overflows.
    """
    endless, unbounded = jnp.isinf(t), jnp.isinf(e0)
    t, e0 = jnp.where(endless, 1.0, t), jnp.where(unbounded, 1.0, e0)
    progress = _progress(e0, t, mu, smoothness, g2)
    limit = 0.5 / quotient_of_products((t, mu, mu), (smoothness, g2))
    late = limit / (1 + 1 / progress)
    bound = jnp.where(progress <= 1, e0 / (1 + progress), late)
    return jnp.where(endless, 0.0, jnp.where(unbounded, limit, bound))


@_bound.defjvp
def _bound_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    """The derivatives b²/e₀² by e₀, -cb² by T, and -bx/(1+x) by log c.

    Differentiating the formula itself would over- and underflow again.
    """
    e0, t, mu, smoothness, g2 = primals
    d_e0, d_t, d_mu, d_smoothness, d_g2 = tangents
    bound = _bound(*primals)
    infinite = jnp.isinf(e0) | jnp.isinf(t)
    # At an infinite argument the bound is constant in e₀, or constantly zero.
    e0, t = (jnp.where(infinite, 1.0, x) for x in (e0, t))
    progress = _progress(e0, t, mu, smoothness, g2)
    kept = jnp.where(infinite, 0.0, 1 / (1 + progress))
    early = progress <= 1
    gained = jnp.where(
        early, progress * kept, 1 / (1 + 1 / jnp.where(early, 1.0, progress))
    )
    gained = jnp.where(infinite, 1.0, gained)

    finite = jnp.where(jnp.isinf(bound), 0.0, bound)
    by_t = -2 * quotient_of_products((finite, finite, mu, mu), (smoothness, g2))
    derivative = jnp.square(kept) * d_e0 + by_t * d_t
    for constant, tangent, power in [
        (mu, d_mu, -2.0),
        (smoothness, d_smoothness, 1.0),
        (g2, d_g2, 1.0),
    ]:
        by_constant = quotient_of_products((finite, gained), (constant,))
        derivative += power * by_constant * tangent
    return bound, derivative


def _progress(
    e0: jax.Array, t: jax.Array, mu: jax.Array, smoothness: jax.Array, g2: jax.Array
) -> jax.Array:
    """The product x = e₀cT; the bound has fallen by the factor 1+x."""
    return 2 * quotient_of_products((e0, t, mu, mu), (smoothness, g2))
