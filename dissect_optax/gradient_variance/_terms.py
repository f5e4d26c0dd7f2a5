"""Terms of the gradient of one example, and their mean and spread over a batch.

A gradient is a tree of terms. At its ends stand values that the program computes for
every example; between them stand only linear operations that do not depend on the
example. So the squares can often be summed without ever forming a gradient:

* `Contraction` (`_contractions`): Σ_t x_t δ_tᵀ, the gradient of a dense layer or of a
  convolution. One pair of vectors, or a few, become products of the squares; many are
  contracted for a few examples at a time.
* `TableRows` (`_tables`): rows of a table that were looked up. The rows of one index
  within an example are added before they are squared; rows that no example reads cost
  nothing.
* `Reindexed`, `Scaled`, `Concatenation`: elements keep their identity, so the operation
  acts on the mean and on the spread.
* `Applied`: any other linear operation; it runs on the gradients of a few examples at
  a time.
* `Sum`: parts that overlap are added before they are squared, by cross products of
  their factors (`_cross_products`) or example by example.
* `Constant`: the same for all examples; moves the mean only.
* `Materialized`: everything else. The gradients of all examples lie side by side.
* `TakenInLoop`: mean and spread were taken inside a loop of the program.

"Spread" is the population variance Σ_k p_k |g_k - ḡ|² with shares p_k that sum to one.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from dissect_optax import _formulas
from dissect_optax.gradient_variance._program import (
    Environment,
    Source,
    dtype_of,
    run_equation,
    shape_of,
    variables,
)

Moments = tuple[jax.Array, jax.Array]
Box = tuple[tuple[int, int], ...]

# A stack of smaller gradients is reduced at once, by a product with the shares.
SMALL_SIZE = 2**16


class NeedsValues(Exception):
    """Moments were taken inside a loop where the values themselves are needed."""


def accumulator(dtype: Any) -> Any:
    """The dtype in which numbers of `dtype` are added up: at least 32 bits."""
    dtype = np.dtype(dtype)
    # The 8-bit formats do not promote to anything by themselves.
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        return np.dtype(np.float32)
    return jnp.promote_types(dtype, jnp.float32)


def widened(values: jax.Array) -> jax.Array:
    """Values in the dtype in which they are added up."""
    return values.astype(accumulator(values.dtype))


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

    def constant(self, source: Source) -> jax.Array:
        """A value that is the same for all examples."""
        if isinstance(source, Literal):
            return jnp.asarray(source.val)
        return self.constants[source]

    def for_every_example(self, source: Source) -> jax.Array:
        """A value with its batch axis, also where it is the same for all examples."""
        if source in self.values:
            return self.values[source]
        value = self.constant(source)
        return jnp.broadcast_to(value, (self.shares.size, *value.shape))


class Term(abc.ABC):
    """A part of the gradient of one example."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape for one example."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """Dtype in which the term is added up."""

    @property
    @abc.abstractmethod
    def sources(self) -> tuple[Source, ...]:
        """Values of the program that the term needs."""

    @property
    def invariants(self) -> tuple[Source, ...]:
        """Those of them that must not change from step to step of a loop."""
        return ()

    @abc.abstractmethod
    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        """The term for one example."""

    @abc.abstractmethod
    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        """The sum over the steps of a loop, along the first axis of the sources.

        `invariants` come without that axis.
        """

    @property
    @abc.abstractmethod
    def routes(self) -> tuple[str, ...]:
        """How the moments are computed, in words."""

    @abc.abstractmethod
    def moments(self, batch: Batch) -> Moments:
        """Mean and spread over the batch."""

    @property
    def size(self) -> int:
        """Number of elements for one example."""
        return math.prod(self.shape)

    @property
    def workspace(self) -> int:
        """Numbers held per example while its gradient is evaluated."""
        return self.size

    @abc.abstractmethod
    def extra_memory(self, examples: int) -> int:
        """Numbers held beyond the program's own values and the two results."""

    @abc.abstractmethod
    def extra_operations(self, examples: int) -> int:
        """Floating-point operations beyond those of the plain gradient."""


