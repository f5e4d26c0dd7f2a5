"""One rule for each primitive: what it does to the terms of a gradient.

A rule is a function, registered for one or more primitives, that gets the walk, an
equation and which of its outputs is wanted. It returns the term that this output is, or
None where it does not know the form; the value is then materialized for every example,
which is always right. `knows` lists the parameters that the rule has taken into account
(or that cannot matter): an equation that has others, from a newer JAX, is not
recognised. The walk back from the gradient asks these rules, inside loops as well as
outside; nothing else in this package knows what a primitive means.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal, Primitive, Var

from dissect_optax.gradient_variance import _contractions
from dissect_optax.gradient_variance._contractions import (
    Contraction,
    Dimensions,
    KernelEntries,
    KernelGradient,
    Patches,
)
from dissect_optax.gradient_variance._placement import (
    Moved,
    Placed,
    Repetition,
    saturated,
    windows_are_disjoint,
)
from dissect_optax.gradient_variance._program import (
    SCAN_PARAMETERS,
    Atom,
    Derived,
    Source,
    derive,
    dtype_of,
    loop_of,
    shape_of,
    size_of,
)
from dissect_optax.gradient_variance._tables import TableRows
from dissect_optax.gradient_variance._terms import (
    Applied,
    Concatenation,
    Constant,
    Elementwise,
    Materialized,
    Reindexed,
    Scaled,
    Several,
    Sum,
    TakenInLoop,
    Term,
    reindexed,
    widened,
)

if TYPE_CHECKING:
    from dissect_optax.gradient_variance._walk import Walk

Rule = Callable[["Walk", JaxprEqn, int], Term | None]

# Let mistakes in rules end in an exception, and not in a materialized gradient.
STRICT = False

# A row of a stacked parameter that the example chooses becomes a product with a
# one-hot vector if there are at most so many rows.
ONE_HOT_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Registered:
    """A rule, and the parameters of the primitive that it knows."""

    rule: Rule
    knows: frozenset[str]

    def recognises(self, equation: JaxprEqn) -> bool:
        """Whether the rule knows all parameters that are set."""
        return all(
            name in self.knows or value is None
            for name, value in equation.params.items()
        )


RULES: dict[str, Registered] = {}


def rule(*primitives: str, knows: tuple[str, ...] = ()) -> Callable[[Rule], Rule]:
    """Register a rule for some primitives."""

    def register(function: Rule) -> Rule:
        for name in primitives:
            RULES[name] = Registered(function, frozenset(knows))
        return function

    return register


# ---- Sums ----------------------------------------------------------------------------

ADDITIONS = ("add", "add_any")


# c = add_any a b
@rule(*ADDITIONS)
def _add(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """All additions that end in a value, at once."""
    terms: list[Term] = []
    pending: list[Atom] = list(equation.invars)
    while pending:
        part = pending.pop()
        inner = None if isinstance(part, Literal) else walk.produced_by.get(part)
        if inner is not None and inner.primitive.name in ADDITIONS:
            pending.extend(inner.invars)
        elif not walk.is_zero(part):
            terms.append(walk.term(part))
    return added(terms)


# c = sub a b
@rule("sub")
def _sub(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """A sum with one sign changed."""
    first, second = equation.invars
    kept = [] if walk.is_zero(first) else [walk.term(first)]
    return added([*kept, negative(walk.term(second))])


# b = neg a
@rule("neg")
def _neg(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """The term with its sign changed."""
    return negative(walk.term(equation.invars[0]))


# ---- The same elements, in the same or in other places -------------------------------


# b = copy a;  c d = optimization_barrier a b;  b = sharding_constraint[sharding=…] a
@rule("copy", "copy_p", "optimization_barrier", knows=())
@rule("sharding_constraint", knows=("sharding", "context_mesh", "unconstrained_dims"))
@rule("reduce_precision", knows=("exponent_bits", "mantissa_bits"))
def _same(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """The operand itself."""
    return walk.term(equation.invars[output])


# b:f32[…] = convert_element_type[new_dtype=float32] a:bf16[…]
@rule("convert_element_type", knows=("new_dtype", "weak_type", "sharding"))
def _cast(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A number in another precision; from complex to real, its real part."""
    (operand,) = equation.invars
    before, after = dtype_of(operand), equation.params["new_dtype"]
    if not all(jnp.issubdtype(dtype, jnp.inexact) for dtype in (before, after)):
        return None
    term = walk.term(operand)
    is_complex = jnp.issubdtype(before, jnp.complexfloating)
    if is_complex and not jnp.issubdtype(after, jnp.complexfloating):
        return _part_of_complex(term, _contractions.real_part, jnp.real)
    return term


