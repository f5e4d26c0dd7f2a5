"""Correlation between the gradients of examples that follow one another in the data.

The variance of a mini-batch's gradient is that of independent examples over their
number. Where the example is a part of what was drawn, a token of a sequence or a frame
of a film, neighbours have similar gradients, and sums of neighbours have a larger
spread than their variance says: by a factor 1 + ρ for pairs. This ρ is measured, over
all parameters, with the data in the order in which they were given.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax.dissection._data import number_of_examples
from dissect_optax.dissection._effects import student_quantile

PyTree = Any

# Pairs that are looked at, and how many are needed for an interval that says anything.
_MOST_PAIRS, _FEWEST_PAIRS = 64, 16


class Correlation(NamedTuple):
    """An estimate of ρ with its 95 % interval."""

    value: float
    low: float
    high: float


def neighbour_correlation(
    gradient: Callable[..., PyTree], params: PyTree, data: PyTree
) -> Correlation | None:
    """Correlation of the gradients of neighbours, from pairs all over the data.

    Args:
      gradient: `gradient(params, example, key)`, the gradient of one example.
      params: Where it is taken.
      data: Arrays `[examples, ...]` in the order in which they were given.

    Returns:
      The correlation; None where there are too few pairs, or gradients do not differ.
    """
    pairs = min(_MOST_PAIRS, number_of_examples(data) // 2)
    if pairs < _FEWEST_PAIRS:
        return None
    # Disjoint, since two pairs begin at least two examples apart.
    first = np.linspace(0, number_of_examples(data) - 2, pairs).astype(int)
    indices = np.stack([first, first + 1], axis=1)
    chosen = jax.tree.map(lambda array: jnp.asarray(array[indices]), data)
    products, squares = jax.device_get(jax.jit(_moments(gradient))(params, chosen))
    return correlation_of_pairs(products.astype(float), squares.astype(float))


def _moments(gradient: Callable[..., PyTree]) -> Callable[..., Any]:
    """From pairs to both moments of each, about the mean of all gradients."""

    def moments(params: PyTree, pairs: PyTree) -> tuple[jax.Array, jax.Array]:
        count = number_of_examples(pairs)
        keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), (count, 2))

        def gradients(pair: PyTree, keys: jax.Array) -> PyTree:
            return jax.vmap(gradient, (None, 0, 0))(params, pair, keys)

        # One pair at a time: no more than two gradients are in memory, and their mean.
        def add(total: PyTree, item: tuple[PyTree, jax.Array]) -> tuple[PyTree, None]:
            both = gradients(*item)
            return jax.tree.map(lambda t, g: t + g.sum(0), total, both), None

        def centred(item: tuple[PyTree, jax.Array]) -> tuple[jax.Array, jax.Array]:
            both = jax.tree.map(lambda g, m: g - m[None], gradients(*item), mean)
            product = sum(jnp.vdot(g[0], g[1]).real for g in jax.tree.leaves(both))
            square = sum(jnp.sum(jnp.abs(g) ** 2) for g in jax.tree.leaves(both)) / 2
            return jnp.asarray(product), jnp.asarray(square)

        one = jax.tree.map(lambda leaf: leaf[0], (pairs, keys))
        shapes = jax.eval_shape(gradients, *one)
        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape[1:], g.dtype), shapes)
        total, _ = jax.lax.scan(add, zeros, (pairs, keys))
        mean = jax.tree.map(lambda t: t / (2 * count), total)
        return jax.lax.map(centred, (pairs, keys))

    return moments


def correlation_of_pairs(
    products: np.ndarray, squares: np.ndarray
) -> Correlation | None:
    """Correlation from centred moments, with an interval over the pairs.

    Args:
      products: (a - m)·(b - m) of each pair of gradients, m their mean over all pairs.
      squares: (‖a - m‖² + ‖b - m‖²)/2 of each.

    Returns:
      The correlation; None where it is not defined.

    Examples:
      >>> correlation_of_pairs(np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 1.0]))
      Correlation(value=1.0, low=1.0, high=1.0)
    """
    count, total = len(products), float(squares.sum())
    if not (math.isfinite(total) and total > 0):
        return None
    ratio = float(products.sum()) / total
    residuals = products - ratio * squares
    error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / total
    half = student_quantile(count - 1) * error
    return Correlation(
        *(
            _without_bias(min(max(end, -1.0), 1.0), 2 * count)
            for end in (ratio, ratio - half, ratio + half)
        )
    )


def _without_bias(ratio: float, examples: int) -> float:
    """ρ from the ratio of moments about the mean of so many examples.

    That mean has the variance q = (1 + ρ)/n of one example's, which is missing from
    both moments: the ratio is (ρ - q)/(1 - q).
    """
    return (ratio * (examples - 1) + 1) / (examples - 1 + ratio)
