"""Summaries of parts of a batch, and how they are merged.

A `Summary` holds the means and spreads of some examples. Micro-batches are summed up
one after the other, devices along a mapped axis all at once; both merge exactly.
Weights are the shares that examples have in a summary.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import _formulas
from dissect_optax.gradient_variance._plan import Summary

# ---- Micro-batches and mapped axes -------------------------------------------------


def in_microbatches(
    run: Callable[..., tuple[Summary, list[jax.Array]]],
    examples: Any,
    size: int,
    microbatch_size: int,
) -> tuple[Summary, list[jax.Array]]:
    """Summary of a batch from summaries of its parts, one after the other."""
    full = size // microbatch_size
    parts = jax.tree.map(
        functools.partial(_split, count=full, size=microbatch_size), examples
    )
    first, first_aux = run(jax.tree.map(_first, parts))
    merge = functools.partial(_merge_next, run)
    summary, aux = jax.lax.scan(merge, first, jax.tree.map(_after_first, parts))
    collected = [
        jnp.concatenate([head, jax.lax.collapse(rest, 0, 2)])
        for head, rest in zip(first_aux, aux, strict=True)
    ]
    if size % microbatch_size:
        start = full * microbatch_size
        rest = jax.tree.map(functools.partial(_from, start=start), examples)
        summary, last = merge(summary, rest)
        collected = [
            jnp.concatenate([head, tail])
            for head, tail in zip(collected, last, strict=True)
        ]
    return summary, collected


def _split(leaf: jax.Array, count: int, size: int) -> jax.Array:
    """The first `count` microbatches along a new leading axis."""
    return leaf[: count * size].reshape(count, size, *leaf.shape[1:])


def _first(leaf: jax.Array) -> jax.Array:
    """The first microbatch."""
    return leaf[0]


def _after_first(leaf: jax.Array) -> jax.Array:
    """All microbatches but the first."""
    return leaf[1:]


def _from(leaf: jax.Array, start: int) -> jax.Array:
    """The examples after the full microbatches."""
    return leaf[start:]


def _merge_next(
    run: Callable[..., tuple[Summary, list[jax.Array]]], summary: Summary, part: Any
) -> tuple[Summary, list[jax.Array]]:
    """Add the examples of one more microbatch to a summary."""
    other, aux = run(part)
    moments = [
        _formulas.merged_moments(summary.weight, m, s, other.weight, om, os)
        for m, s, om, os in zip(
            summary.means, summary.spreads, other.means, other.spreads, strict=True
        )
    ]
    means, spreads = ([m[i] for m in moments] for i in range(2))
    total = summary.weight + other.weight
    share = jnp.where(total > 0, other.weight / jnp.where(total > 0, total, 1), 0)
    merged = Summary(
        total,
        summary.squared_weight + other.squared_weight,
        summary.value + share * (other.value - summary.value),
        means,
        spreads,
    )
    return merged, aux


def merged_over_axis(
    summary: Summary, axis_name: Any, size: int, equal: bool
) -> Summary:
    """Summary of all devices along a mapped axis, each with `size` examples.

    `equal` says that all examples have the same weight.

    With the shares w of the parts, the mean is Σ w m over their means m, and the spread
    is Σ w (s + |m - mean|²): two arrays are added up, one after the other.
    """
    parts = jax.lax.psum(1, axis_name)
    total = functools.partial(jax.lax.psum, axis_name=axis_name)
    if equal:
        # What is known of all devices need not be asked of them.
        dtype = summary.weight.dtype
        weight = squared_weight = jnp.asarray(size * parts, dtype)
        share = jnp.asarray(1 / parts, dtype)
        value, means = total((share * summary.value, _times(share, summary.means)))
    else:
        # Weights are at most one, so that a mean never grows on the way.
        part = summary.weight / (size * parts)
        weight, squared_weight, value, means = total(
            (
                summary.weight,
                summary.squared_weight,
                part * summary.value,
                _times(part, summary.means),
            )
        )
        safe = jnp.where(weight > 0, weight, 1)
        share, rest = summary.weight / safe, size * parts / safe
        value, means = rest * value, _times(rest, means)
    spreads = total(
        _times(
            share,
            [
                s + _formulas.squared_magnitude(local - mean)
                for s, local, mean in zip(
                    summary.spreads, summary.means, means, strict=True
                )
            ],
        )
    )
    return Summary(weight, squared_weight, value, means, spreads)


def _times(factor: jax.Array, arrays: list[jax.Array]) -> list[jax.Array]:
    """Arrays times a scalar, in their own dtypes."""
    return [factor.astype(x.real.dtype) * x for x in arrays]


# ---- Weights -----------------------------------------------------------------------


def relative_weights(weights: jax.Array, axis_name: Any) -> jax.Array:
    """Weights in units of the largest one, so that their squares do not overflow."""
    weights = weights.astype(jnp.promote_types(weights.dtype, jnp.float32))
    largest = weights.max()
    if axis_name is not None:
        largest = jax.lax.pmax(largest, axis_name)
    return weights / jnp.where(largest > 0, largest, 1)


# ---- Checks ------------------------------------------------------------------------


def check_microbatch_size(microbatch_size: int | None) -> None:
    """Reject a microbatch size that is not a positive integer."""
    if microbatch_size is None:
        return
    is_integer = isinstance(microbatch_size, int | np.integer)
    if not is_integer or isinstance(microbatch_size, bool) or microbatch_size < 1:
        raise ValueError(
            "`microbatch_size` must be a positive integer or None, got "
            f"{microbatch_size!r}. None takes the whole batch at once."
        )


def checked_weights(weights: jax.typing.ArrayLike, size: int) -> jax.Array:
    """Weights as an array; concrete ones must leave a variance to be estimated."""
    weights = jnp.asarray(weights)
    if weights.shape != (size,):
        raise ValueError(
            f"`weights` must hold one number per example, shape ({size},), got shape "
            f"{weights.shape}."
        )
    if not isinstance(weights, jax.core.Tracer):
        concrete = np.asarray(weights)
        if not (np.isfinite(concrete).all() and (concrete >= 0).all()):
            raise ValueError(
                f"`weights` must be finite and not negative, got {concrete}. Use 0 for "
                "examples that do not count."
            )
        if np.count_nonzero(concrete) < 2:
            raise ValueError(
                "The variance of a gradient needs at least two examples with positive "
                f"weight, got {np.count_nonzero(concrete)}."
            )
    return weights