# b = transpose[permutation=(1, 0)] a
@rule("transpose", knows=("permutation",))
def _transpose(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """A product is transposed by its factors."""
    term = walk.term(equation.invars[0])
    if isinstance(term, Contraction):
        moved = transposed(term, tuple(equation.params["permutation"]))
        if moved is not None:
            return moved
    return reindexed(term, equation, output)


# b = reshape[new_sizes=(…)] a;  b = squeeze[dimensions=(0,)] a
@rule("reshape", knows=("new_sizes", "sharding"))
@rule("squeeze", knows=("dimensions",))
def _reshape(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """A product is reshaped by its factors, where no axis has parts of both."""
    term = walk.term(equation.invars[0])
    if isinstance(term, Contraction):
        moved = reshaped(term, shape_of(equation.outvars[0]))
        if moved is not None:
            return moved
    return reindexed(term, equation, output)


# b = rev[dimensions=…] a;  b = slice[limit_indices=… start_indices=… strides=…] a
# b c = split[axis=… sizes=…] a
@rule("rev", knows=("dimensions",))
@rule("slice", knows=("start_indices", "limit_indices", "strides"))
@rule("split", knows=("axis", "sizes"))
def _move(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """Elements in other places."""
    return reindexed(walk.term(equation.invars[0]), equation, output)


# c = pad[padding_config=…] a 0.0
@rule("pad", knows=("padding_config",))
def _pad(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """Elements among zeros."""
    if not walk.is_zero(equation.invars[1]):
        return None
    return reindexed(walk.term(equation.invars[0]), equation, output)


# b:f32[3,4] = broadcast_in_dim[broadcast_dimensions=(1,) shape=(3, 4)] a:f32[4]
@rule("broadcast_in_dim", knows=("shape", "broadcast_dimensions", "sharding"))
def _broadcast(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """Elements repeated along new axes."""
    if len(equation.invars) != 1:
        return None
    operand = equation.invars[0]
    term = walk.term(operand)
    shape = shape_of(equation.outvars[0])
    axes = tuple(equation.params["broadcast_dimensions"])
    if math.prod(shape) == term.size:
        if isinstance(term, Contraction):
            moved = reshaped(term, shape)
            if moved is not None:
                return moved
        return reindexed(term, equation, output)
    sizes = zip(axes, term.shape, strict=True)
    move = Repetition(shape, tuple(a for a, n in sizes if n != 1))
    return Reindexed(term, move, ("repeat", move, term.shape), shape)


def undone_broadcast(
    equation: JaxprEqn,
) -> tuple[Atom, tuple[int | None, ...]] | None:
    """The operand of a broadcast, and which axis of the result each of its axes is."""
    name = equation.primitive.name
    operand, result = equation.invars[0], equation.outvars[0]
    if name == "broadcast_in_dim" and len(equation.invars) == 1:
        axes = tuple(equation.params["broadcast_dimensions"])
        small, large = shape_of(operand), shape_of(result)
        return operand, tuple(
            None if small[i] != large[a] else a for i, a in enumerate(axes)
        )
    if name in ("reshape", "squeeze"):
        # Axes of size one come and go.
        small, large = shape_of(operand), shape_of(result)
        places = [a for a, n in enumerate(large) if n != 1]
        if [n for n in small if n != 1] != [large[a] for a in places]:
            return None
        found = iter(places)
        return operand, tuple(None if n == 1 else next(found) for n in small)
    if name == "convert_element_type":
        before, after = dtype_of(operand), dtype_of(result)
        if all(jnp.issubdtype(dtype, jnp.inexact) for dtype in (before, after)):
            return operand, tuple(range(len(shape_of(operand))))
    return None


# c = concatenate[dimension=0] a b
@rule("concatenate", knows=("dimension",))
def _concatenate(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """Terms side by side."""
    terms = tuple(map(walk.term, equation.invars))
    return Concatenation(terms, equation.params["dimension"])


# c = dynamic_slice[slice_sizes=…] a start …
@rule("dynamic_slice", knows=("slice_sizes",))
def _dynamic_slice(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """Elements at a place that is the same for all examples."""
    term = walk.term(equation.invars[0])
    if isinstance(term, Materialized) or not _others_are_constant(walk, equation, 0):
        return None
    return Moved(term, equation)


# ---- Elements times what all examples share ------------------------------------------


# c = mul a b;  c = div a b
@rule("mul", knows=("out_dtype",))
@rule("div", knows=("out_dtype",))
def _mul(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A term times a constant, or two values that span a product."""
    left, right = equation.invars
    kind = equation.primitive.name
    if kind == "mul" and walk.is_constant(left):
        left, right = right, left
    if not walk.is_constant(right):
        return _spanned(walk, equation) if kind == "mul" else None
    if shape_of(left) != shape_of(equation.outvars[0]):
        return None
    return scaled(walk, walk.term(left), right, kind)


def _spanned(walk: "Walk", equation: JaxprEqn) -> Term | None:
    """The outer product of two values that were broadcast to one shape."""
    shape = shape_of(equation.outvars[0])
    values = [walk.unbroadcast(v) for v in equation.invars]
    axes = [[a for a in places if a is not None] for _, places in values]
    sizes = [size_of(v) for v, _ in values]
    if math.prod(shape) <= max(sizes) or set(axes[0]) & set(axes[1]):
        return None
    if sorted(axes[0] + axes[1]) != [a for a, n in enumerate(shape) if n != 1]:
        return None
    factors = [derive(_without_units, value) for value, _ in values]
    none = Dimensions((), ())
    term = Contraction((factors[0],), (factors[1],), none, None, "mul")
    order = tuple(np.argsort(axes[0] + axes[1]).tolist())
    moved = transposed(term, order)
    return None if moved is None else reshaped(moved, shape)


def _without_units(value: jax.Array) -> jax.Array:
    """The value without axes of size one."""
    return value.reshape([n for n in value.shape if n != 1])


# d = select_n c a b: a where c is false, b where it is true
@rule("select_n")
def _select(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """Elements where a mask that all examples share is on (or off)."""
    mask, *cases = equation.invars
    if (
        not walk.is_constant(mask)
        or len(cases) != 2
        or not jnp.issubdtype(dtype_of(mask), jnp.bool_)
    ):
        return None
    parts = [
        scaled(walk, walk.term(case), mask, "select" if on else "deselect")
        for on, case in enumerate(cases)
        if not walk.is_zero(case)
    ]
    if any(isinstance(walk.term(case), Constant) for case in cases) and len(parts) > 1:
        return None
    return added(parts) if parts else None


def scaled(walk: "Walk", term: Term, factor: Atom, kind: str) -> Term:
    """A term times a constant; in the factors of a product where they have its axes."""
    small, axes = walk.unbroadcast(factor)
    places = tuple(a for a in axes if a is not None)
    value = derive(_without_units, small)
    moved = _scaled_inside(term, value, places, kind)
    if moved is not None:
        return moved
    if kind == "deselect":
        return Scaled(term, derive(jnp.logical_not, factor), "select")
    return Scaled(term, factor, kind)


def _scaled_inside(
    term: Term, value: Source, places: tuple[int, ...], kind: str
) -> Term | None:
    """The term with a scale taken into its factors, if these have the scale's axes."""
    scaled = functools.partial(_scaled_inside, value=value, places=places, kind=kind)
    if isinstance(term, Sum):
        return _with_inner(term, scaled)
    if isinstance(term, TableRows):
        rest = [a for a in range(len(term.shape)) if a not in term.axes]
        if not set(places) <= set(rest):
            return None
        inside = functools.partial(_scale_rows, kind, term.row_shape)
        inside = functools.partial(inside, tuple(rest.index(a) for a in places))
        return dataclasses.replace(term, rows=derive(inside, term.rows, value))
    if isinstance(term, KernelGradient):
        if places or not isinstance(term.term, Contraction):
            return None
        return _with_inner(term, scaled)
    if isinstance(term, Scaled):
        if kind in ("select", "deselect") and term.kind != "select":
            # The mask may hide elements that the scale makes infinite: it comes last.
            return None
        return _with_inner(term, scaled)
    if isinstance(term, Reindexed) and not places:
        if isinstance(term.term, Materialized):
            scale = functools.partial(_scale_axes, kind, ())
            source = derive(scale, term.term.source, value)
            inner = dataclasses.replace(term.term, source=source)
            return dataclasses.replace(term, term=inner)
        return _with_inner(term, scaled)
    if not isinstance(term, Contraction):
        return None
    if not places:
        scale = functools.partial(_scale_axes, kind, ())
        return term.with_factors(None, scale, value)
    if term.left_view is not None:
        return None
    shared = len(term.dimensions.left_shared)
    for side, free in enumerate(term.free):
        first = shared + (len(term.free[0]) if side else 0)
        if set(places) <= set(range(first, first + len(free))):
            axes = tuple(free[a - first] for a in places)
            scale = functools.partial(_scale_axes, kind, axes)
            sides = (None, scale) if side else (scale, None)
            return term.with_factors(*sides, value)
    return None


def _with_inner(
    term: Several | Elementwise, change: Callable[[Term], Term | None]
) -> Term | None:
    """The term with the terms inside it changed, or None where one cannot be."""
    if isinstance(term, Elementwise):
        inner = change(term.term)
        return None if inner is None else dataclasses.replace(term, term=inner)
    parts = list(map(change, term.terms))
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    if isinstance(term, Sum):
        return added(found)
    return dataclasses.replace(term, terms=tuple(found))


def _scale_axes(
    kind: str, axes: tuple[int, ...], x: jax.Array, value: jax.Array
) -> jax.Array:
    """A factor times a value that has some of its axes."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    sizes = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    value = value.transpose(order).reshape(sizes)
    if kind in ("select", "deselect"):
        keep = value if kind == "select" else ~value
        return jnp.where(keep, x, jnp.zeros((), x.dtype))
    x, value = widened(x), widened(value)
    return x / value if kind == "div" else x * value


def _scale_rows(
    kind: str,
    row_shape: tuple[int, ...],
    axes: tuple[int, ...],
    rows: jax.Array,
    value: jax.Array,
) -> jax.Array:
    """Rows [T, row] times a value that has some axes of a row."""
    shaped = rows.reshape(-1, *row_shape)
    axes = tuple(a + 1 for a in axes)
    return _scale_axes(kind, axes, shaped, value).reshape(rows.shape)


# ---- Complex numbers -----------------------------------------------------------------


# b = real a;  b = imag a
@rule("real", "imag")
def _real_or_imaginary(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """One part of complex factors is a product of twice as many real ones."""
    term = walk.term(equation.invars[0])
    if equation.primitive.name == "real":
        return _part_of_complex(term, _contractions.real_part, jnp.real)
    return _part_of_complex(term, _contractions.imaginary_part, jnp.imag)


def _part_of_complex(
    term: Term,
    split: Callable[[Contraction], Contraction],
    take: Callable[[jax.Array], jax.Array],
) -> Term | None:
    """The real or imaginary part of a term."""
    if isinstance(term, Materialized):
        return dataclasses.replace(term, source=derive(take, term.source))
    part = functools.partial(_part_of_complex, split=split, take=take)
    if isinstance(term, Sum | Concatenation | Reindexed):
        return _with_inner(term, part)
    if isinstance(term, TableRows):
        return dataclasses.replace(term, rows=derive(take, term.rows))
    if isinstance(term, Scaled):
        if jnp.issubdtype(dtype_of(term.factor), jnp.complexfloating):
            return None
        return _with_inner(term, part)
    if not isinstance(term, Contraction) or term.left_view is not None:
        return None
    left, right = (_contractions.is_complex(s[0]) for s in (term.left, term.right))
    if left and right:
        return split(term)
    if left:
        return term.with_factors(take, None)
    return term.with_factors(None, take)


# b = conj[input_dtype=…] a
@rule("conj", knows=("input_dtype",))
def _conj(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """The conjugates of both factors."""
    term = walk.term(equation.invars[0])
    if isinstance(term, Contraction):
        return term.with_factors(jnp.conj, jnp.conj)
    return None


# c = complex a b
@rule("complex")
def _complex(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """The sum of a real term and i times another."""
    parts: list[Term] = []
    for operand, unit in zip(equation.invars, (1, 1j), strict=True):
        if walk.is_zero(operand):
            continue
        term = walk.term(operand)
        if not isinstance(term, Contraction):
            return None
        times = functools.partial(_times_unit, unit)
        parts.append(term.with_factors(None, times))
    return added(parts) if parts else None


def _times_unit(unit: complex, x: jax.Array) -> jax.Array:
    """A real factor times 1 or i."""
    return x * jnp.asarray(unit, jnp.promote_types(widened(x).dtype, jnp.complex64))


# ---- Products ------------------------------------------------------------------------


# c:f32[3,4] = dot_general[dimension_numbers=(([], []), ([], []))] a:f32[3] b:f32[4]
@rule(
    "dot_general",
    knows=(
        "dimension_numbers",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
)
def _dot_general(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A product of two values of the example, or of a term with a constant."""
    left, right = equation.invars
    constant = walk.is_constant(left) or walk.is_constant(right)
    if constant:
        moved = _product_with_constant(walk, equation)
        if moved is not None:
            return moved
    if isinstance(left, Literal) or isinstance(right, Literal):
        return None
    (left_dims, right_dims), (left_shared, right_shared) = equation.params[
        "dimension_numbers"
    ]
    size = size_of(equation.outvars[0])
    # Not the elements of one vector times those of another, or times a constant.
    smaller = size <= max(size_of(left), size_of(right))
    if smaller and (left_shared or constant):
        return None
    return Contraction(
        (left,),
        (right,),
        Dimensions(
            tuple(left_dims),
            tuple(right_dims),
            tuple(left_shared),
            tuple(right_shared),
        ),
        equation.params["precision"],
        "dot_general",
    )


def _product_with_constant(walk: "Walk", equation: JaxprEqn) -> Term | None:
    """(Σ x δᵀ) B = Σ x (Bᵀδ)ᵀ: the constant meets the factor that has its axes."""
    operand = 1 if walk.is_constant(equation.invars[0]) else 0
    term = walk.term(equation.invars[operand])
    if isinstance(term, Materialized):
        return None
    moved = _factor_times_constant(term, equation, operand)
    return moved if moved is not None else Applied(term, equation, operand, 0)


def _factor_times_constant(term: Term, equation: JaxprEqn, operand: int) -> Term | None:
    """The product with the constant taken into one factor."""
    if isinstance(term, Sum):
        parts = [_factor_times_constant(t, equation, operand) for t in term.terms]
        found = [part for part in parts if part is not None]
        return added(found) if len(found) == len(parts) else None
    if not isinstance(term, Contraction) or term.left_view is not None:
        return None
    summed, shared = equation.params["dimension_numbers"]
    if shared[0] or term.dimensions.left_shared:
        return None
    constant = equation.invars[1 - operand]
    own, others = summed[operand], summed[1 - operand]
    count = len(term.free[0])
    sides = {0 if axis < count else 1 for axis in own}
    if len(sides) > 1:
        return None
    side = sides.pop() if sides else 1
    free = term.free[side]
    axes = tuple(free[axis - (count if side else 0)] for axis in own)
    rank = len(shape_of((term.right if side else term.left)[0]))
    product = functools.partial(
        _through_constant, axes, tuple(others), equation.params["precision"]
    )
    # The factor keeps its other axes in their order; those of the constant follow.
    place = {axis: i for i, axis in enumerate(a for a in range(rank) if a not in axes)}
    dims = term.dimensions
    if side:
        dims = dataclasses.replace(
            dims, right_summed=tuple(place[a] for a in dims.right_summed)
        )
        moved = term.with_factors(None, product, constant, dimensions=dims)
    else:
        dims = dataclasses.replace(
            dims, left_summed=tuple(place[a] for a in dims.left_summed)
        )
        moved = term.with_factors(product, None, constant, dimensions=dims)
    # Axes as they are now: [left, right] with the constant's at the end of one side.
    new = len(shape_of(constant)) - len(others)
    left_count, right_count = (len(f) for f in moved.free)
    axes_now = list(range(left_count + right_count))
    from_constant = (
        axes_now[left_count + right_count - new :]
        if side
        else axes_now[left_count - new : left_count]
    )
    rest = [a for a in axes_now if a not in from_constant]
    order = [*rest, *from_constant] if operand == 0 else [*from_constant, *rest]
    return transposed(moved, tuple(order)) or _transposed_result(moved, tuple(order))


def _through_constant(
    axes: tuple[int, ...],
    others: tuple[int, ...],
    precision: Any,
    factor: jax.Array,
    constant: jax.Array,
) -> jax.Array:
    """A factor contracted with a constant."""
    factor, constant = widened(factor), widened(constant)
    dtype = jnp.promote_types(factor.dtype, constant.dtype)
    return jax.lax.dot_general(
        factor.astype(dtype),
        constant.astype(dtype),
        ((axes, others), ((), ())),
        precision=precision,
    )


def transposed(term: Contraction, order: tuple[int, ...]) -> Contraction | None:
    """The product with its axes in another order, if its factors can bring it."""
    if term.left_view is not None:
        return None
    shared = len(term.dimensions.left_shared)
    left, right = (len(free) for free in term.free)
    groups = [0 if a < shared else 1 if a < shared + left else 2 for a in order]
    swap = groups == [0] * shared + [2] * right + [1] * left
    if not swap and groups != sorted(groups):
        return None
    if swap and left and right:
        moved = term.swapped()
        order = tuple(
            a if a < shared else a + right if a < shared + left else a - left
            for a in order
        )
        return transposed(moved, order)
    if tuple(order) == tuple(range(len(order))):
        return term
    dims = term.dimensions
    dims = dataclasses.replace(
        dims,
        left_shared=tuple(dims.left_shared[a] for a in order[:shared]),
        right_shared=tuple(dims.right_shared[a] for a in order[:shared]),
    )
    orders = (
        tuple(a - shared for a in order[shared : shared + left]),
        tuple(a - shared - left for a in order[shared + left :]),
    )
    left_move, right_move = (
        None
        if moved == tuple(range(len(moved)))
        else functools.partial(_permute_axes, free, moved)
        for free, moved in zip(term.free, orders, strict=True)
    )
    return term.with_factors(left_move, right_move, dimensions=dims)


def _permute_axes(
    free: tuple[int, ...], order: tuple[int, ...], factor: jax.Array
) -> jax.Array:
    """A factor with its free axes in another order."""
    axes = list(range(factor.ndim))
    for place, k in zip(free, order, strict=True):
        axes[place] = free[k]
    return factor.transpose(axes)


def _transposed_result(term: Term, order: tuple[int, ...]) -> Reindexed:
    """The term with its axes in another order."""
    shape = tuple(term.shape[a] for a in order)
    move = functools.partial(jnp.transpose, axes=order)
    return Reindexed(term, move, ("transpose", order, term.shape), shape)


def reshaped(term: Contraction, shape: tuple[int, ...]) -> Contraction | None:
    """The product in another shape, if no axis has parts of both factors."""
    if term.left_view is not None:
        return None
    shared_sizes, left_size, _ = term.flat_shape
    count = len(shared_sizes)
    if shape[:count] != shared_sizes:
        return None
    rest = shape[count:]
    for split in range(len(rest) + 1):
        if math.prod(rest[:split]) == left_size:
            break
    else:
        return None
    dims = term.dimensions
    summed = len(dims.left_summed)
    new_dims = Dimensions(
        tuple(range(summed)),
        tuple(range(summed)),
        tuple(range(summed, summed + count)),
        tuple(range(summed, summed + count)),
    )
    left = functools.partial(
        _reshape_free, (*dims.left_summed, *dims.left_shared), rest[:split]
    )
    right = functools.partial(
        _reshape_free, (*dims.right_summed, *dims.right_shared), rest[split:]
    )
    return term.with_factors(left, right, dimensions=new_dims)


def _reshape_free(
    bound: tuple[int, ...], shape: tuple[int, ...], factor: jax.Array
) -> jax.Array:
    """A factor [*bound, *free] with its free axes in another shape."""
    free = [a for a in range(factor.ndim) if a not in bound]
    factor = factor.transpose(*bound, *free)
    return factor.reshape(*factor.shape[: len(bound)], *shape)


# c = conv_general_dilated[dimension_numbers=… padding=… …] image cotangent
@rule(
    "conv_general_dilated",
    knows=(
        "window_strides",
        "padding",
        "lhs_dilation",
        "rhs_dilation",
        "dimension_numbers",
        "feature_group_count",
        "batch_group_count",
        "precision",
        "preferred_element_type",
        "out_sharding",
    ),
)
def _convolution(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A convolution of two values of the example, as a product of patches."""
    image, kernel = equation.invars
    params = equation.params
    if walk.is_constant(image) or walk.is_constant(kernel):
        operand = 1 if walk.is_constant(image) else 0
        return _applied(walk, equation, output, operand)
    if params["feature_group_count"] != 1:
        return None
    numbers = params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    shape = shape_of(equation.outvars[0])
    positions = tuple(shape[d] for d in out[2:])
    groups = params["batch_group_count"]
    padding = tuple(
        (low, high, dilation - 1)
        for (low, high), dilation in zip(
            params["padding"], params["lhs_dilation"], strict=True
        )
    )
    patches = Patches(
        tuple(lhs),
        padding,
        tuple(shape_of(kernel)[d] for d in rhs[2:]),
        tuple(params["rhs_dilation"]),
        positions,
        tuple(params["window_strides"]),
        groups,
    )
    product = Contraction(
        (image,),
        (kernel,),
        # [entries, positions, groups, batch] with [entries, groups, out]
        Dimensions((0,), (0,), (2,), (1,)),
        params["precision"],
        "conv_general_dilated",
        patches,
        KernelEntries(tuple(rhs), groups),
    )
    return KernelGradient(product, positions, tuple(out), equation)


# b = reduce_sum[axes=(0,)] a
@rule("reduce_sum", knows=("axes", "out_sharding"))
def _reduce_sum(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A sum over axes of one factor, or the small result of summing a product."""
    term = walk.term(equation.invars[0])
    shape = shape_of(equation.outvars[0])
    axes = tuple(equation.params["axes"])
    if isinstance(term, Materialized):
        return None
    if math.prod(shape) == term.size:
        if isinstance(term, Contraction):
            moved = reshaped(term, shape)
            if moved is not None:
                return moved
        return reindexed(term, equation, output)
    small = _summed(term, axes)
    if small is not None:
        walk.replacements[equation.outvars[0]] = small
        return Materialized(small, f"reduce_sum of {', '.join(term.routes)}")
    moved = _factor_summed(term, axes)
    return moved if moved is not None else Applied(term, equation, 0, 0)


def _summed(term: Term, axes: tuple[int, ...]) -> Derived | None:
    """A sum over some axes that is small, without forming what is summed."""
    scales: list[Scaled] = []
    while isinstance(term, Scaled) and term.kind != "select":
        scales.append(term)
        term = term.term
    if isinstance(term, Sum):
        parts = []
        for part in term.terms:
            for scale in scales[::-1]:
                part = dataclasses.replace(scale, term=part)
            parts.append(_summed(part, axes))
        if any(part is None for part in parts):
            return None
        return derive(_sum_of_values, *(part for part in parts if part is not None))
    kinds = tuple(scale.kind for scale in scales)
    factors = tuple(scale.factor for scale in scales)
    size = math.prod(n for a, n in enumerate(term.shape) if a not in axes)
    if isinstance(term, Materialized):
        function = functools.partial(_sum_of_repeated, None, axes, kinds)
        return derive(function, term.source, *factors)
    if isinstance(term, Reindexed) and isinstance(term.term, Materialized):
        move = term.move
        if not isinstance(move, Repetition) or size > term.term.size:
            return None
        function = functools.partial(_sum_of_repeated, move, axes, kinds)
        return derive(function, term.term.source, *factors)
    if not isinstance(term, Contraction) or term.left_view is not None:
        return None
    left, right = term.factors
    if len(term.left) > 1 or size > max(math.prod(left.shape), math.prod(right.shape)):
        return None
    function = functools.partial(_sum_of_product, term.dimensions, axes, kinds)
    return derive(function, term.left[0], term.right[0], *factors)


def _sum_of_values(*values: jax.Array) -> jax.Array:
    """The sum of some values."""
    return functools.reduce(jnp.add, values)


def _sum_of_repeated(
    move: Repetition | None,
    axes: tuple[int, ...],
    kinds: tuple[str, ...],
    value: jax.Array,
    *scales: jax.Array,
) -> jax.Array:
    """A repeated value times the scales, summed over some axes."""
    value = widened(value if move is None else move.without_units(value))
    rank = value.ndim if move is None else len(move.shape)
    labels = list(range(rank)) if move is None else list(move.axes)
    operands: list[Any] = [value, labels, *_scale_operands(kinds, scales, rank)]
    counted = 1
    if move is not None and not scales:
        counted = math.prod(move.shape[a] for a in axes if a not in move.axes)
    wanted = [a for a in range(rank) if a not in axes]
    kept = [a for a in wanted if a in labels or scales]
    assert kept == wanted, "an axis that only the repetition has stays"
    return jnp.einsum(*operands, wanted, optimize="optimal") * counted


def _scale_operands(
    kinds: tuple[str, ...], scales: tuple[jax.Array, ...], rank: int
) -> list[Any]:
    """Scales as operands of an einsum over the axes of the result."""
    operands: list[Any] = []
    for kind, scale in zip(kinds, scales, strict=True):
        scale = widened(jnp.asarray(scale))
        labels = list(range(rank)) if scale.ndim else []
        operands += [1 / scale if kind == "div" else scale, labels]
    return operands


def _sum_of_product(
    dimensions: Dimensions,
    axes: tuple[int, ...],
    kinds: tuple[str, ...],
    left: jax.Array,
    right: jax.Array,
    *scales: jax.Array,
) -> jax.Array:
    """One factor meets the scales first, so that the product is never formed."""
    left, right = widened(left), widened(right)
    bound_left = (*dimensions.left_shared, *dimensions.left_summed)
    bound_right = (*dimensions.right_shared, *dimensions.right_summed)
    # Axes of the result first, so that they have the labels of the scales.
    order = [*dimensions.left_shared]
    order += [a for a in range(left.ndim) if a not in bound_left]
    left_label = {a: i for i, a in enumerate(order)}
    rank = len(order)
    right_label = {}
    for a in range(right.ndim):
        if a not in bound_right:
            right_label[a] = rank
            rank += 1
    for i, a in enumerate(dimensions.left_summed):
        left_label[a] = rank + i
    for a, b in zip(bound_left, bound_right, strict=True):
        right_label[b] = left_label[a]
    wanted = [a for a in range(rank) if a not in axes]
    return jnp.einsum(
        left,
        [left_label[a] for a in range(left.ndim)],
        right,
        [right_label[a] for a in range(right.ndim)],
        *_scale_operands(kinds, scales, rank),
        wanted,
        optimize="optimal",
    )


def _factor_summed(term: Term, axes: tuple[int, ...]) -> Contraction | None:
    """The product with one factor, or each, summed over its own axes."""
    if not isinstance(term, Contraction) or term.left_view is not None:
        return None
    if term.dimensions.left_shared:
        return None
    count = len(term.free[0])
    left_axes = tuple(term.free[0][a] for a in axes if a < count)
    right_axes = tuple(term.free[1][a - count] for a in axes if a >= count)
    dims = term.dimensions
    ranks = [len(factor.shape) for factor in term.factors]
    places = [
        {a: i for i, a in enumerate(b for b in range(rank) if b not in gone)}
        for rank, gone in zip(ranks, (left_axes, right_axes), strict=True)
    ]
    return term.with_factors(
        functools.partial(_sum_axes, left_axes) if left_axes else None,
        functools.partial(_sum_axes, right_axes) if right_axes else None,
        dimensions=Dimensions(
            tuple(places[0][a] for a in dims.left_summed),
            tuple(places[1][a] for a in dims.right_summed),
        ),
    )


def _sum_axes(axes: tuple[int, ...], factor: jax.Array) -> jax.Array:
    """A factor summed over some axes."""
    return widened(factor).sum(axes)


# ---- Rows of tables, and parts of stacked parameters ---------------------------------


# d = scatter-add[dimension_numbers=…] table indices updates
@rule(
    "scatter-add",
    knows=(
        "dimension_numbers",
        "mode",
        "update_jaxpr",
        "update_consts",
        "indices_are_sorted",
        "unique_indices",
    ),
)
def _scatter_add(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """Updates added to a table at certain places."""
    table, _, updates = equation.invars
    if walk.is_constant(updates):
        return None
    placed = _scattered(walk, equation)
    if placed is None or walk.is_zero(table):
        return placed
    return added([walk.term(table), placed])


def _scattered(walk: "Walk", equation: JaxprEqn) -> Term | None:
    """The updates alone, among zeros."""
    table, indices, updates = equation.invars
    shape = shape_of(table)
    numbers = equation.params["dimension_numbers"]
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    inserted = tuple(numbers.inserted_window_dims)
    if numbers.operand_batching_dims or not shape_of(indices):
        return None
    term = walk.term(updates)
    fixed = walk.is_constant(indices) and not isinstance(term, Materialized)
    if fixed and _places_are_distinct(walk, equation):
        return Moved(term, equation)
    window = [d for d in range(len(shape)) if d not in inserted]
    whole = all(
        shape_of(updates)[u] == shape[t]
        for u, t in zip(numbers.update_window_dims, window, strict=True)
    )
    if sorted(axes) != sorted(inserted) or not whole:
        apply = fixed and walk.is_zero(table)
        return Applied(term, equation, 2, 0) if apply else None
    sizes = tuple(shape[a] for a in axes)
    clips = equation.params["mode"] == jax.lax.GatherScatterMode.CLIP
    rows = functools.partial(_rows_first, tuple(numbers.update_window_dims))
    return TableRows(
        derive(functools.partial(_flat_indices, sizes, clips), indices),
        derive(rows, updates),
        shape,
        axes,
    )


def _flat_indices(sizes: tuple[int, ...], clips: bool, indices: jax.Array) -> jax.Array:
    """Indices [..., axes] as one index [T]; beyond all rows where it is dropped."""
    indices = saturated(indices.reshape(-1, len(sizes)))
    bounds = jnp.asarray(sizes, jnp.int32)[None]
    if clips:
        indices = jnp.clip(indices, 0, bounds - 1)
    inside = ((indices >= 0) & (indices < bounds)).all(1)
    flat = jnp.zeros(indices.shape[0], jnp.int32)
    for a, size in enumerate(sizes):
        flat = flat * size + indices[:, a]
    return jnp.where(inside, flat, math.prod(sizes))


def _rows_first(window: tuple[int, ...], updates: jax.Array) -> jax.Array:
    """Updates as rows [T, row]."""
    others = [d for d in range(updates.ndim) if d not in window]
    count = math.prod(updates.shape[d] for d in others)
    return updates.transpose(*others, *window).reshape(count, -1)


def _places_are_distinct(walk: "Walk", equation: JaxprEqn) -> bool:
    """Whether no element of the table gets two updates, for all that is known."""
    table, indices, updates = equation.invars
    numbers = equation.params["dimension_numbers"]
    if equation.params["unique_indices"]:
        return True
    places = walk.known_value(indices)
    if places is None:
        return False
    window = iter(numbers.update_window_dims)
    sizes = [
        1 if d in numbers.inserted_window_dims else shape_of(updates)[next(window)]
        for d in range(len(shape_of(table)))
    ]
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    clips = equation.params["mode"] == jax.lax.GatherScatterMode.CLIP
    return windows_are_disjoint(
        places.reshape(-1, len(axes)), axes, sizes, shape_of(table), clips
    )


# d = dynamic_update_slice table update start …
@rule("dynamic_update_slice")
def _dynamic_update_slice(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A part of a parameter that is read at a computed place, among zeros."""
    table, update, *starts = equation.invars
    if not walk.is_zero(table) or walk.is_constant(update):
        return None
    term = walk.term(update)
    if all(map(walk.is_constant, starts)) and not isinstance(term, Materialized):
        return Placed(term, tuple(starts), shape_of(table))
    sizes, windows = shape_of(table), shape_of(update)
    axes = tuple(a for a, n in enumerate(windows) if n != sizes[a])
    if not axes:
        return term
    if isinstance(term, Contraction) and len(axes) == 1:
        (axis,) = axes
        if windows[axis] == 1 and sizes[axis] <= ONE_HOT_ROWS:
            chosen = _one_hot_product(term, axis, sizes[axis], starts[axis])
            if chosen is not None:
                return chosen
    height = [sizes[a] for a in axes]
    window = [windows[a] for a in axes]
    indices = functools.partial(_window_indices, height, window)
    rows = functools.partial(
        _rows_first, tuple(a for a in range(len(sizes)) if a not in axes)
    )
    return TableRows(
        derive(indices, *(starts[a] for a in axes)), derive(rows, update), sizes, axes
    )


def _window_indices(
    sizes: list[int], window: list[int], *starts: jax.Array
) -> jax.Array:
    """Flat indices [T] of a window that is moved inside the table."""
    flat = jnp.zeros([1], jnp.int32)
    for size, width, start in zip(sizes, window, starts, strict=True):
        # Negative starts have been counted from the end before; XLA clamps them.
        first = jnp.clip(saturated(start), 0, size - width)
        along = first + jnp.arange(width, dtype=jnp.int32)
        flat = (flat[:, None] * size + along[None]).reshape(-1)
    return flat


def _one_hot_product(
    term: Contraction, axis: int, size: int, start: Atom
) -> Contraction | None:
    """A product in one of few rows: one factor times the one-hot vector of the row."""
    if term.left_view is not None or term.dimensions.left_shared:
        return None
    count = len(term.free[0])
    side = 0 if axis < count else 1
    place = term.free[side][axis - (count if side else 0)]
    spread = functools.partial(_spread_by_one_hot, place, size)
    functions = (None, spread) if side else (spread, None)
    return term.with_factors(*functions, start)


def _spread_by_one_hot(
    axis: int, size: int, factor: jax.Array, start: jax.Array
) -> jax.Array:
    """A factor whose axis of size one becomes the axis of the rows."""
    row = jnp.clip(saturated(start), 0, size - 1)
    hot = (jnp.arange(size, dtype=jnp.int32) == row).reshape(
        [size if a == axis else 1 for a in range(factor.ndim)]
    )
    return jnp.where(hot, factor, jnp.zeros((), factor.dtype))


# c = gather[dimension_numbers=… slice_sizes=…] a indices
@rule(
    "gather",
    knows=(
        "dimension_numbers",
        "slice_sizes",
        "indices_are_sorted",
        "unique_indices",
        "mode",
        "fill_value",
    ),
)
def _gather(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """Elements from places that are the same for all examples."""
    term = walk.term(equation.invars[0])
    if isinstance(term, Materialized) or not walk.is_constant(equation.invars[1]):
        return None
    if equation.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        return Applied(term, equation, 0, 0)
    return Moved(term, equation)


# ---- Other linear operations ---------------------------------------------------------


# b = cumsum[axis=0 reverse=True] a;  b = fft[…] a;  b = reduce_window_sum[…] a
@rule("cumsum", knows=("axis", "reverse"))
@rule("fft", knows=("fft_type", "fft_lengths", "kind"))
@rule(
    "reduce_window_sum",
    knows=(
        "window_dimensions",
        "window_strides",
        "padding",
        "base_dilation",
        "window_dilation",
    ),
)
def _linear(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A linear operation on its first operand."""
    return _applied(walk, equation, output, 0)


# c = triangular_solve[left_side=… …] a b, linear in b
@rule(
    "triangular_solve",
    knows=("left_side", "lower", "transpose_a", "conjugate_a", "unit_diagonal"),
)
def _triangular_solve(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A linear operation on the right-hand side."""
    return _applied(walk, equation, output, 1)


def _applied(
    walk: "Walk", equation: JaxprEqn, output: int, operand: int
) -> Term | None:
    """A linear operation on one operand, run on gradients of a few examples."""
    term = walk.term(equation.invars[operand])
    if isinstance(term, Materialized):
        return None
    if not _others_are_constant(walk, equation, operand):
        return None
    return Applied(term, equation, operand, output)


def _others_are_constant(walk: "Walk", equation: JaxprEqn, operand: int) -> bool:
    """Whether all inputs but one are the same for all examples."""
    inputs = enumerate(equation.invars)
    return all(walk.is_constant(v) for i, v in inputs if i != operand)


# ---- Loops and conditions ------------------------------------------------------------


# c ys = scan[jaxpr=… length=…] consts c xs
@rule("scan", knows=tuple(SCAN_PARAMETERS))
def _scan(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """A sum over steps, or a stack: asks for its factors."""
    loop = loop_of(equation)
    if loop is None:
        return None
    walk.request(equation, output)
    if output < loop.carries:
        # What the sum starts with may come from another loop.
        walk.term(equation.invars[loop.consts + output])
    return None


# b = cond[branches=…] index operands
@rule("cond", knows=("branches", "linear"))
def _cond(walk: "Walk", equation: JaxprEqn, output: int) -> Term | None:
    """One of several terms: asks for their factors."""
    walk.request(equation, output)
    return None


# What a loop gives for a gradient whose moments it has taken itself. It stands for the
# gradient in the program, and is never evaluated.
TAKEN_IN_LOOP = Primitive("moments_taken_in_loop")
TAKEN_IN_LOOP.def_abstract_eval(
    lambda mean, spread, *, inner, length, dtype: mean.update(dtype=dtype)
)


# c = moments_taken_in_loop[inner=… length=…] mean spread
@rule("moments_taken_in_loop", knows=("inner", "length", "dtype"))
def _taken_in_loop(walk: "Walk", equation: JaxprEqn, output: int) -> Term:
    """Mean and spread that left a loop."""
    mean, spread = equation.invars
    assert isinstance(mean, Var)
    assert isinstance(spread, Var)
    params = equation.params
    return TakenInLoop(mean, spread, params["inner"].term, params["length"])


# ---- Building terms ------------------------------------------------------------------


def negative(term: Term) -> Term:
    """The term with its sign changed."""
    minus: Source = derive(lambda: jnp.float32(-1))
    inside = _scaled_inside(term, minus, (), "mul")
    return inside if inside is not None else Scaled(term, minus, "mul")


def added(terms: list[Term]) -> Term:
    """The sum of terms; those of one layout become one."""
    merged: dict[object, Term] = {}
    for term in terms:
        parts = term.terms if isinstance(term, Sum) else (term,)
        for part in parts:
            key = _layout(part)
            merged[key] = _joined(merged[key], part) if key in merged else part
    flat = tuple(merged.values())
    if len(flat) == 1:
        return flat[0]
    if all(isinstance(part, Materialized) for part in flat):
        values = (part.source for part in flat if isinstance(part, Materialized))
        return Materialized(derive(_sum_of_values, *values), "add")
    return Sum(flat)


def _layout(term: Term) -> object:
    """Key of the terms that can be added inside."""
    if isinstance(term, Contraction | TableRows):
        return (type(term), term.layout)
    if isinstance(term, Reindexed):
        return ("reindexed", term.key)
    if isinstance(term, KernelGradient):
        return ("kernel", term.key, _layout(term.term))
    if isinstance(term, Scaled) and not isinstance(term.factor, Literal):
        return ("scaled", term.kind, term.factor)
    # Nothing, not even itself: the gradient of w + w adds one value to itself.
    return object()


def _joined(one: Term, other: Term) -> Term:
    """Two terms of the same layout as one."""
    if isinstance(one, Contraction) and isinstance(other, Contraction):
        return one.joined(other)
    if isinstance(one, TableRows) and isinstance(other, TableRows):
        return one.joined(other)
    if isinstance(one, KernelGradient) and isinstance(other, KernelGradient):
        return dataclasses.replace(one, term=one.term.joined(other.term))
    assert isinstance(one, Reindexed | Scaled)
    assert isinstance(other, Reindexed | Scaled)
    inner = added([one.term, other.term])
    if isinstance(inner, Contraction) and inner.has_large_factors():
        inner = Materialized(derive_value(inner), inner.name)
    return dataclasses.replace(one, term=inner)


def derive_value(term: Term) -> Derived:
    """A term as one value of the example."""
    sources = tuple(dict.fromkeys(term.sources))

    def value(*values: jax.Array) -> jax.Array:
        return term.value(dict(zip(sources, values, strict=True)), None)

    return derive(value, *sources)
