"""Losses that look across examples, recognised from their programs.

The variance of a mean is that of independent terms. Batch normalization in training
mode has no terms: its statistics are those of the whole batch, and of a single example
they are the example itself, so that x - mean(x) is zero and so is its gradient. Nothing
fails, and the numbers are wrong; two functions find what they can:

- `centered_on_itself`: in the program of one example, a difference between a value and
  its own mean over axes of length one.
- `mixes_examples`: in the program of a batch, a value without the batch axis that comes
  from one with it and meets another one with it, such as a mean that is subtracted from
  each example. The batch axis is told from others by its length, a prime number that
  divides no other length.

Both read jaxprs, so they know nothing of any framework's layers. Neither is complete,
and a program that they find may be right all the same (the length of the longest
sequence mixes examples too), so what they find is a warning.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from dissect_optax.gradient_variance._program import (
    Atom,
    depends_on,
    shape_of,
    size_of,
    trace,
)

SAME_ELEMENTS = ("broadcast_in_dim", "convert_element_type", "reshape", "squeeze")
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)
REMEDY = (
    "Batch normalization in training mode does so. Use its running statistics "
    "(`use_running_average=True` in Flax Linen, `model.eval()` in Flax NNX), a "
    "normalization within the example (LayerNorm, GroupNorm), or make groups of "
    "examples the examples: reshape the leaves of `batch` to [groups, size, ...] and "
    "let the loss be the mean over one group."
)


def warn_of_centering(jaxpr: Jaxpr, examples: Sequence[Var]) -> None:
    """Warn of a value that is its own mean, in the program of one example."""
    found = centered_on_itself(jaxpr, depends_on(jaxpr, examples))
    if found is not None:
        warnings.warn(
            "The loss of one example subtracts from a value of shape "
            f"{shape_of(found.outvars[0])} its mean over axes of length one. The "
            "difference is zero, and so is the gradient of all that comes before it. "
            + REMEDY,
            UserWarning,
            stacklevel=2,
        )


def warn_of_mixing(
    loss: Callable[..., Any], params: Any, example: Any, jaxpr: Jaxpr
) -> bool:
    """Warn of a loss `loss(params, batch)` in which examples meet; whether they do.

    Args:
        loss: Mean over a batch.
        params: Parameters, or their shapes.
        example: Shapes of one example.
        jaxpr: Program of a batch of one, for the lengths that occur in it.
    """
    size = batch_size_apart_from(lengths(jaxpr))
    if size is None:
        return False
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), example
    )
    try:
        program, _ = trace(loss, params, batch)
    except Exception:
        # It takes batches of certain lengths only, which is no fault.
        return False
    examples = program.jaxpr.invars[len(jax.tree.leaves(params)) :]
    found = mixes_examples(program.jaxpr, examples, size)
    if found is None:
        return False
    shape = ", ".join(
        "batch" if n == size else str(n) for n in shape_of(found.outvars[0])
    )
    warnings.warn(
        "The batched loss lets examples meet: it combines a value of the whole batch "
        f"with single examples in a `{found.primitive.name}` of shape [{shape}]. Its "
        "mean over batches of one is another function. " + REMEDY,
        UserWarning,
        stacklevel=2,
    )
    return True


def centered_on_itself(
    jaxpr: Jaxpr, dependent: Iterable[Var] | None = None
) -> JaxprEqn | None:
    """The first difference of a value and its own mean over axes of length one.

    `dependent`, if given, holds the variables that depend on the example.
    """
    relevant = None if dependent is None else set(dependent)
    # The value whose elements a variable holds, and whether a sum was on the way.
    origin: dict[Atom, tuple[Atom, bool]] = {}
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in SAME_ELEMENTS or name == "reduce_sum" or _divides_by_one(equation):
            source, output = equation.invars[0], equation.outvars[0]
            if size_of(source) == size_of(output):
                # y = reduce_sum[axes=(0,)] x:f32[1,3], as in mean(x, 0) = y / 1.0
                first, summed = _origin(source, origin)
                origin[output] = first, summed or name == "reduce_sum"
        if name == "sub":
            (left, _), (right, summed) = (_origin(v, origin) for v in equation.invars)
            known = isinstance(left, Var) and (relevant is None or left in relevant)
            # Without the sum it is a value minus itself, a usual trick with
            # `stop_gradient`.
            if known and left is right and summed:
                return equation
        for inner in _jaxprs(equation):
            found = centered_on_itself(inner)
            if found is not None:
                return found
    return None


def _origin(atom: Atom, origin: dict[Atom, tuple[Atom, bool]]) -> tuple[Atom, bool]:
    """The value whose elements an atom holds."""
    if isinstance(atom, Literal):  # Not hashable.
        return atom, False
    return origin.get(atom, (atom, False))


def _divides_by_one(equation: JaxprEqn) -> bool:
    """Whether an equation divides or multiplies by a literal one."""
    if equation.primitive.name not in ("div", "mul"):
        return False
    one = equation.invars[1]
    return isinstance(one, Literal) and jnp.ndim(one.val) == 0 and bool(one.val == 1)


def mixes_examples(
    jaxpr: Jaxpr, examples: Iterable[Atom], size: int
) -> JaxprEqn | None:
    """The first equation in which examples meet each other.

    Args:
        jaxpr: Program of a batch.
        examples: Its inputs that hold the batch.
        size: Length of the batch axis, which divides no other length.
    """
    dependent = {v for v in examples if isinstance(v, Var)}
    for equation in jaxpr.eqns:
        inputs = {v for v in equation.invars if isinstance(v, Var) and v in dependent}
        if not inputs:
            continue
        nested = list(_jaxprs(equation))
        for inner in nested:
            # The predicate of a `cond` comes first and is not handed on.
            pairs = zip(reversed(inner.invars), reversed(equation.invars), strict=False)
            handed = [a for a, v in pairs if isinstance(v, Var) and v in inputs]
            found = mixes_examples(inner, handed, size)
            if found is not None:
                return found
        reduced = any(not _batch_axes(v, size) for v in inputs)
        axes = [_batch_axes(v, size) for v in equation.outvars]
        # x - m:f32[3], m a mean over the batch; or x @ xᵀ, all pairs of examples.
        if not nested and ((reduced and any(axes)) or max(axes, default=0) > 1):
            return equation
        dependent.update(equation.outvars)
    return None


def _batch_axes(atom: Atom, size: int) -> int:
    """Number of axes that hold the batch, by itself or merged with another one."""
    shape = getattr(atom.aval, "shape", ())
    return sum(n > 0 and n % size == 0 for n in shape)


def batch_size_apart_from(lengths: Iterable[int]) -> int | None:
    """A prime that divides none of the lengths, or None if there is no small one."""
    known = {n for n in lengths if n > 0}
    free = (prime for prime in PRIMES if all(n % prime for n in known))
    return next(free, None)


def lengths(jaxpr: Jaxpr) -> set[int]:
    """Lengths of all axes of a program."""
    found = {n for v in jaxpr.invars for n in getattr(v.aval, "shape", ())}
    for equation in jaxpr.eqns:
        found |= {n for v in equation.outvars for n in getattr(v.aval, "shape", ())}
        for inner in _jaxprs(equation):
            found |= lengths(inner)
    return found


def _jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Programs among the parameters of an equation."""
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, Jaxpr):
                yield each
