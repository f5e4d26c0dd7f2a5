"""The paper's equations as pure functions on arrays: no trees, no state.

Letters are the paper's, "Dissecting Adam: The Sign, Magnitude and Variance of
Stochastic Gradients" (Balles & Hennig): `m`, `v` are moving averages of the gradient
and of its square, `s` a variance, `η²` (`eta2`) a relative variance, `γ` a factor, `μ`
(`momentum`) a decay, `t` (`count`) the number of gradients seen, from one. Everything
is element-wise, and a complex gradient has a real variance, `E|g - E g|²`.

Operands are cast explicitly, so that `jax_numpy_dtype_promotion="strict"` changes
nothing. Where a value that a `where` discards may be infinite, either it is computed
from a harmless operand (a "double where") or its derivative is written out: zero times
an infinite derivative would be NaN.
"""

from typing import Any

import jax
import jax.numpy as jnp

# ---- The weight of the newest gradient, and the momentum correction ---------------


def newest_weight(
    decay: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Weight w_t = (1-β)/(1-β^t) of g_t in the bias-corrected averages (3) and (4).

    Exactly one at t = 1. A decay that low precision has rounded to one gives the
    limit 1/t, the plain average.
    """
    # β is rounded to `dtype` first, so that a Python float and a traced value agree.
    return _newest_weight(jnp.asarray(decay, dtype), jnp.asarray(count, dtype))


def kappa(
    momentum: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """κ(μ,t) = (1-μ)(1+μ^t) / ((1+μ)(1-μ^t)), Eq. (19); κ(μ,1) = 1 and κ(0,t) = 1."""
    return _kappa(jnp.asarray(momentum, dtype), jnp.asarray(count, dtype))


def one_minus_kappa(
    momentum: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """1 - κ(μ,t) = 2μ(1-μ^(t-1)) / ((1+μ)(1-μ^t)); exactly zero at t = 1 or μ = 0."""
    mu = jnp.asarray(momentum, dtype)
    previous = newest_weight(mu, jnp.maximum(count - 1, 1), dtype)
    ratio = newest_weight(mu, count, dtype) / previous
    return jnp.where(count <= 1, 0.0, 2 * mu / (1 + mu) * ratio)


def _power_minus_one(decay: jax.Array, exponent: jax.Array | float) -> jax.Array:
    """β^t - 1, with all digits also where β^t is close to one."""
    # The smallest number in place of zero gives β → 1 its limit in the ratios below.
    return jnp.expm1(exponent * jnp.minimum(_log(decay), -jnp.finfo(decay.dtype).tiny))


def _log(decay: jax.Array) -> jax.Array:
    """Logarithm of β; finite at zero, where all powers of β still underflow."""
    return jnp.log(jnp.maximum(decay, jnp.finfo(decay.dtype).tiny))


# The derivatives of w and κ by the decay are written out. Differentiating the quotients
# gives 0/0 at β = 0, and near β = 1 a difference of numbers that agree in all digits.
# Below, u = -ln β; where t u is small, the differences are taken term by term.
_SERIES_BELOW = 0.25


@jax.custom_jvp
def _newest_weight(decay: jax.Array, count: jax.Array) -> jax.Array:
    """w_t = (1-β)/(1-β^t)."""
    weight = _power_minus_one(decay, 1.0) / _power_minus_one(decay, count)
    return jnp.where(count <= 1, 1.0, weight)


@_newest_weight.defjvp
def _newest_weight_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Derivative by d ln(1/w)/dβ = 1/(1-β) - t β^(t-1)/(1-β^t), 1/w = 1 + β + …."""
    decay, count = primals
    weight = _newest_weight(decay, count)
    near, u, tu, beta, far = _two_ranges(decay, count)

    def bernoulli(x: jax.Array) -> jax.Array:
        """1/(e^x - 1) - 1/x."""
        x2 = x * x
        return -0.5 + x / 12 * (1 - x2 / 60 * (1 - x2 / 42 * (1 - x2 / 40)))

    series = (bernoulli(u) - count * bernoulli(tu)) / beta
    direct = 1 / (1 - far) + count * far ** (count - 1) / _power_minus_one(far, count)
    slope = jnp.where(count <= 1, 0.0, jnp.where(near, series, direct))
    return weight, -weight * slope * tangents[0]


@jax.custom_jvp
def _kappa(momentum: jax.Array, count: jax.Array) -> jax.Array:
    """κ(μ,t) = w_t (1+μ^t)/(1+μ)."""
    one_plus_power = 2 + _power_minus_one(momentum, count)
    one_plus_mu = 2 + _power_minus_one(momentum, 1.0)
    ratio = _newest_weight(momentum, count) * one_plus_power / one_plus_mu
    return jnp.where(count <= 1, 1.0, ratio)


@_kappa.defjvp
def _kappa_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Derivative of κ = tanh(u/2)/tanh(tu/2).

    d ln κ/dμ = 2/(μ²-1) + 2t μ^(t-1)/(1-μ^(2t))
    """
    momentum, count = primals
    value = _kappa(momentum, count)
    near, u, tu, mu, far = _two_ranges(momentum, count)

    def curvature(x: jax.Array) -> jax.Array:
        """(x/sinh(x) - 1)/x²."""
        x2 = x * x
        return -1 / 6 + x2 * (7 / 360 - x2 * (31 / 15120 - x2 * (127 / 604800)))

    series = u / mu * (count * count * curvature(tu) - curvature(u))
    direct = 2 / _power_minus_one(far, 2.0)
    direct -= 2 * count * far ** (count - 1) / _power_minus_one(far, 2 * count)
    slope = jnp.where(count <= 1, 0.0, jnp.where(near, series, direct))
    return value, value * slope * tangents[0]


def _two_ranges(decay: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
    """Whether a series serves; u, tu and β for it; β for the closed form."""
    u = -_log(decay)
    near = count * u < _SERIES_BELOW
    u = jnp.where(near, u, 0.0)
    return near, u, count * u, jnp.where(near, decay, 1.0), jnp.where(near, 0.5, decay)


# ---- Moving averages (3), (4) and the variance between them, §3.3 -----------------


def squared_magnitude(x: jax.Array) -> jax.Array:
    """|x|², real also for complex x."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


# The derivatives of the three recursions are written out as well: at a weight of one
# they choose a form that forgets the past exactly, and that has no derivative by w.


@jax.custom_jvp
def average(previous: jax.Array, newest: jax.Array, weight: jax.Array) -> jax.Array:
    """Bias-corrected moving average after `newest` came in with its weight."""
    # A weight of one forgets the past, however large it was.
    step = weight.astype(newest.dtype) * (newest - previous)
    return jnp.where(weight == 1, newest, previous + step)


@average.defjvp
def _average_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """(1-w) dm + w dg + (g-m) dw."""
    previous, newest, weight = primals
    d_previous, d_newest, d_weight = tangents
    w, dw = (x.astype(newest.dtype) for x in (weight, d_weight))
    tangent = (1 - w) * d_previous + w * d_newest + (newest - previous) * dw
    return average(previous, newest, weight), tangent


@jax.custom_jvp
def average_of_squares(
    previous: jax.Array, newest: jax.Array, weight: jax.Array
) -> jax.Array:
    """The same for squares, which may overflow: infinity stays infinity."""
    return jnp.where(weight == 1, newest, (1 - weight) * previous + weight * newest)


@average_of_squares.defjvp
def _average_of_squares_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """(1-w) dv + w d|g|² + (|g|²-v) dw; without the last where a square overflowed."""
    previous, newest, weight = primals
    d_previous, d_newest, d_weight = tangents
    overflow = jnp.isinf(previous) | jnp.isinf(newest)
    difference = jnp.where(overflow, 0.0, newest - previous)
    tangent = (1 - weight) * d_previous + weight * d_newest + difference * d_weight
    return average_of_squares(previous, newest, weight), tangent


@jax.custom_jvp
def average_with_variance(
    mean: jax.Array, variance: jax.Array, gradient: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted mean and weighted variance, the pair (m, v-m²) of §3.3.

    The recursion of West (1979), "Updating mean and variance estimates: an improved
    method": algebraically v-m², without the subtraction, and never negative::

        s ← (1-w) (s + w |g - m_before|²)
    """
    mean = average(mean, gradient, weight)
    # From the new mean, g - m_after = (1-w)(g - m_before): XLA then updates the old one
    # in place first. From the old one it would copy it, which takes a third of a step.
    # The last operation is the sum, for it computes one that depends on a single array,
    # like a `where` around it, once for every user, and copies again.
    square = squared_magnitude(gradient - mean)
    rest = 1 - weight
    share = jnp.where(rest == 0, 0.0, weight / jnp.where(rest == 0, 1.0, rest))
    past, square = (jnp.where(rest == 0, 0.0, x) for x in (variance, square))
    return mean, rest * past + share * square


@average_with_variance.defjvp
def _average_with_variance_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Tangent ds = (1-w) (ds + 2w Re(d* dd)) + ((1-2w) |d|² - s) dw, with d = g - m."""
    mean, variance, gradient, weight = primals
    d_mean, d_variance, d_gradient, d_weight = tangents
    deviation, d_deviation = gradient - mean, d_gradient - d_mean
    square = squared_magnitude(deviation)
    overflow = jnp.isinf(square) | jnp.isinf(variance)
    by_weight = jnp.where(overflow, 0.0, (1 - 2 * weight) * square - variance)
    product = jnp.real(jnp.conj(deviation) * d_deviation)
    tangent = (1 - weight) * (d_variance + 2 * weight * product) + by_weight * d_weight
    _, d_average = jax.jvp(
        average, (mean, gradient, weight), (d_mean, d_gradient, d_weight)
    )
    return average_with_variance(*primals), (d_average, tangent)


@jax.custom_jvp
def variance_with_noise_floor(
    mean: jax.Array, second_moment: jax.Array, eps: jax.Array
) -> jax.Array:
    """Variance (√v+ε)² - m², with its sign: Adam's ε (5) as a noise floor.

    As (√v+ε-|m|)(√v+ε+|m|), which cancels once and not twice.
    """
    root, magnitude = _root(mean, second_moment) + eps, jnp.abs(mean)
    # A mean that overflowed with v would make this inf - inf.
    magnitude = jnp.minimum(magnitude, jnp.finfo(magnitude.dtype).max)
    return (root - magnitude) * (root + magnitude)


@variance_with_noise_floor.defjvp
def _variance_with_noise_floor_jvp(
    primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    """2 (√v+ε) (dv/(2√v) + dε) - 2 Re(m* dm); zero where v overflowed."""
    mean, second_moment, eps = primals
    d_mean, d_second, d_eps = tangents
    d_root, overflow = _d_root(mean, second_moment, d_mean, d_second)
    root = jnp.where(overflow, 0.0, _root(mean, second_moment) + eps)
    tangent = 2 * root * (d_root + d_eps) - 2 * _product(mean, d_mean)
    return variance_with_noise_floor(*primals), jnp.where(overflow, 0.0, tangent)


@jax.custom_jvp
def add_noise_floor(mean: jax.Array, variance: jax.Array, eps: jax.Array) -> jax.Array:
    """(√v+ε)² - m² = s + ε (2√v+ε) from s = v-m², where s is known better than v."""
    second_moment = variance + squared_magnitude(mean)
    root = _root(mean, jnp.minimum(second_moment, jnp.finfo(eps.dtype).max))
    return variance + eps * (2 * root + eps)


@add_noise_floor.defjvp
def _add_noise_floor_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Tangent ds + 2 (√v+ε) dε + 2 ε d√v; zero where v overflowed."""
    mean, variance, eps = primals
    d_mean, d_variance, d_eps = tangents
    second_moment = variance + squared_magnitude(mean)
    d_second = d_variance + 2 * _product(mean, d_mean)
    d_root, overflow = _d_root(mean, second_moment, d_mean, d_second)
    root = jnp.where(overflow, 0.0, _root(mean, second_moment))
    tangent = d_variance + 2 * (root + eps) * d_eps + 2 * eps * d_root
    return add_noise_floor(*primals), jnp.where(overflow, 0.0, tangent)


def _root(mean: jax.Array, second_moment: jax.Array) -> jax.Array:
    """√v; |m| where v has underflowed, since all that is known then is v ≥ m²."""
    underflow = second_moment < jnp.finfo(second_moment.dtype).tiny
    return jnp.where(underflow, jnp.abs(mean), jnp.sqrt(second_moment))


def _d_root(
    mean: jax.Array, second_moment: jax.Array, d_mean: jax.Array, d_second: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Tangent of `_root`, finite everywhere, and whether v has overflowed."""
    overflow = jnp.isinf(second_moment)
    underflow = second_moment < jnp.finfo(second_moment.dtype).tiny
    root = jnp.sqrt(jnp.where(underflow | overflow, 1.0, second_moment))
    _, d_magnitude = jax.jvp(jnp.abs, (mean,), (d_mean,))
    return jnp.where(underflow, d_magnitude, d_second / (2 * root)), overflow


def _product(x: jax.Array, d_x: jax.Array) -> jax.Array:
    """Re(x* dx), half of the tangent of |x|²."""
    return jnp.real(jnp.conj(x) * d_x)


def debias(variance: jax.Array, rest: jax.Array) -> jax.Array:
    """s/(1-κ) with `rest` = 1-κ; zero where one gradient carries all the weight.

    E[v-m²] = (1-κ)σ² for independent gradients, since κ(μ,t) is also the sum of the
    squared weights in m. A negative v-m², which two decays allow, stays as it is.
    """
    # At t = 1, or with decay zero, v-m² and 1-κ are both zero: no spread was seen.
    undefined = rest <= 0
    divisor = jnp.where(undefined | (variance < 0), 1.0, rest)
    return jnp.where(undefined, 0.0, scaled(variance, 1 / divisor))


def accumulate(previous: jax.Array, newest: jax.Array, decay: jax.Array) -> jax.Array:
    """μ r + g, Eq. (18)."""
    return scaled(previous, decay) + newest


@jax.custom_jvp
def scaled(value: jax.Array, scale: jax.Array) -> jax.Array:
    """The product c x of a number and an array that may have overflowed; 0 ∞ = 0."""
    nothing = jnp.zeros((), value.dtype)
    return jnp.where(scale == 0, nothing, scale.astype(value.dtype) * value)


@scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Tangent c dx + x dc; no dependence on c where x has overflowed."""
    value, scale = primals
    d_value, d_scale = tangents
    finite = jnp.where(jnp.isinf(value), jnp.zeros((), value.dtype), value)
    c, dc = (x.astype(value.dtype) for x in (scale, d_scale))
    tangent = c * d_value + dc * finite
    return scaled(value, scale), tangent


# ---- Relative variance (7) and the adaptation factors (14), (15) ------------------


# The derivatives are written out once more, so that they are finite where the value
# takes no harm (a division by zero that a `where` discards, an infinite variance) and
# only who differentiates pays for the guards. `maximum` and `minimum` are not a matter
# of taste either: with `where` in their place XLA's loops on a CPU take three times as
# long.


def is_no_direction(mean: jax.Array) -> jax.Array:
    """Whether |p| is below the square root of the smallest normal number.

    That is 1.1e-19 in float32. Above it p² has all its digits. Below it lies what is
    left of an average long after its last gradient, when its variance may have
    underflowed already, so that η² is not known; NaN is not below it.
    """
    return squared_magnitude(mean) < jnp.finfo(mean.dtype).tiny


def sign(mean: jax.Array) -> jax.Array:
    """Sign of p, zero where p is too small to be a direction."""
    if jnp.iscomplexobj(mean):
        signs = jnp.sign(mean)
    else:
        # The same as `sign` from the smallest direction on, in half of the time.
        steep = 2 / jnp.finfo(mean.dtype).tiny ** 0.5
        signs = jax.lax.stop_gradient(jnp.clip(steep * mean, -1.0, 1.0))
    return jnp.where(is_no_direction(mean), jnp.zeros((), mean.dtype), signs)


@jax.custom_jvp
def relative_variance(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """η² = s/p², Eq. (7), with the sign of s; zero where there is no direction.

    Variances below the smallest normal number count as zero. η² stays above -1 by one
    rounding unit, so that every factor is finite, and a variance that has overflowed
    makes it infinite.
    """
    limits = jnp.finfo(variance.dtype)
    # Neither 0/0 nor infinity over infinity.
    square = jnp.clip(squared_magnitude(mean), limits.tiny, limits.max)
    eta2 = jnp.maximum(variance / square, limits.eps - 1)
    return jnp.where(is_no_direction(mean), 0.0, eta2)


@relative_variance.defjvp
def _relative_variance_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Tangent ds/p² - 2 η² dp/p; zero where η² is set, infinite or at its end."""
    mean, variance = primals
    d_mean, d_variance = tangents
    eta2 = relative_variance(mean, variance)
    lowest = jnp.finfo(variance.dtype).eps - 1
    varies = ~(is_no_direction(mean) | jnp.isinf(eta2) | (eta2 == lowest))
    square = jnp.where(varies, squared_magnitude(mean), 1.0)
    tangent = d_variance / square
    tangent -= 2 * jnp.where(varies, eta2, 0.0) * (_product(mean, d_mean) / square)
    return eta2, jnp.where(varies, tangent, 0.0)


def inverse_of_one_plus_eta2(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """1/(1+η²) as p²/(p²+s), in one division; with the limits of `relative_variance`.

    Its derivative is not finite everywhere.
    """
    limits = jnp.finfo(variance.dtype)
    square = jnp.clip(squared_magnitude(mean), limits.tiny, limits.max)
    total = square + variance
    lowest = total < limits.eps * square
    return jnp.where(lowest, 1 / limits.eps, square / total)


@jax.custom_jvp
def variance_of_rescaled(
    mean: jax.Array, variance: jax.Array, rescaled: jax.Array
) -> jax.Array:
    """η²|g|² for η² = s/m², with no larger number on the way."""
    # In this order XLA computes it in the loop that uses it; for a ratio that is
    # squared it would fill an array first.
    floor = jnp.finfo(mean.dtype).tiny ** 0.5
    size, length = jnp.maximum(jnp.abs(mean), floor), jnp.abs(rescaled)
    spread = variance / size * length / size * length
    return jnp.where(is_no_direction(mean), 0.0, spread)


@variance_of_rescaled.defjvp
def _variance_of_rescaled_jvp(
    primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    """Tangent r² ds + 2 s r dr with r = |g|/|m|; zero where there is no η²."""
    mean, variance, rescaled = primals
    d_mean, d_variance, d_rescaled = tangents
    value = variance_of_rescaled(*primals)
    varies = ~(is_no_direction(mean) | jnp.isinf(value) | jnp.isinf(variance))
    size = jnp.where(varies, jnp.abs(mean), 1.0)
    ratio = jnp.where(varies, jnp.abs(rescaled) / size, 0.0)
    _, d_rescaled = jax.jvp(jnp.abs, (rescaled,), (d_rescaled,))
    _, d_size = jax.jvp(jnp.abs, (mean,), (d_mean,))
    d_ratio = (d_rescaled - ratio * d_size) / size
    spread = jnp.where(varies, variance, 0.0)
    return value, ratio * (ratio * d_variance + 2 * spread * d_ratio)


def adapted(gamma: jax.Array, mean: jax.Array) -> jax.Array:
    """γ ⊙ p, Eqs. (14), (15); zero where there is no direction, whatever γ is."""
    absent = is_no_direction(mean)
    return jnp.where(absent, jnp.zeros((), mean.dtype), gamma.astype(mean.dtype) * mean)


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
    spread = mean_square - squared_magnitude(mean)
    # Not `maximum`, which halves the derivative where there is no spread.
    return jnp.where(spread < 0, 0.0, spread)


def variance_of_mean_factor(squared_share: jax.Array) -> jax.Array:
    """Factor from the population variance of per-example gradients to ŝ of Eq. (44).

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
