"""Gradients that are products of two small factors, Σ_t x_t δ_tᵀ.

With one pair of vectors (a dense layer) the batch mean of xδᵀ is one matrix product of
all x with all δ, and the batch mean of its square is another, of x² with δ². With a few
pairs (a layer that is used several times) the square has cross terms,

    (Σ_t x_t δ_tᵀ)² = Σ_tt' (x_t x_t') (δ_t δ_t')ᵀ,

which are again one matrix product with a row for each pair of pairs. With many (time,
or the positions of a convolution) it is cheaper to contract a few examples at a time,
and to add up the gradients with their squares.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from dissect_optax import _formulas
from dissect_optax.gradient_variance._program import (
    Derived,
    Source,
    abstract,
    derive,
    dtype_of,
    run_equation,
    shape_of,
)
from dissect_optax.gradient_variance._terms import (
    Batch,
    Elementwise,
    Moments,
    Term,
    accumulator,
    chunk_size,
    moments_by_example,
    widened,
)

# A chunk's element-wise work costs about as much as this many multiplications per
# element of the gradient (measured on a CPU, where the products run at 50 per ns).
CROSS_TERMS_WORTH = 28


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
    """The factor of each window of `Patches`.

    [out feature, feature, *space] in the order `spec` becomes [entries, groups, out].
    """

    spec: tuple[int, ...]
    groups: int

    def __call__(self, kernel: jax.Array) -> jax.Array:
        out, feature, *space = self.spec
        kernel = kernel.transpose(feature, *space, out)
        return kernel.reshape(-1, self.groups, kernel.shape[-1] // self.groups)


View = Patches | KernelEntries | None
Axes = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Dimensions:
    """Which axes of two factors are summed over, and which are shared."""

    left_summed: Axes
    right_summed: Axes
    left_shared: Axes = ()
    right_shared: Axes = ()

    @property
    def numbers(self) -> tuple[tuple[Axes, Axes], tuple[Axes, Axes]]:
        """In the order of `jax.lax.dot_general`."""
        return (
            (self.left_summed, self.right_summed),
            (self.left_shared, self.right_shared),
        )

    def after(self, axes: int) -> "Dimensions":
        """The same after some more axes at the front, which are summed over."""
        leading = tuple(range(axes))
        left, right, left_shared, right_shared = (
            tuple(d + axes for d in dims)
            for dims in (
                self.left_summed,
                self.right_summed,
                self.left_shared,
                self.right_shared,
            )
        )
        return Dimensions(
            (*leading, *left), (*leading, *right), left_shared, right_shared
        )

    def swapped(self) -> "Dimensions":
        """The same with the factors exchanged."""
        return Dimensions(
            self.right_summed, self.left_summed, self.right_shared, self.left_shared
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction(Term):
    """Sum over pairs of `dot_general(left, right)`, each seen through its view.

    Axes of the result: the shared ones, those of the left factor, those of the right.
    """

    left: tuple[Source, ...]
    right: tuple[Source, ...]
    dimensions: Dimensions
    precision: Any
    name: str
    left_view: View = None
    right_view: View = None

    @functools.cached_property
    def factors(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of the two factors for one example."""
        factors = []
        for sources, view in (
            (self.left, self.left_view),
            (self.right, self.right_view),
        ):
            factor = abstract(sources[0])
            factors.append(factor if view is None else jax.eval_shape(view, factor))
        return factors[0], factors[1]

    @property
    def free(self) -> tuple[Axes, Axes]:
        """Axes of the left and of the right factor that only one of them has."""
        left, right = self.factors
        dims = self.dimensions
        bound_left = (*dims.left_summed, *dims.left_shared)
        bound_right = (*dims.right_summed, *dims.right_shared)
        return (
            tuple(d for d in range(len(left.shape)) if d not in bound_left),
            tuple(d for d in range(len(right.shape)) if d not in bound_right),
        )

    @property
    def depth(self) -> int:
        """Number of outer products that one example contributes."""
        shape = self.factors[0].shape
        depth = math.prod(shape[d] for d in self.dimensions.left_summed)
        return len(self.left) * depth

    @property
    def has_cheap_cross_terms(self) -> bool:
        """Whether the cross terms of its outer products cost less than chunks."""
        return is_worth_crossing(self.depth)

    def has_large_factors(self, times: int = 1) -> bool:
        """Whether a factor, used so many times, is as large as the product.

        The product itself is then the smaller thing to keep for every example. Not
        that of a convolution: it would be a convolution for each example.
        """
        if self.left_view is not None or self.depth * times == 1:
            return False
        sizes = (math.prod(factor.shape) for factor in self.factors)
        return max(sizes) * len(self.left) * times >= self.size

    @property
    def shape(self) -> tuple[int, ...]:
        left, right = (factor.shape for factor in self.factors)
        free_left, free_right = self.free
        return (
            *(left[d] for d in self.dimensions.left_shared),
            *(left[d] for d in free_left),
            *(right[d] for d in free_right),
        )

    @property
    def dtype(self) -> Any:
        left, right = self.factors
        return jnp.promote_types(accumulator(left.dtype), accumulator(right.dtype))

    @property
    def sources(self) -> tuple[Source, ...]:
        return (*self.left, *self.right)

    @property
    def routes(self) -> tuple[str, ...]:
        if self.depth == 1:
            return (f"outer product ({self.name})",)
        if self.has_cheap_cross_terms:
            return (f"{self.depth} outer products ({self.name})",)
        return (f"product per example ({self.name})",)

    @property
    def workspace(self) -> int:
        left, right = (math.prod(factor.shape) for factor in self.factors)
        copies = len(self.left) > 1
        viewed = (left if self.left_view or copies else 0) + (
            right if self.right_view or copies else 0
        )
        return self.size + viewed

    def extra_memory(self, examples: int) -> int:
        if not self.has_cheap_cross_terms:
            return chunk_size(self, examples) * self.workspace
        pairs = self.depth * (self.depth + 1) // 2
        sides = sum(math.prod(factor.shape) for factor in self.factors)
        return examples * pairs * len(self.left) * sides // self.depth

    def extra_operations(self, examples: int) -> int:
        if not self.has_cheap_cross_terms:
            return 3 * examples * self.size
        pairs = self.depth * (self.depth + 1) // 2
        return 2 * examples * pairs * self.size

    # ---- Values ----------------------------------------------------------------------

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        left = _viewed(self.left_view, [environment[v] for v in self.left])
        right = _viewed(self.right_view, [environment[v] for v in self.right])
        return self._multiply(left, right, precision, leading=len(self.left) > 1)

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        assert self.left_view is None, "a convolution is summed by its KernelGradient"
        left = jnp.concatenate([stacks[v] for v in self.left])
        right = jnp.concatenate([stacks[v] for v in self.right])
        return self._multiply(left, right, precision, leading=1)

    def _multiply(
        self, left: jax.Array, right: jax.Array, precision: Any, leading: int
    ) -> jax.Array:
        """Contract two factors, which have some more axes at the front to sum over."""
        dtype = jnp.promote_types(accumulator(left.dtype), accumulator(right.dtype))
        if left.dtype != right.dtype or left.dtype.itemsize < 2:
            # Also 8-bit floats, which few backends multiply.
            left, right = left.astype(dtype), right.astype(dtype)
        return jax.lax.dot_general(
            left,
            right,
            self.dimensions.after(leading).numbers,
            precision=self.precision if precision is None else precision,
            preferred_element_type=dtype,
        )

    # ---- Moments ---------------------------------------------------------------------

    def moments(self, batch: Batch) -> Moments:
        if not self.has_cheap_cross_terms or batch.two_pass:
            return moments_by_example(self, batch)
        mean, squares = self.raw_moments(batch)
        return mean, batch.scaled(_formulas.spread_from_squares(squares, mean))

    def raw_moments(self, batch: Batch) -> Moments:
        """Mean and mean square by matrix products over the batch."""
        if self.depth == 1 and self.left_view is None:
            return self._outer_moments(batch)
        left, right = self.matrices(batch)
        return (
            self.unflattened(cross_mean(left, right, batch, self.precision)),
            self.unflattened(cross_square(left, right, batch, self.precision)),
        )

    def _outer_moments(self, batch: Batch) -> Moments:
        """The same for one pair of factors, without reordering them."""
        (left,) = (widened(batch.for_every_example(v)) for v in self.left)
        (right,) = (widened(batch.for_every_example(v)) for v in self.right)
        shares = batch.shares.reshape(-1, *(1,) * (right.ndim - 1))
        shares = shares.astype(right.real.dtype)
        mean = self._multiply(left, right * shares, batch.precision, leading=1)
        squares = self._multiply(
            _formulas.squared_magnitude(left),
            _formulas.squared_magnitude(right) * shares,
            batch.precision,
            leading=1,
        )
        return mean, squares

    def matrices(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The factors as [examples, depth, *shared, left] and […, right]."""
        free_left, free_right = self.free
        dims = self.dimensions
        return (
            _matrix(
                batch,
                self.left,
                self.left_view,
                (dims.left_summed, dims.left_shared, free_left),
            ),
            _matrix(
                batch,
                self.right,
                self.right_view,
                (dims.right_summed, dims.right_shared, free_right),
            ),
        )

    def unflattened(self, elements: jax.Array) -> jax.Array:
        """From [*shared, left, right] to the term's shape."""
        return elements.reshape(self.shape)

    @property
    def flat_shape(self) -> tuple[Axes, int, int]:
        """Sizes of the shared axes, and of all left and all right axes together."""
        left, right = (factor.shape for factor in self.factors)
        free_left, free_right = self.free
        return (
            tuple(left[d] for d in self.dimensions.left_shared),
            math.prod(left[d] for d in free_left),
            math.prod(right[d] for d in free_right),
        )

    # ---- Linear operations on the factors --------------------------------------------

    def with_factors(
        self,
        left: Callable[[jax.Array], jax.Array] | None = None,
        right: Callable[[jax.Array], jax.Array] | None = None,
        *constants: Source,
        dimensions: Dimensions | None = None,
    ) -> "Contraction":
        """The same contraction of factors to which a function was applied.

        The functions get the factor, and after it the values of `constants`.
        """

        def through(
            function: Callable[..., jax.Array] | None, sources: tuple[Source, ...]
        ) -> tuple[Source, ...]:
            if function is None:
                return sources
            return tuple(derive(function, v, *constants) for v in sources)

        return dataclasses.replace(
            self,
            left=through(left, self.left),
            right=through(right, self.right),
            dimensions=dimensions or self.dimensions,
        )

    def swapped(self) -> "Contraction":
        """The transposed product."""
        return dataclasses.replace(
            self,
            left=self.right,
            right=self.left,
            left_view=self.right_view,
            right_view=self.left_view,
            dimensions=self.dimensions.swapped(),
        )

    @property
    def layout(self) -> Hashable:
        """Key of the products that can be computed as one."""
        factors = tuple((f.shape, str(f.dtype)) for f in self.factors)
        views = (self.left_view, self.right_view)
        return (factors, views, self.dimensions, str(self.precision))

    def joined(self, other: "Contraction") -> "Contraction":
        """The sum of two products of one layout, as one deeper product."""
        return dataclasses.replace(
            self,
            left=(*self.left, *other.left),
            right=(*self.right, *other.right),
        )


def is_worth_crossing(depth: int) -> bool:
    """Whether all products of two of `depth` outer products cost less than chunks.

    Not without any product (an axis of length zero): there are no pairs then.
    """
    return 0 < depth * (depth + 1) // 2 <= depth + CROSS_TERMS_WORTH


def cross_mean(
    left: jax.Array, right: jax.Array, batch: Batch, precision: Any
) -> jax.Array:
    """Mean over the batch of Σ_t left_t right_tᵀ, [*shared, left, right]."""
    shares = batch.shares.astype(right.real.dtype)
    right = right * shares.reshape(-1, *(1,) * (right.ndim - 1))
    return _batched_product(left, right, batch, precision)


def cross_square(
    left: jax.Array, right: jax.Array, batch: Batch, precision: Any
) -> jax.Array:
    """Mean over the batch of |Σ_t left_t right_tᵀ|²."""
    depth = left.shape[1]
    pairs = [(t, u) for t in range(depth) for u in range(t, depth)]
    first, second = (jnp.asarray([p[i] for p in pairs]) for i in range(2))
    # A pair of two different products occurs twice.
    counts = jnp.asarray([1.0 if t == u else 2.0 for t, u in pairs], left.real.dtype)
    return _products_of_pairs(
        (left[:, first], left[:, second]),
        (right[:, first], right[:, second]),
        counts,
        batch,
        precision,
    )


def cross_product(
    one: tuple[jax.Array, jax.Array],
    other: tuple[jax.Array, jax.Array],
    batch: Batch,
    precision: Any,
) -> jax.Array:
    """Mean over the batch of Re(a conj(b)) of two contractions (left, right)."""
    depth, other_depth = one[0].shape[1], other[0].shape[1]
    first = jnp.repeat(jnp.arange(depth), other_depth)
    second = jnp.tile(jnp.arange(other_depth), depth)
    counts = jnp.ones(depth * other_depth, one[0].real.dtype)
    return _products_of_pairs(
        (one[0][:, first], other[0][:, second]),
        (one[1][:, first], other[1][:, second]),
        counts,
        batch,
        precision,
    )


def _products_of_pairs(
    lefts: tuple[jax.Array, jax.Array],
    rights: tuple[jax.Array, jax.Array],
    counts: jax.Array,
    batch: Batch,
    precision: Any,
) -> jax.Array:
    """Sum over pairs of rows of Re((l_1 r_1ᵀ) conj(l_2 r_2ᵀ)), averaged."""
    left = lefts[0] * jnp.conj(lefts[1])
    right = rights[0] * jnp.conj(rights[1])
    weights = batch.shares.astype(counts.dtype)[:, None] * counts[None]
    right = right * weights.reshape(*weights.shape, *(1,) * (right.ndim - 2))
    return jnp.real(_batched_product(left, right, batch, precision))


def _batched_product(
    left: jax.Array, right: jax.Array, batch: Batch, precision: Any
) -> jax.Array:
    """[n, k, *shared, i] with [n, k, *shared, j] to [*shared, i, j]."""
    shared = tuple(range(2, left.ndim - 1))
    return jax.lax.dot_general(
        left,
        right,
        (((0, 1), (0, 1)), (shared, shared)),
        precision=precision if batch.precision is None else batch.precision,
        preferred_element_type=jnp.promote_types(left.dtype, right.dtype),
    )


def _matrix(
    batch: Batch,
    sources: Sequence[Source],
    view: View,
    axes: tuple[Axes, Axes, Axes],
) -> jax.Array:
    """Factors of all examples as [examples, depth, *shared, free]."""
    summed, shared, free = axes

    def of_one(values: list[jax.Array]) -> jax.Array:
        factor = _viewed(view, values)
        more = factor.ndim - sum(map(len, axes))
        order = [
            *range(more),
            *(d + more for dims in (summed, shared, free) for d in dims),
        ]
        factor = factor.transpose(order)
        inner = factor.shape[more + len(summed) : more + len(summed) + len(shared)]
        columns = math.prod(factor.shape[factor.ndim - len(free) :]) if free else 1
        rows = math.prod(factor.shape[: more + len(summed)])
        return factor.reshape(rows, *inner, columns)

    stacks = [batch.for_every_example(v) for v in sources]
    return widened(jax.vmap(of_one)(stacks))


def _viewed(view: View, values: Sequence[jax.Array]) -> jax.Array:
    """A factor of one example; several are stacked along a new first axis."""
    factors = [x if view is None else view(x) for x in values]
    return jnp.stack(factors) if len(factors) > 1 else factors[0]


@dataclasses.dataclass(frozen=True, eq=False)
class KernelGradient(Elementwise):
    """A contraction of patches [groups, positions, in, out] in the kernel's order."""

    term: Contraction
    positions: tuple[int, ...]
    spec: tuple[int, ...]
    equation: JaxprEqn
    """The convolution of one use of the kernel."""

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.equation.outvars[0])

    @property
    def key(self) -> Hashable:
        """The same for gradients in one order."""
        return (self.positions, self.spec)

    def move(self, elements: jax.Array) -> jax.Array:
        """From [groups, positions, batch, out per group] to the order `spec`."""
        groups, _, batch, out = elements.shape
        elements = elements.transpose(1, 2, 0, 3)
        elements = elements.reshape(*self.positions, batch, groups * out)
        rank = len(self.positions)
        source = [0] * (rank + 2)
        for axis, place in zip((rank, rank + 1, *range(rank)), self.spec, strict=True):
            source[place] = axis
        return elements.transpose(source)

    def value(self, environment: Mapping[Any, Any], precision: Any) -> jax.Array:
        return self.move(self.term.value(environment, precision))

    def total(self, stacks: Mapping[Any, Any], precision: Any) -> jax.Array:
        # The axis that the convolution sums over has room for all steps.
        numbers = self.equation.params["dimension_numbers"]
        # A factor that was scaled or cast has another dtype than in the program.
        params = {**self.equation.params, "preferred_element_type": self.dtype}
        equation = self.equation.replace(params=params)
        total: Any = 0
        for image, kernel in zip(self.term.left, self.term.right, strict=True):
            left = _steps_in_axis(stacks[image], numbers.lhs_spec[1])
            right = _steps_in_axis(stacks[kernel], numbers.rhs_spec[1])
            if left.dtype != right.dtype:
                left, right = left.astype(self.dtype), right.astype(self.dtype)
            total = total + run_equation(equation, left, right)[0]
        return total

    def moments(self, batch: Batch) -> Moments:
        mean, spread = batch.moments(self.term)
        return self.move(mean), self.move(spread)


