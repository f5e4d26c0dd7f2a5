"""Sources of variance: second moments of something that is observed in every step.

A source is three functions on trees. Unlike a transformation it can be read without
being updated, so that others can be built around it: the largest value so far
(`maximum`), or that of the step before (`decorrelated`). `estimate` runs it beside a
direction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax import _formulas
from dissect_optax._checks import (
    check_callable,
    check_floating,
    check_state,
    checked_decay,
)
from dissect_optax._estimate import update_accumulators
from dissect_optax._precision import (
    cast,
    cast_like,
    real_dtype,
    upcast,
    zeros_for_accumulation,
)
from dissect_optax.family import _equations
from dissect_optax.family._checks import check_start, require_kept
from dissect_optax.family._trees import is_zero, update_buffer


class Observation(NamedTuple):
    """One step as a source sees it.

    Attributes:
      count: The number of gradients seen, from one; None in the trees.
      gradient: The gradient, in at least float32.
      mean: The average that the direction keeps, with this gradient in it; or None.
      previous_mean: The same before this gradient; or None.
      previous_gradient: The gradient before, if the direction keeps it; or None.
    """

    count: Any
    gradient: Any
    mean: Any = None
    previous_mean: Any = None
    previous_gradient: Any = None


class Source(NamedTuple):
    """A second moment, element by element or by blocks.

    Attributes:
      init: From parameters to state.
      update: From trees in an `Observation` and a state to the moments, in at least
        float32, and the new state.
      read: From a state to the moments with all gradients so far in them.
    """

    init: Callable[[optax.Params], Any]
    update: Callable[[Observation, Any], tuple[optax.Updates, Any]]
    read: Callable[[Any], optax.Updates]


class SecondMomentState(NamedTuple):
    """State of the sources with one buffer: a count and the moment."""

    # int32, the number of gradients seen; hides tuple.count, as Optax's states do.
    count: jax.Array  # type: ignore[assignment]
    second_moment: optax.Updates


class CentredSecondMomentState(NamedTuple):
    """State of `centred_second_moment`: a count, a mean and the moment about it."""

    count: jax.Array  # type: ignore[assignment]
    mean: optax.Updates
    variance: optax.Updates


class FactoredSecondMomentState(NamedTuple):
    """State of `factored_second_moment`: a count, means over columns and over rows."""

    count: jax.Array  # type: ignore[assignment]
    row: optax.Updates
    column: optax.Updates


class MaximumState(NamedTuple):
    """State of `maximum`: that of the source, and its largest value."""

    source: Any
    maximum: optax.Updates


class DecorrelatedState(NamedTuple):
    """State of `decorrelated`: a count and the state of the source."""

    count: jax.Array  # type: ignore[assignment]
    source: Any


# ---- What is observed -------------------------------------------------------------

Observed = Callable[[Observation], jax.Array]


def deviation_from_mean(uncorrected: jax.typing.ArrayLike | None = None) -> Observed:
    """The deviation g - m of the gradient from the average with it in it, AdaBelief's.

    Its second moment estimates the variance of the gradient. For independent gradients
    it is too small by the factor 2β1²/(1+β1), 0.85 at β1 = 0.9, since m has taken a
    part of g; with one decay for both it is β times the v - m² of §3.3, exactly. A
    drifting gradient adds its drift.

    Args:
      uncorrected: The decay β1 of the average. If given, m is the average without bias
        correction, as in AdaBelief's published code: the first deviations are then
        nearly the gradients themselves.

    Returns:
      A function of an `Observation`.

    Raises:
      ValueError: If the decay is outside [0, 1).

    References:
      Zhuang et al., "AdaBelief optimizer", NeurIPS 2020.
    """
    decay = None if uncorrected is None else checked_decay("uncorrected", uncorrected)

    def observe(seen: Observation) -> jax.Array:
        mean = require_kept(seen.mean, "a mean", "deviation_from_mean")
        if decay is not None:
            real = real_dtype(mean.dtype)
            total = _equations.total_weight(decay, seen.count, real)
            mean = total.astype(mean.dtype) * mean
        return seen.gradient - mean

    return observe


def deviation_from_previous_mean(*, from_zero: bool = False) -> Observed:
    """The deviation g_t - m_(t-1) of the gradient from the average before it, ACProp's.

    Its second moment estimates the variance of the gradient. For independent gradients
    it is too large by the factor 2/(1+β1), 1.05 at β1 = 0.9, since m is itself
    estimated. A drifting gradient adds its drift.

    Args:
      from_zero: Take the first deviation from zero, so that it is the first gradient,
        as in ACProp's published code. Otherwise it is zero: there is no mean before.

    Returns:
      A function of an `Observation`.

    References:
      Zhuang et al., "Momentum centering and asynchronous update for adaptive gradient
      methods", NeurIPS 2021.
    """

    def observe(seen: Observation) -> jax.Array:
        name = "deviation_from_previous_mean"
        mean = require_kept(seen.previous_mean, "a mean", name)
        if from_zero:
            return seen.gradient - mean
        return _equations.change(seen.gradient, mean, seen.count)

    return observe


def extrapolated_gradient(b2: jax.typing.ArrayLike = 0.92) -> Observed:
    """The gradient plus a share of its last change, g + (1-β2)(g - g₋), Adan's.

    Args:
      b2: The decay β2 that `extrapolate` has for the average of the changes.

    Returns:
      A function of an `Observation`; the change is zero in the first step.

    Raises:
      ValueError: If the decay is outside [0, 1).

    References:
      Xie et al., "Adan", TPAMI 2024.
    """
    b2 = checked_decay("b2", b2)

    def observe(seen: Observation) -> jax.Array:
        kept = "the gradient before"
        previous = require_kept(seen.previous_gradient, kept, "extrapolated_gradient")
        share = 1 - jnp.asarray(b2, real_dtype(seen.gradient.dtype))
        change = _equations.change(seen.gradient, previous, seen.count)
        return seen.gradient + share.astype(change.dtype) * change

    return observe


# ---- Blocks -----------------------------------------------------------------------


def layer_sum(observed: jax.Array) -> jax.Array:
    """The sum of |x|² over all elements of a parameter, a scalar: NovoGrad's ‖g‖²."""
    return _equations.squared_norm(observed)


