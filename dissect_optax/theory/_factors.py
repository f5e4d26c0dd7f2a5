"""Variance adaptation factors from the exact mean and standard deviation, §3.

The library's `inverse` and `inverse_sqrt` are the same curves as functions of η². Here
they take p and σ themselves, because η² = σ²/p² has no value at a zero gradient and, in
float32, none beyond η = 1e19. The optimal factor of a sign, Eq. (15), is
`sign_certainty`.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_same_shape,
    check_count,
    check_momentum,
    check_not_negative,
    magnitude,
)

# Where z/sinh z is zero to the last bit, and where 1 - z/sinh z needs its series.
_LARGE, _SMALL = 80.0, 1.0
# Leaves a relative error of 1e-17 at z = 1.
_TERMS = 10
# After so many gradients μ^t is zero for every μ < 1 of float64; 0·∞ is avoided.
_ENDLESS = 1e30


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
      * p = 0: zero, also for σ = 0, where every factor has the same error.
      * An infinite p: one. An infinite σ: zero. Both infinite: NaN, since the ratio is
        unknown.

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
    length, deviation = _on_common_scale(mean, std)
    square = jnp.square(length)
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
      * An infinite p: one. An infinite σ: zero. Both infinite: NaN.

    Examples:
      >>> from dissect_optax import theory
      >>> gap = theory.adam_factor(3.0, 2.0) - theory.sign_certainty(3.0, 2.0)
      >>> bool(abs(gap) < 0.065)
      True

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, §3.1, Figure 5.
    """
    length, deviation = _on_common_scale(mean, std)
    return length / jnp.sqrt(jnp.square(length) + jnp.square(deviation))


def momentum_correction(momentum: ArrayLike, count: ArrayLike) -> jax.Array:
    """Relative variance of a momentum term over that of one gradient, Eq. (19).

    κ(μ,t) = (1-μ)(1+μ^t) / ((1+μ)(1-μ^t)): var[r]/E[r]² = κ σ²/p² for r = Σ μ^s g_(t-s)
    with independent gradients of one mean p and one variance σ².

    Args:
      momentum: μ in [0, 1), of any shape; without unit.
      count: t ≥ 1, the number of gradients in the sum, of a shape that broadcasts; may
        be infinite.

    Returns:
      κ in (0, 1], of the broadcast shape; falls from 1 at t = 1 to (1-μ)/(1+μ).

    Raises:
      ValueError: If a concrete `momentum` lies outside [0, 1) or a concrete `count` is
        below one.

    Edge cases:
      * κ(μ,1) = 1 and κ(0,t) = 1, exactly; κ(μ,∞) = (1-μ)/(1+μ).
      * The derivatives keep their digits from μ = 0 to the last number below one.

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
    check_momentum(mu)
    check_count(t)
    return _kappa(mu, jnp.minimum(t, _ENDLESS))


@jax.custom_jvp
def _kappa(mu: jax.Array, t: jax.Array) -> jax.Array:
    """κ by its formula, with μ^t from the logarithm."""
    log_power = -t * _minus_log(mu)
    growth = (1 + jnp.exp(log_power)) / -jnp.expm1(log_power)
    return jnp.where(t == 1, 1.0, (1 - mu) / (1 + mu) * growth)


@_kappa.defjvp
def _kappa_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The derivatives, without cancellation as μ → 1.

    With x = -log μ, κ = tanh(x/2) / tanh(tx/2), and with f(z) = 1 - z/sinh z

        ∂(log κ)/∂μ = -(f(tx) - f(x)) / (xμ) = -2/(1-μ²) + 2tμ^(t-1)/(1-μ^(2t)),
        ∂(log κ)/∂t = -(1 - f(tx)) / t.

    The terms of the second form diverge at μ = 1 and cancel; those of the first do not,
    because f(z) ≈ z²/6. The first is not defined at μ = 0.
    """
    mu, t = primals
    d_mu, d_t = tangents
    kappa, x = _kappa(mu, t), _minus_log(mu)

    close_to_one = mu > 0.5
    x_high, mu_high = jnp.where(close_to_one, x, 1.0), jnp.where(close_to_one, mu, 1.0)
    high = -(_deficit(t * x_high) - _deficit(x_high)) / (x_high * mu_high)
    x_low, mu_low = jnp.where(close_to_one, 1.0, x), jnp.where(close_to_one, 0.0, mu)
    power = 2 * t * jnp.exp(-(t - 1) * x_low) / -jnp.expm1(-2 * t * x_low)
    low = power - 2 / ((1 - mu_low) * (1 + mu_low))

    by_mu = jnp.where(t == 1, 0.0, jnp.where(close_to_one, high, low))
    by_t = -(1 - _deficit(t * x)) / t
    return kappa, kappa * (by_mu * d_mu + by_t * d_t)


def _minus_log(mu: jax.Array) -> jax.Array:
    """-log μ, kept finite at zero by a number that is lost in the sum with others."""
    return -jnp.log(mu + jnp.sqrt(jnp.finfo(mu.dtype).tiny))


def _deficit(z: jax.Array) -> jax.Array:
    """1 - z/sinh z for z ≥ 0."""
    small = z < _SMALL
    # (sinh z - z) / sinh z, both divided by z.
    square = jnp.square(jnp.where(small, z, 0.0))
    excess = jnp.zeros_like(z)
    for k in reversed(range(1, _TERMS)):
        excess = square * (excess + 1 / math.factorial(2 * k + 1))
    large = jnp.clip(z, _SMALL, _LARGE)
    return jnp.where(small, excess / (1 + excess), 1 - large / jnp.sinh(large))


def _on_common_scale(mean: ArrayLike, std: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """|p| and σ divided by the larger of the two; (0, 1) for (0, 0)."""
    mean, std = as_same_shape(mean, std)
    check_not_negative("std", std)
    length = magnitude(mean)
    # A factor is a function of the ratio, so the scale has no derivative to pass on.
    scale = jax.lax.stop_gradient(jnp.maximum(length, std))
    empty, endless = scale == 0, jnp.isinf(scale)
    safe = jnp.where(empty | endless, 1.0, scale)
    endless_mean, endless_std = (
        jnp.where(jnp.isinf(x), 1.0, 0.0).astype(x.dtype) for x in (mean, std)
    )
    length = jnp.where(endless, endless_mean, length / safe)
    deviation = jnp.where(endless, endless_std, std / safe)
    unknown = jnp.isinf(mean) & jnp.isinf(std)
    return jnp.where(unknown, jnp.nan, length), jnp.where(empty, 1.0, deviation)
