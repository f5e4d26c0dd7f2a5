"""Gradients of look-ups: rows that are added to a table of zeros."""

import dataclasses
import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import _formulas
from dissect_optax.gradient_variance._program import Derived, Source, derive, shape_of
from dissect_optax.gradient_variance._terms import (
    Batch,
    Moments,
    Term,
    accumulator,
    moments_by_example,
    widened,
)


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
        return accumulator(self.rows.aval.dtype)

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.indices, self.rows)

    @property
    def routes(self) -> tuple[str, ...]:
        return ("table rows (scatter-add)",)

    @property
    def layout(self) -> Hashable:
        """What two sets of rows must share to be looked up as one."""
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
        entries, width = shape_of(self.rows)
        return examples * entries * (4 * width + 8)

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
        if batch.two_pass and self.indices not in batch.values:
            return moments_by_example(self, batch)
        mean, spread = self._moments_of_rows(batch, centered=True)
        return mean, batch.scaled(spread)

    def raw_moments(self, batch: Batch) -> Moments:
        """Mean and mean square."""
        return self._moments_of_rows(batch, centered=False)

    def _moments_of_rows(self, batch: Batch, centered: bool) -> Moments:
        """Mean and mean square, or spread, of the rows that any example reads."""
        indices = batch.for_every_example(self.indices)
        rows = widened(batch.for_every_example(self.rows))
        examples, entries = indices.shape
        rows = rows.reshape(examples * entries, -1)
        height = self.height

        # Sorted by row of the table and then by example, so that the entries of one
        # (row, example) pair are neighbours, and so are the pairs of one row.
        count = examples * entries
        order = jnp.argsort(indices.reshape(-1), stable=True)
        table = indices.reshape(-1)[order]
        example = order // entries
        new_row = jnp.concatenate([jnp.ones(1, bool), table[1:] != table[:-1]])
        new_pair = new_row.at[1:].max(example[1:] != example[:-1])
        row_of_entry = jnp.cumsum(new_row) - 1
        pair_of_entry = jnp.cumsum(new_pair) - 1
        sorted_sum = functools.partial(
            jax.ops.segment_sum, num_segments=count, indices_are_sorted=True
        )
        gradients = sorted_sum(rows[order], pair_of_entry)
        # Unused slots at the end stay behind all rows that exist.
        row_of_pair = jnp.full(count, count).at[pair_of_entry].set(row_of_entry)
        table_of_row = jnp.full(count, height).at[row_of_entry].set(table)
        shares = jnp.zeros(count, batch.shares.dtype)
        shares = shares.at[pair_of_entry].set(batch.shares[example])[:, None]
        shares = shares.astype(rows.real.dtype)

        mean = sorted_sum(shares * gradients, row_of_pair)
        if centered:
            deviations = gradients - mean.at[row_of_pair].get(mode="clip")
        else:
            deviations = gradients
        square = sorted_sum(
            shares * _formulas.squared_magnitude(deviations), row_of_pair
        )
        if centered:
            # Examples that do not read the row have gradient zero there.
            absent = jnp.maximum(1 - sorted_sum(shares, row_of_pair), 0)
            square += absent * _formulas.squared_magnitude(mean)
        return self._place(table_of_row, mean), self._place(table_of_row, square)

    def _place(self, table_of_row: jax.Array, rows: jax.Array) -> jax.Array:
        """The table with the given rows, zero elsewhere."""
        table = jnp.zeros((self.height, rows.shape[-1]), rows.dtype)
        return self.unflattened(table.at[table_of_row].set(rows, mode="drop"))

    def sum_of_rows(self, indices: jax.Array, rows: jax.Array) -> jax.Array:
        """The table to which rows [T, row] are added at their indices."""
        table = jnp.zeros((self.height, rows.shape[-1]), rows.dtype)
        return self.unflattened(table.at[indices].add(rows, mode="drop"))

    def unflattened(self, table: jax.Array) -> jax.Array:
        """From [row, element] to the table's shape."""
        indexed = tuple(self.table_shape[a] for a in self.axes)
        table = table.reshape(*indexed, *self.row_shape)
        rest = [a for a in range(len(self.table_shape)) if a not in self.axes]
        return table.transpose(np.argsort([*self.axes, *rest]))


def _concatenated(one: Source, other: Source) -> Derived:
    """Two values of one example, one after the other."""

    def concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(a.dtype, b.dtype)
        return jnp.concatenate([a.astype(dtype), b.astype(dtype)])

    return derive(concatenate, one, other)