def layer_mean(observed: jax.Array) -> jax.Array:
    """The mean of |x|² over a parameter, a scalar: Adam-mini's for most layers."""
    return _equations.squared_norm(observed) / max(observed.size, 1)


# ---- Second moments ---------------------------------------------------------------


def second_moment(
    decay: jax.typing.ArrayLike = 0.999,
    of: Observed | None = None,
    *,
    start: _equations.Start = "corrected",
    initial_value: jax.typing.ArrayLike = 0.0,
    increment: jax.typing.ArrayLike = 0.0,
    block: Callable[[jax.Array], jax.Array] | None = None,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> Source:
    """The moving average v of the square of something observed, Eq. (4).

    ::

        v ← v + w (|x|² - v)

    Of the gradient, v - m² estimates its variance, for independent gradients too small
    by the factor 1-κ(β1,t) (§C.1); with two decays a drifting gradient biases it
    either way. Of a deviation see `deviation_from_mean` and
    `deviation_from_previous_mean`.

    Args:
      decay: The decay β2, in [0, 1).
      of: What is observed, a function of an `Observation`; the gradient by default.
      start: "corrected" divides by 1-β^t, "zero" starts at the initial value and leaves
        it there to decay, "first" starts with the first square.
      initial_value: What the average starts with; with "corrected" it is divided by
        1-β^t as well.
      increment: Added to v in every step, before bias correction, as AdaBelief's
        published code does with `eps_root`: 1/(1-β) times as much in the long run.
      block: What is averaged in place of |x|² of every element: a function from the x
        of one parameter to a statistic that broadcasts against it, for instance
        `layer_mean`.
      accumulator_dtype: Dtype of the average. None means each leaf's own, but at least
        float32.

    Returns:
      A source with one buffer, of the shape that `block` returns.

    Raises:
      ValueError: If β is outside [0, 1), `start` is unknown, or `accumulator_dtype` is
        not a floating-point dtype.
      TypeError: If `of` or `block` cannot be called.

    Edge cases:
      * A square that overflows makes v infinite, and the update zero.
      * A decay that low precision has rounded to one adds no increments.

    Examples:
      A source by the variance about the mean, in Adam's place of v:

      >>> import jax.numpy as jnp
      >>> from dissect_optax import family
      >>> tx = family.estimate(
      ...     family.moving_average(0.5),
      ...     family.second_moment(0.5, family.deviation_from_mean()),
      ...     minus_square=False,
      ... )
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 4.0):  # means 1 and 3, deviations 0 and 1
      ...     estimate, state = tx.update(jnp.asarray(gradient), state)
      >>> round(float(estimate.variance), 6)  # weights 1/3 and 2/3
      0.666667

    References:
      Balles & Hennig, "Dissecting Adam", §1.1. Zhang et al., "Adam-mini", ICLR 2025,
      for blocks.
    """
    decay = checked_decay("decay", decay)
    check_start(start)
    check_floating("accumulator_dtype", accumulator_dtype)
    for name, value in (("of", of), ("block", block)):
        if value is not None:
            check_callable(name, value, "a function of arrays, or None")
    filled = 0.0 if start == "corrected" else initial_value

    def init(params: optax.Params) -> SecondMomentState:
        zeros = zeros_for_accumulation(params, accumulator_dtype, real=True)
        if block is not None:
            zeros = jax.tree.map(block, zeros)
        return SecondMomentState(jnp.zeros([], jnp.int32), _filled(zeros, filled))

    def update(seen: Observation, state: Any) -> tuple[optax.Updates, Any]:
        check_state("second_moment", state, SecondMomentState)
        count = optax.safe_increment(state.count)

        def accumulate(g: Any, m: Any, m_before: Any, g_before: Any, v: Any) -> Any:
            v = upcast(v)
            x = g if of is None else of(Observation(count, g, m, m_before, g_before))
            square = (block or _formulas.squared_magnitude)(x).astype(v.dtype)
            weight = _equations.weight_of_newest(decay, count, start, v.dtype)
            v = _formulas.average_of_squares(v, square, weight)
            return v if start == "corrected" else _plus(v, increment)

        square = update_buffer(accumulate, seen[1:], state.second_moment)
        stored = cast_like(square, state.second_moment)
        return corrected(square, count), SecondMomentState(count, stored)

    def corrected(square: optax.Updates, count: jax.Array) -> optax.Updates:
        """With what the bias correction makes of initial value and increments."""
        if start != "corrected":
            return square

        def add(v: jax.Array) -> jax.Array:
            share = _equations.share_of_initial_value(decay, count, v.dtype)
            v = _plus(v, initial_value, share)
            return _plus(v, increment, _equations.sum_of_powers(decay, v.dtype))

        return jax.tree.map(add, square)

    def read(state: SecondMomentState) -> optax.Updates:
        return corrected(upcast(state.second_moment), state.count)

    return Source(init, update, read)


def centred_second_moment(
    decay: jax.typing.ArrayLike = 0.9,
    *,
    start: _equations.Start = "corrected",
    initial_value: jax.typing.ArrayLike = 0.0,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> Source:
    """The variance v - m² between two averages with one decay, of a mean of its own.

    By the recursion of `moving_average_estimate`, without the subtraction. It estimates
    the variance of the gradient, for independent gradients too small by the factor
    1-κ(β,t), 0.95 in the long run at β = 0.9. For directions that keep no average, or
    one with another decay.

    Args:
      decay: The decay β of both averages, in [0, 1).
      start: "corrected" is the weighted variance of the gradients seen. "zero" counts
        the zero that the averages start with as a gradient, as centred RMSProp does;
        "first" starts with the first gradient and no variance.
      initial_value: What the variance starts with.
      accumulator_dtype: Dtype of both averages. None means each leaf's own, but at
        least float32.

    Returns:
      A source with two buffers.

    Raises:
      ValueError: If β is outside [0, 1), `start` is unknown, or `accumulator_dtype` is
        not a floating-point dtype.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from dissect_optax import family
      >>> tx = family.estimate(
      ...     optax.identity(), family.centred_second_moment(0.5), minus_square=False
      ... )
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 4.0):
      ...     estimate, state = tx.update(jnp.asarray(gradient), state)
      >>> round(float(estimate.variance), 6)  # weights 1/3 and 2/3, about 3
      2.0

    References:
      Balles & Hennig, "Dissecting Adam", §3.3. Graves, "Generating sequences with
      recurrent neural networks", 2013.
    """
    decay = checked_decay("decay", decay)
    check_start(start)
    check_floating("accumulator_dtype", accumulator_dtype)
    filled = 0.0 if start == "corrected" else initial_value

    def init(params: optax.Params) -> CentredSecondMomentState:
        zeros = zeros_for_accumulation(params, accumulator_dtype, real=True)
        return CentredSecondMomentState(
            count=jnp.zeros([], jnp.int32),
            mean=zeros_for_accumulation(params, accumulator_dtype),
            variance=_filled(zeros, filled),
        )

    def update(seen: Observation, state: Any) -> tuple[optax.Updates, Any]:
        check_state("centred_second_moment", state, CentredSecondMomentState)
        count = optax.safe_increment(state.count)

        def accumulate(g: jax.Array, m: jax.Array, s: jax.Array) -> Any:
            m, s = upcast((m, s))
            weight = _equations.weight_of_newest(decay, count, start, s.dtype)
            return _formulas.average_with_variance(m, s, g.astype(m.dtype), weight)

        mean, variance = update_accumulators(
            accumulate, (seen.gradient,), (state.mean, state.variance)
        )
        stored = cast_like((mean, variance), (state.mean, state.variance))
        new_state = CentredSecondMomentState(count, *stored)
        return corrected(variance, count), new_state

    def corrected(variance: optax.Updates, count: jax.Array) -> optax.Updates:
        if start != "corrected":
            return variance

        def add(s: jax.Array) -> jax.Array:
            share = _equations.share_of_initial_value(decay, count, s.dtype)
            return _plus(s, initial_value, share)

        return jax.tree.map(add, variance)

    def read(state: CentredSecondMomentState) -> optax.Updates:
        return corrected(upcast(state.variance), state.count)

    return Source(init, update, read)


def sign_controlled_second_moment(
    decay: jax.typing.ArrayLike = 0.999,
    *,
    initial_value: jax.typing.ArrayLike = 1e-6,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> Source:
    """A second moment that moves by (1-β) g² towards g², Yogi's.

    ::

        v ← v - (1-β) sign(v - g²) g²,      divided by 1-β^t

    Where v exceeds g² it falls by g² and not by v, so that it forgets a large gradient
    slowly. In equilibrium it is about the *median* of g², or more: v - m² is not an
    estimate of a variance.

    Args:
      decay: The decay β2, in [0, 1).
      initial_value: What v starts with, divided by 1-β^t as well.
      accumulator_dtype: Dtype of the moment. None means each leaf's own, but at least
        float32.

    Returns:
      A source with one buffer.

    Raises:
      ValueError: If β is outside [0, 1), or `accumulator_dtype` is not a floating-point
        dtype.

    References:
      Zaheer et al., "Adaptive methods for nonconvex optimization", NeurIPS 2018.
    """
    decay = checked_decay("decay", decay)
    check_floating("accumulator_dtype", accumulator_dtype)

    def init(params: optax.Params) -> SecondMomentState:
        zeros = zeros_for_accumulation(params, accumulator_dtype, real=True)
        return SecondMomentState(
            jnp.zeros([], jnp.int32), _filled(zeros, initial_value)
        )

    def update(seen: Observation, state: Any) -> tuple[optax.Updates, Any]:
        check_state("sign_controlled_second_moment", state, SecondMomentState)
        count = optax.safe_increment(state.count)

        def accumulate(g: jax.Array, v: jax.Array) -> jax.Array:
            v = upcast(v)
            square = _formulas.squared_magnitude(g).astype(v.dtype)
            weight = 1 - jnp.asarray(decay, v.dtype)
            return _equations.sign_controlled(v, square, weight)

        square = update_buffer(accumulate, (seen.gradient,), state.second_moment)
        stored = cast_like(square, state.second_moment)
        return corrected(square, count), SecondMomentState(count, stored)

    def corrected(square: optax.Updates, count: jax.Array) -> optax.Updates:
        return jax.tree.map(
            lambda v: _equations.over_total_weight(v, decay, count), square
        )

    def read(state: SecondMomentState) -> optax.Updates:
        return corrected(upcast(state.second_moment), state.count)

    return Source(init, update, read)


def factored_second_moment(
    decay: optax.ScalarOrSchedule = 0.999,
    *,
    eps: jax.typing.ArrayLike = 1e-30,
    smallest_axis: int = 128,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> Source:
    """A second moment of rank one, from its means over rows and columns, Adafactor's.

    With r and c the moving averages of the means of g²+ε along the largest and the
    second largest axis::

        v = r cᵀ / mean(r)

    v has the right means over rows and columns and nothing else: v - m² estimates the
    variance only as far as variances are products of a row's and a column's.

    Args:
      decay: The decay β2, in [0, 1), with bias correction; or a schedule of it, without
        one, for instance 1 - (t+1)^-0.8 of t from zero.
      eps: Added to every square.
      smallest_axis: Parameters whose second largest axis is shorter keep the square of
        every element.
      accumulator_dtype: Dtype of the averages. None means each leaf's own, but at least
        float32.

    Returns:
      A source with buffers of the shape of the parameters without one axis each.

    Raises:
      ValueError: If β is outside [0, 1), or `accumulator_dtype` is not a floating-point
        dtype.

    References:
      Shazeer & Stern, "Adafactor: Adaptive learning rates with sublinear memory cost",
      ICML 2018.
    """
    if not callable(decay):
        decay = checked_decay("decay", decay)
    check_floating("accumulator_dtype", accumulator_dtype)

    def axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
        """The second largest and the largest axis; None where all is kept."""
        if len(shape) < 2:
            return None
        second, largest = (int(axis) for axis in np.argsort(shape)[-2:])
        return None if shape[second] < smallest_axis else (second, largest)

    def init(params: optax.Params) -> FactoredSecondMomentState:
        zeros = zeros_for_accumulation(params, accumulator_dtype, real=True)

        def row(z: jax.Array) -> jax.Array:
            pair = axes(z.shape)
            return z if pair is None else jnp.sum(z, axis=pair[1], keepdims=True)

        def column(z: jax.Array) -> jax.Array:
            pair = axes(z.shape)
            if pair is None:
                return jnp.zeros((), z.dtype)
            return jnp.sum(z, axis=pair[0], keepdims=True)

        count = jnp.zeros([], jnp.int32)
        rows, columns = jax.tree.map(row, zeros), jax.tree.map(column, zeros)
        return FactoredSecondMomentState(count, rows, columns)

    def update(seen: Observation, state: Any) -> tuple[optax.Updates, Any]:
        check_state("factored_second_moment", state, FactoredSecondMomentState)
        count = optax.safe_increment(state.count)

        def accumulate(g: jax.Array, row: jax.Array, column: jax.Array) -> Any:
            row, column = upcast((row, column))
            square = _plus(_formulas.squared_magnitude(g).astype(row.dtype), eps)
            if callable(decay):
                weight = 1 - jnp.asarray(decay(state.count)).astype(row.dtype)
            else:
                weight = _formulas.newest_weight(decay, count, row.dtype)
            pair = axes(g.shape)
            if pair is None:
                return _formulas.average_of_squares(row, square, weight), column
            over_rows, over_columns = (
                jnp.mean(square, axis=axis, keepdims=True) for axis in pair
            )
            return (
                _formulas.average_of_squares(row, over_columns, weight),
                _formulas.average_of_squares(column, over_rows, weight),
            )

        row, column = update_accumulators(
            accumulate, (seen.gradient,), (state.row, state.column)
        )
        stored = cast_like((row, column), (state.row, state.column))
        return product(row, column), FactoredSecondMomentState(count, *stored)

    def product(rows: optax.Updates, columns: optax.Updates) -> optax.Updates:
        def leaf(row: jax.Array, column: jax.Array) -> jax.Array:
            if column.ndim == 0:
                return row
            second, _ = axes(jnp.broadcast_shapes(row.shape, column.shape)) or (0, 0)
            return _equations.rank_one(row, column, second)

        return jax.tree.map(leaf, rows, columns)

    def read(state: FactoredSecondMomentState) -> optax.Updates:
        return product(upcast(state.row), upcast(state.column))

    return Source(init, update, read)


def power_decay(exponent: float = 0.8) -> Callable[[jax.Array], jax.Array]:
    """The schedule 1 - (t+1)^(-exponent) of a decay, Adafactor's."""
    return lambda step: 1 - (jnp.asarray(step, jnp.float32) + 1) ** -exponent


# ---- Sources around a source ------------------------------------------------------


def maximum(source: Source) -> Source:
    """The largest value of a source so far, AMSGrad's.

    It grows with the number of steps where noise is stationary, so that v - m² is not
    an estimate of a variance, but an upper end of such.

    Args:
      source: Any source.

    Returns:
      A source with one buffer more.

    References:
      Reddi, Kale & Kumar, "On the convergence of Adam and beyond", ICLR 2018.
    """

    def init(params: optax.Params) -> MaximumState:
        state = source.init(params)
        return MaximumState(state, jax.tree.map(jnp.zeros_like, source.read(state)))

    def update(seen: Observation, state: Any) -> tuple[optax.Updates, Any]:
        check_state("maximum", state, MaximumState)
        moment, inner = source.update(seen, state.source)
        # Not `maximum`, which would halve the derivative where both are equal.
        largest = jax.tree.map(
            lambda v, most: jnp.where(v < most, most, v), moment, upcast(state.maximum)
        )
        return largest, MaximumState(inner, cast_like(largest, state.maximum))

    return Source(init, update, lambda state: upcast(state.maximum))


def decorrelated(source: Source, *, first: float | None = None) -> Source:
    """The value that a source had a step before, independent of the present gradient.

    A factor by it does not favour gradients that happen to be small: the expectation of
    γ⊙g is γ⊙∇L for independent mini-batches. It estimates what the source does, of the
    step before.

    Args:
      source: Any source.
      first: The moment in the first step, which has none before it: the source's own by
        default; 1.0 makes the first step one along the direction itself (ACProp), and
        infinity makes it zero (ADOPT).

    Returns:
      A source with the buffers of the one inside.

    Edge cases:
      * Around another `decorrelated` it changes nothing but the first step: the moments
        of two steps before are not kept.

    References:
      Zhuang et al., NeurIPS 2021. Taniguchi et al., "ADOPT: Modified Adam can converge
      with any β2 with the optimal rate", NeurIPS 2024.
    """

    def init(params: optax.Params) -> DecorrelatedState:
        return DecorrelatedState(jnp.zeros([], jnp.int32), source.init(params))

    def update(seen: Observation, state: Any) -> tuple[optax.Updates, Any]:
        check_state("decorrelated", state, DecorrelatedState)
        present, inner = source.update(seen, state.source)

        def before(previous: jax.Array, present: jax.Array) -> jax.Array:
            if first is not None:
                present = jnp.full_like(previous, first)
            return jnp.where(state.count == 0, present, previous)

        moment = jax.tree.map(before, source.read(state.source), present)
        return moment, DecorrelatedState(optax.safe_increment(state.count), inner)

    return Source(init, update, lambda state: source.read(state.source))


def _filled(zeros: optax.Updates, value: jax.typing.ArrayLike) -> optax.Updates:
    """Buffers with their initial value."""
    return jax.tree.map(lambda z: _plus(z, value), zeros)


def _plus(
    moment: jax.Array,
    amount: jax.typing.ArrayLike,
    share: jax.typing.ArrayLike | None = None,
) -> jax.Array:
    """The moment and an amount that is nearly always zero, in the moment's dtype."""
    if is_zero(amount):
        return moment
    more = cast(jnp.asarray(amount), moment.dtype)
    return moment + (more if share is None else more * share)
