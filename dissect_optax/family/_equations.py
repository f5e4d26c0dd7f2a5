"""Equations of the family as pure functions on arrays, beside those of the paper.

Letters are those of `dissect_optax._formulas`; d is an update direction.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dissect_optax import _formulas

# How an average starts: divided by 1-β^t, from its initial value, or with the first
# observation.
Start = Literal["corrected", "zero", "first"]


def weight_of_newest(
    decay: jax.typing.ArrayLike,
    count: jax.Array,
    start: Start,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """Weight of the newest observation in an average."""
    if start == "corrected":
        return _formulas.newest_weight(decay, count, dtype)
    weight = 1 - jnp.asarray(decay, dtype)
    if start == "first":
        return jnp.where(count <= 1, 1.0, weight)
    return weight


def total_weight(
    decay: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """1-β^t, the weight of all gradients in an average that started at zero."""
    rest = 1 - jnp.asarray(decay, dtype)
    weight = rest / _formulas.newest_weight(decay, count, dtype)
    return jnp.where(count < 1, 0.0, weight)


def over_total_weight(
    average: jax.Array, decay: jax.typing.ArrayLike, count: jax.Array
) -> jax.Array:
    """The bias correction a/(1-β^t); the average itself before the first gradient."""
    total = total_weight(decay, count, average.dtype)
    return average / jnp.where(total == 0, 1.0, total)


def share_of_initial_value(
    decay: jax.typing.ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """β^t/(1-β^t), what the bias correction makes of the weight of the beginning.

    Zero where a decay that was rounded to one has no beginning to correct for.
    """
    total = total_weight(decay, count, dtype)
    none = total == 0
    return jnp.where(none, 0.0, (1 - total) / jnp.where(none, 1.0, total))


def nesterov_average(
    mean: jax.Array,
    gradient: jax.Array,
    decay: jax.typing.ArrayLike,
    count: jax.Array,
    start: Start,
) -> jax.Array:
    """β m_t + (1-β) g_t; with bias correction, of m by 1-β^(t+1) and of g by 1-β^t."""
    real = gradient.real.dtype
    beta = jnp.asarray(decay, real)
    weight = weight_of_newest(decay, count, start, real)
    ratio = jnp.ones((), real)
    if start == "corrected":
        ratio = _formulas.newest_weight(decay, count + 1, real) / weight
    return (beta * ratio).astype(mean.dtype) * mean + weight.astype(
        gradient.dtype
    ) * gradient


def change(gradient: jax.Array, previous: jax.Array, count: jax.Array) -> jax.Array:
    """g_t - g_(t-1); zero in the first step."""
    return jnp.where(count <= 1, jnp.zeros((), gradient.dtype), gradient - previous)


def sign_controlled(
    previous: jax.Array, square: jax.Array, weight: jax.Array
) -> jax.Array:
    """V - w sign(v-g²) g², the additive rule of Yogi."""
    step = jnp.where(previous > square, -weight, weight) * square
    # Equal ones may both be infinite; NaN equals nothing.
    return jnp.where(previous == square, previous, previous + step)


@jax.custom_jvp
def square_of_root_plus(moment: jax.Array, eps: jax.Array) -> jax.Array:
    """(√v+ε)²; a moment below zero, which rounding can cause, counts as zero."""
    return jnp.square(jnp.sqrt(jnp.where(moment < 0, 0.0, moment)) + eps)


@square_of_root_plus.defjvp
def _square_of_root_plus_jvp(
    primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    """(1 + ε/√v) dv + 2 (√v+ε) dε; without ε/√v where v is zero, zero if infinite."""
    moment, eps = primals
    d_moment, d_eps = tangents
    defined = (moment >= jnp.finfo(moment.dtype).tiny) & jnp.isfinite(moment)
    root = jnp.sqrt(jnp.where(defined, moment, 1.0))
    ratio = jnp.where(defined, eps / root, 0.0)
    root = jnp.where(defined, root, 0.0)
    tangent = (1 + ratio) * d_moment + 2 * (root + eps) * d_eps
    return square_of_root_plus(moment, eps), jnp.where(jnp.isinf(moment), 0.0, tangent)


@jax.custom_jvp
def reciprocal_of_root(eta2: jax.Array) -> jax.Array:
    """η⁻¹ = (η²)^(-1/2), at most one over the rounding unit."""
    unit = jnp.finfo(eta2.dtype).eps
    # Not `rsqrt`, which takes XLA on a CPU twenty instructions.
    return jnp.sqrt(1 / jnp.maximum(eta2, unit * unit))


@reciprocal_of_root.defjvp
def _reciprocal_of_root_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Tangent -η⁻³/2 dη²; zero where η² is at its end."""
    (eta2,), (d_eta2,) = primals, tangents
    unit = jnp.finfo(eta2.dtype).eps
    value = reciprocal_of_root(eta2)
    slope = -0.5 * value * value * value
    return value, jnp.where(eta2 < unit * unit, 0.0, slope) * d_eta2


def rank_one(row: jax.Array, column: jax.Array, axis: int) -> jax.Array:
    """R cᵀ / mean(r), the non-negative rank-one matrix with these margins.

    Both keep the summed axis with length one; `axis` is that along which r varies.
    """
    mean = jnp.mean(row, axis=axis, keepdims=True)
    empty = mean == 0
    return jnp.where(empty, 0.0, row / jnp.where(empty, 1.0, mean)) * column


def squared_norm(x: jax.Array) -> jax.Array:
    """‖x‖²."""
    if jnp.iscomplexobj(x):
        return squared_norm(x.real) + squared_norm(x.imag)
    # Without the barrier XLA on a CPU squares x into an array of its own first, which
    # doubles the time of a step.
    return jnp.sum(jnp.square(jax.lax.optimization_barrier(x)))


def agreement(update: jax.Array, gradient: jax.Array, least_share: float) -> jax.Array:
    """1[u·g>0] / max(share of them, least share), the cautious mask."""
    same = jnp.real(jnp.conj(update) * gradient) > 0
    real = jnp.real(update).dtype
    agrees = same.astype(real)
    return agrees / jnp.maximum(jnp.mean(agrees), jnp.asarray(least_share, real))


def sum_of_powers(
    decay: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """1 + β + β² + … = 1/(1-β); zero for a decay that was rounded to one."""
    rest = 1 - jnp.asarray(decay, dtype)
    none = rest <= 0
    return jnp.where(none, 0.0, 1 / jnp.where(none, 1.0, rest))
