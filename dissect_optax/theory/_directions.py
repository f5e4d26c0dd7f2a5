"""Random update directions, given by their first two moments.

The expected change of a quadratic loss, Eq. (10), depends on a direction z through E[z]
and E[zzᵀ] alone. Both are exact here for a Gaussian estimate and for its sign, each
with any element-wise factors. This covers SGD, SSD, SVAG and Adam.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from dissect_optax.theory._arguments import (
    as_floats,
    check_covariance,
    check_second_moment,
    check_shape,
    check_vector,
)
from dissect_optax.theory._orthants import expected_sign_product
from dissect_optax.theory._signs import expected_sign, standardize


class Direction(NamedTuple):
    """First and second moments of a random update direction z.

    Attributes:
      mean: E[z], of shape [d].
      second_moment: E[zzᵀ], of shape [d, d].
    """

    mean: jax.Array
    second_moment: jax.Array


def gaussian_direction(
    mean: ArrayLike, covariance: ArrayLike, factors: ArrayLike = 1.0
) -> Direction:
    """The direction z = γ⊙p̂ of a Gaussian estimate: SGD, or SVAG with its factors.

    E[z] = γ⊙p,      E[zzᵀ] = γγᵀ ⊙ (Σ + ppᵀ),      p̂ ~ N(p, Σ)

    The moments are the same for any p̂ of mean p and covariance Σ, Gaussian or not.

    Args:
      mean: p, of shape [d].
      covariance: Σ, of shape [d, d], in the unit of `mean` squared.
      factors: γ, of shape [d] or a scalar; fixed numbers, such as `optimal_factor`.

    Returns:
      The `Direction`.

    Raises:
      ValueError: If the shapes do not go together, or a concrete `covariance` is not
        one: not finite, not symmetric, or with correlations outside [-1, 1]. Also if
        the concrete second moment over- or underflows.

    Edge cases:
      * In float32, a direction whose elements are all below 1e-19, or one above 1e19,
        has no second moment in this format: rescale the problem, or use float64.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> sgd = theory.gaussian_direction(jnp.array([2.0, 1.0]), jnp.eye(2))
      >>> print(sgd.second_moment)
      [[5. 2.]
       [2. 2.]]

    References:
      Balles & Hennig, "Dissecting Adam", §2.1, §B.1.
    """
    p, cov, gamma = _checked(mean, covariance, factors)
    moment = cov + jnp.outer(p, p)
    return _direction(gamma, p, moment)


def sign_direction(
    mean: ArrayLike, covariance: ArrayLike, factors: ArrayLike = 1.0
) -> Direction:
    """The direction z = γ⊙sign(p̂) of a Gaussian sign: SSD, or Adam with its factors.

    E[z_i] = γ_i (2ρ_i-1) sign(p_i),      E[z_i z_j] = γ_i γ_j (1 - 2 P[s_i ≠ s_j])

    with s = sign(p̂), p̂ ~ N(p, Σ), and exact orthant probabilities. The cost is one
    `expected_sign_product` for each of the d² pairs.

    Args:
      mean: p, of shape [d].
      covariance: Σ, of shape [d, d], in the unit of `mean` squared.
      factors: γ, of shape [d] or a scalar; fixed numbers, such as `sign_certainty` or
        `adam_factor`.

    Returns:
      The `Direction`, without unit.

    Raises:
      ValueError: If the shapes do not go together, or a concrete `covariance` is not
        one: not finite, not symmetric, or with correlations outside [-1, 1]. Also if
        the concrete second moment over- or underflows.

    Edge cases:
      * A variance of zero is a sign that is known; Σ = 0 is the deterministic sign.
      * Mean and variance both zero: that element of z is zero, as sign(0) = 0.
      * In float32, standard deviations below 1e-19 or above 1e19 have no variance in
        this format. They count as zero or are infinite: rescale the problem, or use
        float64.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import theory
      >>> gradient = jnp.array([2.0, -1.0])
      >>> ssd = theory.sign_direction(gradient, jnp.zeros((2, 2)))
      >>> print(ssd.second_moment)
      [[ 1. -1.]
       [-1.  1.]]

    References:
      Balles & Hennig, "Dissecting Adam", §1.4, §2.1, §B.1.
    """
    p, cov, gamma = _checked(mean, covariance, factors)
    variance = jnp.diagonal(cov)
    known = variance <= 0
    # The root has no derivative at zero.
    std = jnp.where(known, 0.0, jnp.sqrt(jnp.where(known, 1.0, variance)))
    inverse_std = jnp.where(known, 0.0, 1 / jnp.where(known, 1.0, std))
    z = standardize(p, std)

    # All pairs, each twice: selecting one half costs more than computing the other.
    correlation = cov * inverse_std[:, None] * inverse_std[None, :]
    pairs = expected_sign_product(
        z[:, None], z[None, :], jnp.clip(correlation, -1.0, 1.0)
    )
    own = jnp.where(known & (p == 0), 0.0, 1.0).astype(cov.dtype)
    moment = jnp.where(jnp.eye(p.shape[0], dtype=bool), own[:, None], pairs)
    return _direction(gamma, expected_sign(p, std), moment)


def _direction(gamma: jax.Array, mean: jax.Array, moment: jax.Array) -> Direction:
    """The direction γ⊙z from the moments of z."""
    direction = Direction(gamma * mean, gamma[:, None] * moment * gamma[None, :])
    check_second_moment(direction.second_moment, direction.mean)
    return direction


def _checked(
    mean: ArrayLike, covariance: ArrayLike, factors: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments of a direction, checked, as arrays of one dtype."""
    p, cov, gamma = as_floats(mean, covariance, factors)
    size = check_vector("mean", p)
    check_shape("covariance", cov, (size, size), f"a mean of shape {p.shape}")
    check_covariance(cov)
    if gamma.ndim:
        check_shape("factors", gamma, p.shape, f"a mean of shape {p.shape}")
    return p, cov, jnp.broadcast_to(gamma, p.shape)
