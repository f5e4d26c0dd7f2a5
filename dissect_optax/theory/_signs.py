"""Probability that the sign of a Gaussian estimate is the true sign, §1.4.

All functions depend on mean and standard deviation through their ratio alone. They are
exact in both tails: 2ρ-1 keeps all digits where it is small. Neither a zero mean nor a
zero deviation gives NaN, in value or in derivative.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_same_shape,
    check_not_negative,
    magnitude,
)
from dissect_optax.theory._scales import quotient

# From here on erf(z/√2) is one to the last bit and exp(-z²/2) is zero, also in float64.
_SATURATED = 40.0


def expected_sign(mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Expectation of the sign of a Gaussian variable, §1.4.

    E[sign(p̂)] = (2ρ-1) sign(p) = erf(p / (√2 σ)),      p̂ ~ N(p, σ²)

    An odd function of the mean, smooth wherever σ > 0.

    Args:
      mean: p, of any shape.
      std: σ ≥ 0, in the unit of `mean`, of a shape that broadcasts with it.

    Returns:
      E[sign(p̂)] in [-1, 1], of the broadcast shape; without unit.

    Raises:
      ValueError: If a concrete `std` is negative.

    Edge cases:
      * σ = 0: the sign itself, with sign(0) = 0 and derivative zero.
      * A ratio that overflows counts as infinite, one that underflows as zero.
      * An infinite p: its sign. An infinite σ: zero. Both infinite: NaN.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> print(theory.expected_sign(jnp.array([-1.0, 0.0, 2.0]), 0.0))
      [-1.  0.  1.]

    References:
      Balles & Hennig, "Dissecting Adam", §1.4, §B.2 (Lemma 2).
    """
    mean, std = as_same_shape(mean, std)
    check_not_negative("std", std)
    return jax.lax.erf(standardize(mean, std) * math.sqrt(0.5))


def sign_certainty(mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """The optimal factor 2ρ-1 of a Gaussian sign, Eq. (15).

    2ρ-1 = erf(|p| / (√2 σ)) minimises E‖γ⊙sign(p̂) - sign(p)‖² over all γ, for a
    Gaussian p̂ ~ N(p, σ²). Use this rather than 2·`success_probability`-1, which loses
    all digits where ρ is close to 1/2.

    Args:
      mean: p, of any shape.
      std: σ ≥ 0, in the unit of `mean`, of a shape that broadcasts with it.

    Returns:
      2ρ-1 in [0, 1], of the broadcast shape; without unit.

    Raises:
      ValueError: If a concrete `std` is negative.

    Edge cases:
      * p = 0: zero, also for σ = 0: there is no true sign to agree with.
      * σ = 0 and p ≠ 0: one.
      * An infinite p: one. An infinite σ: zero. Both infinite: NaN.
      * The kink at p = 0 has derivative zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> from dissect_optax import theory
      >>> std = jnp.array([0.5, 1.0, 2.0])
      >>> factors = dissect_optax.gaussian_sign(jnp.square(std))
      >>> bool(jnp.allclose(theory.sign_certainty(1.0, std), factors))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3, Lemma 1.
    """
    return magnitude(expected_sign(mean, std))


def success_probability(mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Probability that a Gaussian estimate has the sign of its mean, Eq. (8).

    ρ = P[sign(p̂) = sign(p)] = 1/2 + 1/2 erf(|p| / (√2 σ)),      p̂ ~ N(p, σ²)

    Args:
      mean: p, of any shape.
      std: σ ≥ 0, in the unit of `mean`, of a shape that broadcasts with it.

    Returns:
      ρ in [1/2, 1], of the broadcast shape; without unit.

    Raises:
      ValueError: If a concrete `std` is negative.

    Edge cases:
      * p = 0: 1/2, also for σ = 0.
      * An infinite p: one. An infinite σ: 1/2. Both infinite: NaN.

    Examples:
      >>> from dissect_optax import theory
      >>> print(f"{theory.success_probability(mean=1.0, std=1.0):.4f}")
      0.8413

    References:
      Balles & Hennig, "Dissecting Adam", §1.4, §B.2 (Lemma 2).
    """
    return 0.5 + 0.5 * sign_certainty(mean, std)


def standardize(mean: jax.Array, std: jax.Array) -> jax.Array:
    """The mean in standard deviations, clipped where Gaussian integrals saturate."""
    unknown = jnp.isinf(mean) & jnp.isinf(std)
    # Covers σ = 0, and the product overflows only where the ratio is small.
    saturated = jnp.abs(mean) >= _SATURATED * std
    ratio = quotient(jnp.where(saturated, 0.0, mean), jnp.where(saturated, 1.0, std))
    ratio = jnp.where(saturated, _SATURATED * jnp.sign(mean), ratio)
    return jnp.where(unknown, jnp.nan, ratio)
