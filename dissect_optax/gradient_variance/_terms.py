"""What the gradient of one example is made of, and its mean and spread over a batch.

A gradient is a tree of terms. At its ends stand values that the program computes for
every example; between them stand only linear operations that do not depend on the
example. So the squares can often be summed without ever forming a gradient:

* `Contraction` of one pair of vectors, xδᵀ (a dense layer): the batch mean of xδᵀ is
  one matrix product of all x with all δ, and the batch mean of its square is another,
  of x² with δ².
* `Contraction` over time or space, Σ_t x_t δ_tᵀ (attention, convolution as patches):
  a batched matrix product for a few examples at a time, added up with its square.
* `Rows` of a table (embeddings): the rows of one token within an example are added
  before they are squared; rows that no example reads cost nothing.
* `Mapped`, `Scaled`, `Joined`: elements keep their identity, so they act on the mean
  and on the spread.
* `Total`: parts that overlap are added example by example before they are squared.
* `Constant`: the same for all examples; moves the mean only.
* `Stored`: everything else. The gradients of all examples lie side by side.

"Spread" is the population variance Σ_k p_k |g_k - ḡ|² with shares p_k that sum to one.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var

from dissect_optax import _formulas
from dissect_optax.gradient_variance._program import Environment, run_equation, shaped

Moments = tuple[jax.Array, jax.Array]

# Examples evaluated at a time: as many as keep their gradients within a CPU's caches.
CHUNK_BYTES = 6 * 2**20
CHUNK_EXAMPLES = 16
# A stack of smaller gradients is reduced at once, by a product with the shares.
SMALL_SIZE = 2**16


@dataclasses.dataclass(frozen=True)
class Batch:
    """Values of the program for all examples, and how to take moments over them."""

    values: Environment  # [n, ...] each
    constants: Environment  # without a batch axis
    shares: jax.Array  # [n], non-negative, sums to one
    scale: jax.Array  # what spreads are multiplied with
    two_pass: bool
    precision: jax.lax.PrecisionLike
    known: dict[int, Moments] = dataclasses.field(default_factory=dict)

    def moments(self, term: "Term") -> Moments:
        """Mean and spread of a term, computed once where parameters share it."""
        if id(term) not in self.known:
            self.known[id(term)] = term.moments(self)
        return self.known[id(term)]

    def scaled(self, spread: jax.Array) -> jax.Array:
        """A spread in the unit that the caller wants."""
        return spread * self.scale.astype(spread.dtype)

    def for_every_example(self, variable: Var) -> jax.Array:
        """A value with its batch axis, also where it is the same for all examples."""
        if variable in self.values:
            return self.values[variable]
        value = self.constants[variable]
        return jnp.broadcast_to(value, (self.shares.size, *value.shape))


def accumulator(dtype: Any) -> jnp.dtype:
    """The dtype in which numbers of `dtype` are added up: at least 32 bits."""
    return jnp.promote_types(dtype, jnp.float32)


class Term(abc.ABC):
    """A part of the gradient of one example."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape for one example."""

    @property
    @abc.abstractmethod
    def variables(self) -> tuple[Var, ...]:
        """Values of the program that the term needs."""

    @abc.abstractmethod
    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        """The term for one example."""

    @property
    @abc.abstractmethod
    def routes(self) -> tuple[str, ...]:
        """How the moments are computed, in words."""

    def moments(self, batch: Batch) -> Moments:
        """Mean and spread over the batch."""
        return _moments_by_example(self, batch)

    @property
    def size(self) -> int:
        """Number of elements for one example."""
        return math.prod(self.shape)

    @property
    def workspace(self) -> int:
        """Numbers held per example while its gradient is evaluated."""
        return self.size

    def extra_memory(self, examples: int) -> int:
        """Numbers held beyond the program's own values and the two results."""
        return chunk_size(self, examples) * self.workspace

    def extra_operations(self, examples: int) -> int:
        """Floating-point operations beyond those of the plain gradient."""
        return 3 * examples * self.size


