"""The interval of the dominance from sampled columns; no curvature is computed."""

import numpy as np
import pytest

from dissect_optax.diagnostics import _dominance
from dissect_optax.diagnostics._intervals import NO_SKEWNESS

SIZES = [300, 200, 80, 20]


def covered(matrix: np.ndarray, columns: int, repetitions: int = 400) -> float:
    """How often the interval from so many columns holds the dominance."""
    magnitudes = np.abs(matrix)
    diagonal, sums = np.diag(magnitudes), magnitudes.sum(axis=0)
    truth = diagonal.sum() / sums.sum()
    starts = np.cumsum([0, *SIZES[:-1]])
    counts = _dominance.columns_per_leaf(SIZES, columns)
    leaf = np.repeat(np.arange(len(SIZES)), counts)
    rng = np.random.default_rng(0)
    count = 0
    for _ in range(repetitions):
        chosen = np.concatenate(
            [
                start + rng.choice(size, number, replace=False)
                for start, size, number in zip(starts, SIZES, counts, strict=True)
            ]
        )
        sample = _dominance._Columns(leaf, diagonal[chosen], sums[chosen][:, None])
        interval = _dominance._from_columns(sample, SIZES)[0]
        count += interval.low <= truth <= interval.high
    return count / repetitions


def curvature(spread: float) -> np.ndarray:
    """A matrix of full rank whose coordinates have log-normal scales."""
    rng = np.random.default_rng(5)
    size = sum(SIZES)
    scales = np.exp(spread * rng.normal(size=size))
    root = scales[:, None] * rng.normal(size=(size, 500))
    return root @ root.T


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_interval_from_columns_covers(spread: float) -> None:
    assert 0.93 <= covered(curvature(spread), 64) <= 0.97


def test_a_few_large_columns_do_not_end_the_interval_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = curvature(0.7)
    assert covered(matrix, 64) > 0.9
    monkeypatch.setattr(_dominance, "_skewness", lambda *_: NO_SKEWNESS)
    assert covered(matrix, 64) < 0.88


def test_skewness_of_a_stratified_sum() -> None:
    """Against the moments of many samples without replacement."""
    rng = np.random.default_rng(1)
    sizes, counts = [60, 40], [12, 20]
    population = [rng.gamma(0.5, size=size) * 10**i for i, size in enumerate(sizes)]
    leaf = np.repeat([0, 1], counts)
    found, sums, variances = [], [], []
    for _ in range(4000):
        parts = [
            rng.choice(values, count, replace=False)
            for values, count in zip(population, counts, strict=True)
        ]
        found.append(_dominance._skewness(leaf, np.concatenate(parts), sizes))
        sums.append(sum(n * part.mean() for n, part in zip(sizes, parts, strict=True)))
        variances.append(
            sum(
                n**2 * (1 - len(part) / n) * part.var(ddof=1) / len(part)
                for n, part in zip(sizes, parts, strict=True)
            )
        )
    scale = np.std(sums)
    deviations = np.asarray(sums) - np.mean(sums)
    expected = [
        np.mean(deviations**3) / scale**3,
        np.mean(deviations * np.asarray(variances)) / scale**3,
    ]
    # The denominators σ³ of the estimates are themselves estimated from few values.
    np.testing.assert_allclose(np.median(found, axis=0), expected, rtol=0.5, atol=0.05)
    assert expected[1] > 2 * abs(expected[0])
