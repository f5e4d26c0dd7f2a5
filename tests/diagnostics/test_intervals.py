"""Intervals: quantiles, the jackknife, ratios, and coverage of simulated statistics."""

import math

import numpy as np
import pytest
from scipy import stats

from dissect_optax.diagnostics import _intervals as intervals
from dissect_optax.diagnostics import _measure


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 31, 127, 2000])
@pytest.mark.parametrize("tail", [0.025, 0.05])
def test_student_quantiles(degrees: int, tail: float) -> None:
    expected = stats.t.ppf(1 - tail, degrees)
    assert intervals.student_quantile(degrees, tail) == pytest.approx(
        expected, rel=1e-4
    )


def test_no_degree_of_freedom_bounds_nothing() -> None:
    assert intervals.student_quantile(0) == math.inf


def test_jackknife_of_a_mean_is_its_textbook_error() -> None:
    x = np.random.default_rng(0).normal(size=20)
    without = ((x.sum() - x) / 19)[:, None]
    covariance = intervals.jackknife_covariance(without)
    assert covariance[0, 0] == pytest.approx(x.var(ddof=1) / 20)


def test_jackknife_of_pairs_leaves_out_both_sides() -> None:
    """Against leaving out each mini-batch and starting again."""
    rng = np.random.default_rng(1)
    g, z = rng.normal(size=(7, 3)), rng.normal(size=(7, 3))

    def pair_mean(kept: np.ndarray) -> float:
        products = z[kept] @ g[kept].T
        n = len(kept)
        return float((products.sum() - np.trace(products)) / (n * (n - 1)))

    ahead = np.sum(z * (g.sum(0) - g), axis=1) / 6
    behind = np.sum(g * (z.sum(0) - z), axis=1) / 6
    groups = np.zeros(7, int)
    value, replicates = _measure._pair_mean(ahead, behind, groups)
    everything = np.arange(7)
    assert value == pytest.approx(pair_mean(everything))
    expected = [pair_mean(np.delete(everything, k)) for k in range(7)]
    np.testing.assert_allclose(replicates, expected)


def test_ratio_to_something_that_may_be_zero_has_no_upper_end() -> None:
    covariance = np.diag([0.01, 1.0])
    interval = intervals.positive_ratio_interval(4.0, 0.5, covariance, 30)
    assert interval.value == 8.0
    assert 0 < interval.low < 8.0
    assert interval.high == math.inf
    negative = intervals.positive_ratio_interval(4.0, -0.5, covariance, 30)
    assert negative.value == math.inf
    assert negative.low > 0
    assert negative.high == math.inf


def test_ratio_with_small_errors_is_the_delta_method() -> None:
    covariance = np.array([[1e-4, 2e-5], [2e-5, 1e-4]])
    interval = intervals.positive_ratio_interval(3.0, 2.0, covariance, 1000)
    error = math.sqrt(1e-4 / 4 - 2 * 3 / 8 * 2e-5 + 9 / 16 * 1e-4)
    half = stats.t.ppf(0.975, 1000) * error
    assert interval.low == pytest.approx(1.5 - half, rel=1e-3)
    assert interval.high == pytest.approx(1.5 + half, rel=1e-3)


def test_the_ends_of_a_ratio_are_where_a_test_of_it_changes_its_mind() -> None:
    covariance = np.array([[0.2, 0.1], [0.1, 0.3]])
    interval = intervals.positive_ratio_interval(5.0, 3.0, covariance, 12)
    t = intervals.student_quantile(12)
    for theta in (interval.low, interval.high):
        variance = np.array([1, -theta]) @ covariance @ np.array([1, -theta])
        assert abs(5.0 - theta * 3.0) == pytest.approx(t * math.sqrt(variance))


def test_skewness_moves_both_quantiles() -> None:
    """By the equation that defines them, for either sign and a skewed one."""
    assert intervals.skewed_quantiles(2.0, intervals.NO_SKEWNESS) == (2.0, 2.0)
    for g, w in ((0.2, 0.2), (-0.2, -0.2), (0.05, 0.15)):
        below, above = intervals.skewed_quantiles(2.0, intervals.Skewness(g, w))
        for ratio, quantile in ((-below, -2.0), (above, 2.0)):
            slope = (3 * w - g) / 6
            cubic = slope**2 * ratio**3 / 3
            h = ratio + w / 2 + slope * (ratio**2 - 1) + cubic
            assert h == pytest.approx(quantile)
        # The mean of a sample skewed to the right is more often far below the truth.
        assert (below > 2 > above) == (g > 0)
        mirrored = intervals.skewed_quantiles(2.0, intervals.Skewness(-g, -w))
        assert mirrored == pytest.approx((above, below))


def exponential_means_covered(*, skewed: bool) -> float:
    """Coverage of the mean of 20 exponential variables, as a ratio to one."""
    x = np.random.default_rng(4).exponential(size=(2000, 20))
    covered = 0
    for row in x:
        deviations = row - row.mean()
        variance = row.var(ddof=1) / 20
        k = 20 * np.sum(deviations**3) / (19 * 18) / 400 / variance**1.5
        interval = intervals.positive_ratio_interval(
            row.mean(),
            1.0,
            np.diag([variance, 0.0]),
            19,
            intervals.Skewness(k, k) if skewed else intervals.NO_SKEWNESS,
        )
        covered += interval.low <= 1.0 <= interval.high
    return covered / 2000


