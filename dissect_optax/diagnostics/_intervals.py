"""Intervals from replicates: what a number would be without each of the mini-batches.

Everything here is NumPy in float64, on a few numbers per mini-batch. The jackknife
leaves out one mini-batch at a time; its quantiles are Student's with one degree of
freedom less than there are mini-batches.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
# Relative error below which the squared norm of a gradient counts as known.
_RESOLVED = 0.1
# Student's distribution is summed on so many points.
_POINTS = 4001


class Interval(NamedTuple):
    """An estimate with an interval of 95 % confidence.

    Attributes:
      value: The estimate; NaN where the data do not allow one.
      low: Lower end; -inf or the smallest possible value where it is unbounded.
      high: Upper end; inf where the data do not bound the quantity.

    Examples:
      >>> from dissect_optax.diagnostics import Interval
      >>> interval = Interval(2.0, 1.5, 3.0)
      >>> interval.low <= interval.value <= interval.high
      True
    """

    value: float
    low: float
    high: float


UNKNOWN = Interval(math.nan, 0.0, math.inf)


def in_range(interval: Interval, low: float, high: float) -> Interval:
    """The interval cut at the ends of what is possible, in Python's numbers."""
    cut = [min(max(float(end), low), high) for end in interval]
    return Interval(*(cut if not math.isnan(interval.value) else [math.nan, *cut[1:]]))


@functools.lru_cache(maxsize=1024)
def student_quantile(degrees: int, tail: float = (1 - CONFIDENCE) / 2) -> float:
    """The t that a Student variable exceeds with probability `tail`."""
    if degrees < 1:
        return math.inf
    # By the substitution t = √n tan(φ) the density is cos(φ)^(n-1), without long tails.
    angle = np.linspace(0.0, math.pi / 2, _POINTS)
    with np.errstate(divide="ignore"):
        log_density = (degrees - 1) * np.log(np.cos(angle))
    density = np.exp(log_density)
    if degrees == 1:
        density = np.ones_like(angle)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    share = mass / mass[-1]
    return math.sqrt(degrees) * math.tan(np.interp(1 - 2 * tail, share, angle))


