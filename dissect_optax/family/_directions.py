"""Directions: transformations from gradients to what an update points along.

They are ordinary transformations of plain updates. `estimate` pairs a direction with a
variance, and hands the `mean` (or `previous_gradient`) that its state keeps to the
source of the variance, so that it is stored once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import check_floating, check_state, checked_decay
from dissect_optax._estimate import in_gradient_dtype, require_gradients
from dissect_optax._precision import (
    cast,
    dtype_of,
    real_dtype,
    upcast,
    zeros_for_accumulation,
)
from dissect_optax.family import _equations
from dissect_optax.family._checks import check_start
from dissect_optax.family._trees import is_zero, map_present, update_buffer


class MovingAverageState(NamedTuple):
    """State of `moving_average` and `nesterov`: a count and the average."""

    # int32, the number of gradients seen; hides tuple.count, as Optax's states do.
    count: jax.Array  # type: ignore[assignment]
    mean: optax.Updates


class InterpolateState(NamedTuple):
    """State of `interpolate`: the average."""

    mean: optax.Updates


class MixAveragesState(NamedTuple):
    """State of `mix_averages`: a count, the fast and the slow average."""

    count: jax.Array  # type: ignore[assignment]
    mean: optax.Updates
    slow_mean: optax.Updates


class ExtrapolateState(NamedTuple):
    """State of `extrapolate`: a count, two averages and the gradient before."""

    count: jax.Array  # type: ignore[assignment]
    mean: optax.Updates
    mean_difference: optax.Updates
    previous_gradient: optax.Updates


def moving_average(
    decay: jax.typing.ArrayLike = 0.9,
    *,
    start: _equations.Start = "corrected",
    initial_value: jax.typing.ArrayLike = 0.0,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The exponential moving average m of the updates, Eq. (3).

    With w = (1-β)/(1-β^t), or 1-β without bias correction::

        m ← m + w (g - m)

    Args:
      decay: The decay β, in [0, 1).
      start: "corrected" divides by 1-β^t, as Adam does; "zero" starts at the initial
        value and leaves it there to decay; "first" starts with the first gradient.
      initial_value: What the average starts with. With "corrected" it is divided by
        1-β^t as well, as Yogi does.
      accumulator_dtype: Dtype of the average. None means each leaf's own, but at least
        float32.

    Returns:
      A transformation of plain updates. Its state holds one buffer.

    Raises:
      ValueError: If β is outside [0, 1), `start` is unknown, or `accumulator_dtype` is
        not a floating-point dtype.

    Edge cases:
      * A decay that low precision has rounded to one: with "corrected" the plain
        average of all gradients, with the others the beginning for ever.
      * A leaf whose gradient is None keeps its average.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.moving_average(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 4.0):
      ...     mean, state = tx.update(jnp.asarray(gradient), state)
      >>> float(mean)  # weights 1/3 and 2/3
      3.0

    References:
      Balles & Hennig, "Dissecting Adam", §1.1.
    """
    decay = checked_decay("decay", decay)
    check_start(start)
    check_floating("accumulator_dtype", accumulator_dtype)

    def step(
        gradients: optax.Updates, state: MovingAverageState
    ) -> tuple[optax.Updates, MovingAverageState]:
        count = optax.safe_increment(state.count)
        mean = _averaged(gradients, state.mean, decay, count, start)

        def read(g: jax.Array, m: jax.Array) -> jax.Array:
            del g
            if not is_zero(initial_value) and start == "corrected":
                real = real_dtype(m.dtype)
                share = _equations.share_of_initial_value(decay, count, real)
                m = m + (jnp.asarray(initial_value, real) * share).astype(m.dtype)
            return m

        direction = map_present(read, gradients, mean)
        return direction, MovingAverageState(count, _stored(mean, state.mean))

    # The initial value of a corrected average is added where it is read.
    filled = 0.0 if start == "corrected" else initial_value
    return _direction(
        "moving_average", MovingAverageState, step, accumulator_dtype, filled
    )


