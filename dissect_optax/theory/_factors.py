"""Variance adaptation factors from the exact mean and standard deviation, §3.

The library's `inverse` and `inverse_sqrt` are the same curves as functions of η². Here
they take p and σ themselves, because η² = σ²/p² has no value at a zero gradient and, in
float32, none beyond η = 1e19. The optimal factor of a sign, Eq. (15), is
`sign_certainty`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_same_shape,
    check_not_negative,
)


def optimal_factor(mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """The factor γ that brings γ⊙p̂ closest to p, Eq. (14).

    γ = p²/(p²+σ²) = 1/(1+η²) minimises E‖γ⊙p̂ - p‖² for any p̂ of mean p and element-wise
    variance σ²; no Gaussian is assumed.

    Args:
      mean: p, of any shape.
      std: σ ≥ 0, in the unit of `mean`, of a shape that broadcasts with it.

    Returns:
      γ in [0, 1], of the broadcast shape; without unit.

    Raises:
      ValueError: If a concrete `std` is negative.

    Edge cases:
      * p = 0: zero, also for σ = 0, where every factor would do.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> gradient, std = jnp.array([2.0, 1.0]), jnp.array([1.0, 1.5])
      >>> factors = theory.optimal_factor(gradient, std)
      >>> bool(jnp.allclose(factors, jnp.array([4 / 5, 4 / 13])))  # Figure 1
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3, Lemma 1.
    """
    magnitude, deviation = _on_common_scale(mean, std)
    square = jnp.square(magnitude)
    return square / (square + jnp.square(deviation))


def adam_factor(mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """The factor that Adam applies to the sign, Eq. (6).

    γ = |p|/√(p²+σ²) = (1+η²)^(-1/2), close to the optimal factor `sign_certainty` of a
    Gaussian sign: never more than 0.065 away from it.

    Args:
      mean: p, of any shape.
      std: σ ≥ 0, in the unit of `mean`, of a shape that broadcasts with it.

    Returns:
      γ in [0, 1], of the broadcast shape; without unit.

    Raises:
      ValueError: If a concrete `std` is negative.

    Edge cases:
      * p = 0: zero, also for σ = 0; the kink there has derivative zero.

    Examples:
      >>> from dissect_optax import theory
      >>> gap = theory.adam_factor(3.0, 2.0) - theory.sign_certainty(3.0, 2.0)
      >>> bool(abs(gap) < 0.065)
      True

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, §3.1, Figure 5.
    """
    magnitude, deviation = _on_common_scale(mean, std)
    return magnitude / jnp.sqrt(jnp.square(magnitude) + jnp.square(deviation))


def momentum_correction(momentum: ArrayLike, count: ArrayLike) -> jax.Array:
    """The relative variance that a momentum term keeps of its gradients', Eq. (19).

    κ(μ,t) = (1-μ)(1+μ^t) / ((1+μ)(1-μ^t)): var[r]/E[r]² = κ σ²/p² for r = Σ μ^s g_(t-s)
    with independent gradients of one mean p and one variance σ².

    Args:
      momentum: μ in [0, 1), of any shape; without unit.
      count: t ≥ 1, the number of gradients in the sum, of a shape that broadcasts.

    Returns:
      κ in (0, 1], of the broadcast shape; falls from 1 at t = 1 to (1-μ)/(1+μ).

    Raises:
      ValueError: If a concrete `momentum` lies outside [0, 1) or a concrete `count` is
        below one.

    Edge cases:
      * κ(μ,1) = 1 and κ(0,t) = 1, exactly.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> kappa = theory.momentum_correction(0.9, jnp.array([1, 2, 1000]))
      >>> bool(jnp.allclose(kappa, jnp.array([1, 181 / 361, 1 / 19])))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.4, §C.3.
    """
    mu, t = as_same_shape(momentum, count)
    if not isinstance(mu, jax.core.Tracer) and not bool(
        np.all((np.asarray(mu) >= 0) & (np.asarray(mu) < 1))
    ):
        raise ValueError(f"`momentum` must lie in [0, 1), got {momentum}.")
    if not isinstance(t, jax.core.Tracer) and not bool(np.all(np.asarray(t) >= 1)):
        raise ValueError(
            f"`count` is the number of gradients seen and starts at one, got {count}."
        )
    # The κ of the transformations has no derivative at μ = 0; this has. Its logarithm
    # is kept from infinity by a number that is lost in the sum with any other μ.
    log_power = t * jnp.log(mu + jnp.sqrt(jnp.finfo(mu.dtype).tiny))
    growth = (1 + jnp.exp(log_power)) / -jnp.expm1(log_power)
    return jnp.where(t == 1, 1.0, (1 - mu) / (1 + mu) * growth)


def _on_common_scale(mean: ArrayLike, std: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """|p| and σ divided by the larger of the two; (0, 1) for (0, 0)."""
    mean, std = as_same_shape(mean, std)
    check_not_negative("std", std)
    magnitude = jnp.abs(mean)
    # A factor is a function of the ratio, so the scale has no derivative to pass on.
    scale = jax.lax.stop_gradient(jnp.maximum(magnitude, std))
    empty = scale == 0
    safe = jnp.where(empty, 1.0, scale)
    return magnitude / safe, jnp.where(empty, 1.0, std / safe)
