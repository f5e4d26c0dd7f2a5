"""Digests of traced programs: what tells a user's functions apart in records."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ADDRESS = re.compile(r"0x[0-9a-f]+")


def program_digest(function: Callable[..., Any], *shapes: Any) -> str:
    """Digest of the program that a function traces to, its constants included.

    Examples:
      >>> one = program_digest(lambda x: 2 * x, jnp.ones(3))
      >>> one == program_digest(lambda y: 2 * y, jnp.ones(3))
      True
      >>> one == program_digest(lambda x: 3 * x, jnp.ones(3))
      False
    """
    closed = jax.make_jaxpr(function)(*shapes)
    # Addresses of functions differ from process to process.
    content = hashlib.sha256(_ADDRESS.sub("", str(closed)).encode())
    for constant_array in closed.consts:
        content.update(np.asarray(_plain(constant_array)).tobytes())
    return content.hexdigest()[:12]


def _plain(array: Any) -> Any:
    """The numbers of an array, also of one of random keys."""
    if isinstance(array, jax.Array) and jnp.issubdtype(
        array.dtype, jax.dtypes.prng_key
    ):
        return jax.random.key_data(array)
    return array
