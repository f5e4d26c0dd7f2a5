"""Momentum: how the variance of an `Estimate` propagates into averages and sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dissect_optax import _formulas
from dissect_optax._checks import check_floating, check_state, checked_decay
from dissect_optax._estimate import (
    Estimate,
    is_none,
    require_estimate,
    update_accumulators,
    where_present,
)
from dissect_optax._precision import cast_like, upcast, zeros_for_accumulation


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
      ValueError: If μ is outside [0, 1), or `accumulator_dtype` is not a
        floating-point dtype.
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
    momentum = checked_decay("momentum", momentum)
    check_floating("accumulator_dtype", accumulator_dtype)

    def init_fn(params: optax.Params) -> AccumulateMomentumState:
        return AccumulateMomentumState(
            trace=zeros_for_accumulation(params, accumulator_dtype),
            variance=zeros_for_accumulation(params, accumulator_dtype, real=True),
        )

    def update_fn(
        updates: optax.Updates,
        state: AccumulateMomentumState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Estimate, AccumulateMomentumState]:
        del params, extra_args
        estimate = require_estimate(updates, "accumulate_momentum")
        check_state("accumulate_momentum", state, AccumulateMomentumState)

        def accumulate(
            mean: jax.Array, variance: jax.Array, r: jax.Array, s: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            r, s = upcast((r, s))
            mu = jnp.asarray(momentum, s.dtype)
            return (
                _formulas.accumulate(r, mean.astype(r.dtype), mu),
                _formulas.accumulate(s, variance.astype(s.dtype), mu * mu),
            )

        trace, spread = update_accumulators(
            accumulate,
            (estimate.mean, estimate.variance),
            (state.trace, state.variance),
        )
        new_state = AccumulateMomentumState(*cast_like((trace, spread), tuple(state)))
        trace, spread = (where_present(estimate.mean, x) for x in (trace, spread))
        return Estimate(trace, spread, estimate.dtypes), new_state

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
    momentum = checked_decay("momentum", momentum)

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
        check_state("correct_for_momentum", state, CorrectForMomentumState)
        count = optax.safe_increment(state.count)
        variance = jax.tree.map(
            lambda s: _formulas.scaled(s, _formulas.kappa(momentum, count, s.dtype)),
            estimate.variance,
        )
        estimate = Estimate(estimate.mean, variance, estimate.dtypes)
        return estimate, CorrectForMomentumState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def accumulate_gradients(
    momentum: jax.typing.ArrayLike,
) -> optax.GradientTransformation:
    """As `optax.trace`, r ← μ r + g on plain gradients, in the dtypes of the state.

    Optax multiplies by an array μ as it is, which fails for other dtypes where
    implicit promotion is an error.
    """

    def init_fn(params: optax.Params) -> optax.TraceState:
        return optax.TraceState(trace=jax.tree.map(jnp.zeros_like, params))

    def update_fn(
        updates: optax.Updates,
        state: optax.TraceState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.TraceState]:
        del params
        check_state("m_sgd` and `m_ssd", state, optax.TraceState)

        def accumulate(g: jax.Array | None, r: jax.Array) -> jax.Array | None:
            if g is None:
                return None
            wide = upcast(r)
            mu = jnp.asarray(momentum, wide.real.dtype)
            return _formulas.accumulate(wide, g.astype(wide.dtype), mu)

        trace = jax.tree.map(accumulate, updates, state.trace, is_leaf=is_none)
        return trace, optax.TraceState(trace=trace)

    return optax.GradientTransformation(init_fn, update_fn)