@dataclasses.dataclass(frozen=True, eq=False)
class Value(Term):
    """A term that is one value of the program."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.source)

    @property
    def dtype(self) -> Any:
        return accumulator(dtype_of(self.source))


@dataclasses.dataclass(frozen=True, eq=False)
class Materialized(Value):
    """A value of the program, kept for every example; `reason` says why."""

    reason: str

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source,)

    @property
    def routes(self) -> tuple[str, ...]:
        return (f"stored gradients ({self.reason})",)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return widened(environment[self.source])

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self.value(stacks, precision).sum(0)

    def moments(self, batch: Batch) -> Moments:
        if self.size > SMALL_SIZE:
            return moments_by_example(self, batch)
        # A loop may find that it is the same for all examples after all.
        values = widened(batch.for_every_example(self.source))
        mean = _average(values, batch.shares)
        deviations = _formulas.squared_magnitude(values - mean[None])
        return mean, batch.scaled(_average(deviations, batch.shares))

    def extra_memory(self, examples: int) -> int:
        return examples * self.size

    def extra_operations(self, examples: int) -> int:
        return 4 * examples * self.size


@dataclasses.dataclass(frozen=True, eq=False)
class Constant(Value):
    """A value that is the same for all examples."""

    @property
    def sources(self) -> tuple[Source, ...]:
        return () if isinstance(self.source, Literal) else (self.source,)

    @property
    def routes(self) -> tuple[str, ...]:
        return ("the same for all examples",)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        if isinstance(self.source, Literal):
            return jnp.asarray(self.source.val, self.dtype)
        return widened(environment[self.source])

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        assert not isinstance(self.source, Literal)
        return self.value(stacks, precision).sum(0)

    def moments(self, batch: Batch) -> Moments:
        value = widened(batch.constant(self.source))
        return value, jnp.zeros_like(value.real)

    def extra_memory(self, examples: int) -> int:
        return 0

    def extra_operations(self, examples: int) -> int:
        return 0


@dataclasses.dataclass(frozen=True, eq=False)
class TakenInLoop(Term):
    """A gradient of which only mean and spread left the loop that computed it."""

    mean: Var
    spread: Var
    inner: Term
    """The term of one step of the loop."""
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.mean)

    @property
    def dtype(self) -> Any:
        return dtype_of(self.mean)

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.mean, self.spread)

    @property
    def routes(self) -> tuple[str, ...]:
        return self.inner.routes

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        raise NeedsValues

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        raise NeedsValues

    def moments(self, batch: Batch) -> Moments:
        return batch.constant(self.mean), batch.scaled(batch.constant(self.spread))

    def extra_memory(self, examples: int) -> int:
        return self.inner.extra_memory(examples)

    def extra_operations(self, examples: int) -> int:
        return self.length * self.inner.extra_operations(examples)


# ---- Operations on the elements of a term --------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Elementwise(Term):
    """A term whose elements are changed one by one, or moved."""

    term: Term

    @property
    def dtype(self) -> Any:
        return self.term.dtype

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.term.sources

    @property
    def invariants(self) -> tuple[Source, ...]:
        return self.term.invariants

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


@dataclasses.dataclass(frozen=True, eq=False)
class Reindexed(Elementwise):
    """A term whose elements stand in other places, among zeros, or several times."""

    move: Callable[[jax.Array], jax.Array]
    key: Hashable
    """The same for moves that do the same."""
    shape_after: tuple[int, ...]
    box_after: Box | None = None
    """Bounds, along each axis, of the elements that can differ from zero."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shape_after

    @property
    def box(self) -> Box:
        return self.box_after or tuple((0, size) for size in self.shape)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self.move(self.term.value(environment, precision))

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self.move(self.term.total(stacks, precision))

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        return self.move(mean), self.move(spread)


