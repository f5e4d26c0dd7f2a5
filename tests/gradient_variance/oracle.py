"""The variance of a mini-batch gradient in NumPy float64."""

import numpy as np


def variance_by_equation_44(gradients: np.ndarray) -> np.ndarray:
    """Equation (44) term by term, for gradients [B, ...] of one leaf."""
    gradients = np.asarray(gradients)
    size = gradients.shape[0]
    mean = gradients.sum(0) / size
    squares = (np.abs(gradients) ** 2).sum(0) / (size - 1)
    return (squares - size / (size - 1) * np.abs(mean) ** 2) / size


def variance_of_mean(gradients: np.ndarray) -> np.ndarray:
    """Sample variance with divisor |B|-1, divided by |B|."""
    gradients = np.asarray(gradients)
    return gradients.var(0, ddof=1) / gradients.shape[0]


def weighted_mean_and_variance(
    gradients: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean and the unbiased estimate of its variance, from two sums.

    For independent gradients of variance σ², E Σ w |g - ḡ|² = σ² (W - Σw²/W) and the
    weighted mean has variance σ² Σw²/W², with W = Σw.
    """
    gradients = np.asarray(gradients)
    weights = np.asarray(weights, np.float64)
    total, squares = weights.sum(), (weights**2).sum()
    mean = np.tensordot(weights, gradients, 1) / total
    deviations = np.tensordot(weights, np.abs(gradients - mean) ** 2, 1)
    single = deviations / (total - squares / total)
    return mean, single * squares / total**2


def relative_error(actual: np.ndarray, wanted: np.ndarray) -> float:
    """Largest error, relative to the largest wanted value."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape, (actual.shape, wanted.shape)
    scale = np.abs(wanted).max(initial=0.0)
    return float(np.abs(actual - wanted).max(initial=0.0) / (scale or 1.0))