@dataclasses.dataclass(frozen=True)
class Stored(Term):
    """A value of the program, kept for every example; `reason` says why."""

    variable: Var
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        return shaped(self.variable).shape

    @property
    def variables(self) -> tuple[Var, ...]:
        return (self.variable,)

    @property
    def routes(self) -> tuple[str, ...]:
        return (f"stored gradients ({self.reason})",)

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        value = environment[self.variable]
        return value.astype(accumulator(value.dtype))

    def moments(self, batch: Batch) -> Moments:
        if self.size > SMALL_SIZE:
            return _moments_by_example(self, batch)
        values = self.value(batch.values, batch)
        mean = _average(values, batch.shares)
        deviations = _formulas.squared_magnitude(values - mean[None])
        return mean, batch.scaled(_average(deviations, batch.shares))

    def extra_memory(self, examples: int) -> int:
        return examples * self.size

    def extra_operations(self, examples: int) -> int:
        return 4 * examples * self.size


@dataclasses.dataclass(frozen=True)
class Constant(Term):
    """A value that is the same for all examples."""

    variable: Var | Literal

    @property
    def shape(self) -> tuple[int, ...]:
        return shaped(self.variable).shape

    @property
    def variables(self) -> tuple[Var, ...]:
        return () if isinstance(self.variable, Literal) else (self.variable,)

    @property
    def routes(self) -> tuple[str, ...]:
        return ("the same for all examples",)

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        if isinstance(self.variable, Literal):
            value = jnp.asarray(self.variable.val)
        else:
            value = batch.constants[self.variable]
        return value.astype(accumulator(value.dtype))

    def moments(self, batch: Batch) -> Moments:
        value = self.value({}, batch)
        return value, jnp.zeros_like(value.real)

    def extra_memory(self, examples: int) -> int:
        return 0

    def extra_operations(self, examples: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True)
class Patches:
    """The windows of an image that the elements of a convolution kernel meet.

    [batch, feature, *space] in the order `spec` becomes [groups, entries, positions,
    batch per group]: one position for each element of the kernel.
    """

    spec: tuple[int, ...]
    padding: tuple[tuple[int, int, int], ...]
    window: tuple[int, ...]
    window_dilation: tuple[int, ...]
    positions: tuple[int, ...]
    strides: tuple[int, ...]
    groups: int

    def __call__(self, image: jax.Array) -> jax.Array:
        batch, feature, *space = self.spec
        image = image.transpose(feature, *space, batch)
        zero = jnp.zeros((), image.dtype)
        image = jax.lax.pad(image, zero, ((0, 0, 0), *self.padding, (0, 0, 0)))
        # One axis after the other: 3 + 3 slices for a kernel of 3×3, not 9.
        for axis, (count, stride, size, dilation) in enumerate(
            zip(
                self.positions,
                self.strides,
                self.window,
                self.window_dilation,
                strict=True,
            ),
            start=1,
        ):
            reach = (size - 1) * dilation + 1
            slices = [
                jax.lax.slice_in_dim(
                    image, i * stride, i * stride + reach, dilation, axis
                )
                for i in range(count)
            ]
            image = jnp.stack(slices, axis=-2)
        entries = image.shape[0] * math.prod(self.window)
        return image.reshape(entries, math.prod(self.positions), self.groups, -1)


@dataclasses.dataclass(frozen=True)
class KernelEntries:
    """What each window of `Patches` is multiplied with.

    [out feature, feature, *space] in the order `spec` becomes [entries, groups, out].
    """

    spec: tuple[int, ...]
    groups: int

    def __call__(self, kernel: jax.Array) -> jax.Array:
        out, feature, *space = self.spec
        kernel = kernel.transpose(feature, *space, out)
        return kernel.reshape(-1, self.groups, kernel.shape[-1] // self.groups)


View = Patches | KernelEntries | None
Dimensions = tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]


