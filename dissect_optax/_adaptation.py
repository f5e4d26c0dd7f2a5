"""The variance aspect: shorten the elements of the update that are mostly noise.

A factor is a plain function γ(η²) of the relative variance η² = s/p² of the direction,
Eq. (7). Three are given here; any element-wise function does.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import check_callable
from dissect_optax._estimate import Estimate, in_gradient_dtype, require_estimate

Factor = Callable[[jax.Array], jax.Array]


def inverse(relative_variance: jax.Array) -> jax.Array:
    """The factor γ = 1/(1+η²), Eq. (14).

    Among all factors it minimises E‖γ⊙p̂ - p‖², the expected distance to the true
    direction p (Lemma 1); the factor of SVAG.

    Args:
      relative_variance: η² > -1, of any shape; without unit.

    Returns:
      γ, of the same shape; in [0, 1] for η² ≥ 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import inverse
      >>> print(inverse(jnp.array([0.0, 1.0, jnp.inf])))
      [1.  0.5 0. ]

    References:
      Balles & Hennig, "Dissecting Adam", §3.2, Lemma 1.
    """
    return 1 / (1 + relative_variance)


def inverse_sqrt(relative_variance: jax.Array) -> jax.Array:
    """The factor γ = (1+η²)^(-1/2), Eq. (6).

    On the sign of a direction it is Adam's factor, and a close approximation of the
    optimal one, `gaussian_sign`.

    Args:
      relative_variance: η² > -1, of any shape; without unit.

    Returns:
      γ, of the same shape; in [0, 1] for η² ≥ 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import inverse_sqrt
      >>> print(inverse_sqrt(jnp.array([0.0, 3.0, jnp.inf])))
      [1.  0.5 0. ]

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, §3.1.
    """
    return 1 / jnp.sqrt(1 + relative_variance)


def gaussian_sign(relative_variance: jax.Array) -> jax.Array:
    """The factor γ = 2ρ-1 = erf(1/√(2η²)), Eqs. (8), (15).

    Among all factors it minimises E‖γ⊙sign(p̂) - sign(p)‖² for a Gaussian p̂, where ρ is
    the probability that its sign is right (Lemma 1).

    Args:
      relative_variance: η², of any shape; without unit. Not positive counts as zero.

    Returns:
      γ, of the same shape, in [0, 1].

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import gaussian_sign, inverse_sqrt
      >>> eta2 = jnp.array([0.0, 0.5, 2.0, jnp.inf])
      >>> bool(jnp.all(jnp.abs(gaussian_sign(eta2) - inverse_sqrt(eta2)) < 0.08))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §1.4, §3.1, Lemma 1.
    """
    # Below 0.01 the sign is certain to the last digit of float64, erf(7) = 1 - 4e-23,
    # and the derivative of the root would overflow.
    certain = relative_variance < 0.01
    eta2 = jnp.where(certain, 1.0, relative_variance)
    return jnp.where(certain, 1.0, jax.lax.erf(jax.lax.rsqrt(2 * eta2)))


def adapt_to_variance(
    factor: Factor = inverse,
) -> optax.GradientTransformationExtraArgs:
    """Scales every element of the update by a factor of its relative variance.

    Turns an `Estimate` (p, s) into the plain update of Eqs. (14), (15)::

        γ(η²) ⊙ p,      η² = s/p²

    Args:
      factor: The element-wise function γ of η²: `inverse`, `inverse_sqrt`,
        `gaussian_sign` or your own. After two decays it may meet
        -1 < η² < 0.

    Returns:
      A stateless transformation from `Estimate` to plain updates, in the dtype of the
      gradients that the `Estimate` was made from.

    Raises:
      TypeError: If the factor cannot be called or, from `update`, if plain gradients
        arrive instead of an `Estimate`.

    Edge cases:
      * A direction of zero gives an update of zero, whatever its variance. So does one
        smaller than the square root of the smallest normal number (1.1e-19 in float32).
      * A variance below the smallest normal number counts as zero.
      * η² so large that it overflows gives the factor of infinity, zero for the three
        factors here.
      * η² ≤ -1, which rounding can cause after two decays, is taken as -1 + one
        rounding unit.
      * Integer and boolean gradients get updates in float32.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.adapt_to_variance(dissect_optax.inverse)
      >>> gradient, variance = jnp.array([2.0, 1.0]), jnp.array([1.0, 2.25])
      >>> estimate = dissect_optax.Estimate(gradient, variance)
      >>> updates, _ = tx.update(estimate, tx.init(jnp.zeros(2)))
      >>> print(updates)  # Figure 1: η² = 0.25 and 2.25
      [1.6        0.30769232]

    References:
      Balles & Hennig, "Dissecting Adam", §3, Lemma 1.
    """
    check_callable("factor", factor, "a function of the relative variance η²")

    def update_fn(
        updates: Estimate,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params, extra_args
        estimate = require_estimate(updates, "adapt_to_variance")

        # Not `in`, which would compare with a factor of any type.
        one_division = factor is inverse or factor is inverse_sqrt
        adapt = _adapt_with_one_division if one_division else _adapt
        adapted = jax.tree.map(
            functools.partial(adapt, factor), estimate.mean, estimate.variance
        )
        return in_gradient_dtype(adapted, estimate.dtypes), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _adapt(factor: Factor, p: jax.Array, s: jax.Array) -> jax.Array:
    """γ(η²) ⊙ p for any factor."""
    return _formulas.adapted(factor(_formulas.relative_variance(p, s)), p)


# `inverse` and `inverse_sqrt` are 1/(1+η²) and its root. 1/(1+η²) = p²/(p²+s) takes one
# division where 1/(1+s/p²) takes two, and XLA on a CPU turns 1/√(1+η²) into an inverse
# root, twenty instructions that wait for each other, where a root is one. This is in
# the last loop of a step, which has to keep up with the memory.


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _adapt_with_one_division(factor: Factor, p: jax.Array, s: jax.Array) -> jax.Array:
    """γ(η²) ⊙ p for `inverse` and `inverse_sqrt`."""
    gamma = _formulas.inverse_of_one_plus_eta2(p, s)
    if factor is inverse_sqrt:
        gamma = jnp.sqrt(gamma)
    return _formulas.adapted(gamma, p)


@_adapt_with_one_division.defjvp
def _adapt_with_one_division_jvp(
    factor: Factor, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    """The tangent of `_adapt`, which is finite also where the root is zero."""
    _, tangent = jax.jvp(functools.partial(_adapt, factor), primals, tangents)
    return _adapt_with_one_division(factor, *primals), tangent
