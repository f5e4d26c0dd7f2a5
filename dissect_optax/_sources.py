"""The sources of variance: transformations from gradients to an `Estimate`.

The variance comes from the history of the gradients (`moving_average_estimate`), from
the caller (`attach_variance`), from the examples of the batch
(`aggregate_per_example`), or from another of these (`with_relative_variance_of`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import (
    check_batch,
    check_floating,
    check_state,
    checked_decay,
    checked_not_negative,
    matching_variance,
)
from dissect_optax._estimate import (
    Estimate,
    estimate_from_gradients,
    require_estimate,
    require_gradients,
    update_accumulators,
)
from dissect_optax._precision import (
    cast_like,
    upcast,
    zeros_for_accumulation,
)


class MovingAverageEstimateState(NamedTuple):
    """State of `moving_average_estimate` with one decay: (m, v-m²), bias-corrected."""

    # int32, the number of gradients seen; hides tuple.count, as Optax's states do.
    count: jax.Array  # type: ignore[assignment]
    mean: optax.Updates
    variance: optax.Updates


class TwoMovingAveragesEstimateState(NamedTuple):
    """State of `moving_average_estimate` with two decays: (m, v), bias-corrected."""

    # int32, the number of gradients seen; hides tuple.count, as Optax's states do.
    count: jax.Array  # type: ignore[assignment]
    mean: optax.Updates
    second_moment: optax.Updates


def moving_average_estimate(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike | None = None,
    *,
    eps: jax.typing.ArrayLike = 0.0,
    debias_variance: bool = False,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Estimates mean and variance of the gradient by moving averages over the steps.

    Turns gradients into an `Estimate` (m, s) with the bias-corrected averages of
    Eqs. (3), (4) and the variance of §3.3::

        m = (1-β1)/(1-β1^t) Σ β1^(t-i) g_i
        v = (1-β2)/(1-β2^t) Σ β2^(t-i) |g_i|²
        s = (√v + ε)² - m²

    With ε = 0 that is s = v - m². It assumes that the last 1/(1-β) gradients come from
    about the same distribution, and underestimates the variance of the gradient by the
    factor 1-κ(β1,t), since m is itself estimated (§C.1).

    With one decay (`b2=None`, the paper's own methods) the pair follows West's exact
    recursion on weighted mean and weighted variance: two buffers, no bias-correction
    pass, no cancellation, never negative. With two decays (Adam) v is kept, and s can
    be negative, down to -m², where the slow average has not yet seen what the fast one
    has; Adam's factor needs it so.

    Args:
      b1: Decay β1 of the mean, in [0, 1).
      b2: Decay β2 of the second moment, in [0, 1). None means one decay for both.
      eps: Adam's ε, a noise floor in the gradient's unit: it makes
        `scale_by_sign`, `adapt_to_variance(inverse_sqrt)` exactly m/(√v+ε).
      debias_variance: Divide v - m² by 1-κ(β1,t), which makes it unbiased for
        independent gradients, the form of the later publication (ICML 2018).
      accumulator_dtype: Dtype that both moments are stored in. None means each leaf's
        own, but at least float32. Complex leaves use the complex dtype that goes with
        it.

    Returns:
      A transformation from gradients to `Estimate`. Its state holds `count`, `mean` and
      `variance` (one decay) or `second_moment` (two decays).

    Raises:
      ValueError: If a decay is outside [0, 1), ε is negative, or `accumulator_dtype` is
        not a floating-point dtype.
      TypeError: From `update`, if it is given an `Estimate` instead of gradients, or a
        state of the other kind (one decay for two, or two for one).

    Edge cases:
      * First step: m = g and s = 0 to the last bit (one decay), so that every factor
        is one. `debias_variance=True` meets 0/0 there and takes s = 0, too.
      * Decay zero: every step is a first step.
      * A decay that a low-precision `optax.inject_hyperparams` has rounded to one, or
        a traced one: the plain average of all gradients, the limit of the formula.
      * A leaf whose gradient is None keeps its averages.
      * Two decays, and g² so small that v underflows (|g| < 1e-19 in float32): v counts
        as m², the least that it can be with equal decays.
      * A square that overflows (|g| > 1e19 in float32) makes v and s infinite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.moving_average_estimate(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 4.0):
      ...     estimate, state = tx.update(jnp.asarray(gradient), state)
      >>> float(estimate.mean), round(float(estimate.variance), 6)  # weights 1/3, 2/3
      (3.0, 2.0)

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, §3.3, §C.1. West, "Updating mean and
      variance estimates: an improved method", Communications of the ACM 22(9), 1979.
    """
    b1 = checked_decay("b1", b1)
    if b2 is not None:
        b2 = checked_decay("b2", b2)
    eps = checked_not_negative("eps", eps)
    check_floating("accumulator_dtype", accumulator_dtype)
    state_type: Any = MovingAverageEstimateState
    if b2 is not None:
        state_type = TwoMovingAveragesEstimateState
    has_eps = not (isinstance(eps, int | float) and eps == 0)

    def init_fn(params: optax.Params) -> Any:
        count = jnp.zeros([], jnp.int32)
        mean = zeros_for_accumulation(params, accumulator_dtype)
        square = zeros_for_accumulation(params, accumulator_dtype, real=True)
        return state_type(count, mean, square)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, Any]:
        del params, extra_args
        require_gradients(updates, "moving_average_estimate")
        check_state("moving_average_estimate", state, state_type)
        count = optax.safe_increment(state.count)

        def accumulate(
            g: jax.Array, mean: jax.Array, square: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            mean, square = upcast((mean, square))
            g = upcast(g).astype(mean.dtype)
            weight = _formulas.newest_weight(b1, count, square.dtype)
            if b2 is None:
                return _formulas.average_with_variance(mean, square, g, weight)
            weight2 = _formulas.newest_weight(b2, count, square.dtype)
            g2 = _formulas.squared_magnitude(g)
            return (
                _formulas.average(mean, g, weight),
                _formulas.average_of_squares(square, g2, weight2),
            )

        def read_variance(mean: jax.Array, square: jax.Array) -> jax.Array:
            floor = jnp.asarray(eps, square.dtype)
            if b2 is None:
                variance = square
            elif debias_variance:
                variance = _formulas.variance_with_noise_floor(
                    mean, square, jnp.zeros((), square.dtype)
                )
            else:
                return _formulas.variance_with_noise_floor(mean, square, floor)
            if debias_variance:
                rest = _formulas.one_minus_kappa(b1, count, square.dtype)
                variance = _formulas.debias(variance, rest)
            if has_eps:
                variance = _formulas.add_noise_floor(mean, variance, floor)
            return variance

        mean, square = update_accumulators(
            accumulate, (updates,), (state.mean, state[2])
        )
        new_state = state_type(count, *cast_like((mean, square), (state[1], state[2])))
        variance = jax.tree.map(read_variance, mean, square)
        return estimate_from_gradients(updates, mean, variance), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def attach_variance() -> optax.GradientTransformationExtraArgs:
    """Pairs the gradient with a variance that the caller hands to `update`.

    Turns a gradient g and the extra argument `grad_variance` into the `Estimate`
    (g, ŝ), with ŝ from Eq. (44), for instance from `value_grad_and_variance`::

        updates, state = tx.update(grad, state, params, grad_variance=variance)

    Returns:
      A stateless transformation from gradients to `Estimate`.

    Raises:
      TypeError: From `update`, if `grad_variance` is missing, or if it is given an
        `Estimate` instead of gradients.
      ValueError: From `update`, if the trees or their shapes differ, or the variance is
        complex.

    Edge cases:
      * A negative variance, which a difference of sums can round to, counts as zero.
      * A complex gradient has a real variance, E|g - E g|²; a complex one is an error.
      * `optax.masked` and `optax.partition` may hand over the whole variance tree with
        part of the gradients: the part that belongs to them is taken.
      * `optax.MultiSteps` hands over the variance of the last micro-batch only, beside
        the gradient of the whole batch. Use `value_grad_and_variance` with
        `microbatch_size` instead, or merge the micro-batches before `update`
        (docs/numerics.md, "Gradient accumulation").

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.attach_variance()
      >>> g = {"w": jnp.ones(3)}
      >>> estimate, _ = tx.update(g, tx.init(g), grad_variance={"w": jnp.full(3, 0.25)})
      >>> float(estimate.variance["w"][0])
      0.25

    References:
      Balles & Hennig, "Dissecting Adam", §3.3, §C.2.
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        *,
        grad_variance: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, optax.EmptyState]:
        del params, extra_args
        require_gradients(updates, "attach_variance")
        if grad_variance is None:
            raise TypeError(
                "`attach_variance` needs the variance of the gradient: call "
                "update(grad, state, params, grad_variance=variance), for instance "
                "with the variance from dissect_optax.value_grad_and_variance."
            )
        variance = matching_variance(updates, grad_variance)
        mean = upcast(updates)
        return estimate_from_gradients(updates, mean, variance), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def aggregate_per_example() -> optax.GradientTransformationExtraArgs:
    """Aggregates per-example gradients into their mean and the variance of the mean.

    Turns gradients with a leading batch axis, as `jax.vmap(jax.grad(loss))` returns
    them, into the `Estimate` (g, ŝ) of Eqs. (2), (44)::

        g = 1/B Σ_k g_k,      ŝ = 1/B · 1/(B-1) Σ_k |g_k - g|²

    the sample variance of the per-example gradients divided by the batch size: unbiased
    for the variance of g if the examples are independent. It is computed from the
    deviations. (`value_grad_and_variance` gets the same without ever materialising the
    per-example gradients.)

    Returns:
      A stateless transformation from trees of shape [B, *parameter] to `Estimate`.

    Raises:
      ValueError: From `update`, if the leaves disagree on the batch size, have no batch
        axis, or the batch has fewer than two examples.
      TypeError: If it is given an `Estimate`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.aggregate_per_example()
      >>> per_example = jnp.array([[1.0, 2.0], [3.0, 2.0]])
      >>> print(tx.update(per_example, tx.init(jnp.zeros(2)))[0].variance)
      [1. 0.]

    References:
      Balles & Hennig, "Dissecting Adam", §C.2.
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, optax.EmptyState]:
        del params, extra_args
        require_gradients(updates, "aggregate_per_example")
        check_batch(updates)
        wide = upcast(updates)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
        variance = jax.tree.map(_formulas.variance_of_mean, wide, mean)
        return estimate_from_gradients(updates, mean, variance), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def with_relative_variance_of(
    estimator: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the gradient as the direction, and takes the relative variance elsewhere.

    Turns a gradient g into the `Estimate` (g, η²·|g|²) where η² = s/m² is the relative
    variance, Eq. (7), of the `Estimate` (m, s) that `estimator` makes of the same
    gradients. A factor γ(η²) then acts on g itself, as in SVAG without momentum.

    Args:
      estimator: A transformation from gradients to `Estimate`, for instance
        `moving_average_estimate`.

    Returns:
      A transformation from gradients to `Estimate`; its state is the estimator's.

    Raises:
      TypeError: From `update`, if `estimator` does not return an `Estimate`.

    Edge cases:
      * Where m is zero, or below the square root of the smallest normal number (1.1e-19
        in float32), the direction is set to zero, as in Algorithm 2.
      * Where η²·|g|² is below the smallest normal number it counts as zero: γ is wrong
        by up to 1e-2 at |g| = 1e-18, by up to 1e-6 at 1e-16 (float32).

    Examples:
      The erf factor of Eq. (15) on the sign of the gradient, which has no name of its
      own:

      >>> import jax.numpy as jnp
      >>> import optax
      >>> import dissect_optax as do
      >>> tx = optax.chain(
      ...     do.with_relative_variance_of(do.moving_average_estimate(0.9)),
      ...     do.scale_by_sign(),
      ...     do.adapt_to_variance(do.gaussian_sign),
      ...     optax.scale_by_learning_rate(0.1),
      ... )
      >>> updates, _ = tx.update(jnp.array([5.0, -2.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)  # one gradient shows no variance
      [-0.1  0.1]

    References:
      Balles & Hennig, "Dissecting Adam", §3.2.
    """
    estimator = optax.with_extra_args_support(estimator)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, optax.OptState]:
        estimate, state = estimator.update(updates, state, params, **extra_args)
        if not isinstance(estimate, Estimate):
            raise TypeError(
                "`with_relative_variance_of` needs an estimator that returns an "
                f"Estimate, got one that returns {type(estimate).__name__}. Use "
                "moving_average_estimate(), for instance."
            )
        estimate = require_estimate(estimate, "with_relative_variance_of")

        def direction(m: jax.Array, g: jax.Array) -> jax.Array:
            absent = _formulas.is_no_direction(m)
            return jnp.where(absent, jnp.zeros((), g.dtype), g)

        gradients = upcast(updates)
        mean = jax.tree.map(direction, estimate.mean, gradients)
        variance = jax.tree.map(
            _formulas.variance_of_rescaled, estimate.mean, estimate.variance, gradients
        )
        return estimate_from_gradients(updates, mean, variance), state

    return optax.GradientTransformationExtraArgs(estimator.init, update_fn)