@dataclasses.dataclass(frozen=True)
class Contraction(Term):
    """Sum over pairs of `dot_general(left, right)`, each seen through its view."""

    left: tuple[Var, ...]
    right: tuple[Var, ...]
    left_view: View
    right_view: View
    dimensions: Dimensions
    precision: Any
    name: str

    @functools.cached_property
    def factors(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the two factors for one example."""
        left, right = shaped(self.left[0]), shaped(self.right[0])
        factors = []
        for aval, view in ((left, self.left_view), (right, self.right_view)):
            factor = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
            factors.append(factor if view is None else jax.eval_shape(view, factor))
        return factors[0], factors[1]

    @property
    def depth(self) -> int:
        """Number of outer products that one example contributes."""
        (contracted, _), _ = self.dimensions
        shape = self.factors[0].shape
        return len(self.left) * math.prod(shape[d] for d in contracted)

    @property
    def shape(self) -> tuple[int, ...]:
        (left_dims, right_dims), (left_batch, right_batch) = self.dimensions
        left, right = (factor.shape for factor in self.factors)
        return (
            *(left[d] for d in left_batch),
            *(n for d, n in enumerate(left) if d not in (*left_dims, *left_batch)),
            *(n for d, n in enumerate(right) if d not in (*right_dims, *right_batch)),
        )

    @property
    def variables(self) -> tuple[Var, ...]:
        return (*self.left, *self.right)

    @property
    def routes(self) -> tuple[str, ...]:
        kind = "outer product" if self.depth == 1 else "product per example"
        return (f"{kind} ({self.name})",)

    @property
    def workspace(self) -> int:
        left, right = (math.prod(factor.shape) for factor in self.factors)
        copies = len(self.left) > 1
        viewed = (left if self.left_view or copies else 0) + (
            right if self.right_view or copies else 0
        )
        return self.size + viewed

    def extra_memory(self, examples: int) -> int:
        if self.depth > 1:
            return super().extra_memory(examples)
        return examples * sum(math.prod(factor.shape) for factor in self.factors)

    def extra_operations(self, examples: int) -> int:
        if self.depth > 1:
            return super().extra_operations(examples)
        return 2 * examples * self.size

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        left = _viewed(self.left_view, [environment[v] for v in self.left])
        right = _viewed(self.right_view, [environment[v] for v in self.right])
        return self._multiply(left, right, batch, first=0)

    def moments(self, batch: Batch) -> Moments:
        if self.depth > 1 or batch.two_pass:
            return _moments_by_example(self, batch)
        left = self._stack(self.left, self.left_view, batch)
        right = self._stack(self.right, self.right_view, batch)
        shares = batch.shares.reshape(-1, *(1,) * (right.ndim - 1))
        mean = self._multiply(left, right * shares, batch, first=1)
        squares = self._multiply(
            _formulas.squared_magnitude(left),
            _formulas.squared_magnitude(right) * shares,
            batch,
            first=1,
        )
        return mean, batch.scaled(_formulas.spread_from_squares(squares, mean))

    def _stack(self, names: Sequence[Var], view: View, batch: Batch) -> jax.Array:
        """A factor of all examples, in the dtype of the accumulator."""
        stacks = [batch.for_every_example(v) for v in names]
        factor = jax.vmap(functools.partial(_viewed, view))(stacks)
        return factor.astype(accumulator(factor.dtype))

    def _multiply(
        self, left: jax.Array, right: jax.Array, batch: Batch, first: int
    ) -> jax.Array:
        """Contract two factors; `first` is one where a batch axis comes first."""
        leading = first + (len(self.left) > 1)
        (left_dims, right_dims), (left_batch, right_batch) = (
            tuple(tuple(d + leading for d in dims) for dims in pair)
            for pair in self.dimensions
        )
        summed = tuple(range(leading))
        precision = self.precision if batch.precision is None else batch.precision
        return jax.lax.dot_general(
            left,
            right,
            (
                ((*summed, *left_dims), (*summed, *right_dims)),
                (left_batch, right_batch),
            ),
            precision=precision,
            preferred_element_type=accumulator(
                jnp.promote_types(left.dtype, right.dtype)
            ),
        )


def _viewed(view: View, values: Sequence[jax.Array]) -> jax.Array:
    """A factor of one example; several are stacked along a new first axis."""
    factors = [x if view is None else view(x) for x in values]
    return jnp.stack(factors) if len(factors) > 1 else factors[0]


@dataclasses.dataclass(frozen=True)
class Rows(Term):
    """Rows added to a table of zeros: the gradient of a look-up along one axis."""

    indices: Var
    updates: Var
    equation: JaxprEqn

    @property
    def shape(self) -> tuple[int, ...]:
        return shaped(self.equation.outvars[0]).shape

    @property
    def variables(self) -> tuple[Var, ...]:
        return (self.indices, self.updates)

    @property
    def routes(self) -> tuple[str, ...]:
        return ("table rows (scatter-add)",)

    def extra_memory(self, examples: int) -> int:
        return 4 * examples * shaped(self.updates).size

    def extra_operations(self, examples: int) -> int:
        return 8 * examples * shaped(self.updates).size

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        updates = environment[self.updates]
        dtype = accumulator(updates.dtype)
        return jax.lax.scatter_add(
            jnp.zeros(self.shape, dtype),
            environment[self.indices],
            updates.astype(dtype),
            self.equation.params["dimension_numbers"],
            mode=self.equation.params["mode"],
        )

    def moments(self, batch: Batch) -> Moments:
        numbers = self.equation.params["dimension_numbers"]
        (axis,) = numbers.inserted_window_dims
        examples = batch.shares.size
        indices = batch.for_every_example(self.indices)
        updates = batch.for_every_example(self.updates)
        windows = [d + 1 for d in numbers.update_window_dims]
        entries = [d for d in range(updates.ndim) if d not in windows]
        updates = updates.transpose(*entries, *windows)
        row_shape = updates.shape[len(entries) :]
        rows = updates.reshape(-1, math.prod(row_shape))
        rows = rows.astype(accumulator(rows.dtype))
        height = self.shape[axis]
        table = self._valid(indices.reshape(-1).astype(jnp.int32), height)

        # Sorted by row of the table and then by example, so that the entries of one
        # (row, example) pair are neighbours, and so are the pairs of one row.
        count = table.size
        order = jnp.argsort(table, stable=True)
        table = table[order]
        example = order // (count // examples)
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

        mean = sorted_sum(shares * gradients, row_of_pair)
        deviations = gradients - mean.at[row_of_pair].get(mode="clip")
        spread = sorted_sum(
            shares * _formulas.squared_magnitude(deviations), row_of_pair
        )
        # Examples that do not read the row have gradient zero there.
        absent = 1 - sorted_sum(shares, row_of_pair)
        spread += jnp.maximum(absent, 0) * _formulas.squared_magnitude(mean)
        place = functools.partial(self._place, table_of_row, row_shape, axis)
        return place(mean), place(batch.scaled(spread))

    def _place(
        self,
        table_of_row: jax.Array,
        row_shape: tuple[int, ...],
        axis: int,
        rows: jax.Array,
    ) -> jax.Array:
        """The table with the given rows, zero elsewhere."""
        table = jnp.zeros((self.shape[axis], *row_shape), rows.dtype)
        rows = rows.reshape(-1, *row_shape)
        return jnp.moveaxis(table.at[table_of_row].set(rows, mode="drop"), 0, axis)

    def _valid(self, indices: jax.Array, height: int) -> jax.Array:
        """Indices as the look-up treats them: clipped, or `height` where dropped."""
        if self.equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            return jnp.clip(indices, 0, height - 1)
        inside = (indices >= 0) & (indices < height)
        return jnp.where(inside, indices, height)


@dataclasses.dataclass(frozen=True)
class Wrapped(Term):
    """A term whose elements are changed one by one, or moved."""

    term: Term

    @property
    def variables(self) -> tuple[Var, ...]:
        return self.term.variables

    @property
    def routes(self) -> tuple[str, ...]:
        return self.term.routes

    @property
    def workspace(self) -> int:
        return self.size + self.term.workspace

    def extra_memory(self, examples: int) -> int:
        return self.term.extra_memory(examples)

    def extra_operations(self, examples: int) -> int:
        return self.term.extra_operations(examples)


@dataclasses.dataclass(frozen=True)
class Mapped(Wrapped):
    """Elements of a term in other places: one output of the given equation."""

    equation: JaxprEqn
    output: int

    @property
    def shape(self) -> tuple[int, ...]:
        return shaped(self.equation.outvars[self.output]).shape

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        return self._place(self.term.value(environment, batch))

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        return self._place(mean), self._place(spread)

    def _place(self, elements: jax.Array) -> jax.Array:
        """The elements where the equation puts them."""
        if self.equation.primitive.name == "pad":
            zero = jnp.zeros((), elements.dtype)
            config = self.equation.params["padding_config"]
            return jax.lax.pad(elements, zero, config)
        return run_equation(self.equation, elements)[self.output]

    @property
    def box(self) -> tuple[tuple[int, int], ...]:
        """Bounds, along each axis, of the elements that can differ from zero."""
        if self.equation.primitive.name == "pad":
            config = self.equation.params["padding_config"]
            if all(low >= 0 and high >= 0 for low, high, _ in config):
                return tuple(
                    (int(low), int(size - high))
                    for (low, high, _), size in zip(config, self.shape, strict=True)
                )
        return tuple((0, size) for size in self.shape)


@dataclasses.dataclass(frozen=True)
class KernelGradient(Wrapped):
    """A product [groups, positions, in, out] in the order of the network's kernel."""

    positions: tuple[int, ...]
    spec: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        shape = jax.ShapeDtypeStruct(self.term.shape, jnp.float32)
        return jax.eval_shape(self._place, shape).shape

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        return self._place(self.term.value(environment, batch))

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        return self._place(mean), self._place(spread)

    def _place(self, elements: jax.Array) -> jax.Array:
        """From [groups, positions, batch, out per group] to the order `spec`."""
        groups, _, batch, out = elements.shape
        elements = elements.transpose(1, 2, 0, 3)
        elements = elements.reshape(*self.positions, batch, groups * out)
        rank = len(self.positions)
        source = [0] * (rank + 2)
        for axis, place in zip((rank, rank + 1, *range(rank)), self.spec, strict=True):
            source[place] = axis
        return elements.transpose(source)


@dataclasses.dataclass(frozen=True)
class Scaled(Wrapped):
    """A term times (or divided by) something that is the same for all examples."""

    factor: Constant | float
    divide: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.term.shape

    @property
    def variables(self) -> tuple[Var, ...]:
        own = self.factor.variables if isinstance(self.factor, Constant) else ()
        return (*self.term.variables, *own)

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        return self._scale(self.term.value(environment, batch), self._factor(batch))

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        factor = self._factor(batch)
        square = _formulas.squared_magnitude(factor)
        return self._scale(mean, factor), self._scale(spread, square)

    def _factor(self, batch: Batch) -> jax.Array:
        """The factor as an array."""
        if isinstance(self.factor, Constant):
            return self.factor.value({}, batch)
        return jnp.float32(self.factor)

    def _scale(self, elements: jax.Array, factor: jax.Array) -> jax.Array:
        """Elements times or divided by a factor."""
        return elements / factor if self.divide else elements * factor


@dataclasses.dataclass(frozen=True)
class Several(Term):
    """Terms that together make one."""

    terms: tuple[Term, ...]

    @property
    def variables(self) -> tuple[Var, ...]:
        return tuple(v for term in self.terms for v in term.variables)

    @property
    def workspace(self) -> int:
        return self.size + sum(term.workspace for term in self.terms)

    def extra_operations(self, examples: int) -> int:
        return sum(term.extra_operations(examples) for term in self.terms)


@dataclasses.dataclass(frozen=True)
class Joined(Several):
    """Terms side by side along one axis."""

    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.terms[0].shape)
        shape[self.axis] = sum(term.shape[self.axis] for term in self.terms)
        return tuple(shape)

    @property
    def routes(self) -> tuple[str, ...]:
        routes = (route for term in self.terms for route in term.routes)
        return tuple(dict.fromkeys(routes))

    def extra_memory(self, examples: int) -> int:
        return max(term.extra_memory(examples) for term in self.terms)

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        values = [term.value(environment, batch) for term in self.terms]
        return jnp.concatenate(values, self.axis)

    def moments(self, batch: Batch) -> Moments:
        means, spreads = zip(*map(batch.moments, self.terms), strict=True)
        return jnp.concatenate(means, self.axis), jnp.concatenate(spreads, self.axis)


