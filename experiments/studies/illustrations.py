"""What Figures 1, 4 and 5 show: values of formulas, which need no runs."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dissect_optax import gaussian_sign, inverse, inverse_sqrt, theory


def adapted_gradients() -> dict[str, np.ndarray]:
    """Stochastic gradients in two dimensions and their optimal factors, Figure 1.

    Returns:
      The true `gradient` [2], the `std` [2] of the stochastic ones, `samples` [300, 2]
      of these, and the `factors` [2].
    """
    gradient, std = np.array([2.0, 1.0]), np.array([1.0, 1.5])
    normal = np.random.default_rng(0).normal(size=(300, 2))
    return {
        "gradient": gradient,
        "std": std,
        "samples": gradient + std * normal,
        "factors": np.asarray(theory.optimal_factor(gradient, std)),
    }


def wrong_signs() -> list[dict[str, Any]]:
    """Gaussian gradients that now and then have the wrong sign, Figure 4.

    Returns:
      Distributions of the same positive `mean` and growing `variance`, each with its
      `density` at the points `x`, and the probability of a `wrong_sign`.
    """
    mean, x = 1.0, np.linspace(-4.5, 6.5, 1001)
    panels = []
    for variance in (0.5, 1.0, 4.0):
        deviation = np.sqrt(variance)
        density = np.exp(-((x - mean) ** 2) / (2 * variance))
        right = theory.success_probability(mean, deviation)
        panels.append(
            {
                "mean": mean,
                "variance": variance,
                "x": x,
                "density": density / (deviation * np.sqrt(2 * np.pi)),
                "wrong_sign": 1 - float(right),
            }
        )
    return panels


def adaptation_factors() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The variance adaptation factors over the relative standard deviation, Figure 5.

    Returns:
      η, and by the factor's name its values at η.
    """
    eta = np.linspace(0.0, 5.0, 501)
    squared = jnp.square(jnp.asarray(eta))
    factors = (inverse, inverse_sqrt, gaussian_sign)
    return eta, {factor.__name__: np.asarray(factor(squared)) for factor in factors}
