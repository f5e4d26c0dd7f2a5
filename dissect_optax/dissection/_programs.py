"""Digests of traced programs: what tells a user's functions apart in records."""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from dissect_optax.dissection._data import numbers_of

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def program_digest(function: Callable[..., Any], *shapes: Any) -> str:
    """Digest of the program that a function traces to, its constants included.

    A derivative rule of the user's own is part of it only where `function` takes the
    derivative.

    Examples:
      >>> import jax.numpy as jnp
      >>> one = program_digest(lambda x: 2 * x, jnp.ones(3))
      >>> one == program_digest(lambda y: 2 * y, jnp.ones(3))
      True
      >>> one == program_digest(lambda x: 3 * x, jnp.ones(3))
      False

      Also of arrays that a function inside holds.

      >>> holds = lambda array: jax.jit(lambda x: x + array)
      >>> one = program_digest(holds(jnp.array([0.0, 1.0])), jnp.ones(2))
      >>> one == program_digest(holds(jnp.array([0.0, 2.0])), jnp.ones(2))
      False
    """
    closed = jax.make_jaxpr(function)(*shapes)
    # Addresses of functions differ from process to process.
    content = hashlib.sha256(_ADDRESS.sub("", str(closed)).encode())
    for array in _constants(closed):
        numbers = numbers_of(array)
        content.update(f"{numbers.dtype}{numbers.shape}".encode() + numbers.tobytes())
    return content.hexdigest()[:12]


def uses_first_argument(function: Callable[..., Any], *shapes: Any) -> bool:
    """Whether some result depends on the first argument, as far as the program shows.

    Examples:
      >>> uses_first_argument(lambda x, y: x + y, 1.0, 2.0)
      True
      >>> uses_first_argument(lambda x, y: 2 * y, 1.0, 2.0)
      False
    """
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    count = len(jax.tree.leaves(shapes[0]))
    reached = set(jaxpr.invars[:count])
    for equation in jaxpr.eqns:
        # A literal has no hash, and depends on nothing.
        if any(_is_variable(v) and v in reached for v in equation.invars):
            reached.update(equation.outvars)
    return any(_is_variable(v) and v in reached for v in jaxpr.outvars)


def _is_variable(atom: Any) -> bool:
    """Whether an input of an equation is a variable, not a literal."""
    return not hasattr(atom, "val")


def _constants(program: Any) -> Iterator[Any]:
    """The arrays that a program and those inside it hold, in their order."""
    yield from getattr(program, "consts", ())
    # A ClosedJaxpr has its equations one level below.
    for equation in getattr(program, "jaxpr", program).eqns:
        yield from (atom.val for atom in equation.invars if not _is_variable(atom))
        for parameter in jax.tree.leaves(list(equation.params.values())):
            if hasattr(parameter, "eqns"):
                yield from _constants(parameter)