@dataclasses.dataclass(frozen=True)
class Total(Several):
    """The sum of terms: a shared parameter, or several uses of its parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def routes(self) -> tuple[str, ...]:
        routes: list[str] = []
        for group in self.groups:
            inner = tuple(route for term in group for route in term.routes)
            routes += inner if len(group) == 1 else [f"sum of {' + '.join(inner)}"]
        return tuple(dict.fromkeys(routes))

    @functools.cached_property
    def groups(self) -> tuple[tuple[Term, ...], ...]:
        """Terms that share elements, together; a constant is on its own."""
        groups: list[list[Term]] = []
        for term in self.terms:
            meets = [group for group in groups if any(_overlap(term, t) for t in group)]
            merged = [t for group in meets for t in group]
            groups = [group for group in groups if group not in meets]
            groups.append([*merged, term])
        return tuple(map(tuple, groups))

    def extra_memory(self, examples: int) -> int:
        return max(
            group[0].extra_memory(examples)
            if len(group) == 1
            else chunk_size(self, examples) * self.workspace
            for group in self.groups
        )

    def value(self, environment: Mapping[Var, Any], batch: Batch) -> jax.Array:
        values = [term.value(environment, batch) for term in self.terms]
        return functools.reduce(jnp.add, values)

    def moments(self, batch: Batch) -> Moments:
        parts = [
            batch.moments(group[0])
            if len(group) == 1
            else _moments_by_example(Total(group), batch)
            for group in self.groups
        ]
        means, spreads = zip(*parts, strict=True)
        return functools.reduce(jnp.add, means), functools.reduce(jnp.add, spreads)


def _overlap(one: Term, other: Term) -> bool:
    """Whether two terms may both differ from zero, and between examples, somewhere."""
    if isinstance(one, Constant) or isinstance(other, Constant):
        return False
    if not (isinstance(one, Mapped) and isinstance(other, Mapped)):
        return True
    return all(
        a < d and c < b for (a, b), (c, d) in zip(one.box, other.box, strict=True)
    )


# ---- Moments from the gradients of a few examples at a time ------------------------


def chunk_size(term: Term, examples: int) -> int:
    """Number of examples whose gradients are evaluated together."""
    fitting = CHUNK_BYTES // max(1, 4 * term.workspace)
    most = max(1, min(CHUNK_EXAMPLES, fitting, examples))
    # A chunk that divides the batch saves compiling a second, smaller one.
    divisors = [c for c in range(most, most // 2, -1) if examples % c == 0]
    return divisors[0] if divisors else most


def _moments_by_example(term: Term, batch: Batch) -> Moments:
    """Moments from gradients that exist for one chunk of examples at a time."""
    mean, squares = _sums(term, batch, None)
    if batch.two_pass:
        _, spread = _sums(term, batch, mean)
        return mean, batch.scaled(spread)
    return mean, batch.scaled(_formulas.spread_from_squares(squares, mean))


def _sums(term: Term, batch: Batch, center: jax.Array | None) -> Moments:
    """Weighted sums of the gradients and of their squared distances from `center`."""
    examples = batch.shares.size
    chunk = chunk_size(term, examples)
    names = [v for v in dict.fromkeys(term.variables) if v in batch.values]
    stacks = ([batch.values[v] for v in names], batch.shares)
    remainder = examples % chunk
    run = functools.partial(_chunk_sums, term, batch, names, center)
    if remainder:
        head = jax.tree.map(functools.partial(_rows, start=0, size=remainder), stacks)
        sums = run(head)
    else:
        shapes = jax.eval_shape(run, stacks)
        sums = jax.tree.map(_zeros, shapes)
    starts = jnp.arange(remainder, examples, chunk)
    step = functools.partial(_add_chunk, run, stacks, chunk)
    return jax.lax.scan(step, sums, starts)[0]


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Zeros of a given shape and dtype."""
    return jnp.zeros(shape.shape, shape.dtype)