def _steps_in_axis(stack: jax.Array, axis: int) -> jax.Array:
    """[steps, *shape] with the steps moved into one of the other axes."""
    moved = jnp.moveaxis(stack, 0, axis)
    shape = list(stack.shape[1:])
    shape[axis] *= stack.shape[0]
    return moved.reshape(shape)


def real_part(term: Contraction) -> Contraction:
    """Re Σ l r = Σ Re l Re r - Im l Im r, a product of real factors."""
    return _of_parts(term, lambda x: (x.real, -x.imag), lambda x: (x.real, x.imag))


def imaginary_part(term: Contraction) -> Contraction:
    """Im Σ l r = Σ Im l Re r + Re l Im r, a product of real factors."""
    return _of_parts(term, lambda x: (x.imag, x.real), lambda x: (x.real, x.imag))


def _of_parts(
    term: Contraction,
    left_parts: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    right_parts: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> Contraction:
    """The contraction twice, with the first and with the second part of each factor."""

    def part(
        sources: tuple[Source, ...],
        parts: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
        which: int,
    ) -> tuple[Derived, ...]:
        return tuple(derive(lambda x: parts(x)[which], v) for v in sources)

    return dataclasses.replace(
        term,
        left=(*part(term.left, left_parts, 0), *part(term.left, left_parts, 1)),
        right=(*part(term.right, right_parts, 0), *part(term.right, right_parts, 1)),
    )


def is_complex(source: Source) -> bool:
    """Whether a value is complex."""
    return bool(jnp.issubdtype(dtype_of(source), jnp.complexfloating))