@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(Elementwise):
    """A term times, or divided by, or masked with, what all examples share."""

    factor: Source
    kind: str
    """`mul`, `div`, or `select`, which keeps the elements where the factor is true."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.term.shape

    @property
    def dtype(self) -> Any:
        if self.kind == "select":
            return self.term.dtype
        return jnp.promote_types(self.term.dtype, accumulator(dtype_of(self.factor)))

    @property
    def sources(self) -> tuple[Source, ...]:
        own = () if isinstance(self.factor, Literal) else (self.factor,)
        return (*self.term.sources, *own)

    @property
    def invariants(self) -> tuple[Source, ...]:
        own = () if isinstance(self.factor, Literal) else (self.factor,)
        return (*self.term.invariants, *own)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self.scale(self.term.value(environment, precision), environment)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self.scale(self.term.total(stacks, precision), stacks)

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        scale = functools.partial(self.scale, environment=batch.constants)
        return scale(mean), scale(spread, square=True)

    def extra_memory(self, examples: int) -> int:
        # The spread before it is scaled, as the plain gradient holds the mean.
        return self.size + self.term.extra_memory(examples)

    def scale(
        self, elements: jax.Array, environment: Mapping[Any, Any], square: bool = False
    ) -> jax.Array:
        """Elements scaled by the factor, or by its squared magnitude."""
        if isinstance(self.factor, Literal):
            factor = jnp.asarray(self.factor.val)
        else:
            factor = jnp.asarray(environment[self.factor])
        if self.kind == "select":
            return jnp.where(factor, elements, jnp.zeros((), elements.dtype))
        factor = widened(factor)
        if square:
            factor = _formulas.squared_magnitude(factor)
        return elements / factor if self.kind == "div" else elements * factor


@dataclasses.dataclass(frozen=True, eq=False)
class Applied(Elementwise):
    """A linear operation that mixes elements, run on gradients of a few examples.

    One output of an equation, of which one input is the term and the others are the
    same for all examples.
    """

    equation: JaxprEqn
    operand: int
    """Which input of the equation the term is."""
    output: int

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.equation.outvars[self.output])

    @property
    def dtype(self) -> Any:
        return accumulator(dtype_of(self.equation.outvars[self.output]))

    @property
    def _others(self) -> tuple[Var, ...]:
        inputs = enumerate(self.equation.invars)
        return tuple(v for i, v in inputs if i != self.operand and isinstance(v, Var))

    @property
    def sources(self) -> tuple[Source, ...]:
        return (*self.term.sources, *self._others)

    @property
    def invariants(self) -> tuple[Source, ...]:
        return (*self.term.invariants, *self._others)

    @property
    def routes(self) -> tuple[str, ...]:
        name = self.equation.primitive.name
        return (f"gradients by example ({name} of {', '.join(self.term.routes)})",)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self._run(self.term.value(environment, precision), environment)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self._run(self.term.total(stacks, precision), stacks)

    def _run(self, value: jax.Array, environment: Mapping[Any, Any]) -> jax.Array:
        """The equation with the term's value as its operand."""
        own = self.equation.invars[self.operand]
        value = value.astype(dtype_of(own))
        operands = [
            value if i == self.operand else environment[v]
            for i, v in enumerate(self.equation.invars)
            if isinstance(v, Var)
        ]
        return widened(run_equation(self.equation, *operands)[self.output])

    def moments(self, batch: Batch) -> Moments:
        return moments_by_example(self, batch)

    def extra_memory(self, examples: int) -> int:
        return chunk_size(self, examples) * self.workspace

    def extra_operations(self, examples: int) -> int:
        return 3 * examples * (self.size + self.term.size)


# ---- Several terms -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Several(Term):
    """Terms that together make one."""

    terms: tuple[Term, ...]

    @property
    def dtype(self) -> Any:
        return functools.reduce(jnp.promote_types, (t.dtype for t in self.terms))

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(v for term in self.terms for v in term.sources)

    @property
    def invariants(self) -> tuple[Source, ...]:
        return tuple(v for term in self.terms for v in term.invariants)

    @property
    def workspace(self) -> int:
        return self.size + sum(term.workspace for term in self.terms)

    def extra_operations(self, examples: int) -> int:
        return sum(term.extra_operations(examples) for term in self.terms)