def nesterov(
    decay: jax.typing.ArrayLike = 0.9,
    *,
    start: _equations.Start = "corrected",
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The average after one more step along the present gradient, as in NAdam.

    With m the average without bias correction::

        d = β m_t/(1-β^(t+1)) + (1-β) g_t/(1-β^t)

    Args:
      decay: The decay β, in [0, 1).
      start: "corrected" as above; "zero" without either bias correction, "first"
        with the first gradient as the first average.
      accumulator_dtype: Dtype of the average. None means each leaf's own, but at least
        float32.

    Returns:
      A transformation of plain updates. Its state holds one buffer.

    Raises:
      ValueError: If β is outside [0, 1), `start` is unknown, or `accumulator_dtype` is
        not a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.nesterov(0.5, start="zero")
      >>> direction, _ = tx.update(jnp.array([8.0]), tx.init(jnp.zeros(1)))
      >>> print(direction)  # half of the average, 4, and half of the gradient
      [6.]

    References:
      Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016.
    """
    decay = checked_decay("decay", decay)
    check_start(start)
    check_floating("accumulator_dtype", accumulator_dtype)

    def step(
        gradients: optax.Updates, state: MovingAverageState
    ) -> tuple[optax.Updates, MovingAverageState]:
        count = optax.safe_increment(state.count)
        mean = _averaged(gradients, state.mean, decay, count, start)

        def read(g: jax.Array, m: jax.Array) -> jax.Array:
            g = g.astype(m.dtype)
            return _equations.nesterov_average(m, g, decay, count, start)

        direction = map_present(read, gradients, mean)
        return direction, MovingAverageState(count, _stored(mean, state.mean))

    return _direction("nesterov", MovingAverageState, step, accumulator_dtype)


def interpolate(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The gradient mixed with a slower average of those before it, as in Lion.

    ::

        d = β1 m + (1-β1) g,      m ← β2 m + (1-β2) g

    Args:
      b1: The share β1 of the average in the direction, in [0, 1).
      b2: The decay β2 of the average, in [0, 1); the average starts at zero.
      accumulator_dtype: Dtype of the average. None means each leaf's own, but at least
        float32.

    Returns:
      A transformation of plain updates. Its state holds one buffer.

    Raises:
      ValueError: If a decay is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.interpolate(0.5, 0.75)
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (4.0, 2.0):
      ...     direction, state = tx.update(jnp.asarray(gradient), state)
      >>> float(direction), float(state.mean)
      (1.5, 1.25)

    References:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023.
    """
    b1, b2 = checked_decay("b1", b1), checked_decay("b2", b2)
    check_floating("accumulator_dtype", accumulator_dtype)

    def step(
        gradients: optax.Updates, state: InterpolateState
    ) -> tuple[optax.Updates, InterpolateState]:
        def mix(g: jax.Array, m: jax.Array) -> jax.Array:
            m = upcast(m)
            weight = 1 - jnp.asarray(b1, real_dtype(m.dtype))
            return _formulas.average(m, g.astype(m.dtype), weight)

        direction = map_present(mix, gradients, state.mean)
        one = jnp.ones([], jnp.int32)
        mean = _averaged(gradients, state.mean, b2, one, "zero")
        return direction, InterpolateState(_stored(mean, state.mean))

    return _direction("interpolate", InterpolateState, step, accumulator_dtype)


def mix_averages(
    b1: jax.typing.ArrayLike = 0.9,
    b3: optax.ScalarOrSchedule = 0.9999,
    alpha: optax.ScalarOrSchedule = 5.0,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A fast average plus a multiple of a very slow one, as in AdEMAMix.

    ::

        d = m₁/(1-β1^t) + α m₂

    The slow average starts at zero and is not corrected for it.

    Args:
      b1: The decay β1 of the fast average, in [0, 1).
      b3: The decay β3 of the slow average, in [0, 1), or a schedule of it.
      alpha: The multiple α, or a schedule of it.
      accumulator_dtype: Dtype of both averages. None means each leaf's own, but at
        least float32.

    Returns:
      A transformation of plain updates. Its state holds two buffers.

    Raises:
      ValueError: If a decay is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.mix_averages(0.5, 0.75, alpha=2.0)
      >>> direction, _ = tx.update(jnp.array([8.0]), tx.init(jnp.zeros(1)))
      >>> print(direction)  # 8, and twice a quarter of it
      [12.]

    References:
      Pagliardini, Ablin & Grangier, "The AdEMAMix optimizer", ICLR 2025.
    """
    b1 = checked_decay("b1", b1)
    if not callable(b3):
        b3 = checked_decay("b3", b3)
    check_floating("accumulator_dtype", accumulator_dtype)

    def step(
        gradients: optax.Updates, state: MixAveragesState
    ) -> tuple[optax.Updates, MixAveragesState]:
        count = optax.safe_increment(state.count)
        slow_decay = b3(state.count) if callable(b3) else b3
        multiple = alpha(state.count) if callable(alpha) else alpha
        mean = _averaged(gradients, state.mean, b1, count, "corrected")
        slow = _averaged(gradients, state.slow_mean, slow_decay, count, "zero")

        def mix(g: jax.Array, m: jax.Array, slow: jax.Array) -> jax.Array:
            del g
            return m + cast(jnp.asarray(multiple), m.dtype) * slow

        direction = map_present(mix, gradients, mean, slow)
        stored = _stored(mean, state.mean), _stored(slow, state.slow_mean)
        return direction, MixAveragesState(count, *stored)

    return _direction("mix_averages", MixAveragesState, step, accumulator_dtype)


def extrapolate(
    b1: jax.typing.ArrayLike = 0.98,
    b2: jax.typing.ArrayLike = 0.92,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The average plus a share of the average change of the gradient, as in Adan.

    With Δ = g_t - g_(t-1), zero in the first step, and bias-corrected averages::

        d = m + (1-β2) EMA_β2(Δ)

    Args:
      b1: The decay β1 of the average of the gradients, in [0, 1).
      b2: The decay β2 of the average of their changes, in [0, 1).
      accumulator_dtype: Dtype of the three buffers. None means each leaf's own, but at
        least float32.

    Returns:
      A transformation of plain updates. Its state holds three buffers: two averages and
      the gradient before.

    Raises:
      ValueError: If a decay is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.extrapolate(0.0, 0.0)
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 4.0):
      ...     direction, state = tx.update(jnp.asarray(gradient), state)
      >>> float(direction)  # without any decay, 4 and the change of 3
      7.0

    References:
      Xie et al., "Adan: Adaptive Nesterov momentum algorithm for faster optimizing deep
      models", TPAMI 2024.
    """
    b1, b2 = checked_decay("b1", b1), checked_decay("b2", b2)
    check_floating("accumulator_dtype", accumulator_dtype)

    def step(
        gradients: optax.Updates, state: ExtrapolateState
    ) -> tuple[optax.Updates, ExtrapolateState]:
        count = optax.safe_increment(state.count)

        def difference(g: jax.Array, previous: jax.Array) -> jax.Array:
            return _equations.change(g, upcast(previous).astype(g.dtype), count)

        changes = map_present(difference, gradients, state.previous_gradient)
        mean = _averaged(gradients, state.mean, b1, count, "corrected")
        change = _averaged(changes, state.mean_difference, b2, count, "corrected")

        def add(g: jax.Array, m: jax.Array, change: jax.Array) -> jax.Array:
            del g
            share = 1 - jnp.asarray(b2, real_dtype(m.dtype))
            return m + share.astype(m.dtype) * change

        direction = map_present(add, gradients, mean, change)
        previous = update_buffer(lambda g, _: g, (gradients,), state.previous_gradient)
        new_state = ExtrapolateState(
            count,
            _stored(mean, state.mean),
            _stored(change, state.mean_difference),
            _stored(previous, state.previous_gradient),
        )
        return direction, new_state

    return _direction("extrapolate", ExtrapolateState, step, accumulator_dtype)


def _direction(
    name: str,
    state_type: Any,
    step: Any,
    accumulator_dtype: jax.typing.DTypeLike | None,
    initial_value: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """A transformation of plain updates from a step in at least float32."""

    def init_fn(params: optax.Params) -> Any:
        def buffer() -> optax.Updates:
            zeros = zeros_for_accumulation(params, accumulator_dtype)
            if is_zero(initial_value):
                return zeros
            return jax.tree.map(
                lambda z: z + cast(jnp.asarray(initial_value), z.dtype), zeros
            )

        return state_type(
            *(
                jnp.zeros([], jnp.int32) if field == "count" else buffer()
                for field in state_type._fields
            )
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        require_gradients(updates, name)
        check_state(name, state, state_type)
        direction, state = step(upcast(updates), state)
        dtypes = tuple(dtype_of(leaf) for leaf in jax.tree.leaves(updates))
        return in_gradient_dtype(direction, dtypes), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _averaged(
    gradients: optax.Updates,
    mean: optax.Updates,
    decay: jax.typing.ArrayLike,
    count: jax.Array,
    start: _equations.Start,
) -> optax.Updates:
    """The average with the newest gradient in it, in at least float32."""

    def accumulate(g: jax.Array, m: jax.Array) -> jax.Array:
        m = upcast(m)
        weight = _equations.weight_of_newest(decay, count, start, real_dtype(m.dtype))
        return _formulas.average(m, g.astype(m.dtype), weight)

    return update_buffer(accumulate, (gradients,), mean)


def _stored(tree: optax.Updates, like: optax.Updates) -> optax.Updates:
    """The buffers in the dtypes in which the state keeps them."""
    return jax.tree.map(lambda leaf, other: cast(leaf, other.dtype), tree, like)
