"""Gradients of look-ups: rows that are added to a table of zeros."""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import _formulas
from dissect_optax.gradient_variance._program import (
    Derived,
    Source,
    derive,
    dtype_of,
    shape_of,
)
from dissect_optax.gradient_variance._terms import (
    Batch,
    Moments,
    Term,
    accumulator,
    widened,
)

# Up to so many look-ups of one example are compared with each other; more are sorted.
COMPARED_LOOK_UPS = 64
# From so many elements on, one number for each row costs little beside the table.
WIDE_ROW = 8


@dataclasses.dataclass(frozen=True, eq=False)
class TableRows(Term):
    """Rows of a table that one example reads, each added at its index.

    The indexed axes of the table, in the given order, count as one. An index beyond
    the table stands for a look-up that was dropped.
    """

    indices: Source  # int32[T]
    rows: Source  # [T, row]
    table_shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table_shape

    @property
    def dtype(self) -> Any:
        return accumulator(dtype_of(self.rows))

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.indices, self.rows)

    @property
    def routes(self) -> tuple[str, ...]:
        return ("table rows (scatter-add)",)

    @property
    def layout(self) -> Hashable:
        """Key of the sets of rows that can be looked up as one."""
        return (self.table_shape, self.axes)

    @property
    def height(self) -> int:
        """Number of rows of the table."""
        return math.prod(self.table_shape[a] for a in self.axes)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: the axes that are not indexed."""
        axes = enumerate(self.table_shape)
        return tuple(n for a, n in axes if a not in self.axes)

    def extra_memory(self, examples: int) -> int:
        # The rows are the program's own; their squares are added to a second table.
        entries, width = shape_of(self.rows)
        return examples * entries * (width + 8)

    def extra_operations(self, examples: int) -> int:
        entries, width = shape_of(self.rows)
        sorting = max(1, math.ceil(math.log2(max(2, examples * entries))))
        return examples * entries * (8 * width + 4 * sorting)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self._add(environment[self.indices], environment[self.rows])

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        indices, rows = stacks[self.indices], stacks[self.rows]
        return self._add(indices.reshape(-1), rows.reshape(-1, rows.shape[-1]))

    def _add(self, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """The table with the rows added at their indices."""
        rows = widened(rows).reshape(-1, *self.row_shape)
        places = self._places(indices)
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, rows.ndim)),
            inserted_window_dims=tuple(sorted(self.axes)),
            scatter_dims_to_operand_dims=self.axes,
        )
        table = jnp.zeros(self.table_shape, rows.dtype)
        mode = jax.lax.GatherScatterMode.FILL_OR_DROP
        return jax.lax.scatter_add(table, places, rows, numbers, mode=mode)

    def _places(self, indices: jax.Array) -> jax.Array:
        """One index per axis, [T, axes], from indices of rows."""
        sizes = [self.table_shape[a] for a in self.axes]
        places = []
        for size in sizes[:0:-1]:
            places.append(indices % size)
            indices = indices // size
        # The first one is not reduced: beyond the table it stays beyond.
        return jnp.stack([indices, *places[::-1]], axis=-1)

    def joined(self, other: "TableRows") -> "TableRows":
        """All rows of both."""
        return dataclasses.replace(
            self,
            indices=_concatenated(self.indices, other.indices),
            rows=_concatenated(self.rows, other.rows),
        )

    # ---- Moments ---------------------------------------------------------------------

    def moments(self, batch: Batch) -> Moments:
        indices, rows, _ = entries = self._entries(batch)
        mean = self._scattered(indices, entries.weighted(rows))
        # Deviations, and not squares and their mean: rows that many examples read may
        # have nearly the same gradient. Only rows that were read are looked at.
        at_rows = mean.at[indices].get(mode="fill", fill_value=0)
        squares = _formulas.squared_magnitude(rows - at_rows)
        # Examples that do not read the row have gradient zero there. Its readers add
        # that between them, which saves another pass over the rows.
        read = self._readers(indices, entries.shares)
        unread = jnp.maximum(1 - read, 0) / jnp.where(read > 0, read, 1)
        squares += _for_rows(unread, rows) * _formulas.squared_magnitude(at_rows)
        spread = self._scattered(indices, batch.scaled(entries.weighted(squares)))
        return self.unflattened(mean), self.unflattened(spread)

    def _readers(self, indices: jax.Array, shares: jax.Array) -> jax.Array:
        """For each entry, the share of all examples that read its row."""
        if math.prod(self.row_shape) >= WIDE_ROW:
            read = jnp.zeros(self.height, shares.dtype)
            read = read.at[indices].add(shares, mode="drop")
            return read.at[indices].get(mode="fill", fill_value=1)
        # One number per row would be as much as the table itself.
        order = jnp.argsort(indices)
        ordered = indices[order]
        group = _groups(ordered)
        total = jax.ops.segment_sum(
            shares[order], group, num_segments=indices.size, indices_are_sorted=True
        )
        return jnp.zeros_like(shares).at[order].set(total[group])

    def raw_moments(self, batch: Batch) -> Moments:
        """Mean and mean square."""
        entries = self._entries(batch)
        squares = _formulas.squared_magnitude(entries.rows)
        return (
            self.sum_of_rows(entries.indices, entries.weighted(entries.rows)),
            self.sum_of_rows(entries.indices, entries.weighted(squares)),
        )

    def _entries(self, batch: Batch) -> "_Entries":
        """The gradient of each row that an example reads, once per example and row."""
        indices = batch.for_every_example(self.indices)
        rows = widened(batch.for_every_example(self.rows))
        count = indices.shape[1]
        if 1 < count <= COMPARED_LOOK_UPS:
            indices, rows = jax.vmap(self._merged_by_comparison)(indices, rows)
        elif count > 1:
            indices, rows = jax.vmap(self._merged_by_sorting)(indices, rows)
        shares = batch.shares.astype(rows.real.dtype)
        return _Entries(
            indices.reshape(-1),
            self.with_row_shape(rows),
            jnp.repeat(shares, count),
        )

    def _merged_by_comparison(
        self, indices: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Rows of one index added at its first occurrence; the others are dropped."""
        same = indices[:, None] == indices[None]
        earlier = jnp.tril(same, -1).any(1)
        highest = jax.lax.Precision.HIGHEST
        rows = jnp.matmul(same.astype(rows.dtype), rows, precision=highest)
        return jnp.where(earlier, self.height, indices), rows

    def _merged_by_sorting(
        self, indices: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The same for many look-ups."""
        count = indices.size
        order = jnp.argsort(indices, stable=True)
        ordered = indices[order]
        group = _groups(ordered)
        merged = jax.ops.segment_sum(
            rows[order], group, num_segments=count, indices_are_sorted=True
        )
        return jnp.full(count, self.height, indices.dtype).at[group].set(
            ordered
        ), merged

    def with_row_shape(self, rows: jax.Array) -> jax.Array:
        """Flat rows in the shape that they have in the table.

        XLA's CPU backend divides for the place of every element when it computes an
        outer product flat. A row of one number keeps an axis: rows of none are added
        ten times as slowly.
        """
        return rows.reshape(-1, *(self.row_shape or (1,)))

    def _scattered(self, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """[height, *row] with the rows added at their indices."""
        table = jnp.zeros((self.height, *rows.shape[1:]), rows.dtype)
        return table.at[indices].add(rows, mode="drop")

    def sum_of_rows(self, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """The table to which rows [T, *row] are added at their indices."""
        return self.unflattened(self._scattered(indices, rows))

    def unflattened(self, table: jax.Array) -> jax.Array:
        """From [height, *row] to the table's shape."""
        indexed = tuple(self.table_shape[a] for a in self.axes)
        table = table.reshape(*indexed, *self.row_shape)
        rest = [a for a in range(len(self.table_shape)) if a not in self.axes]
        return table.transpose(np.argsort([*self.axes, *rest]))


def _groups(ordered: jax.Array) -> jax.Array:
    """Consecutive numbers of equal neighbours."""
    starts = jnp.concatenate([jnp.zeros(1, bool), ordered[1:] != ordered[:-1]])
    return jnp.cumsum(starts)


def _for_rows(numbers: jax.Array, rows: jax.Array) -> jax.Array:
    """One number for each row, to be multiplied with the rows [N, *row]."""
    return numbers.reshape(-1, *(1 for _ in rows.shape[1:]))


class _Entries(NamedTuple):
    """Gradients of rows, each of one example; an index beyond the table is unused."""

    indices: jax.Array  # [N]
    rows: jax.Array  # [N, *row]
    shares: jax.Array  # [N], of the example

    def weighted(self, rows: jax.Array) -> jax.Array:
        """Rows times the shares of their examples."""
        return _for_rows(self.shares, rows) * rows


def _concatenated(one: Source, other: Source) -> Derived:
    """Two values of one example, one after the other."""

    def concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(a.dtype, b.dtype)
        return jnp.concatenate([a.astype(dtype), b.astype(dtype)])

    return derive(concatenate, one, other)
