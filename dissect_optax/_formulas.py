"""The paper's equations as pure functions on arrays: no trees, no state.

Letters are the paper's, "Dissecting Adam: The Sign, Magnitude and Variance of
Stochastic Gradients" (Balles & Hennig): `m`, `v` are moving averages of the gradient
and of its square, `s` a variance, `η²` (`eta2`) a relative variance, `γ` a factor, `μ`
(`momentum`) a decay, `t` (`count`) the number of gradients seen, from one. Everything
is element-wise, and a complex gradient has a real variance, `E|g - E g|²`.
"""

import jax
import jax.numpy as jnp

# ---- The weight of the newest gradient, and the momentum correction ---------------


def log_decay(decay: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Natural logarithm of a decay, in `dtype` (-inf for a decay of zero)."""
    # Rounded to `dtype` first, so that a Python float and a traced value agree.
    return jnp.log(jnp.asarray(decay, dtype))


def newest_weight(
    decay: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Weight w_t = (1-β)/(1-β^t) of g_t in the bias-corrected averages (3) and (4).

    Exactly one at t = 1. A decay that low precision has rounded to one gives the
    limit 1/t, the plain average.
    """
    # 1-β^t by subtraction would lose the digits that bias correction is about.
    log_beta = log_decay(decay, dtype)
    t = count.astype(dtype)
    averages_all = (count <= 1) | (log_beta == 0)
    safe_log = jnp.where(averages_all, -1.0, log_beta)
    weight = jnp.expm1(safe_log) / jnp.expm1(t * safe_log)
    return jnp.where(averages_all, 1.0 / t, weight)


def kappa(
    momentum: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """κ(μ,t) = (1-μ)(1+μ^t) / ((1+μ)(1-μ^t)), Eq. (19); κ(μ,1) = 1 and κ(0,t) = 1."""
    mu = jnp.asarray(momentum, dtype)
    power = jnp.exp(count.astype(dtype) * log_decay(momentum, dtype))
    ratio = newest_weight(momentum, count, dtype) * (1 + power) / (1 + mu)
    return jnp.where(count <= 1, 1.0, ratio)


def one_minus_kappa(
    momentum: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """1 - κ(μ,t) = 2μ(1-μ^(t-1)) / ((1+μ)(1-μ^t)); exactly zero at t = 1 or μ = 0."""
    mu = jnp.asarray(momentum, dtype)
    # (1-μ^(t-1))/(1-μ^t) is the ratio of two bias corrections, w_t / w_(t-1).
    before = newest_weight(momentum, jnp.maximum(count - 1, 1), dtype)
    ratio = newest_weight(momentum, count, dtype) / before
    return jnp.where(count <= 1, 0.0, 2 * mu / (1 + mu) * ratio)


# ---- Moving averages (3), (4) and the variance between them, §3.3 -----------------


def squared_magnitude(x: jax.Array) -> jax.Array:
    """|x|², real also for complex x."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def average(previous: jax.Array, newest: jax.Array, weight: jax.Array) -> jax.Array:
    """Bias-corrected moving average after `newest` came in with its weight."""
    return previous + weight * (newest - previous)


def average_with_variance(
    mean: jax.Array, variance: jax.Array, gradient: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and weighted variance, the pair (m, v-m²) of §3.3.

    The recursion of West (1979), "Updating mean and variance estimates: an improved
    method": algebraically v-m², without the subtraction, and never negative.
    """
    deviation = gradient - mean
    spread = squared_magnitude(deviation)
    return mean + weight * deviation, (1 - weight) * (variance + weight * spread)


def add_noise_floor(
    variance: jax.Array, second_moment: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """(√v+ε)² - m² from s = v-m²: Adam's ε as a noise floor on the variance."""
    return variance + eps * (2 * jnp.sqrt(jnp.maximum(second_moment, 0.0)) + eps)


# ---- Relative variance (7) and the adaptation factors (14), (15) ------------------


def relative_variance(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """η² = s/m², Eq. (7), with the sign of s; zero where the direction is zero.

    Variances below the smallest normal number count as zero, and η² stays above -1 by
    one rounding unit, so that every factor is finite.
    """
    # Roots first: m² underflows for |m| < 1e-19 in float32, and (s/m)/m does not help,
    # because XLA rewrites it into s/(m·m).
    limits = jnp.finfo(variance.dtype)
    magnitude = jnp.abs(mean)
    # The comparison is written so that a NaN variance stays NaN.
    size = jnp.where(jnp.abs(variance) < limits.tiny, 0.0, jnp.abs(variance))
    ratio = jnp.sqrt(size) / jnp.where(magnitude > 0, magnitude, 1.0)
    eta2 = jnp.copysign(jnp.square(ratio), variance)
    return jnp.where(magnitude == 0, 0.0, jnp.maximum(eta2, limits.eps - 1))


def debias(variance: jax.Array, rest: jax.Array) -> jax.Array:
    """s/(1-κ) with `rest` = 1-κ; zero where one gradient carries all the weight.

    E[v-m²] = (1-κ)σ² for independent gradients, since κ(μ,t) is also the sum of the
    squared weights in m. A negative v-m², which two decays allow, stays as it is.
    """
    # At t = 1, or with decay zero, v-m² and 1-κ are both zero: no spread was seen.
    undefined = rest <= 0
    divisor = jnp.where(undefined | (variance < 0), 1.0, rest)
    return jnp.where(undefined, 0.0, variance / divisor)


# ---- The variance of a mini-batch gradient (44) -----------------------------------


def variance_of_mean(examples: jax.Array, mean: jax.Array) -> jax.Array:
    """ŝ = 1/B · 1/(B-1) Σ_k |g_k - g|², Eq. (44), over the leading axis."""
    batch_size = examples.shape[0]
    deviations = squared_magnitude(examples - mean[None])
    return jnp.sum(deviations, axis=0) / (batch_size * (batch_size - 1))
