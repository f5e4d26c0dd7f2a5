"""The sign aspect: keep the direction of every element, drop its magnitude."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._estimates import Estimate, like_estimate


def scale_by_sign() -> optax.GradientTransformationExtraArgs:
    """Divides every element of the update by its magnitude.

    For plain updates p the result is sign(p). An `Estimate` (p, s) becomes::

        (sign(p), s/p²)

    since dividing a quantity by |p| divides its variance by p²; the relative variance
    η² of Eq. (7) stays what it was. A complex update keeps its phase, sign(p) = p/|p|.

    Returns:
      A stateless transformation, from plain updates to plain updates and from
      `Estimate` to `Estimate`.

    Edge cases:
      * sign(0) = 0, and its variance is zero.
      * A variance below the smallest normal number counts as zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.scale_by_sign()
      >>> estimate = dissect_optax.Estimate(jnp.array([-2.0]), jnp.array([1.0]))
      >>> signs, _ = tx.update(estimate, tx.init(jnp.zeros(1)))
      >>> print(signs.mean, signs.variance)
      [-1.] [0.25]

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, Eq. (6).
    """

    def update_fn(
        updates: optax.Updates | Estimate,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates | Estimate, optax.EmptyState]:
        del params, extra_args
        if not isinstance(updates, Estimate):
            return jax.tree.map(jnp.sign, updates), state
        mean, variance = updates
        signs = jax.tree.map(jnp.sign, mean)
        spread = jax.tree.map(_formulas.relative_variance, mean, variance)
        return like_estimate(updates, signs, spread, same_ratio=True), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
