"""Two passes over the mini-batches, and the few numbers that each one leaves.

The first pass sums up the mean gradient, its variance and, for the improvements, the
mean sign. The second takes every gradient again and compares it with the mean of the
others, which is what makes products unbiased and signs honest. Nothing of the size of
the parameters is kept per mini-batch; a jackknife needs the numbers only.

With the improvements, even and odd mini-batches are summed up separately: the factor
γ of one half acts on the gradients of the other one, and does not know their noise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dissect_optax import theory
from dissect_optax.diagnostics._problem import Leaves, Loss

# Of jax.Array on the device, and of np.ndarray when the numbers have been collected.
Numbers = Any
# Directions of §2.1, in the order of Table 1.
DIRECTIONS = ("gradient", "sign", "adapted_gradient", "adapted_sign")
# Where predicted sign success is compared with counted success.
BIN_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# The ratios |p|/σ at which success (8) reaches the inner edges: √2 erfinv(2ρ-1).
_BIN_RATIOS = (0.2533471, 0.5244005, 0.8416212, 1.2815516)
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


class Totals(NamedTuple):
    """Sums over mini-batches, by groups of them: arrays of shape [groups, *parameter].

    Attributes:
      count: Mini-batches in each group, of shape [groups].
      mean: Mean gradient.
      mean_sign: Mean of the signs; None where no improvements are wanted.
      variance: Mean of the variance (44) of a mini-batch's gradient.
    """

    # Hides tuple.count, as Optax's states do.
    count: jax.Array  # type: ignore[assignment]
    mean: Leaves
    mean_sign: Leaves | None
    variance: Leaves


class Overall(NamedTuple):
    """Number, mean gradient and variance of all mini-batches."""

    count: jax.Array  # type: ignore[assignment]
    mean: Leaves
    variance: Leaves


class First(NamedTuple):
    """Numbers of one mini-batch from the first pass: the loss, and tr ŝ by leaf."""

    loss: Numbers
    noise: Numbers


class Second(NamedTuple):
    """Numbers of one mini-batch from the second pass; arrays over leaves.

    Attributes:
      neighbours: g·g_before.
      agree_with_all: Elements whose sign is that of the mean over all mini-batches.
      agree_with_others: The same for the mean over the others.
      agree_above: `agree_with_all` among elements of a predicted success above the
        inner edges of the bins; over all leaves, of shape [bins - 1].
      ahead: z·ḡ without this mini-batch, of shape [directions, leaves].
      behind: g·z̄ without this mini-batch.
      curvature: z·Hz, H from the next mini-batch; None where it is not wanted.
    """

    neighbours: Numbers
    agree_with_all: Numbers
    agree_with_others: Numbers
    agree_above: Numbers
    ahead: Numbers
    behind: Numbers
    curvature: Numbers


class Elements(NamedTuple):
    """Summary of the elements of every leaf after the first pass.

    Attributes:
      active: Elements that had a gradient in any mini-batch, of shape [leaves].
      factor: Quantiles of γ = 1/(1+η²), of shape [leaves, quantiles].
      below_half: Share of active elements with γ < 1/2, η² > 1.
      unresolved: Share whose sign these mini-batches do not determine: the mean
        gradient is within two standard errors.
      success: Success (8) at the mean gradient, summed over active elements.
      above: Active elements above the inner edges of the bins, over all leaves.
      success_above: Their success, summed.
    """

    active: Numbers
    factor: Numbers
    below_half: Numbers
    unresolved: Numbers
    success: Numbers
    above: Numbers
    success_above: Numbers


@dataclasses.dataclass(frozen=True)
class Passes:
    """The compiled steps for one loss."""

    first: Callable[..., tuple[Totals, First]]
    overall: Callable[[Totals], Overall]
    elements: Callable[..., Elements]
    second: Callable[..., tuple[Leaves, Second]]
    product: Callable[..., Leaves]


@functools.lru_cache(maxsize=16)
def compiled_passes(loss: Loss, improvements: bool) -> Passes:
    """The steps for a loss, compiled once for it."""
    return build_passes(loss, improvements)


def build_passes(loss: Loss, improvements: bool) -> Passes:
    """The steps for a loss that cannot be hashed."""
    return Passes(
        jax.jit(functools.partial(_first, loss, improvements), donate_argnums=0),
        jax.jit(_overall),
        jax.jit(_elements),
        jax.jit(functools.partial(_second, loss, improvements), donate_argnums=2),
        jax.jit(
            lambda leaves, frozen, batch, z: loss.curvature_times(
                leaves, batch, frozen, [z]
            )[0]
        ),
    )


def empty_totals(leaves: Leaves, improvements: bool) -> Totals:
    """Totals of no mini-batch."""
    groups = 2 if improvements else 1

    def zeros() -> Leaves:
        return [
            jnp.zeros((groups, *x.shape), jnp.promote_types(x.dtype, jnp.float32))
            for x in leaves
        ]

    return Totals(
        jnp.zeros(groups), zeros(), zeros() if improvements else None, zeros()
    )


# ---- The first pass ----------------------------------------------------------------


def _first(
    loss: Loss,
    improvements: bool,
    totals: Totals,
    leaves: Leaves,
    frozen: list[Any],
    batch: Any,
    number: jax.Array,
) -> tuple[Totals, First]:
    """Add one more mini-batch to the totals."""
    value, gradient, variance = loss.gradient_and_variance(leaves, batch, frozen)
    group = number % 2 if improvements else 0
    count = totals.count[group] + 1

    def add(mean: jax.Array, new: jax.Array) -> jax.Array:
        return mean.at[group].add((new - mean[group]) / count.astype(mean.dtype))

    totals = Totals(
        totals.count.at[group].set(count),
        jax.tree.map(add, totals.mean, gradient),
        None
        if totals.mean_sign is None
        else jax.tree.map(add, totals.mean_sign, jax.tree.map(jnp.sign, gradient)),
        jax.tree.map(add, totals.variance, variance),
    )
    return totals, First(value, jnp.stack([jnp.sum(s) for s in variance]))


def _overall(totals: Totals) -> Overall:
    """Number, mean gradient and variance of all mini-batches."""
    count = jnp.sum(totals.count)
    share = totals.count / count

    def merged(groups: jax.Array) -> jax.Array:
        return jnp.tensordot(share.astype(groups.dtype), groups, axes=1)

    means, variances = (
        [merged(x) for x in leaves] for leaves in (totals.mean, totals.variance)
    )
    return Overall(count, means, variances)


def _elements(overall: Overall) -> Elements:
    """Summary of all elements by leaf."""
    count, means, variances = overall
    rows = []
    above = jnp.zeros((2, len(_BIN_RATIOS)))
    for mean, variance in zip(means, variances, strict=True):
        std = jnp.sqrt(variance)
        active = (mean != 0) | (variance > 0)
        size = jnp.maximum(jnp.sum(active), 1)
        rest = variance / count.astype(mean.dtype)
        signal = jnp.sqrt(jnp.maximum(jnp.square(mean) - rest, 0))
        gamma = theory.optimal_factor(signal, std)
        quantiles = jnp.nanquantile(
            jnp.where(active, gamma, jnp.nan), jnp.asarray(QUANTILES, gamma.dtype)
        )
        success = jnp.where(active, theory.success_probability(mean, std), 0)
        over = _above_edges(mean, std, active)
        above += jnp.stack(
            [
                jnp.stack([jnp.sum(o) for o in over]),
                jnp.stack([jnp.sum(jnp.where(o, success, 0)) for o in over]),
            ]
        )
        unresolved = active & (jnp.square(mean) < 4 * rest)
        rows.append(
            (
                jnp.sum(active),
                quantiles,
                jnp.sum(active & (gamma < 0.5)) / size,
                jnp.sum(unresolved) / size,
                jnp.sum(success),
            )
        )
    columns = [jnp.stack(column) for column in zip(*rows, strict=True)]
    return Elements(*columns, *above)


def _above_edges(
    mean: jax.Array, std: jax.Array, active: jax.Array
) -> tuple[jax.Array, ...]:
    """Where success is above each of the inner edges of the bins."""
    return tuple(active & (jnp.abs(mean) >= r * std) for r in _BIN_RATIOS)


# ---- The second pass ---------------------------------------------------------------


def _second(
    loss: Loss,
    improvements: bool,
    totals: Totals,
    overall: Overall,
    before: Leaves,
    leaves: Leaves,
    frozen: list[Any],
    batch: Any,
    next_batch: Any,
    number: jax.Array,
) -> tuple[Leaves, Second]:
    """Compare one mini-batch with the others; returns its gradient as well."""
    gradient = loss.gradient(leaves, batch, frozen)
    count, means, variances = overall
    others = _without(means, gradient, count)

    agree_with_all, agree_with_others = [], []
    agree_above = jnp.zeros(len(_BIN_RATIOS))
    for g, mean, other, variance in zip(
        gradient, means, others, variances, strict=True
    ):
        active = (mean != 0) | (variance > 0)
        with_all = jnp.where(active, _agreement(g, mean), 0)
        agree_with_all.append(jnp.sum(with_all))
        agree_with_others.append(jnp.sum(jnp.where(active, _agreement(g, other), 0)))
        over = _above_edges(mean, jnp.sqrt(variance), active)
        agree_above += jnp.stack([jnp.sum(jnp.where(o, with_all, 0)) for o in over])

    ahead, behind = [_dots(gradient, others)], [_dots(gradient, others)]
    curvature = None
    if improvements:
        ahead, behind, curvature = _directions(
            loss, totals, gradient, others, leaves, frozen, next_batch, number
        )
    second = Second(
        _dots(gradient, before),
        jnp.stack(agree_with_all),
        jnp.stack(agree_with_others),
        agree_above,
        jnp.stack(ahead),
        jnp.stack(behind),
        curvature,
    )
    return gradient, second


def _directions(
    loss: Loss,
    totals: Totals,
    gradient: Leaves,
    others: Leaves,
    leaves: Leaves,
    frozen: list[Any],
    next_batch: Any,
    number: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Products of the four directions with gradients and curvature."""
    own, other = number % 2, 1 - number % 2
    assert totals.mean_sign is not None
    sign = [jnp.sign(g) for g in gradient]
    all_signs = _overall(totals._replace(mean=totals.mean_sign)).mean
    other_signs = _without(all_signs, sign, jnp.sum(totals.count))

    # Of this half, without this mini-batch.
    rest = totals.count[own] - 1
    own_mean = _without([x[own] for x in totals.mean], gradient, totals.count[own])
    own_sign = _without([x[own] for x in totals.mean_sign], sign, totals.count[own])
    own_factor, own_root = _factors(own_mean, [x[own] for x in totals.variance], rest)
    factor, root = _factors(
        [x[other] for x in totals.mean],
        [x[other] for x in totals.variance],
        totals.count[other],
    )

    # The direction, the mean gradient and the mean direction to compare with, and the
    # direction once more, with a factor of other mini-batches: the product of the two
    # then has the expectation of a square with a factor that is known.
    adapted, adapted_sign = _product(factor, gradient), _product(root, sign)
    cases = (
        (gradient, others, others, gradient),
        (sign, others, other_signs, sign),
        (adapted, own_mean, _product(factor, own_mean), _product(own_factor, gradient)),
        (adapted_sign, own_mean, _product(root, own_sign), _product(own_root, sign)),
    )
    bent = loss.curvature_times(leaves, next_batch, frozen, [case[0] for case in cases])
    ahead = [_dots(z, mean) for z, mean, _, _ in cases]
    behind = [_dots(gradient, mean_z) for _, _, mean_z, _ in cases]
    curvature = [_dots(case[3], hz) for case, hz in zip(cases, bent, strict=True)]
    return ahead, behind, jnp.stack(curvature)


