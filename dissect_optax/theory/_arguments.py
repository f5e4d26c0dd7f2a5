"""Arguments as they come in: one floating dtype for all, and checked.

Only concrete arrays are looked at for their values, so that traced ones pass; with
NumPy, because inside jit a comparison by JAX would be traced itself.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def as_floats(*values: ArrayLike) -> tuple[jax.Array, ...]:
    """The arguments as arrays of their common floating dtype, each in its own shape."""
    dtype = jnp.result_type(0.0, *values)
    return tuple(jnp.asarray(value, dtype) for value in values)


def as_same_shape(*values: ArrayLike) -> tuple[jax.Array, ...]:
    """The arguments as arrays of their common floating dtype and common shape."""
    return tuple(jnp.broadcast_arrays(*as_floats(*values)))


def check_not_negative(name: str, value: jax.Array) -> None:
    """Raise if an element of a concrete array is negative."""
    if not isinstance(value, jax.core.Tracer) and bool(np.any(np.asarray(value) < 0)):
        raise ValueError(
            f"`{name}` must not be negative, got {np.min(np.asarray(value))}."
        )


def check_positive(name: str, value: jax.Array) -> None:
    """Raise unless all elements of a concrete array are positive."""
    if not isinstance(value, jax.core.Tracer) and not bool(
        np.all(np.asarray(value) > 0)
    ):
        raise ValueError(f"`{name}` must be positive, got {np.min(np.asarray(value))}.")


def check_correlation(value: jax.Array) -> None:
    """Raise if an element of a concrete array is no correlation."""
    if isinstance(value, jax.core.Tracer):
        return
    largest = np.max(np.abs(np.asarray(value)), initial=0.0)
    if largest > 1:
        raise ValueError(
            "`correlation` must lie in [-1, 1], got a value of magnitude "
            f"{largest}. Divide a covariance by both standard deviations."
        )


def check_vector(name: str, value: jax.Array) -> int:
    """The length of a vector; raise if it is none."""
    if value.ndim != 1:
        raise ValueError(
            f"`{name}` must be a vector, got shape {value.shape}. Use jax.vmap for a "
            "batch."
        )
    return value.shape[0]


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...], like: str) -> None:
    """Raise unless an array has the shape that `like` asks for."""
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have shape {shape} to go with {like}, got {value.shape}."
        )
