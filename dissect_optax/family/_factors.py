"""Factors that the paper does not have: η⁻¹, a bound, and the signal-to-noise ratio."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dissect_optax._checks import check_callable, checked_not_negative
from dissect_optax.family import _equations

Factor = Callable[[jax.Array], jax.Array]


def reciprocal(relative_variance: jax.Array) -> jax.Array:
    """The factor γ = η⁻¹ = |p|/σ, AdaBelief's on the sign of the direction.

    It has a pole at η → 0: where a direction is certain, the update is as large as you
    like, unless something bounds η from below, as ε does in AdaBelief. γ is between
    1/√(1+η²) and infinity; for η ≫ 1 it is Adam's factor.

    Args:
      relative_variance: η², of any shape; without unit.

    Returns:
      γ, of the same shape; at most one over the rounding unit (8e6 in float32).

    Edge cases:
      * η below one rounding unit of its dtype, zero and negative ones, count as one
        rounding unit: a smaller deviation from a mean cannot be told from rounding.
        `bounded` takes a lower bound.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> print(family.reciprocal(jnp.array([0.25, 1.0, 4.0, jnp.inf])))
      [2.  1.  0.5 0. ]

    References:
      Zhuang et al., "AdaBelief optimizer", NeurIPS 2020.
    """
    return _equations.reciprocal_of_root(relative_variance)


def bounded(factor: Factor, bound: jax.typing.ArrayLike = 1.0) -> Factor:
    """The smaller of a factor and a bound.

    Args:
      factor: A function γ of η², for instance `reciprocal`.
      bound: The largest γ, not negative.

    Returns:
      A function of η² like `factor`.

    Raises:
      TypeError: If the factor cannot be called.
      ValueError: If the bound is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> factor = family.bounded(family.reciprocal, 10.0)
      >>> print(factor(jnp.array([0.0, 1.0, 4.0])))
      [10.   1.   0.5]
    """
    check_callable("factor", factor, "a function of the relative variance η²")
    bound = checked_not_negative("bound", bound)

    @functools.wraps(factor)
    def bounded_factor(relative_variance: jax.Array) -> jax.Array:
        gamma = factor(relative_variance)
        most = jnp.asarray(bound, gamma.dtype)
        return jnp.where(gamma > most, most, gamma)

    return bounded_factor


def signal_to_noise(lowest: jax.typing.ArrayLike = 0.1) -> Factor:
    """The factor of VRGD, the signal-to-noise ratio relative to its layer's mean.

    With r = η⁻² = p²/σ²::

        γ = clip(r / mean(r), lowest, 1)

    The mean is over the parameter, so that a constant multiple of all variances, for
    instance the number of devices that they were taken over, does not matter.

    Args:
      lowest: The least γ, in [0, 1].

    Returns:
      A function of the η² of all elements of a parameter.

    Raises:
      ValueError: If `lowest` is negative.

    Edge cases:
      * Elements with η² ≤ 0 (certain, or without a direction) have γ = 1 and do not
        count in the mean.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> factor = family.signal_to_noise(0.1)
      >>> gamma = factor(jnp.array([1.0, 2.0, 1e6]))  # ratios 1, 0.5, 1e-6; mean 0.5
      >>> bool(jnp.allclose(gamma, jnp.array([1.0, 1.0, 0.1])))
      True

    References:
      Jiang et al., "Accelerating large batch training via gradient signal to noise
      ratio (GSNR)", arXiv 2309.13681, 2023.
    """
    lowest = checked_not_negative("lowest", lowest)

    def factor(relative_variance: jax.Array) -> jax.Array:
        counts = relative_variance > 0
        ratio = jnp.square(_equations.reciprocal_of_root(relative_variance))
        ratio = jnp.where(counts, ratio, 0.0)
        number = jnp.sum(counts.astype(ratio.dtype))
        mean = jnp.sum(ratio) / jnp.where(number == 0, 1.0, number)
        gamma = ratio / jnp.where(mean == 0, 1.0, mean)
        least = jnp.asarray(lowest, gamma.dtype)
        gamma = jnp.where(gamma > 1, 1.0, jnp.where(gamma < least, least, gamma))
        return jnp.where(counts, gamma, 1.0)

    return factor
