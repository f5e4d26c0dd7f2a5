"""Members of the family that no library has, written out in NumPy float64."""

import math

import numpy as np


def averages(x: np.ndarray, decay: float) -> np.ndarray:
    """Bias-corrected exponential moving averages over the leading axis."""
    raw, means = np.zeros(x.shape[1:]), []
    for t, value in enumerate(x, start=1):
        raw = decay * raw + (1 - decay) * value
        means.append(raw / (1 - decay**t))
    return np.stack(means)


def adam(g, b1=0.9, b2=0.999, eps=1e-8):
    return averages(g, b1) / (np.sqrt(averages(g**2, b2)) + eps)


def adam_equal_decays(g):
    return adam(g, 0.95, 0.95)


def adam_mini(g, b1=0.9, b2=0.999, eps=1e-8, axes=None):
    """One second moment for a block: the means over these axes of one step."""
    axes = tuple(range(1, g.ndim)) if axes is None else axes
    block = np.mean(g**2, axis=axes, keepdims=True)
    return averages(g, b1) / (np.sqrt(averages(block, b2)) + eps)


def cautious_adam(g, b1=0.9, b2=0.999, eps=1e-8):
    updates = []
    for update, gradient in zip(adam(g, b1, b2, eps), g, strict=True):
        mask = (update * gradient > 0).astype(float)
        updates.append(update * mask / max(mask.mean(), 1e-3))
    return np.stack(updates)


def vrgd(g, variance, lowest=0.1):
    ratios = g**2 / variance
    axes = tuple(range(1, g.ndim))
    relative = ratios / np.mean(ratios, axis=axes, keepdims=True)
    return np.clip(relative, lowest, 1) * g


def factored_rms(g, exponent=0.8, eps=1e-30):
    """Matrices [step, row, column]: v is the product of the margins over their mean."""
    rows, columns, updates = 0.0, 0.0, []
    for t, gradient in enumerate(g, start=1):
        decay = 1 - t**-exponent
        square = gradient**2 + eps
        rows = decay * rows + (1 - decay) * square.mean(axis=1)
        columns = decay * columns + (1 - decay) * square.mean(axis=0)
        updates.append(gradient / np.sqrt(np.outer(rows, columns) / rows.mean()))
    return np.stack(updates)


def kappa(mu, t):
    """The sum of the squared weights of a bias-corrected average."""
    weights = mu ** np.arange(t)
    return np.sum(weights**2) / np.sum(weights) ** 2


def m_svag_mb_reciprocal(g, variance, momentum=0.9, bound=10.0):
    r, s, updates = 0.0, 0.0, []
    for gradient, noise in zip(g, variance, strict=True):
        r = momentum * r + gradient
        s = momentum**2 * s + noise
        updates.append(np.minimum(np.abs(r) / np.sqrt(s), bound) * r)
    return np.stack(updates)


def m_svag_mb_before_momentum(g, variance, momentum=0.9):
    return sums(g**3 / (g**2 + variance), momentum)


def adam_star_mb_before_momentum(g, variance, momentum=0.9):
    return sums(g / np.sqrt(g**2 + variance), momentum)


def sums(updates, momentum):
    """Momentum as a sum, over the leading axis."""
    total, result = 0.0, []
    for update in updates:
        total = momentum * total + update
        result.append(total)
    return np.stack(result)


def variances_about_previous_means(g, momentum):
    means = averages(g, momentum)
    deviations = np.concatenate([np.zeros_like(g[:1]), g[1:] - means[:-1]])
    return averages(deviations**2, momentum)


def m_svag_maximum(g, momentum=0.9):
    means = averages(g, momentum)
    largest = np.maximum.accumulate(variances_about_previous_means(g, momentum))
    updates = []
    for t, (mean, variance) in enumerate(zip(means, largest, strict=True), start=1):
        square = np.where(mean == 0, 1.0, mean**2)
        updates.append(mean / (1 + kappa(momentum, t) * variance / square))
    return np.stack(updates)


def m_svag_decorrelated(g, momentum=0.9):
    means = averages(g, momentum)
    variances = variances_about_previous_means(g, momentum)
    updates = []
    for t, mean in enumerate(means, start=1):
        before = variances[t - 2] if t > 1 else np.zeros_like(mean)
        square = np.where(mean == 0, 1.0, mean**2)
        updates.append(mean / (1 + kappa(momentum, t) * before / square))
    return np.stack(updates)


def adam_unbiased(g, b=0.95, eps=1e-8):
    means, updates = averages(g, b), []
    seconds = averages(g**2, b)
    for t, (m, v) in enumerate(zip(means, seconds, strict=True), start=1):
        # One gradient shows no variance.
        spread = np.zeros_like(m) if t == 1 else (v - m**2) / (1 - kappa(b, t))
        root = np.sqrt(np.maximum(spread, 0) + m**2)
        s = spread + eps * (2 * root + eps)
        updates.append(m / np.sqrt(m**2 + s))
    return np.stack(updates)


def adam_erf(g, b1=0.9, b2=0.999, eps=1e-8):
    m, v = averages(g, b1), averages(g**2, b2)
    s = np.maximum((np.sqrt(v) + eps) ** 2 - m**2, 0)
    ratio = np.abs(m) / np.sqrt(2 * np.where(s == 0, 1.0, s))
    gamma = np.where(s == 0, 1.0, np.vectorize(math.erf)(ratio))
    return gamma * np.sign(m)
