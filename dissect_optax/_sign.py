"""The sign aspect: keep the direction of every element, drop its magnitude."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._estimate import Estimate, in_gradient_dtype, require_estimate
from dissect_optax._precision import dtype_of, upcast


def scale_by_sign() -> optax.GradientTransformationExtraArgs:
    """Divides every element of the update by its magnitude.

    For plain updates p the result is sign(p). An `Estimate` (p, s) becomes::

        (sign(p), s/p²)

    since dividing a quantity by |p| divides its variance by p²; the relative variance
    η² of Eq. (7) is unchanged. A complex update keeps its phase, sign(p) = p/|p|.

    Returns:
      A stateless transformation, from plain updates to plain updates and from
      `Estimate` to `Estimate`.

    Edge cases:
      * sign(0) = 0. In an `Estimate`, a direction smaller than the square root of the
        smallest normal number (1.1e-19 in float32) counts as zero, and so does its
        variance: it is what is left of an average long after its last gradient.
      * Integers and booleans have signs in float32.
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
            # Through float32, since float8 and booleans have no sign of their own.
            signs = jax.tree.map(jnp.sign, upcast(updates))
            dtypes = tuple(dtype_of(leaf) for leaf in jax.tree.leaves(updates))
            return in_gradient_dtype(signs, dtypes), state
        estimate = require_estimate(updates, "scale_by_sign")
        signs = jax.tree.map(lambda p: _formulas.sign(p), estimate.mean)
        variance = jax.tree.map(
            _formulas.relative_variance, estimate.mean, estimate.variance
        )
        return Estimate(signs, variance, estimate.dtypes), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
