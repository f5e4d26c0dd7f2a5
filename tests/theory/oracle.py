"""Slow, obvious float64 versions of what `dissect_optax.theory` computes.

NumPy and SciPy only; nothing here knows JAX or the library.
"""

import itertools
from fractions import Fraction

import numpy as np
from scipy import integrate, special, stats


def success_probability(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """P[sign(X) = sign(p)] for X ~ N(p, σ²), from the distribution function."""
    return stats.norm.cdf(np.abs(mean) / std)


def both_positive(h: np.ndarray, k: np.ndarray, r: np.ndarray) -> np.ndarray:
    """P[X > 0, Y > 0] by Owen's T; unit variances, |r| < 1, h and k not zero."""
    width = np.sqrt((1 - r) * (1 + r))
    own = special.owens_t(h, (k - r * h) / (h * width))
    other = special.owens_t(k, (h - r * k) / (k * width))
    opposite = np.where(h * k > 0, 0.0, 0.5)
    return (special.ndtr(h) + special.ndtr(k)) / 2 - own - other - opposite


def both_positive_by_quadrature(h: float, k: float, r: float) -> float:
    """P[X > 0, Y > 0] as ∫ φ(x) P[Y > 0 | x] dx over x > -h, also for |r| → 1."""
    width = np.sqrt((1 - r) * (1 + r))
    step = -k / r
    # The conditional probability is a step of this width; the rest is smooth.
    edges = [-h, *(step + width * np.array([-40, -8, -2, 0, 2, 8, 40])), 0.0, 12.0]
    edges = np.unique(np.clip(edges, max(-h, -12.0), 12.0))
    pieces = [
        integrate.quad(_joint, a, b, args=(k, r, width), epsabs=1e-15, epsrel=1e-13)[0]
        for a, b in itertools.pairwise(edges)
    ]
    return float(np.sum(pieces))


def _joint(x: float, k: float, r: float, width: float) -> float:
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi) * special.ndtr((k + r * x) / width)


def both_positive_degenerate(h: np.ndarray, k: np.ndarray, r: float) -> np.ndarray:
    """P[X > 0, Y > 0] for r = 1, where Y = X + (k-h), and r = -1."""
    if r > 0:
        return special.ndtr(np.minimum(h, k))
    return np.maximum(special.ndtr(h) - special.ndtr(-k), 0.0)


def distance_to_gradient(factor: float, mean: float, std: float) -> float:
    """E(γX - p)² for X ~ N(p, σ²), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    samples = mean + std * nodes
    return float(weights @ (factor * samples - mean) ** 2 / np.sqrt(2 * np.pi))


def distance_to_sign(factor: float, mean: float, std: float) -> float:
    """E(γ sign(X) - sign(p))² for X ~ N(p, σ²): the sign is right or wrong."""
    right = success_probability(mean, std)
    return float(right * (factor - 1) ** 2 + (1 - right) * (factor + 1) ** 2)


def momentum_variance_ratio(momentum: float, count: int) -> float:
    """var[r]/E[r]² of r = Σ μ^s g_(t-s), in units of one gradient's σ²/p²."""
    weights = float(momentum) ** np.arange(count)
    return float(np.sum(weights**2) / np.sum(weights) ** 2)


def momentum_variance_ratio_slope(momentum: float, count: int) -> float:
    """Derivative by μ of Σ μ^2s / (Σ μ^s)², in exact fractions."""
    mu = Fraction(momentum)
    total = sum(mu**s for s in range(count))
    squares = sum(mu ** (2 * s) for s in range(count))
    d_total = sum(s * mu ** (s - 1) for s in range(1, count))
    d_squares = sum(2 * s * mu ** (2 * s - 1) for s in range(1, count))
    return float((d_squares * total - 2 * squares * d_total) / total**3)


def convergence_bound(
    e0: float, steps: float, mu: float, smoothness: float, second_moment: float
) -> float:
    """1/(1/e₀ + cT) with c = 2μ²/(LG²), in exact fractions."""
    e0, steps, mu, smoothness, second_moment = map(
        Fraction, (e0, steps, mu, smoothness, second_moment)
    )
    rate = 2 * mu**2 / (smoothness * second_moment)
    return float(1 / (1 / e0 + rate * steps))


def gradient_improvement(
    eigenvalues: np.ndarray, displacement: np.ndarray, noise: float
) -> float:
    """Eq. (20) for a diagonal matrix."""
    g = eigenvalues * displacement
    curvature = g @ (eigenvalues * g) + noise**2 * np.sum(eigenvalues**3)
    return float((g @ g) ** 2 / (2 * curvature))


def quadratic_loss(
    hessian: np.ndarray, minimizer: np.ndarray, noise: float, params: np.ndarray
) -> float:
    """E_x ½(θ-x)ᵀQ(θ-x) for x ~ N(x*, ν²I)."""
    displacement = params - minimizer
    constant = noise**2 * np.trace(hessian) / 2
    return float(displacement @ hessian @ displacement / 2 + constant)


def symmetric_matrix(rng: np.random.Generator, eigenvalues: np.ndarray) -> np.ndarray:
    """A symmetric matrix with this spectrum and some orthogonal eigenbasis."""
    basis, _ = np.linalg.qr(rng.normal(size=(eigenvalues.size, eigenvalues.size)))
    return basis @ np.diag(eigenvalues) @ basis.T