def test_the_interval_of_a_skewed_sample_covers() -> None:
    assert exponential_means_covered(skewed=False) < 0.93
    assert 0.93 < exponential_means_covered(skewed=True) < 0.97


def test_square_of_a_root() -> None:
    replicates = np.array([2.1, 1.9, 2.0, 2.05, 1.95])
    interval = intervals.square_interval(2.0, replicates)
    assert interval.value == 4.0
    assert interval.low < 4.0 < interval.high
    doubtful = intervals.square_interval(0.1, 10 * (replicates - 2))
    assert doubtful.low == 0.0
    uphill = intervals.square_interval(-0.1, replicates - 2)
    assert uphill.value == 0.0


def covered_with_neighbours(common: float, *, lent: bool) -> float:
    """Coverage of a mean of a_k + b_{k+1} where b_k = common · a_k."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        a = rng.normal(size=48)
        x = a + common * np.roll(a, -1)
        without = (x.sum() - x) / 47
        interval = intervals.plain_interval(
            float(x.mean()),
            without,
            -math.inf,
            math.inf,
            np.roll(without, 1) if lent else None,
        )
        covered += interval.low <= 0 <= interval.high
    return covered / 1000


@pytest.mark.parametrize("common", [-0.4, 0.0, 0.6])
def test_noise_that_is_lent_to_a_neighbour_counts_once(common: float) -> None:
    assert 0.91 < covered_with_neighbours(common, lent=True) < 0.98


def test_without_it_the_interval_is_too_long_or_too_short() -> None:
    assert covered_with_neighbours(-0.4, lent=False) > 0.99
    assert covered_with_neighbours(0.6, lent=False) < 0.91


def test_between_two_estimates() -> None:
    """Two-sided where they agree, one-sided quantiles far apart."""
    same = intervals.bounded_interval(0.7, 0.7, 1e-3, 1e-3, 1000)
    assert (same.high - same.low) / 2e-3 == pytest.approx(1.962, rel=1e-3)
    apart = intervals.bounded_interval(0.6, 0.7, 1e-3, 1e-3, 1000)
    assert (0.6 - apart.low) / 1e-3 == pytest.approx(1.646, rel=1e-2)
    assert apart.value == pytest.approx(0.65)
    near_one = intervals.bounded_interval(0.99, 0.99, 0.01, 0.01, 30)
    assert near_one.low < 0.99 - 0.02
    assert 0.99 < near_one.high < 1.0
    exact = intervals.bounded_interval(0.7, 0.7, 0.0, 0.0, 10)
    assert exact == (0.7, 0.7, 0.7)


def covered_ratios(scale: float, repetitions: int = 400) -> int:
    """How many of the noise scale's intervals hold it, with the value times `scale`."""
    rng = np.random.default_rng(2)
    count, size, eta2 = 24, 30, 3.0
    mean = rng.normal(size=size)
    truth = eta2 * size / float(mean @ mean) * scale
    covered = 0
    for _ in range(repetitions):
        g = mean + math.sqrt(eta2) * rng.normal(size=(count, size))
        noise = eta2 * rng.chisquare(7, size=(count, size)).sum(axis=1) / 7
        others = (g.sum(0) - g) / (count - 1)
        between = np.sum(g * others, axis=1)
        signal, replicates = _measure._pair_mean(between, between, np.zeros(count, int))
        assert replicates is not None
        without = (noise.sum() - noise) / (count - 1)
        covariance = intervals.jackknife_covariance(
            np.stack([without, replicates], axis=1)
        )
        covariance = intervals.signal_to_noise_covariance(
            covariance,
            float(noise.mean()),
            float(noise.mean()),
            signal,
            between,
            np.sum(g[1:] * g[:-1], axis=1),
        )
        interval = intervals.positive_ratio_interval(
            float(noise.mean()), signal, covariance, count - 1
        )
        covered += interval.low <= truth <= interval.high
    return covered


def test_a_gradient_that_is_resolved_keeps_its_variance() -> None:
    """The correction is for gradients that are hardly known, and noisy itself."""
    rng = np.random.default_rng(6)
    between, neighbours = 100 + rng.normal(size=64), 100 + 3 * rng.normal(size=63)
    covariance = np.array([[1.0, 0.1], [0.1, 16.0]])
    for signal, mended in ((100.0, False), (30.0, True)):
        found = intervals.signal_to_noise_covariance(
            covariance, 50.0, 50.0, signal, between, neighbours
        )
        assert np.array_equal(found, covariance) != mended


def test_coverage_of_the_noise_scale() -> None:
    """95 % of 400, three standard errors either way; a wrong value is not covered."""
    assert 0.917 < covered_ratios(1.0) / 400 < 0.983
    assert covered_ratios(1.3) / 400 < 0.9