def normal_upper_tail(x: float) -> float:
    """Probability that a standard normal variable exceeds x."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def jackknife_covariance(replicates: np.ndarray) -> np.ndarray:
    """Covariance of estimates [m] from their replicates [K, m] without one of K parts.

    (K-1)/K Σ_k (x_k - x̄)(x_k - x̄)ᵀ of Tukey (1958).
    """
    count = replicates.shape[0]
    deviations = replicates - replicates.mean(axis=0)
    return (count - 1) / count * deviations.T @ deviations


def plain_interval(
    value: float,
    replicates: np.ndarray,
    low: float,
    high: float,
    lent: np.ndarray | None = None,
) -> Interval:
    """Student's interval around a value, from replicates [K], cut at its range.

    Args:
      value: The estimate.
      replicates: What it would be without each mini-batch.
      low: The smallest possible value.
      high: The largest one.
      lent: Where a mini-batch also lends something to another one, which the replicates
        leave where it is: what the estimate would be without that alone. Noise that is
        in both is then counted as one: twice their covariance is added.

    Returns:
      The interval.
    """
    count = len(replicates)
    if count < 2 or not math.isfinite(value):
        return Interval(value, low, high)
    variance = float(jackknife_covariance(replicates[:, None])[0, 0])
    degrees = count - 1
    if lent is not None:
        variance, degrees = _with_lent_noise(variance, replicates, lent)
    half = student_quantile(degrees) * math.sqrt(variance)
    return in_range(Interval(value, value - half, value + half), low, high)


class Skewness(NamedTuple):
    """How far an estimate and its error are from those of a normal sample.

    Attributes:
      estimate: Third central moment of the estimate, over σ³.
      with_variance: Covariance of the estimate with its estimated variance, over σ³.
        In a sample of n independent numbers both are their skewness over √n.
    """

    estimate: float
    with_variance: float


NO_SKEWNESS = Skewness(0.0, 0.0)


def skewed_quantiles(t: float, skewness: Skewness) -> tuple[float, float]:
    """How far an estimate may lie below and above the truth, in standard errors.

    Where T is Student's ratio of a skewed estimate x̂, it is not T but

        h(T) = T + w/2 + (3w - g)(T² - 1)/6

    that has Student's quantiles ±t, up to terms of the order 1/n (Johnson 1978, here
    with the two moments g and w apart, since they differ in samples from a finite
    population). The cubic term that makes h monotone is that of Hall (1992).

    Args:
      t: Student's quantile.
      skewness: g and w.

    Returns:
      -T at h(T) = -t, and T at h(T) = t; never below zero.
    """
    g, w = skewness
    slope = (3 * w - g) / 6
    shift = w / 2 - slope

    def ratio(h: float) -> float:
        if abs(slope) < 1e-6:
            return h - shift
        return (float(np.cbrt(1 + 3 * slope * (h - shift))) - 1) / slope

    return max(-ratio(-t), 0.0), max(ratio(t), 0.0)


def positive_ratio_interval(
    numerator: float,
    denominator: float,
    covariance: np.ndarray,
    degrees: int,
    skewness: Skewness = NO_SKEWNESS,
) -> Interval:
    """Ratio of two positive expectations, by the method of Fieller (1954).

    All θ ≥ 0 with (a - θb)² ≤ t² var[a - θb]. Where b may be zero, the interval has no
    upper end; that is the answer and not a failure, since a ratio to something that may
    be zero may be anything large.

    Args:
      numerator: a.
      denominator: b.
      covariance: Covariance of (a, b), of shape [2, 2].
      degrees: Degrees of freedom of the covariance.
      skewness: That of a - θb at the estimate of θ. The two ends then have quantiles of
        their own.

    Returns:
      The interval.
    """
    t = student_quantile(degrees)
    value = numerator / denominator if denominator > 0 else math.inf
    if not math.isfinite(t) or not np.isfinite(covariance).all():
        return Interval(value, 0.0, math.inf)
    # Where θ is below the truth, a - θb is above zero.
    below, above = skewed_quantiles(t, skewness)
    low, _ = _fieller_roots(numerator, denominator, covariance, above)
    _, high = _fieller_roots(numerator, denominator, covariance, below)
    return in_range(Interval(value, min(low, value), max(high, value)), 0.0, math.inf)


def _fieller_roots(
    numerator: float, denominator: float, covariance: np.ndarray, t: float
) -> tuple[float, float]:
    """Both θ with (a - θb)² = t² var[a - θb]; inf where there is no upper one."""
    (v_aa, v_ab), (_, v_bb) = covariance
    # f(θ) = square θ² - 2 cross θ + constant ≤ 0.
    square = denominator**2 - t**2 * v_bb
    cross = numerator * denominator - t**2 * v_ab
    constant = numerator**2 - t**2 * v_aa
    root = math.sqrt(max(cross**2 - square * constant, 0.0))
    # The smaller root, in a form in which nothing cancels.
    low = max(constant / (cross + root), 0.0) if cross + root > 0 else 0.0
    bounded = denominator > 0 and square > 0
    return low, (cross + root) / square if bounded else math.inf


def signal_to_noise_covariance(
    covariance: np.ndarray,
    numerator: float,
    noise: float,
    signal: float,
    between: np.ndarray,
    neighbours: np.ndarray,
) -> np.ndarray:
    """Covariance of tr Σ and ‖∇L‖² as it would be at the ratio that is being tested.

    The estimate b of ‖∇L‖² = pᵀp from K mini-batches with covariance S has the variance
    4 pᵀSp/K + 2 tr(S²)/(K(K-1)). The jackknife counts the second part twice, and where
    b happens to be small so is its own estimate of the first: Fieller's interval then
    ends too early (86 % coverage in the worst case tried). Both are mended here. tr(S²)
    comes from the products of neighbouring gradients, whose variance is
    2 pᵀSp + tr(S²). The first part varies with the hypothetical ‖∇L‖² = a/θ, by the
    mean eigenvalue tr(S²)/tr(S) for a gradient that points as the noise does; half of
    that change is taken, as on the scale √b, on which the error is nearly constant.
    Since it is linear in 1/θ, Fieller's quadratic equation stays one.

    Args:
      covariance: Jackknife covariance of (a, b), of shape [2, 2].
      numerator: a, a multiple of tr S.
      noise: tr S of a mini-batch's gradient.
      signal: b.
      between: g_k·ḡ₋ₖ, of shape [K].
      neighbours: g_k·g_(k-1) for k ≥ 1, of shape [K-1].
    """
    count = len(between)
    if count < 4 or not noise > 0:
        return covariance
    # Where ‖∇L‖² is known to a tenth, its variance hardly changes along the interval,
    # and tr(S²) is hardly known: what is mended is less than the noise that comes with
    # it (97.3 % coverage at a relative error of 1.3 %).
    if covariance[1, 1] < (_RESOLVED * max(signal, 0.0)) ** 2:
        return covariance
    excess = neighbours.var(ddof=1) - 2 * between.var(ddof=1)
    square = min(max(excess / (1 - 2 / (count - 1)), 0.0), noise**2)
    eigenvalue = square / noise
    pure_noise = 2 * square / (count * (count - 1))
    slope = 2 * eigenvalue / count
    result = covariance.copy()
    result[1, 1] = max(covariance[1, 1] - pure_noise - slope * signal, pure_noise)
    # θ² slope (a/θ) is linear in θ, as the covariance's part -2θ v_ab is.
    result[0, 1] = result[1, 0] = covariance[0, 1] - slope * numerator / 2
    return result


def _with_lent_noise(
    variance: float, replicates: np.ndarray, lent: np.ndarray
) -> tuple[float, int]:
    """Variance with twice the covariance of both, and its degrees of freedom.

    The covariance makes the variance less certain than the sum of squares that it is
    without. Its degrees of freedom follow from the spread of its terms (Satterthwaite
    1946): 2 v²/var v, which is the number of squares for normal ones. Fewer than a
    quarter of the replicates are not taken: where v is small by chance, so are they,
    and the interval would be too long twice.
    """
    count = len(replicates)
    own, other = replicates - replicates.mean(), lent - lent.mean()
    terms = (count - 1) * own * (own + 2 * other)
    # It is an estimate, and may come out smaller than it can be.
    corrected = max(float(terms.mean()), variance / 4)
    spread = float(terms.var(ddof=1)) / count
    if not spread > 0:
        return corrected, count - 1
    degrees = max(2 * corrected**2 / spread, (count - 1) / 4)
    return corrected, max(round(min(degrees, count - 1.0)), 1)


def square_interval(
    root: float, replicates: np.ndarray, lent: np.ndarray | None = None
) -> Interval:
    """The square of a quantity that should be positive, from its replicates [K].

    Student's interval on the scale of the root, where the errors are more nearly normal
    and alike; squares of its ends, and zero below a negative one. A negative root has
    the square zero.
    """
    inner = plain_interval(root, replicates, -math.inf, math.inf, lent)
    low, high = (max(end, 0.0) ** 2 for end in (inner.low, inner.high))
    return Interval(max(root, 0.0) ** 2, low, high)


def bounded_interval(
    lower: float, upper: float, lower_error: float, upper_error: float, degrees: int
) -> Interval:
    """Interval for a probability between two others of which both are estimated.

    The critical value is that of Imbens & Manski (2004): the interval covers the
    quantity with 95 % where the two agree, and with at least 95 % wherever it lies
    between them. Its ends are taken on the scale log(p/(1-p)), on which the error of a
    probability near one is nearly symmetric.
    """
    gap = max(upper - lower, 0.0)
    error = max(lower_error, upper_error)
    two_sided = student_quantile(degrees)
    critical = two_sided
    if error > 0 and math.isfinite(two_sided):
        one_sided = student_quantile(degrees, 1 - CONFIDENCE)
        # Φ(c + gap/error) - Φ(-c) = 95 %, between the two quantiles.
        excess = normal_upper_tail(gap / error + two_sided) / (
            normal_upper_tail(two_sided) or 1.0
        )
        critical = one_sided + (two_sided - one_sided) * min(excess, 1.0)
    return Interval(
        (lower + upper) / 2,
        _moved_on_logit_scale(lower, -critical * lower_error if lower_error else 0.0),
        _moved_on_logit_scale(upper, critical * upper_error if upper_error else 0.0),
    )


def _moved_on_logit_scale(probability: float, change: float) -> float:
    """The probability after a change that is given to first order."""
    if not 0 < probability < 1 or change == 0:
        return probability
    if math.isinf(change):
        return float(change > 0)
    odds = math.log(probability / (1 - probability))
    odds += change / (probability * (1 - probability))
    return 1 / (1 + math.exp(-min(max(odds, -700.0), 700.0)))
