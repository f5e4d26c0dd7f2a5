"""A direction and a source, run side by side, make an `Estimate`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import check_state, checked_not_negative
from dissect_optax._estimate import (
    Estimate,
    estimate_from_gradients,
    require_gradients,
)
from dissect_optax._precision import real_dtype, upcast
from dissect_optax.family import _equations
from dissect_optax.family._sources import Observation, Source
from dissect_optax.family._trees import is_zero, map_present


class EstimateState(NamedTuple):
    """State of `estimate`: those of the direction, of the mean, and of the source."""

    direction: optax.OptState
    mean: optax.OptState
    source: Any


def estimate(
    direction: optax.GradientTransformation,
    source: Source,
    *,
    mean: optax.GradientTransformation | None = None,
    minus_square: bool = True,
    eps: jax.typing.ArrayLike = 0.0,
    eps_root: jax.typing.ArrayLike = 0.0,
    floor: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Pairs a direction d of the gradients with a variance s.

    From the second moment v of the source::

        s = (√(v+ε_root) + ε)² - d²      or, with `minus_square=False`,
        s = (√(v+ε_root) + ε)²

    The first is for moments about zero, the second for moments that are variances
    already. On the sign of d, `inverse_sqrt` after the first and `reciprocal` after
    the second both give d/(√(v+ε_root)+ε). What s estimates is up to the source.

    Args:
      direction: A transformation of plain updates, for instance `moving_average`;
        `optax.identity()` for the gradient itself.
      source: The second moment.
      mean: An average for the source if it is not the one that the direction keeps, for
        instance `moving_average`; it takes one buffer more.
      minus_square: Whether d² is subtracted.
      eps: ε ≥ 0, outside the root, in the gradient's unit.
      eps_root: ε_root ≥ 0, inside the root, in its unit squared.
      floor: The least root, as ADOPT has it in place of ε.

    Returns:
      A transformation from gradients to `Estimate`.

    Raises:
      ValueError: If an ε or the floor is negative.
      TypeError: From `update`, if it is given an `Estimate`, or the source needs a mean
        that nobody keeps.

    Edge cases:
      * A moment below the smallest normal number counts as d² in the first form, as in
        `moving_average_estimate`, and as zero in the second.
      * An infinite moment makes the variance infinite, and the update zero.
      * A leaf whose gradient is None keeps its buffers.

    Examples:
      Adam, and with the other source AdaBelief:

      >>> import jax.numpy as jnp
      >>> import dissect_optax as do
      >>> from dissect_optax import family
      >>> tx = family.estimate(family.moving_average(0.9), family.second_moment(0.999))
      >>> pair, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
      >>> print(pair.mean, pair.variance)  # one gradient shows no variance
      [2.] [0.]

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, Eqs. (6), (7).
    """
    eps = checked_not_negative("eps", eps)
    eps_root = checked_not_negative("eps_root", eps_root)
    floor = checked_not_negative("floor", floor)
    direction = optax.with_extra_args_support(direction)
    keeper = optax.with_extra_args_support(optax.identity() if mean is None else mean)

    def init_fn(params: optax.Params) -> EstimateState:
        return EstimateState(
            direction.init(params), keeper.init(params), source.init(params)
        )

    def update_fn(
        updates: optax.Updates,
        state: EstimateState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, EstimateState]:
        require_gradients(updates, "estimate")
        check_state("estimate", state, EstimateState)
        gradients = upcast(updates)
        d, direction_state = direction.update(
            gradients, state.direction, params, **extra_args
        )
        _, mean_state = keeper.update(gradients, state.mean, params, **extra_args)
        before, after = state.direction, direction_state
        if mean is not None:
            before, after = state.mean, mean_state
        seen = Observation(
            count=None,
            gradient=gradients,
            mean=_kept(after, "mean"),
            previous_mean=_kept(before, "mean"),
            previous_gradient=_kept(state.direction, "previous_gradient"),
        )
        moment, source_state = source.update(seen, state.source)

        def variance(d: jax.Array, v: jax.Array) -> jax.Array:
            real = real_dtype(d.dtype)
            v = v.astype(real)
            if not is_zero(eps_root):
                v = v + jnp.asarray(eps_root, real)
            if not is_zero(floor):
                least = jnp.square(jnp.asarray(floor, real))
                v = jnp.where(v < least, least, v)
            if minus_square:
                return _formulas.variance_with_noise_floor(d, v, jnp.asarray(eps, real))
            spread = _equations.square_of_root_plus(v, jnp.asarray(eps, real))
            return jnp.broadcast_to(spread, d.shape)

        variances = map_present(variance, d, moment)
        new_state = EstimateState(direction_state, mean_state, source_state)
        return estimate_from_gradients(updates, d, variances), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _kept(state: Any, field: str) -> Any:
    """A buffer of a direction in at least float32, or None."""
    kept = getattr(state, field, None)
    return None if kept is None else upcast(kept)
