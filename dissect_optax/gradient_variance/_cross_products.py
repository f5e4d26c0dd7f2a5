"""The square of a sum of terms, without the gradient of any example.

Terms that share elements are added before they are squared,

    |a + b|² = |a|² + |b|² + 2 Re(a conj b),

and where both are made of small factors, the batch mean of each part is a matrix
product or a sum over the rows of a table. Three kinds of terms can be crossed: a
contraction, rows of a table, and a small value that is repeated along some axes (the
gradient of a norm); each may be multiplied by what all examples share.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dissect_optax import _formulas
from dissect_optax.gradient_variance import _contractions
from dissect_optax.gradient_variance._contractions import Contraction
from dissect_optax.gradient_variance._placement import Repetition
from dissect_optax.gradient_variance._tables import TableRows
from dissect_optax.gradient_variance._terms import (
    Batch,
    Materialized,
    Moments,
    Reindexed,
    Scaled,
    Sum,
    Term,
    raw_moments_by_example,
    widened,
)


@dataclasses.dataclass(frozen=True)
class _Repeated:
    """A small value of one example, repeated along axes of the gradient."""

    term: Reindexed
    value: Materialized
    move: Repetition


@dataclasses.dataclass(frozen=True)
class _Part:
    """A term of the sum: what can be crossed, and the scales around it."""

    core: Contraction | TableRows | _Repeated
    scales: tuple[Scaled, ...]

    def scaled(self, elements: jax.Array, batch: Batch) -> jax.Array:
        """Elements of the core times the scales."""
        for scale in self.scales:
            elements = scale.scale(elements, batch.constants)
        return elements

    def raw_moments(self, batch: Batch) -> Moments:
        """Mean and mean square."""
        mean, square = _raw_moments(self.core, batch)
        for scale in self.scales:
            mean = scale.scale(mean, batch.constants)
            square = scale.scale(square, batch.constants, square=True)
        return mean, square


def moments(term: Sum, batch: Batch) -> Moments | None:
    """Mean and spread of a sum, or nothing where it has to be formed."""
    parts = _parts(term)
    if parts is None:
        return None
    means, squares = zip(*(part.raw_moments(batch) for part in parts), strict=True)
    mean = functools.reduce(jnp.add, means)
    square = functools.reduce(jnp.add, squares)
    for k, part in enumerate(parts):
        for other in parts[k + 1 :]:
            cross = _cross(part.core, other.core, batch)
            cross = other.scaled(part.scaled(cross, batch), batch)
            square = square + 2 * cross
    return mean, batch.scaled(_formulas.spread_from_squares(square, mean))


def extra_memory(term: Sum, examples: int) -> int | None:
    """Numbers held meanwhile, or nothing where the sum has to be formed."""
    parts = _parts(term)
    if parts is None:
        return None
    # One cross product is as large as the result, to which it is added.
    return term.size + sum(t.extra_memory(examples) for t in term.terms)


def _parts(term: Sum) -> list[_Part] | None:
    """The terms of a sum as parts that can be crossed with each other cheaply."""
    parts = []
    for inner in term.terms:
        part = _part(inner)
        if part is None:
            return None
        parts.append(part)
    pairs = [(a.core, b.core) for k, a in enumerate(parts) for b in parts[k + 1 :]]
    complex_scale = any(
        jnp.issubdtype(scale.dtype, jnp.complexfloating)
        for part in parts
        for scale in part.scales
    )
    if complex_scale or not all(_can_cross(a, b) for a, b in pairs):
        return None
    return parts


def _part(term: Term) -> _Part | None:
    """A term as a part, if it is of a kind that can be crossed."""
    scales = []
    while isinstance(term, Scaled):
        scales.append(term)
        term = term.term
    core: Contraction | TableRows | _Repeated | None = None
    if isinstance(term, TableRows) or (
        isinstance(term, Contraction) and term.left_view is None
    ):
        core = term
    elif isinstance(term, Reindexed) and isinstance(term.term, Materialized):
        core = _repeated(term)
    return None if core is None else _Part(core, tuple(scales[::-1]))


def _repeated(term: Reindexed) -> _Repeated | None:
    """A broadcast of a small value, if the term is one."""
    value = term.term
    assert isinstance(value, Materialized)
    if not isinstance(term.move, Repetition):
        return None
    return _Repeated(term, value, term.move)


def _can_cross(one: object, other: object) -> bool:
    """Whether the cross product of two cores is cheap."""
    if isinstance(one, Contraction) and isinstance(other, Contraction):
        return one.flat_shape == other.flat_shape and _contractions.is_worth_crossing(
            one.depth + other.depth
        )
    if isinstance(one, TableRows) and isinstance(other, Contraction):
        return _rows_meet(one, other)
    if isinstance(one, Contraction):
        return _can_cross(other, one)
    if isinstance(one, _Repeated) and isinstance(other, Contraction):
        return _repeats_one_side(one, other) is not None
    if isinstance(one, _Repeated) and isinstance(other, _Repeated):
        return one.move == other.move
    return False


def _raw_moments(core: Contraction | TableRows | _Repeated, batch: Batch) -> Moments:
    """Mean and mean square of one core."""
    if isinstance(core, TableRows):
        return core.raw_moments(batch)
    if isinstance(core, Contraction):
        if core.has_cheap_cross_terms:
            return core.raw_moments(batch)
        return raw_moments_by_example(core, batch)
    mean, square = _small_moments(batch.for_every_example(core.value.source), batch)
    return core.move(mean), core.move(square)


def _small_moments(stack: jax.Array, batch: Batch) -> Moments:
    """Mean and mean square of a small value of every example."""
    values = widened(stack)
    squares = _formulas.squared_magnitude(values)
    return _mean_of_small(values, batch), _mean_of_small(squares, batch)


def _mean_of_small(values: jax.Array, batch: Batch) -> jax.Array:
    """Mean of a small value of every example."""
    shares = batch.shares.astype(values.dtype)
    return jnp.tensordot(shares, values, 1, precision=jax.lax.Precision.HIGHEST)


def _cross(one: object, other: object, batch: Batch) -> jax.Array:
    """Batch mean of Re(a conj b)."""
    if isinstance(one, Contraction) and isinstance(other, Contraction):
        product = _contractions.cross_product(
            one.matrices(batch), other.matrices(batch), batch, one.precision
        )
        return one.unflattened(product)
    if isinstance(one, TableRows) and isinstance(other, Contraction):
        return _cross_of_rows(one, other, batch)
    if isinstance(one, _Repeated) and isinstance(other, Contraction):
        return _cross_of_repeated(one, other, batch)
    if isinstance(one, _Repeated) and isinstance(other, _Repeated):
        first, second = (
            widened(batch.for_every_example(r.value.source)) for r in (one, other)
        )
        first, second = (one.move.without_units(v, 1) for v in (first, second))
        return one.move(_mean_of_small(jnp.real(first * jnp.conj(second)), batch))
    assert isinstance(one, Contraction)
    return _cross(other, one, batch)


# ---- Rows of a table with a contraction ----------------------------------------------


def _rows_meet(rows: TableRows, product: Contraction) -> bool:
    """Whether rows of the table are rows of one factor: a tied output layer."""
    if product.dimensions.left_shared:
        return False
    return _side_of_rows(rows, product) is not None


def _side_of_rows(rows: TableRows, product: Contraction) -> int | None:
    """Which factor has the indexed axes, and no others: 0 for left, 1 for right."""
    left, right = product.free
    count = len(rows.axes)
    indexed = tuple(range(count))
    if tuple(rows.axes) == indexed and len(left) == count:
        return 0
    behind = tuple(range(len(left), len(left) + len(right)))
    if tuple(rows.axes) == behind:
        return 1
    return None


def _cross_of_rows(rows: TableRows, product: Contraction, batch: Batch) -> jax.Array:
    """Each row times the same row of the contraction."""
    sides: Sequence[jax.Array] = product.matrices(batch)
    if _side_of_rows(rows, product) == 1:
        sides = sides[::-1]
    indexed, other = sides  # [n, depth, height] and [n, depth, row]
    indices = batch.for_every_example(rows.indices)
    values = widened(batch.for_every_example(rows.rows))
    picked = jax.vmap(
        lambda table, index: table.at[:, index].get(mode="fill", fill_value=0)
    )(indexed, indices)
    precision = product.precision if batch.precision is None else batch.precision
    met = jnp.einsum("nkt,nkr->ntr", picked, other, precision=precision)
    shares = batch.shares.astype(met.real.dtype)[:, None, None]
    crossed = shares * jnp.real(values * jnp.conj(met))
    return rows.sum_of_rows(indices.reshape(-1), rows.with_row_shape(crossed))


# ---- A repeated value with a contraction ---------------------------------------------


def _repeats_one_side(repeated: _Repeated, product: Contraction) -> int | None:
    """The factor that has all axes of the value, 0 for left and 1 for right."""
    left, right = (len(free) for free in product.free)
    wanted = set(repeated.move.axes)
    if product.dimensions.left_shared:
        return None
    if wanted <= set(range(left)):
        return 0
    return 1 if wanted <= set(range(left, left + right)) else None


def _cross_of_repeated(
    repeated: _Repeated, product: Contraction, batch: Batch
) -> jax.Array:
    """One factor times the value, contracted with the other factor."""
    left, right = product.matrices(batch)
    side = _repeats_one_side(repeated, product)
    count = len(product.free[0])
    first, shape = (
        (count, product.shape[count:]) if side else (0, product.shape[:count])
    )
    axes = tuple(a - first for a in repeated.move.axes)
    stack = batch.for_every_example(repeated.value.source)
    spread = Repetition(shape, axes)
    values = jax.vmap(spread)(repeated.move.without_units(stack, leading=1))
    values = jnp.conj(widened(values)).reshape(values.shape[0], 1, -1)
    if side:
        right = right * values
    else:
        left = left * values
    right = right * batch.shares.astype(right.real.dtype)[:, None, None]
    precision = product.precision if batch.precision is None else batch.precision
    crossed = jnp.einsum("nki,nkj->ij", left, right, precision=precision)
    return product.unflattened(jnp.real(crossed))
