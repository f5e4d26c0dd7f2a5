"""Table 1 and §D once more, in float64 NumPy, from the paper's sums over the history.

Slow and obvious on purpose: nothing is carried from step to step, every step goes
through all gradients up to it again. `gradients` is [step, *parameter], real or
complex; each algorithm returns its updates -α(...), stacked the same way.
"""

from collections.abc import Iterator

import numpy as np

# ---- Sums over the history --------------------------------------------------------


def histories(gradients: np.ndarray) -> Iterator[np.ndarray]:
    """The gradients up to step t, for t = 1, 2, ..."""
    for t in range(1, len(gradients) + 1):
        yield np.asarray(gradients[:t])


def powers(decay: float, t: int) -> np.ndarray:
    """decay^(t-1), ..., decay, 1: how much the gradients of steps 1..t still count."""
    return np.array([decay ** (t - i) for i in range(1, t + 1)], np.float64)


def weighted_sum(weights: np.ndarray, history: np.ndarray) -> np.ndarray:
    """Σ w_i g_i over the steps."""
    total = np.zeros(history.shape[1:], history.dtype)
    for weight, gradient in zip(weights, history, strict=True):
        total = total + weight * gradient
    return total


def weighted_mean(decay: float, history: np.ndarray) -> np.ndarray:
    """Eq. (3) or (4) after bias correction: an average whose weights sum to one."""
    weights = powers(decay, len(history))
    return weighted_sum(weights, history) / np.sum(weights)


