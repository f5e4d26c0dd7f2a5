"""Terms whose elements stand at places that the program computes."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from dissect_optax.gradient_variance._program import (
    Source,
    read,
    run_equation,
    shape_of,
)
from dissect_optax.gradient_variance._terms import (
    Batch,
    Elementwise,
    Moments,
)

# So many windows are compared with each other at most.
MOST_WINDOWS = 2**10


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Repeats elements along new axes, as `jax.lax.broadcast_in_dim`."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """The axis of the result that each axis of the operand becomes, if it has not size
    one."""

    def __call__(self, elements: jax.Array) -> jax.Array:
        return jax.lax.broadcast_in_dim(
            self.without_units(elements), self.shape, self.axes
        )

    def without_units(self, elements: jax.Array, leading: int = 0) -> jax.Array:
        """Elements without their axes of size one, but for `leading` ones."""
        sizes = (self.shape[a] for a in self.axes)
        return elements.reshape(*elements.shape[:leading], *sizes)


@dataclasses.dataclass(frozen=True, eq=False)
class Moved(Elementwise):
    """Elements moved by an equation whose other inputs all examples share.

    `dynamic_slice` and `gather` take them from there, `scatter-add` puts them there,
    each at a place of its own.
    """

    equation: JaxprEqn

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.equation.outvars[0])

    @property
    def _scatters(self) -> bool:
        return self.equation.primitive.name == "scatter-add"

    @property
    def _places(self) -> tuple[Var, ...]:
        """The inputs that say where."""
        inputs = self.equation.invars
        places = inputs[1:2] if self._scatters else inputs[1:]
        return tuple(v for v in places if isinstance(v, Var))

    @property
    def sources(self) -> tuple[Source, ...]:
        return (*self.term.sources, *self._places)

    @property
    def invariants(self) -> tuple[Source, ...]:
        return (*self.term.invariants, *self._places)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self._move(self.term.value(environment, precision), environment)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self._move(self.term.total(stacks, precision), stacks)

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        move = functools.partial(self._move, environment=batch.constants)
        return move(mean), move(spread)

    def _move(self, elements: jax.Array, environment: Mapping[Any, Any]) -> jax.Array:
        """The elements where the equation puts them, or takes them from."""
        inputs = self.equation.invars
        if self._scatters:
            # Not by the equation, which holds an addition of its own dtype.
            params = self.equation.params
            return jax.lax.scatter_add(
                jnp.zeros(self.shape, elements.dtype),
                read(inputs[1], environment),
                elements,
                params["dimension_numbers"],
                indices_are_sorted=params["indices_are_sorted"],
                unique_indices=params["unique_indices"],
                mode=params["mode"],
            )
        operands = [environment[v] for v in inputs[1:] if isinstance(v, Var)]
        return run_equation(self.equation, elements, *operands)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Placed(Elementwise):
    """A part of a parameter, among zeros, at a place that all examples share.

    As by `dynamic_update_slice`. In a loop the place may change from step to step.
    """

    starts: tuple[Source, ...]
    table_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.table_shape

    @property
    def sources(self) -> tuple[Source, ...]:
        starts = (s for s in self.starts if not isinstance(s, Literal))
        return (*self.term.sources, *starts)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self._place(self.term.value(environment, precision), environment)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        # One step after the other stands in front; each has a place of its own.
        names = tuple(dict.fromkeys(self.term.sources))
        fixed = set(self.term.invariants)
        axes = [None if v in fixed else 0 for v in names]
        step = functools.partial(self._step, names, precision)
        parts = jax.vmap(step, in_axes=(axes,))([stacks[v] for v in names])
        count = parts.shape[0]
        starts = [
            jnp.broadcast_to(
                saturated(s.val if isinstance(s, Literal) else stacks[s]), (count,)
            )
            for s in self.starts
        ]
        rank = len(self.table_shape)
        numbers = jax.lax.ScatterDimensionNumbers(
            update_window_dims=tuple(range(1, rank + 1)),
            inserted_window_dims=(),
            scatter_dims_to_operand_dims=tuple(range(rank)),
        )
        return jax.lax.scatter_add(
            jnp.zeros(self.table_shape, parts.dtype),
            jnp.stack(starts, axis=-1),
            parts,
            numbers,
            # A window that starts outside is moved inside.
            mode=jax.lax.GatherScatterMode.CLIP,
        )

    def _step(
        self, names: tuple[Source, ...], precision: Any, values: list[jax.Array]
    ) -> jax.Array:
        """The part of one step."""
        return self.term.value(dict(zip(names, values, strict=True)), precision)

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        place = functools.partial(self._place, environment=batch.constants)
        return place(mean), place(spread)

    def _place(self, part: jax.Array, environment: Mapping[Any, Any]) -> jax.Array:
        """The part among zeros."""
        starts = [
            s.val if isinstance(s, Literal) else environment[s] for s in self.starts
        ]
        table = jnp.zeros(self.table_shape, part.dtype)
        return jax.lax.dynamic_update_slice(table, part, starts)


def saturated(indices: jax.typing.ArrayLike) -> jax.Array:
    """Indices as int32; what is out of its range stays beyond every table."""
    indices = jnp.asarray(indices)
    limits = jnp.iinfo(indices.dtype)
    low, high = max(limits.min, -1), min(limits.max, 2**31 - 1)
    return jnp.clip(indices, low, high).astype(jnp.int32)


def windows_are_disjoint(
    starts: np.ndarray,
    axes: Sequence[int],
    sizes: Sequence[int],
    shape: Sequence[int],
    clips: bool,
) -> bool:
    """Whether windows of the given sizes share no element.

    `starts` [T, axes] says where each begins along the given axes; along the others
    all begin at zero.
    """
    count = starts.shape[0]
    if count > MOST_WINDOWS:
        return False
    apart = np.zeros((count, count), bool)
    for column, axis in enumerate(axes):
        first = starts[:, column].astype(np.int64)
        if clips:
            first = np.clip(first, 0, shape[axis] - sizes[axis])
        distance = np.abs(first[:, None] - first[None, :])
        apart |= distance >= sizes[axis]
    return bool(apart[~np.eye(count, dtype=bool)].all())