def _without(means: Leaves, part: Leaves, count: jax.Array) -> Leaves:
    """Means without one of their `count` parts."""

    def leave_out(mean: jax.Array, x: jax.Array) -> jax.Array:
        rest = jnp.maximum(count - 1, 1).astype(mean.dtype)
        return mean + (mean - x) / rest

    return [leave_out(mean, x) for mean, x in zip(means, part, strict=True)]


def _factors(
    means: Leaves, variances: Leaves, count: jax.Array
) -> tuple[Leaves, Leaves]:
    """Estimates of γ = 1/(1+η²), Eq. (14), and of its root, Adam's factor (6).

    From means over `count` mini-batches, with x = m² - s/n for p², which is unbiased.
    Both factors are concave in x, so that their expectations are too small: a root by
    10 % at η² = 4, n = 32. To second order the estimate f(x) has the bias f''/2 var x,
    which is -γ(1-γ) v and -(1-γ)(1+3γ)/8 v in units of f, with the relative variance
    v = (4η² + 2η⁴/n)/n of x. That is taken out, up to v = 1, where x is hardly known.
    """

    def factors(mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, jax.Array]:
        n = jnp.maximum(count, 1).astype(mean.dtype)
        signal = jnp.square(mean) - variance / n
        total = signal + variance
        known = total > 0
        gamma = jnp.where(known, signal / jnp.where(known, total, 1), 0)
        # A negative one is left as it is: sums of products with it stay unbiased.
        positive = gamma > 0
        safe = jnp.where(positive, gamma, 1)
        eta2 = (1 - safe) / safe
        v = jnp.minimum((4 * eta2 + 2 * jnp.square(eta2) / n) / n, 1)
        mended = gamma * (1 + safe * (1 - safe) * v)
        root = jnp.sqrt(safe) * (1 + (1 - safe) * (1 + 3 * safe) / 8 * v)
        return mended, jnp.where(positive, root, 0)

    pairs = [factors(m, s) for m, s in zip(means, variances, strict=True)]
    return [gamma for gamma, _ in pairs], [root for _, root in pairs]


def _agreement(first: jax.Array, second: jax.Array) -> jax.Array:
    """One where the signs agree, zero where they do not, 1/2 where one is zero."""
    return 0.5 + 0.5 * jnp.sign(first) * jnp.sign(second)


def _product(first: Leaves, second: Leaves) -> Leaves:
    return [x * y for x, y in zip(first, second, strict=True)]


def _dots(first: Leaves, second: Leaves) -> jax.Array:
    """Inner products by leaf."""
    return jnp.stack([jnp.sum(x * y) for x, y in zip(first, second, strict=True)])