def _rows(stack: jax.Array, start: Any, size: int) -> jax.Array:
    """Some rows of an array."""
    return jax.lax.dynamic_slice_in_dim(stack, start, size)


def _add_chunk(
    run: Any, stacks: Any, chunk: int, sums: Moments, start: jax.Array
) -> tuple[Moments, None]:
    """One step of the loop over chunks."""
    part = jax.tree.map(functools.partial(_rows, start=start, size=chunk), stacks)
    return jax.tree.map(jnp.add, sums, run(part)), None


def _chunk_sums(
    term: Term,
    batch: Batch,
    names: list[Var],
    center: jax.Array | None,
    chunk: tuple[list[jax.Array], jax.Array],
) -> Moments:
    """Weighted sums over the examples of one chunk."""
    values, shares = chunk
    evaluate = functools.partial(_value, term, batch, names)
    gradients = jax.vmap(evaluate)(values)
    total: Any = 0.0
    squares: Any = 0.0
    # Written out, because a reduction over the leading axis is some fifty times slower
    # than additions on XLA's CPU backend.
    for k in range(shares.size):
        gradient, share = gradients[k], shares[k].astype(gradients.real.dtype)
        total = total + share * gradient
        distance = gradient if center is None else gradient - center
        squares = squares + share * _formulas.squared_magnitude(distance)
    return total, squares


def _value(
    term: Term, batch: Batch, names: list[Var], values: list[jax.Array]
) -> jax.Array:
    """The term for one example."""
    example = dict(zip(names, values, strict=True))
    return term.value({**batch.constants, **example}, batch)


def _average(values: jax.Array, shares: jax.Array) -> jax.Array:
    """Weighted mean over the leading axis."""
    # A product, because XLA's CPU backend reduces a leading axis slowly; in full
    # precision, because it replaces a plain sum.
    return jnp.tensordot(
        shares.astype(values.dtype), values, 1, precision=jax.lax.Precision.HIGHEST
    )