def mean_and_variance(
    decay: float, history: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(m, v - m²) of §3.3, as the weighted variance around the weighted mean."""
    mean = weighted_mean(decay, history)
    return mean, weighted_mean(decay, np.abs(history - mean) ** 2)


def kappa(momentum: float, t: int) -> float:
    """κ(μ,t) = Σ μ^(2s) / (Σ μ^s)², s = 0..t-1: Eqs. (18), (19) before any algebra."""
    weights = powers(momentum, t)
    return float(np.sum(weights**2) / np.sum(weights) ** 2)


def minibatch_variance(per_example: np.ndarray) -> np.ndarray:
    """Eq. (44) as printed, per-example gradients [batch, *parameter], real."""
    batch_size = len(per_example)
    squares, total = 0.0, 0.0
    for gradient in np.asarray(per_example, np.float64):
        squares = squares + gradient**2
        total = total + gradient
    mean = total / batch_size
    sample_variance = squares / (batch_size - 1) - batch_size / (batch_size - 1) * (
        mean**2
    )
    return sample_variance / batch_size


# ---- Signs and factors ------------------------------------------------------------


def sign(direction: np.ndarray) -> np.ndarray:
    """p/|p|, and zero for p = 0."""
    size = np.abs(direction)
    return np.where(size == 0, 0.0, direction / np.where(size == 0, 1.0, size))


def adapted(
    power: float, direction: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """(1+η²)^power ⊙ direction with η² = variance/mean²; zero where mean is zero."""
    size = np.abs(mean)
    eta2 = variance / np.where(size == 0, 1.0, size) ** 2
    return np.where(size == 0, 0.0, (1 + eta2) ** power * direction)


# ---- Table 1 without momentum -----------------------------------------------------


def sgd(gradients: np.ndarray, learning_rate: float) -> np.ndarray:
    """-α g."""
    return np.stack([-learning_rate * h[-1] for h in histories(gradients)])


def ssd(gradients: np.ndarray, learning_rate: float) -> np.ndarray:
    """-α sign(g)."""
    return np.stack([-learning_rate * sign(h[-1]) for h in histories(gradients)])


def svag(
    gradients: np.ndarray,
    learning_rate: float,
    decay: float = 0.9,
    debias_variance: bool = False,
) -> np.ndarray:
    """-α γ⊙g, γ = 1/(1+η²), η² from moving averages."""
    updates = []
    for history in histories(gradients):
        mean, variance = mean_and_variance(decay, history)
        if debias_variance:
            variance = debiased(decay, variance, len(history))
        updates.append(-learning_rate * adapted(-1, history[-1], mean, variance))
    return np.stack(updates)


# ---- Table 1 with momentum --------------------------------------------------------


def m_sgd(
    gradients: np.ndarray, learning_rate: float, momentum: float = 0.9
) -> np.ndarray:
    """-α r, r = Σ μ^s g_(t-s)."""
    return np.stack(
        [
            -learning_rate * weighted_sum(powers(momentum, len(h)), h)
            for h in histories(gradients)
        ]
    )


def m_ssd(
    gradients: np.ndarray, learning_rate: float, momentum: float = 0.9
) -> np.ndarray:
    """Algorithm 1: -α sign(r)."""
    return np.stack(
        [
            -learning_rate * sign(weighted_sum(powers(momentum, len(h)), h))
            for h in histories(gradients)
        ]
    )


def debiased(momentum: float, variance: np.ndarray, t: int) -> np.ndarray:
    """(v - m²)/(1-κ), zero where a single gradient has all the weight."""
    rest = 1 - kappa(momentum, t)
    return variance / rest if rest > 0 else np.zeros_like(variance)


def m_svag(
    gradients: np.ndarray,
    learning_rate: float,
    momentum: float = 0.9,
    debias_variance: bool = False,
) -> np.ndarray:
    """Algorithm 2: -α γ⊙m, γ = 1/(1+η²), η² = κ(v-m²)/m²; or with (v-m²)/(1-κ)."""
    updates = []
    for history in histories(gradients):
        mean, variance = mean_and_variance(momentum, history)
        if debias_variance:
            variance = debiased(momentum, variance, len(history))
        variance = kappa(momentum, len(history)) * variance
        updates.append(-learning_rate * adapted(-1, mean, mean, variance))
    return np.stack(updates)


def adam(
    gradients: np.ndarray,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> np.ndarray:
    """Eq. (5): -α m/(√v + ε), zero over zero being zero."""
    updates = []
    for history in histories(gradients):
        mean = weighted_mean(b1, history)
        denominator = np.sqrt(weighted_mean(b2, np.abs(history) ** 2)) + eps
        at_rest = denominator == 0
        updates.append(-learning_rate * mean / np.where(at_rest, 1.0, denominator))
    return np.stack(updates)


# ---- Variants (§D) ----------------------------------------------------------------


def adam_star(
    gradients: np.ndarray, learning_rate: float, momentum: float = 0.9
) -> np.ndarray:
    """Algorithm 4: -α (1+η²)^(-1/2) ⊙ sign(m), η² = κ(v-m²)/m²."""
    updates = []
    for history in histories(gradients):
        mean, variance = mean_and_variance(momentum, history)
        variance = kappa(momentum, len(history)) * variance
        updates.append(-learning_rate * adapted(-0.5, sign(mean), mean, variance))
    return np.stack(updates)


def momentum_and_variance(
    momentum: float, history: np.ndarray, variances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(r, var[r]) of Eq. (18) with mini-batch variances of the gradients."""
    weights = powers(momentum, len(history))
    return weighted_sum(weights, history), weighted_sum(weights**2, variances)


def m_svag_mb(
    gradients: np.ndarray,
    variances: np.ndarray,
    learning_rate: float,
    momentum: float = 0.9,
) -> np.ndarray:
    """Algorithm 3: -α γ⊙r, γ = 1/(1+s/r²)."""
    updates = []
    for history in histories(gradients):
        r, s = momentum_and_variance(momentum, history, variances[: len(history)])
        updates.append(-learning_rate * adapted(-1, r, r, s))
    return np.stack(updates)


def adam_star_mb(
    gradients: np.ndarray,
    variances: np.ndarray,
    learning_rate: float,
    momentum: float = 0.9,
) -> np.ndarray:
    """Algorithm 5: -α (1+s/r²)^(-1/2) ⊙ sign(r)."""
    updates = []
    for history in histories(gradients):
        r, s = momentum_and_variance(momentum, history, variances[: len(history)])
        updates.append(-learning_rate * adapted(-0.5, sign(r), r, s))
    return np.stack(updates)