@dataclasses.dataclass(frozen=True, eq=False)
class Concatenation(Several):
    """Terms side by side along one axis."""

    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.terms[0].shape)
        shape[self.axis] = sum(term.shape[self.axis] for term in self.terms)
        return tuple(shape)

    @property
    def routes(self) -> tuple[str, ...]:
        return tuple(sorted({route for term in self.terms for route in term.routes}))

    def extra_memory(self, examples: int) -> int:
        return max(term.extra_memory(examples) for term in self.terms)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        values = [term.value(environment, precision) for term in self.terms]
        return jnp.concatenate(values, self.axis)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        totals = [term.total(stacks, precision) for term in self.terms]
        return jnp.concatenate(totals, self.axis)

    def moments(self, batch: Batch) -> Moments:
        means, spreads = zip(*map(batch.moments, self.terms), strict=True)
        return jnp.concatenate(means, self.axis), jnp.concatenate(spreads, self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Several):
    """Terms that are added: a shared parameter, or several uses of its parts."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.terms[0].shape

    @property
    def routes(self) -> tuple[str, ...]:
        routes: list[str] = []
        for group in self.groups:
            inner = sorted({route for term in group for route in term.routes})
            routes += inner if len(group) == 1 else [f"sum of {' + '.join(inner)}"]
        return tuple(sorted(set(routes)))

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
            else _group_memory(Sum(group), examples)
            for group in self.groups
        )

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        values = [term.value(environment, precision) for term in self.terms]
        return functools.reduce(jnp.add, values)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        totals = [term.total(stacks, precision) for term in self.terms]
        return functools.reduce(jnp.add, totals)

    def moments(self, batch: Batch) -> Moments:
        parts = [
            batch.moments(group[0])
            if len(group) == 1
            else _moments_of_overlap(Sum(group), batch)
            for group in self.groups
        ]
        means, spreads = zip(*parts, strict=True)
        return functools.reduce(jnp.add, means), functools.reduce(jnp.add, spreads)


def _overlap(one: Term, other: Term) -> bool:
    """Whether two terms may both differ from zero, and between examples, somewhere."""
    if isinstance(one, Constant) or isinstance(other, Constant):
        return False
    if not (isinstance(one, Reindexed) and isinstance(other, Reindexed)):
        return True
    return all(
        a < d and c < b for (a, b), (c, d) in zip(one.box, other.box, strict=True)
    )


def _moments_of_overlap(term: Sum, batch: Batch) -> Moments:
    """Moments of terms that share elements."""
    # Imported here: the cross products are made of these terms.
    from dissect_optax.gradient_variance import _cross_products

    if not batch.two_pass:
        crossed = _cross_products.moments(term, batch)
        if crossed is not None:
            return crossed
    return moments_by_example(term, batch)


def _group_memory(term: Sum, examples: int) -> int:
    """Numbers held while terms that share elements are added."""
    from dissect_optax.gradient_variance import _cross_products

    crossed = _cross_products.extra_memory(term, examples)
    if crossed is not None:
        return crossed
    return chunk_size(term, examples) * term.workspace


# ---- Moments from the gradients of a few examples at a time --------------------------

# Examples evaluated at a time: as many as keep their gradients within a CPU's caches.
CHUNK_BYTES = 6 * 2**20
CHUNK_EXAMPLES = 16


def chunk_size(term: Term, examples: int) -> int:
    """Number of examples whose gradients are evaluated together."""
    fitting = CHUNK_BYTES // max(1, 4 * term.workspace)
    most = max(1, min(CHUNK_EXAMPLES, fitting, examples))
    # A chunk that divides the batch saves compiling a second, smaller one.
    divisors = [c for c in range(most, most // 2, -1) if examples % c == 0]
    return divisors[0] if divisors else most


def moments_by_example(term: Term, batch: Batch) -> Moments:
    """Moments from gradients that exist for one chunk of examples at a time."""
    mean, squares = _sums(term, batch, None)
    if batch.two_pass:
        _, spread = _sums(term, batch, mean)
        return mean, batch.scaled(spread)
    return mean, batch.scaled(_formulas.spread_from_squares(squares, mean))


def raw_moments_by_example(term: Term, batch: Batch) -> Moments:
    """Mean and mean square, in the same way."""
    return _sums(term, batch, None)


def _sums(term: Term, batch: Batch, center: jax.Array | None) -> Moments:
    """Weighted sums of the gradients and of their squared distances from `center`."""
    examples = batch.shares.size
    chunk = chunk_size(term, examples)
    names = [v for v in dict.fromkeys(term.sources) if v in batch.values]
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
    names: list[Source],
    center: jax.Array | None,
    chunk: tuple[list[jax.Array], jax.Array],
) -> Moments:
    """Weighted sums over the examples of one chunk."""
    values, shares = chunk
    evaluate = functools.partial(_value, term, batch, names)
    gradients = jax.vmap(evaluate, axis_size=shares.size)(values)
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
    term: Term, batch: Batch, names: list[Source], values: list[jax.Array]
) -> jax.Array:
    """The term for one example."""
    example = dict(zip(names, values, strict=True))
    return term.value({**batch.constants, **example}, batch.precision)


def _average(values: jax.Array, shares: jax.Array) -> jax.Array:
    """Weighted mean over the leading axis."""
    # A product, because XLA's CPU backend reduces a leading axis slowly; in full
    # precision, because it replaces a plain sum.
    return jnp.tensordot(
        shares.astype(values.dtype), values, 1, precision=jax.lax.Precision.HIGHEST
    )


def stored_parts(term: Term) -> tuple[str, ...]:
    """Routes of what is stored for every example at the size of the whole term."""
    if isinstance(term, Materialized):
        return term.routes
    if isinstance(term, Several):
        return tuple(
            r for t in term.terms if t.size == term.size for r in stored_parts(t)
        )
    if isinstance(term, Elementwise) and term.term.size == term.size:
        return stored_parts(term.term)
    return ()


def reindexed(term: Term, equation: JaxprEqn, output: int) -> Reindexed:
    """A term moved by an equation of one operand; `pad` pads with zeros."""
    name, params = equation.primitive.name, equation.params
    shape = shape_of(equation.outvars[output])
    key = (name, str(sorted(params.items(), key=str)), output, term.shape)
    if name != "pad":
        run = functools.partial(_moved, equation, output)
        return Reindexed(term, run, key, shape)
    config = params["padding_config"]
    box = None
    if all(low >= 0 and high >= 0 for low, high, _ in config):
        bounds = zip(config, shape, strict=True)
        box = tuple((int(low), int(size - high)) for (low, high, _), size in bounds)
    return Reindexed(term, functools.partial(_padded, config), key, shape, box)


def _moved(equation: JaxprEqn, output: int, elements: jax.Array) -> jax.Array:
    """The elements where the equation puts them."""
    assert len(variables(equation)) == 1
    return run_equation(equation, elements)[output]


def _padded(config: Any, elements: jax.Array) -> jax.Array:
    """The elements among zeros."""
    return jax.lax.pad(elements, jnp.zeros((), elements.dtype), config)
