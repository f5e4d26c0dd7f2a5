"""Diagonal dominance of the curvature matrix, Eq. (13), by two independent estimates.

Σ|q_ij| is estimated from whole columns, sampled at random in every parameter, and by
products with Cauchy vectors. Columns are exact where the matrix is small and few of
them suffice where its rows are alike; Cauchy products do not miss a large column.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax.diagnostics._intervals import (
    NO_SKEWNESS,
    Interval,
    Skewness,
    positive_ratio_interval,
    student_quantile,
)
from dissect_optax.diagnostics._passes import Passes
from dissect_optax.diagnostics._problem import Point
from dissect_optax.diagnostics._progress import Progress

# Up to this many parameters all columns are taken.
EXACT_UP_TO = 256
# Products that are averaged to one estimate: three are needed for a finite variance.
_PRODUCTS_PER_ESTIMATE = 4


class Dominance(NamedTuple):
    """c of Eq. (13) for the whole matrix and the block of every parameter.

    Attributes:
      overall: From columns.
      layers: From columns, of the diagonal blocks.
      cauchy: The overall c with Σ|q_ij| from Cauchy products.
      disagree: Whether the two differ by more than their errors allow.
    """

    overall: Interval
    layers: list[Interval]
    cauchy: Interval
    disagree: bool


class _Columns(NamedTuple):
    """Sampled columns: the parameter, |q_jj|, and Σ_i|q_ij| by parameters of i."""

    leaf: np.ndarray
    diagonal: np.ndarray
    sums: np.ndarray


def columns_per_leaf(sizes: list[int], columns: int) -> list[int]:
    """How many columns to take from each parameter; all of them where d is small.

    In proportion to the sizes, but at least two, without which there is no variance.
    """
    total = sum(sizes)
    if total <= max(EXACT_UP_TO, columns):
        return sizes
    return [min(size, max(2, round(columns * size / total))) for size in sizes]


def cauchy_estimates(products: int) -> int:
    """Number of independent estimates that so many Cauchy products give."""
    return max(2, products // _PRODUCTS_PER_ESTIMATE)


def number_of_products(sizes: list[int], columns: int, products: int) -> int:
    """Products with the curvature matrix that the dominance takes."""
    cauchy = cauchy_estimates(products) * _PRODUCTS_PER_ESTIMATE
    return sum(columns_per_leaf(sizes, columns)) + cauchy


def measure_dominance(
    passes: Passes,
    point: Point,
    examples: object,
    key: jax.Array,
    *,
    columns: int,
    products: int,
    progress: Progress,
) -> Dominance:
    """Estimate c from columns and from Cauchy products; see the module."""
    sizes = [math.prod(shape) for shape in point.shapes]
    counts = columns_per_leaf(sizes, columns)
    key_of_columns, key_of_products = jax.random.split(key)
    seed = np.asarray(jax.random.bits(key_of_columns, (4,)))
    sample = _sampled_columns(
        passes, point, examples, np.random.default_rng(seed), sizes, counts, progress
    )
    layers = []
    for leaf in range(len(sizes)):
        own = sample.leaf == leaf
        block = _Columns(
            np.zeros(own.sum(), int), sample.diagonal[own], sample.sums[own][:, [leaf]]
        )
        layers.append(_from_columns(block, [sizes[leaf]])[0])
    overall, diagonal, all_sums, column_error = _from_columns(sample, sizes)

    estimates = _cauchy_sums(
        passes, point, examples, key_of_products, products, progress
    )
    mean = float(estimates.mean())
    error = float(estimates.std(ddof=1)) / math.sqrt(len(estimates))
    t = student_quantile(len(estimates) - 1)
    if not mean > 0:
        return Dominance(overall, layers, Interval(math.nan, 0.0, 1.0), False)
    low, high = mean - t * error, mean + t * error
    cauchy = Interval(
        min(diagonal / mean, 1.0),
        min(diagonal / high, 1.0),
        min(diagonal / low, 1.0) if low > 0 else 1.0,
    )
    # Errors of a few percent, as single precision makes them, are no disagreement.
    allowed = t * error + 2 * column_error + 0.02 * all_sums
    return Dominance(overall, layers, cauchy, abs(mean - all_sums) > allowed)


def _sampled_columns(
    passes: Passes,
    point: Point,
    examples: object,
    random: np.random.Generator,
    sizes: list[int],
    counts: list[int],
    progress: Progress,
) -> _Columns:
    """Columns of the curvature matrix, without replacement within a parameter."""
    places, diagonal, sums = [], [], []
    for leaf, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        chosen = random.choice(size, count, replace=False, shuffle=False)
        for index in chosen:
            direction = _unit_vector(tuple(point.shapes), leaf, index)
            column = passes.product(point.leaves, point.frozen, examples, direction)
            own, by_leaf = _column_sums(direction, column)
            places.append(leaf)
            diagonal.append(float(own))
            sums.append(np.asarray(by_leaf, float))
            progress.advance()
    return _Columns(np.asarray(places), np.asarray(diagonal), np.asarray(sums))


@functools.partial(jax.jit, static_argnums=0)
def _unit_vector(
    shapes: tuple[tuple[int, ...], ...], leaf: jax.Array, index: jax.Array
) -> list[jax.Array]:
    """The vector with one at an element of a parameter."""
    return [
        ((jnp.arange(math.prod(shape)) == index) & (leaf == number))
        .astype(jnp.float32)
        .reshape(shape)
        for number, shape in enumerate(shapes)
    ]


@jax.jit
def _column_sums(
    unit: list[jax.Array], column: list[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """|q_jj| and Σ_i|q_ij| by parameter."""
    dtype = jnp.result_type(*column)
    own = [jnp.sum(jnp.where(u != 0, x, 0)) for u, x in zip(unit, column, strict=True)]
    sums = [jnp.sum(jnp.abs(x)) for x in column]
    total = jnp.sum(jnp.stack([x.astype(dtype) for x in own]))
    return jnp.abs(total), jnp.stack([x.astype(dtype) for x in sums])


def _from_columns(
    sample: _Columns, sizes: list[int]
) -> tuple[Interval, float, float, float]:
    """Dominance with its interval, Σ|q_ii|, Σ|q_ij| and the error of the latter.

    Stratified sampling: d_l times the mean over the sampled columns of each parameter
    l, with the variance d_l² (1 - n_l/d_l) s_l²/n_l, which is zero where all columns of
    a parameter were taken. A few columns are often much larger than the others, so the
    interval takes their skewness into account: without, it ends too early where the
    sample holds too few of them (82 % coverage in place of 95 % for a matrix whose
    scales are log-normal with σ = 0.7).
    """
    both = np.stack([sample.diagonal, sample.sums.sum(axis=1)], axis=1)
    total, covariance, degrees = np.zeros(2), np.zeros((2, 2)), 0
    for leaf, size in enumerate(sizes):
        values = both[sample.leaf == leaf]
        count = len(values)
        if not count:
            continue
        total += size * values.mean(axis=0)
        if count < size:
            spread = np.cov(values, rowvar=False, ddof=1)
            covariance += size**2 * (1 - count / size) * spread / count
            degrees += count - 1
    diagonal, everything = map(float, total)
    error = math.sqrt(covariance[1, 1])
    if not everything > 0:
        return Interval(math.nan, 0.0, 1.0), diagonal, everything, error
    if degrees == 0:
        exact = min(diagonal / everything, 1.0)
        return Interval(exact, exact, exact), diagonal, everything, error
    skewness = _skewness(sample.leaf, both @ [1, -diagonal / everything], sizes)
    interval = positive_ratio_interval(
        diagonal, everything, covariance, degrees, skewness
    )
    value, low, high = (min(end, 1.0) for end in interval)
    return Interval(value, low, high), diagonal, everything, error


def _skewness(leaf: np.ndarray, values: np.ndarray, sizes: list[int]) -> Skewness:
    """Skewness of the stratified estimate of a sum, from the sampled values.

    A mean of n out of N values without replacement has the variance (1 - f)s²/n with
    f = n/N, the third moment (1 - f)(1 - 2f)k/n² with their third moment k, and the
    covariance (1 - f)k/n with s², up to factors (N - 1)/N.
    """
    variance = third = with_variance = 0.0
    for place, size in enumerate(sizes):
        own = values[leaf == place]
        count = len(own)
        if not 2 <= count < size:
            continue
        deviations = own - own.mean()
        rest = 1 - count / size
        variance += size**2 * rest * (deviations**2).sum() / (count - 1) / count
        if count > 2:
            k = count * (deviations**3).sum() / ((count - 1) * (count - 2))
            third += size**3 * rest * (2 * rest - 1) * k / count**2
            with_variance += size**3 * rest**2 * k / count**2
    if not variance > 0:
        return NO_SKEWNESS
    return Skewness(third / variance**1.5, with_variance / variance**1.5)


def _cauchy_sums(
    passes: Passes,
    point: Point,
    examples: object,
    key: jax.Array,
    products: int,
    progress: Progress,
) -> np.ndarray:
    """Independent unbiased estimates of Σ|q_ij|.

    For a vector v of standard Cauchy variables (Hv)_i is Cauchy with the scale
    Σ_j|q_ij|. The geometric mean of m of its magnitudes, times cos(π/2m)^m, is an
    unbiased estimate of the scale, as precise as the median, and needs the sum of the
    logarithms only (Li, Hastie & Church 2007).
    """
    m = _PRODUCTS_PER_ESTIMATE
    estimates = []
    for group_key in jax.random.split(key, cauchy_estimates(products)):
        logarithms = [jnp.zeros(shape) for shape in point.shapes]
        for product_key in jax.random.split(group_key, m):
            v = _cauchy_vector(tuple(point.shapes), product_key)
            hv = passes.product(point.leaves, point.frozen, examples, v)
            logarithms = _add_logarithms(logarithms, hv)
            jax.block_until_ready(logarithms)
            progress.advance()
        estimates.append(float(_geometric_means(logarithms)))
    return np.asarray(estimates)


@functools.partial(jax.jit, static_argnums=0)
def _cauchy_vector(
    shapes: tuple[tuple[int, ...], ...], key: jax.Array
) -> list[jax.Array]:
    """Standard Cauchy variables."""
    keys = jax.random.split(key, len(shapes))
    return [jax.random.cauchy(k, s) for k, s in zip(keys, shapes, strict=True)]


@jax.jit
def _add_logarithms(sums: list[jax.Array], product: list[jax.Array]) -> list[jax.Array]:
    """Sums of the logarithms of magnitudes."""
    return [s + jnp.log(jnp.abs(x)) for s, x in zip(sums, product, strict=True)]


@jax.jit
def _geometric_means(logarithms: list[jax.Array]) -> jax.Array:
    """Unbiased scales of all elements, summed up."""
    m = _PRODUCTS_PER_ESTIMATE
    scales = [jnp.sum(jnp.exp(s / m)) for s in logarithms]
    return jnp.sum(jnp.stack(scales)) * math.cos(math.pi / (2 * m)) ** m
