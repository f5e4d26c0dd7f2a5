"""What happens to plain updates after the adaptation, and around it.

Most optimizers adapt a momentum. NovoGrad and ADOPT take the momentum of adapted
gradients: in their chains `heavy_ball` or `moving_average` comes after
`adapt_to_variance`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import (
    check_callable,
    check_floating,
    check_state,
    checked_decay,
    checked_not_negative,
)
from dissect_optax._estimate import Estimate, in_gradient_dtype, require_gradients
from dissect_optax._precision import (
    cast,
    cast_like,
    dtype_of,
    upcast,
    zeros_for_accumulation,
)
from dissect_optax.family import _equations
from dissect_optax.family._trees import is_zero, map_present, update_buffer


class HeavyBallState(NamedTuple):
    """State of `heavy_ball`: the sum of past updates."""

    trace: optax.Updates


class ClipByScheduleState(NamedTuple):
    """State of `clip_by_schedule`: the number of updates seen."""

    count: jax.Array  # type: ignore[assignment]  # int32


class AddDecayedWeightsState(NamedTuple):
    """State of `add_decayed_weights` with a schedule: the number of updates seen."""

    count: jax.Array  # type: ignore[assignment]  # int32


def heavy_ball(
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    nesterov: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum as a sum of updates, r ← μ r + u, Eq. (18).

    Args:
      momentum: The decay μ, in [0, 1).
      nesterov: Return μ r + u with the new r, one step ahead.
      accumulator_dtype: Dtype of the sum. None means each leaf's own, but at least
        float32.

    Returns:
      A transformation of plain updates. Its state holds one buffer.

    Raises:
      ValueError: If μ is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.heavy_ball(0.5)
      >>> state = tx.init(jnp.zeros(1))
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array([2.0]), state)
      >>> print(updates)
      [3.]

    References:
      Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.
    """
    momentum = checked_decay("momentum", momentum)
    check_floating("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> HeavyBallState:
        return HeavyBallState(zeros_for_accumulation(params, accumulator_dtype))

    def accumulate(u: jax.Array, r: jax.Array) -> jax.Array:
        r = upcast(r)
        mu = jnp.asarray(momentum, r.real.dtype)
        return _formulas.accumulate(r, u.astype(r.dtype), mu)

    def update_fn(
        updates: optax.Updates,
        state: HeavyBallState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HeavyBallState]:
        del params, extra_args
        require_gradients(updates, "heavy_ball")
        check_state("heavy_ball", state, HeavyBallState)
        wide = upcast(updates)
        trace = update_buffer(accumulate, (wide,), state.trace)
        ahead = map_present(accumulate if nesterov else lambda _, r: r, wide, trace)
        new_state = HeavyBallState(cast_like(trace, state.trace))
        return in_gradient_dtype(ahead, _dtypes(updates)), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def clip_by_schedule(
    bound: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformationExtraArgs:
    """Clips every element of the updates to [-c, c], with c a function of the step.

    Args:
      bound: The bound c as a function of the number of updates before this one, not
        negative; for instance t^0.25, ADOPT's.

    Returns:
      A transformation of plain updates; its state is a count.

    Raises:
      TypeError: If the bound cannot be called.

    Edge cases:
      * A complex element keeps its phase and is clipped in magnitude.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.clip_by_schedule(lambda step: 1.0 + step)
      >>> updates, _ = tx.update(jnp.array([-3.0, 0.5]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [-1.   0.5]

    References:
      Taniguchi et al., "ADOPT", NeurIPS 2024, appendix.
    """
    check_callable("bound", bound, "a function of the step")

    def init_fn(params: optax.Params) -> ClipByScheduleState:
        del params
        return ClipByScheduleState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: ClipByScheduleState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ClipByScheduleState]:
        del params, extra_args
        require_gradients(updates, "clip_by_schedule")
        check_state("clip_by_schedule", state, ClipByScheduleState)
        largest = jnp.asarray(bound(state.count))

        def clip(u: jax.Array) -> jax.Array:
            most = largest.astype(u.real.dtype)
            size = jnp.abs(u)
            shrink = jnp.where(size > most, most / jnp.where(size > most, size, 1.0), 1)
            return shrink.astype(u.dtype) * u

        clipped = in_gradient_dtype(
            jax.tree.map(clip, upcast(updates)), _dtypes(updates)
        )
        return clipped, ClipByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def fourth_root(step: jax.Array) -> jax.Array:
    """t^0.25, ADOPT's clipping value."""
    return jnp.asarray(step, jnp.result_type(float)) ** 0.25


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a multiple of the parameters to the updates: u + λ θ.

    After the adaptation it is decoupled weight decay. `optax.add_decayed_weights` needs
    parameters also where λ is zero, and promotes dtypes.

    Args:
      weight_decay: The multiple λ ≥ 0, or a schedule of it.
      mask: A tree of booleans like the parameters, or a prefix of it, True where
        weights decay; or a function that makes one. None means everywhere.

    Returns:
      A transformation of plain updates; its state is a count if λ is a schedule.

    Raises:
      ValueError: If λ is negative or, from `update`, if there are no parameters.

    Edge cases:
      * λ = 0 as a Python number changes nothing and needs no parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.add_decayed_weights(0.5)
      >>> params = jnp.array([4.0])
      >>> updates, _ = tx.update(jnp.array([1.0]), tx.init(params), params)
      >>> print(updates)
      [3.]

    References:
      Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    scheduled = callable(weight_decay)
    if not scheduled:
        weight_decay = checked_not_negative("weight_decay", weight_decay)
    if is_zero(weight_decay):
        return optax.with_extra_args_support(optax.identity())

    def init_fn(params: optax.Params) -> AddDecayedWeightsState | optax.EmptyState:
        del params
        if not scheduled:
            return optax.EmptyState()
        return AddDecayedWeightsState(jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        require_gradients(updates, "add_decayed_weights")
        if params is None:
            raise ValueError(
                "`add_decayed_weights` needs the parameters, got None: call "
                "update(updates, state, params), or set the weight decay to 0.0."
            )
        amount = weight_decay
        if callable(weight_decay):
            check_state("add_decayed_weights", state, AddDecayedWeightsState)
            amount = weight_decay(state.count)
            state = AddDecayedWeightsState(optax.safe_increment(state.count))

        def add(u: jax.Array, p: jax.Array) -> jax.Array:
            return u + cast(jnp.asarray(amount), u.dtype) * cast(upcast(p), u.dtype)

        decayed = map_present(add, upcast(updates), params)
        return in_gradient_dtype(decayed, _dtypes(updates)), state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return tx if mask is None else optax.masked(tx, mask)


def cautious(
    inner: optax.GradientTransformation, *, least_share: float = 1e-3
) -> optax.GradientTransformationExtraArgs:
    """Keeps only the elements of an update that agree in sign with the gradient.

    ::

        1[u·g > 0] / mean(1[u·g > 0]) ⊙ u

    with the mean over each parameter, so that the size of a step is about kept. A test
    of the sign, by one sample: an element survives with the probability that u and g
    have one sign, ρ of Eq. (8) if u knows the sign of the true gradient.

    Args:
      inner: A transformation from gradients to plain updates along them, before the
        learning rate, which turns them around.
      least_share: The least mean that is divided by.

    Returns:
      A transformation from gradients to plain updates, with the state of `inner`.

    Raises:
      TypeError: From `update`, if `inner` returns an `Estimate`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.cautious(family.heavy_ball(0.9))
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in (jnp.array([1.0, 1.0]), jnp.array([0.5, -0.5])):
      ...     updates, state = tx.update(gradient, state)
      >>> print(updates)  # the second momentum, 0.4, disagrees
      [2.8 0. ]

    References:
      Liang et al., "Cautious optimizers: Improving training with one line of code",
      arXiv 2411.16085, 2024.
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        new, state = inner.update(updates, state, params, **extra_args)
        if isinstance(new, Estimate):
            raise TypeError(
                "`cautious` needs an inner transformation that returns plain updates, "
                "got an Estimate. End it with adapt_to_variance()."
            )

        def mask(u: jax.Array, g: jax.Array) -> jax.Array:
            u, g = upcast((u, g))
            agrees = _equations.agreement(u, g.astype(u.dtype), least_share)
            return agrees.astype(u.dtype) * u

        kept = map_present(mask, new, updates)
        return in_gradient_dtype(kept, _dtypes(updates)), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def _dtypes(updates: optax.Updates) -> tuple[jnp.dtype, ...]:
    """The dtypes of all leaves."""
    return tuple(dtype_of(leaf) for leaf in jax.tree.leaves(updates))
