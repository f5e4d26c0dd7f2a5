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


def decay_power_minus_one(
    decay: jax.typing.ArrayLike,
    exponent: jax.Array | int,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """β^t - 1, with all digits also where β^t is close to one."""
    # Rounded to `dtype` first, so that a Python float and a traced value agree. The
    # smallest number in place of zero gives β → 1 its limit in the ratios below.
    log_decay = jnp.log(jnp.asarray(decay, dtype))
    log_decay = jnp.minimum(log_decay, -jnp.finfo(dtype).tiny)
    return jnp.expm1(jnp.asarray(exponent, dtype) * log_decay)


def newest_weight(
    decay: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Weight w_t = (1-β)/(1-β^t) of g_t in the bias-corrected averages (3) and (4).

    Exactly one at t = 1. A decay that low precision has rounded to one gives the
    limit 1/t, the plain average.
    """
    weight = decay_power_minus_one(decay, 1, dtype) / decay_power_minus_one(
        decay, count, dtype
    )
    return jnp.where(count <= 1, 1.0, weight)


def kappa(
    momentum: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """κ(μ,t) = (1-μ)(1+μ^t) / ((1+μ)(1-μ^t)), Eq. (19); κ(μ,1) = 1 and κ(0,t) = 1."""
    one_plus_power = 2 + decay_power_minus_one(momentum, count, dtype)
    one_plus_mu = 2 + decay_power_minus_one(momentum, 1, dtype)
    ratio = newest_weight(momentum, count, dtype) * one_plus_power / one_plus_mu
    return jnp.where(count <= 1, 1.0, ratio)


def one_minus_kappa(
    momentum: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """1 - κ(μ,t) = 2μ(1-μ^(t-1)) / ((1+μ)(1-μ^t)); exactly zero at t = 1 or μ = 0."""
    mu = jnp.asarray(momentum, dtype)
    ratio = decay_power_minus_one(
        momentum, jnp.maximum(count - 1, 1), dtype
    ) / decay_power_minus_one(momentum, count, dtype)
    return jnp.where(count <= 1, 0.0, 2 * mu / (1 + mu) * ratio)


# ---- Moving averages (3), (4) and the variance between them, §3.3 -----------------


def squared_magnitude(x: jax.Array) -> jax.Array:
    """|x|², real also for complex x."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def average(previous: jax.Array, newest: jax.Array, weight: jax.Array) -> jax.Array:
    """Bias-corrected moving average after `newest` came in with its weight."""
    # A weight of one forgets the past, however large it was.
    return jnp.where(weight == 1, newest, previous + weight * (newest - previous))


def average_of_squares(
    previous: jax.Array, newest: jax.Array, weight: jax.Array
) -> jax.Array:
    """The same for squares, which may overflow: infinity stays infinity."""
    return jnp.where(weight == 1, newest, (1 - weight) * previous + weight * newest)


def average_with_variance(
    mean: jax.Array, variance: jax.Array, gradient: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and weighted variance, the pair (m, v-m²) of §3.3.

    The recursion of West (1979), "Updating mean and variance estimates: an improved
    method": algebraically v-m², without the subtraction, and never negative::

        s ← (1-w) s + w (g - m_before)(g - m_after)
    """
    before = mean - gradient
    # The new mean to the last bit, in another form than below: sharing it would make
    # XLA store it, and its rounding is what the product must see.
    after = jnp.where(weight == 1, 0.0, mean - weight * before - gradient)
    product = jnp.maximum(jnp.real(before * jnp.conj(after)), 0.0)
    variance = (1 - weight) * variance + weight * product
    # Never chosen: it only tells XLA to update the variance first, while the old mean
    # is still in place. Otherwise it copies the old mean.
    mean = jnp.where(variance < 0, gradient, average(mean, gradient, weight))
    return mean, variance


def floored_root(
    mean: jax.Array, second_moment: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """√v + ε, Adam's denominator (5); never zero."""
    if isinstance(eps, int | float) and eps >= jnp.finfo(second_moment.dtype).tiny:
        return jnp.sqrt(second_moment) + eps
    # No ε, or one that underflows: where g² has too, all that is known is v ≥ m².
    magnitude = jnp.abs(mean)
    known = second_moment > 0
    root = jnp.sqrt(jnp.where(known, second_moment, 1.0)) + eps
    return jnp.where(known, root, jnp.where(magnitude > 0, magnitude, 1.0))


def add_noise_floor(
    variance: jax.Array, root: jax.Array, eps: jax.typing.ArrayLike
) -> jax.Array:
    """(√v+ε)² - m² from s = v-m² and `root` = √v+ε: Adam's ε as a noise floor."""
    return variance + eps * (2 * root - eps)


# ---- Relative variance (7) and the adaptation factors (14), (15) ------------------


def relative_variance(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """η² = s/m², Eq. (7), with the sign of s; zero where the direction is zero.

    Variances below the smallest normal number count as zero, and η² stays above -1 by
    one rounding unit, so that every factor is finite.
    """
    # Twice by the reciprocal: m² underflows for |m| < 1e-19 in float32, and dividing
    # twice does not help, because XLA rewrites (s/m)/m into s/(m·m).
    magnitude = jnp.abs(mean)
    zero = magnitude == 0
    reciprocal = 1 / jnp.where(zero, 1.0, magnitude)
    eta2 = (variance * reciprocal) * reciprocal
    lowest = jnp.finfo(variance.dtype).eps - 1
    return jnp.where(zero, 0.0, jnp.maximum(eta2, lowest))


def inverse_sqrt_from_moments(mean: jax.Array, root: jax.Array) -> jax.Array:
    """(1+η²)^(-1/2) = |m|/(√v+ε), Eq. (6), where both are at hand; `root` > 0.

    As good as by η² where v ≥ m²; better where v ≪ m², where v-m² cancels.
    """
    return jnp.abs(mean) / root


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
    deviations = examples - mean[None]
    # A large mean is rounded by more than a small spread can bear: take out the rest.
    deviations -= jnp.mean(deviations, axis=0, keepdims=True)
    squares = squared_magnitude(deviations)
    return jnp.sum(squares, axis=0) / (batch_size * (batch_size - 1))


def spread_from_squares(mean_square: jax.Array, mean: jax.Array) -> jax.Array:
    """Population variance E|g|² - |E g|², clamped at zero against rounding."""
    return jnp.maximum(mean_square - squared_magnitude(mean), 0)


def variance_of_mean_factor(squared_share: jax.Array) -> jax.Array:
    """What turns the population variance of per-example gradients into ŝ of Eq. (44).

    With shares p_k = w_k / Σw and `squared_share` = Σp², the variance of Σ p_k g_k is
    estimated without bias by Σ p_k |g_k - ḡ|² times Σp²/(1-Σp²), which is 1/(n-1) for
    n equal weights. Zero where a single example has all the weight.
    """
    rest = 1 - squared_share
    alone = rest <= 4 * jnp.finfo(squared_share.dtype).eps
    return jnp.where(alone, 0.0, squared_share / jnp.where(alone, 1.0, rest))


def merged_moments(
    weight: jax.Array,
    mean: jax.Array,
    spread: jax.Array,
    other_weight: jax.Array,
    other_mean: jax.Array,
    other_spread: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Mean and population variance of two sets together (Chan et al. 1979)."""
    total = weight + other_weight
    share = jnp.where(total > 0, other_weight / jnp.where(total > 0, total, 1), 0)
    share = share.astype(spread.dtype)
    difference = other_mean - mean
    between = share * (1 - share) * squared_magnitude(difference)
    within = spread + share * (other_spread - spread)
    return mean + share * difference, within + between
