"""Updates that know their variance: `Estimate`, and what makes or moves one.

What flows through a chain is a plain gradient tree, as everywhere in Optax, or an
`Estimate`, the pair (p̂, var[p̂]) of an update direction and its element-wise variance.
Three transformations make one, each from another source of variance: the history of
the gradients (`moving_average_estimate`), the caller (`attach_variance`) or the
examples of the batch (`aggregate_per_example`). The others say how a variance
propagates when the direction changes, the way errors are propagated in physics.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import (
    check_batch,
    check_decay,
    check_floating,
    check_not_negative,
    matching_variance,
)
from dissect_optax._precision import cast_like, widen, zeros_in_wide


class Estimate(NamedTuple):
    """An update direction and its element-wise variance, the pair of Lemma 1.

    Attributes:
      mean: The update direction p̂, a tree like the parameters, in the gradient's unit.
      variance: The element-wise variance of p̂, real, with the same structure and
        shapes, in the gradient's unit squared.

    An `Estimate` exists inside a chain only: `adapt_to_variance` turns it back into
    plain updates. Optax's own transformations do not know what a variance is
    (`optax.scale(c)` would scale it by c and not by c²): they belong before an
    `Estimate` is made or behind `adapt_to_variance`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.attach_variance()
      >>> g, v = jnp.array([3.0, -1.0]), jnp.array([0.5, 2.0])
      >>> estimate, _ = tx.update(g, tx.init(g), grad_variance=v)
      >>> isinstance(estimate, dissect_optax.Estimate)
      True
      >>> bool((estimate.mean == g).all() & (estimate.variance == v).all())
      True
    """

    mean: optax.Updates
    variance: optax.Updates

    def __add__(self, other: Any) -> NoReturn:
        raise TypeError(_LEFT_THE_CHAIN)

    def __radd__(self, other: Any) -> NoReturn:
        raise TypeError(_LEFT_THE_CHAIN)


class _SourcedEstimate(Estimate):
    """An Estimate that remembers of its gradients what the pair cannot say.

    Where the memory is lost, at a jit boundary or in somebody else's transformation,
    the pair alone serves: the update is then in wide numbers, and right to rounding.
    """

    # The gradients' dtypes in leaf order, where the pair is in wider numbers.
    dtypes: tuple[jnp.dtype, ...] | None = None
    # (m, √v+ε), from which (1+η²)^(-1/2) = |m|/(√v+ε) comes without cancellation.
    moments: tuple[optax.Updates, optax.Updates] | None = None


_LEFT_THE_CHAIN = (
    "An Estimate (mean, variance) left its optax.chain and was used as an update. "
    "Put adapt_to_variance() behind the transformation that made it."
)


# ---- Making an Estimate -----------------------------------------------------------


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
        no floating-point dtype.
      TypeError: From `update`, if it is given an `Estimate` instead of gradients.

    Edge cases:
      * First step: m = g and s = 0 to the last bit (one decay), so that every factor
        is one. `debias_variance=True` meets 0/0 there and takes s = 0, too.
      * Decay zero: every step is a first step.
      * A decay that a low-precision `optax.inject_hyperparams` has rounded to one, or
        a traced one: the plain average of all gradients, the limit of the formula.
      * A leaf whose gradient is None keeps its averages.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.moving_average_estimate(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> for gradient in (1.0, 4.0):
      ...     estimate, state = tx.update(jnp.asarray(gradient), state)
      >>> [round(float(leaf), 6) for leaf in estimate]  # weights 1/3 and 2/3
      [3.0, 2.0]

    References:
      Balles & Hennig, "Dissecting Adam", §1.1, §3.3, §C.1. West, "Updating mean and
      variance estimates: an improved method", Communications of the ACM 22(9), 1979.
    """
    check_decay("b1", b1)
    if b2 is not None:
        check_decay("b2", b2)
    check_not_negative("eps", eps)
    check_floating("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> Any:
        count = jnp.zeros([], jnp.int32)
        mean = zeros_in_wide(params, accumulator_dtype)
        square = zeros_in_wide(params, accumulator_dtype, real=True)
        if b2 is None:
            return MovingAverageEstimateState(count, mean, square)
        return TwoMovingAveragesEstimateState(count, mean, square)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, Any]:
        del params, extra_args
        _check_gradient(updates, "moving_average_estimate")
        count = optax.safe_increment(state.count)

        def accumulate(
            g: jax.Array, mean: jax.Array, square: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            g, mean, square = widen((jnp.asarray(g, mean.dtype), mean, square))
            dtype = square.dtype
            weight = _formulas.newest_weight(b1, count, dtype)
            if b2 is None:
                return _formulas.average_with_variance(mean, square, g, weight)
            weight2 = _formulas.newest_weight(b2, count, dtype)
            g2 = _formulas.squared_magnitude(g)
            return (
                _formulas.average(mean, g, weight),
                _formulas.average_of_squares(square, g2, weight2),
            )

        def read_variance(mean: jax.Array, square: jax.Array) -> jax.Array:
            if b2 is None:
                variance = square
            else:
                variance = square - _formulas.squared_magnitude(mean)
            if debias_variance:
                rest = _formulas.one_minus_kappa(b1, count, square.dtype)
                variance = _formulas.debias(variance, rest)
            return variance

        def read_root(
            mean: jax.Array, square: jax.Array, variance: jax.Array
        ) -> jax.Array:
            if b2 is None or debias_variance:
                v = variance + _formulas.squared_magnitude(mean)
                return _formulas.floored_root(mean, jnp.maximum(v, 0.0), eps)
            return _formulas.floored_root(mean, square, eps)

        mean, square = _accumulate(accumulate, (updates,), (state[1], state[2]))
        new_state = type(state)(count, *cast_like((mean, square), (state[1], state[2])))
        variance = jax.tree.map(read_variance, mean, square)
        if b2 is None and isinstance(eps, int | float) and eps == 0:
            return _new_estimate(updates, mean, variance), new_state
        root = jax.tree.map(read_root, mean, square, variance)
        variance = jax.tree.map(
            lambda s, r: _formulas.add_noise_floor(s, r, eps), variance, root
        )
        return _new_estimate(updates, mean, variance, root), new_state

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
      ValueError: From `update`, if the trees or their shapes differ.

    Edge cases:
      * A negative variance, which a difference of sums can round to, counts as zero.
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
        _check_gradient(updates, "attach_variance")
        if grad_variance is None:
            raise TypeError(
                "`attach_variance` needs the variance of the gradient: call "
                "update(grad, state, params, grad_variance=variance), for instance "
                "with the variance from dissect_optax.value_grad_and_variance."
            )
        variance = matching_variance(updates, grad_variance)
        mean = widen(updates)
        return _new_estimate(updates, mean, variance), state

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
        _check_gradient(updates, "aggregate_per_example")
        check_batch(updates)
        wide = widen(updates)
        mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
        variance = jax.tree.map(_formulas.variance_of_mean, wide, mean)
        return _new_estimate(updates, mean, variance), state

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
      * Where m is exactly zero the direction is set to zero, as in Algorithm 2.

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

        def direction(m: jax.Array, g: jax.Array) -> jax.Array:
            g = jnp.asarray(g, m.dtype)
            return jnp.where(m == 0, jnp.zeros((), m.dtype), g)

        def variance(m: jax.Array, s: jax.Array, g: jax.Array) -> jax.Array:
            eta2 = _formulas.relative_variance(m, s)
            g2 = _formulas.squared_magnitude(jnp.asarray(g, m.dtype))
            # No variance times a square that overflows is still no variance.
            return jnp.where(eta2 == 0, 0.0, eta2 * g2)

        gradient = jax.tree.map(direction, estimate.mean, updates)
        spread = jax.tree.map(variance, estimate.mean, estimate.variance, updates)
        return like_estimate(estimate, gradient, spread, same_ratio=True), state

    return optax.GradientTransformationExtraArgs(estimator.init, update_fn)


# ---- Moving an Estimate -----------------------------------------------------------


class AccumulateMomentumState(NamedTuple):
    """State of `accumulate_momentum`: the aggregators r and s of Eq. (48)."""

    trace: optax.Updates
    variance: optax.Updates


def accumulate_momentum(
    momentum: jax.typing.ArrayLike = 0.9,
    *,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Accumulates momentum, and the variance of the momentum with it.

    Turns an `Estimate` (g, ŝ) into the `Estimate` (r, s) of Eqs. (18), (48)::

        r ← μ r + g,      s ← μ² s + ŝ

    the variance of a sum of independent terms, each shrunk by μ in every step.

    Args:
      momentum: The decay μ, in [0, 1).
      accumulator_dtype: Dtype that both aggregators are stored in. None means each
        leaf's own, but at least float32.

    Returns:
      A transformation from `Estimate` to `Estimate`. Its state holds `trace` (r) and
      `variance` (s).

    Raises:
      ValueError: If μ is outside [0, 1), or `accumulator_dtype` is no floating-point
        dtype.
      TypeError: From `update`, if it is given plain gradients.

    Edge cases:
      * μ = 0 hands the `Estimate` on as it is.
      * A leaf whose gradient is None keeps its aggregators.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.accumulate_momentum(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> one = dissect_optax.Estimate(jnp.asarray(1.0), jnp.asarray(1.0))
      >>> for _ in range(2):
      ...     estimate, state = tx.update(one, state)
      >>> float(estimate.mean), float(estimate.variance)
      (1.5, 1.25)

    References:
      Balles & Hennig, "Dissecting Adam", §3.4, §C.3, Algorithms 3 and 5.
    """
    check_decay("momentum", momentum)
    check_floating("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> AccumulateMomentumState:
        return AccumulateMomentumState(
            trace=zeros_in_wide(params, accumulator_dtype),
            variance=zeros_in_wide(params, accumulator_dtype, real=True),
        )

    def update_fn(
        updates: optax.Updates,
        state: AccumulateMomentumState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, AccumulateMomentumState]:
        del params, extra_args
        estimate = require_estimate(updates, "accumulate_momentum")

        def accumulate(
            mean: jax.Array, variance: jax.Array, r: jax.Array, s: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            r, s = widen((r, s))
            mu = jnp.asarray(momentum, s.dtype)
            return mu * r + mean.astype(r.dtype), mu**2 * s + variance.astype(s.dtype)

        trace, spread = _accumulate(accumulate, estimate, (state.trace, state.variance))
        new_state = AccumulateMomentumState(*cast_like((trace, spread), tuple(state)))
        trace, spread = (_where_present(estimate.mean, x) for x in (trace, spread))
        return like_estimate(estimate, trace, spread), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class CorrectForMomentumState(NamedTuple):
    """State of `correct_for_momentum`: the number of gradients seen."""

    count: jax.Array  # type: ignore[assignment]  # int32


def correct_for_momentum(
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    """Corrects the variance of a gradient to that of a momentum along it.

    Multiplies the variance of an `Estimate` by κ of Eq. (19)::

        κ(μ,t) = (1-μ)(1+μ^t) / ((1+μ)(1-μ^t)),      s ← κ(μ,t) s

    A momentum averages over past gradients, so its relative variance is smaller than
    that of one gradient: by (1-μ)/(1+μ) in the long run, 0.053 for μ = 0.9. It assumes
    that mean and variance of the gradient change slowly.

    Args:
      momentum: The decay μ, in [0, 1); the same as of the averages in the `Estimate`.

    Returns:
      A transformation from `Estimate` to `Estimate`; its state is a count.

    Raises:
      ValueError: If μ is outside [0, 1).
      TypeError: From `update`, if it is given plain gradients.

    Edge cases:
      * κ(μ,1) = 1 exactly, and κ(0,t) = 1.
      * A traced μ of one gives the limit 1/t.

    Examples:
      >>> import jax.numpy as jnp
      >>> import dissect_optax
      >>> tx = dissect_optax.correct_for_momentum(0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> one = dissect_optax.Estimate(jnp.asarray(1.0), jnp.asarray(1.0))
      >>> for _ in range(2):
      ...     estimate, state = tx.update(one, state)
      >>> bool(jnp.isclose(estimate.variance, 5 / 9))  # (1-μ)(1+μ²)/((1+μ)(1-μ²))
      True

    References:
      Balles & Hennig, "Dissecting Adam", §3.4, §C.3.
    """
    check_decay("momentum", momentum)

    def init_fn(params: optax.Params) -> CorrectForMomentumState:
        del params
        return CorrectForMomentumState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: CorrectForMomentumState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, CorrectForMomentumState]:
        del params, extra_args
        estimate = require_estimate(updates, "correct_for_momentum")
        count = optax.safe_increment(state.count)
        variance = jax.tree.map(
            lambda s: _formulas.kappa(momentum, count, s.dtype) * s, estimate.variance
        )
        estimate = like_estimate(estimate, estimate.mean, variance)
        return estimate, CorrectForMomentumState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# ---- What every room that handles an Estimate needs -------------------------------


def require_estimate(updates: Any, name: str) -> Estimate:
    """The updates, if they are an Estimate; else the error that says what to do."""
    if isinstance(updates, Estimate):
        return updates
    raise TypeError(
        f"`{name}` needs an Estimate (mean, variance), got a plain "
        f"{type(updates).__name__} of gradients. Put moving_average_estimate(), "
        "attach_variance() or aggregate_per_example() before it in the chain."
    )


def like_estimate(
    estimate: Estimate,
    mean: optax.Updates,
    variance: optax.Updates,
    *,
    same_ratio: bool = False,
) -> Estimate:
    """A new Estimate from the same gradients; `same_ratio` if η² did not change."""
    if not isinstance(estimate, _SourcedEstimate):
        return Estimate(mean, variance)
    new = _SourcedEstimate(mean, variance)
    new.dtypes = estimate.dtypes
    new.moments = estimate.moments if same_ratio else None
    return new


def known_moments(estimate: Estimate) -> tuple[optax.Updates, optax.Updates] | None:
    """(m, √v+ε) with 1+η² = (√v+ε)²/m², if the Estimate still knows them."""
    return estimate.moments if isinstance(estimate, _SourcedEstimate) else None


def in_gradient_dtype(estimate: Estimate, updates: optax.Updates) -> optax.Updates:
    """Plain updates made from `estimate`, in the dtypes of the gradients behind it."""
    if not isinstance(estimate, _SourcedEstimate) or estimate.dtypes is None:
        return updates
    leaves, treedef = jax.tree.flatten(updates)
    pairs = zip(leaves, estimate.dtypes, strict=True)
    return jax.tree.unflatten(treedef, [leaf.astype(dtype) for leaf, dtype in pairs])


def _new_estimate(
    gradients: optax.Updates,
    mean: optax.Updates,
    variance: optax.Updates,
    root: optax.Updates | None = None,
) -> Estimate:
    """An Estimate made from gradients; None wherever there was no gradient."""
    mean, variance = (_where_present(gradients, tree) for tree in (mean, variance))
    estimate = _SourcedEstimate(mean, variance)
    estimate.dtypes = tuple(jnp.result_type(g) for g in jax.tree.leaves(gradients))
    if root is not None:
        estimate.moments = (mean, _where_present(gradients, root))
    return estimate


def _where_present(inputs: optax.Updates, tree: optax.Updates) -> optax.Updates:
    """The leaves of `tree` where there is an input, None elsewhere."""
    return jax.tree.map(
        lambda given, leaf: None if given is None else leaf,
        inputs,
        tree,
        is_leaf=_is_none,
    )


def _accumulate(
    fn: Callable[..., tuple[jax.Array, jax.Array]],
    inputs: tuple[optax.Updates, ...],
    accumulators: tuple[optax.Updates, optax.Updates],
) -> tuple[optax.Updates, optax.Updates]:
    """Both accumulators after `fn`; a leaf whose input is None keeps its own."""
    treedef: Any = jax.tree.structure(inputs[0], is_leaf=_is_none)
    new, rows = [], [treedef.flatten_up_to(tree) for tree in (*inputs, *accumulators)]
    for row in zip(*rows, strict=True):
        new.append(row[-2:] if row[0] is None else fn(*row))
    first, second = zip(*new, strict=True) if new else ((), ())
    return treedef.unflatten(first), treedef.unflatten(second)


def _check_gradient(updates: Any, name: str) -> None:
    """Raise if the updates are an Estimate already."""
    if isinstance(updates, Estimate):
        raise TypeError(
            f"`{name}` makes an Estimate from plain gradients, got an Estimate. Use "
            "one source of variance in a chain."
        )


def _is_none(leaf: Any) -> bool:
    """Whether this is the place of an absent leaf."""
    return leaf is None
