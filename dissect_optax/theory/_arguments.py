"""Conversion and validation of arguments.

Values are checked where they are concrete, so traced arguments pass. The checks use
NumPy: inside jit, JAX would trace the comparison of concrete arrays as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# Far above the rounding errors of float32, far below what a wrong argument leaves.
_TOLERANCE = float(np.sqrt(np.finfo(np.float32).eps))


def as_floats(*values: ArrayLike) -> tuple[jax.Array, ...]:
    """The arguments as arrays of a common dtype of at least float32; shapes are kept.

    The result does not depend on the user's `jax_numpy_dtype_promotion`: under "strict"
    an integer count could not be combined with a float.
    """
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(jnp.result_type(0.0, *values), jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"The theory is about real numbers, got {dtype.name}. Pass real and "
            "imaginary parts as separate elements."
        )
    return tuple(jnp.asarray(value, dtype) for value in values)


def as_same_shape(*values: ArrayLike) -> tuple[jax.Array, ...]:
    """The arguments as arrays of a common floating dtype and their broadcast shape."""
    floats = as_floats(*values)
    shape = jnp.broadcast_shapes(*(value.shape for value in floats))
    return tuple(jnp.broadcast_to(value, shape) for value in floats)


def magnitude(value: jax.Array) -> jax.Array:
    """|x| with derivative zero at the kink, where `jnp.abs` has derivative one."""
    return value * jax.lax.stop_gradient(jnp.sign(value))


def check_not_negative(name: str, value: jax.Array, *, finite: bool = False) -> None:
    """Raise if an element of a concrete array is negative or NaN (or infinite)."""
    _check(name, value, lambda x: x >= 0, "must not be negative")
    if finite:
        check_finite(name, value)


def check_positive(name: str, value: jax.Array, *, finite: bool = False) -> None:
    """Raise unless all elements of a concrete array are positive (and finite)."""
    _check(name, value, lambda x: x > 0, "must be positive")
    if finite:
        check_finite(name, value)


def check_finite(name: str, value: jax.Array) -> None:
    """Raise if an element of a concrete array is infinite or NaN."""
    _check(name, value, np.isfinite, "must be finite")


def check_momentum(value: jax.Array) -> None:
    """Raise unless all elements of a concrete array lie in [0, 1)."""
    _check("momentum", value, lambda x: (x >= 0) & (x < 1), "must lie in [0, 1)")


def check_count(value: jax.Array) -> None:
    """Raise if an element of a concrete array is below one."""
    expected = "is the number of gradients seen and starts at one"
    _check("count", value, lambda x: x >= 1, expected)


def check_correlation(value: jax.Array) -> None:
    """Raise unless all elements of a concrete array lie in [-1, 1]."""
    _check(
        "correlation",
        value,
        lambda x: np.abs(x) <= 1,
        "must lie in [-1, 1]",
        "Divide a covariance by both standard deviations.",
    )


def check_covariance(value: jax.Array) -> None:
    """Raise unless a concrete matrix is symmetric with correlations in [-1, 1]."""
    advice = "Where variances overflow, rescale the problem or use float64."
    _check("covariance", value, np.isfinite, "must be finite", advice)
    matrix = _concrete(value)
    if matrix is None:
        return
    variance = np.diagonal(matrix).astype(np.float64)
    if np.any(variance < 0):
        raise ValueError(
            f"`covariance` must have variances on its diagonal, got {np.min(variance)}."
        )
    std = np.sqrt(variance)
    largest = std[:, None] * std[None, :]
    excess = np.abs(matrix) - largest * (1 + _TOLERANCE)
    if np.any(excess > 0):
        i, j = np.unravel_index(np.argmax(excess), excess.shape)
        raise ValueError(
            "`covariance` must not exceed the product of two standard deviations, got "
            f"{matrix[i, j]} at [{i}, {j}] with standard deviations {std[i]} and "
            f"{std[j]}. If it holds correlations, multiply them by both."
        )
    if np.any(np.abs(matrix - matrix.T) > _TOLERANCE * largest):
        raise ValueError(
            "`covariance` must be symmetric. Use 0.5 * (covariance + covariance.T)."
        )


def check_second_moment(moment: jax.Array, mean: jax.Array) -> None:
    """Raise if the concrete second moment of a direction leaves its format."""
    matrix, vector = _concrete(moment), _concrete(mean)
    if matrix is None or vector is None or np.any(np.isnan(vector)):
        return
    largest = np.max(np.abs(matrix), initial=0.0)
    # Zero is right for a direction that is always zero.
    vanishes = largest < np.finfo(matrix.dtype).tiny and np.any(vector != 0)
    if vanishes or not np.isfinite(largest):
        raise ValueError(
            f"The second moment of this direction {'under' if vanishes else 'over'}"
            f"flows in {matrix.dtype}. Rescale the problem, or use float64."
        )


def check_orthogonal(name: str, value: jax.Array) -> None:
    """Raise unless the columns of a concrete square matrix are orthonormal."""
    check_finite(name, value)
    matrix = _concrete(value)
    if matrix is None:
        return
    matrix = matrix.astype(np.float64)
    error = np.max(np.abs(matrix.T @ matrix - np.eye(matrix.shape[0])), initial=0.0)
    if error > _TOLERANCE:
        raise ValueError(
            f"`{name}` must be orthogonal, but its product with its transpose differs "
            f"from the identity by up to {error:.2g}. Take the eigenvectors from "
            "jnp.linalg.eigh, or the first factor of jnp.linalg.qr."
        )


def check_rotation(name: str, value: jax.Array) -> None:
    """Raise unless a concrete square matrix is orthogonal with determinant +1."""
    check_orthogonal(name, value)
    matrix = _concrete(value)
    if matrix is not None and matrix.size and np.linalg.slogdet(matrix)[0] < 0:
        raise ValueError(
            f"`{name}` must have determinant +1, got a reflection. Change the sign of "
            "one of its columns."
        )


def check_fraction(
    name: str, value: jax.Array, largest: jax.Array, largest_name: str
) -> None:
    """Raise unless a concrete array lies in [0, 1] and does not exceed `largest`."""
    _check(name, value, lambda x: (x >= 0) & (x <= 1), "must lie in [0, 1]")
    check_not_above(name, value, largest, largest_name)


def check_not_above(
    name: str, value: jax.Array, largest: jax.Array, largest_name: str
) -> None:
    """Raise if concrete numbers exceed others by more than rounding."""
    numbers, limits = _concrete(value), _concrete(largest)
    if numbers is None or limits is None:
        return
    numbers, limits = np.broadcast_arrays(numbers, limits)
    wrong = numbers.astype(np.float64) > limits.astype(np.float64) * (1 + _TOLERANCE)
    if np.any(wrong):
        raise ValueError(
            f"`{name}` must not exceed {largest_name}, got {numbers[wrong][0]} > "
            f"{limits[wrong][0]}."
        )


def check_vector(name: str, value: jax.Array) -> int:
    """The length of a vector; raise if the array is not one."""
    if value.ndim != 1:
        raise ValueError(
            f"`{name}` must be a vector, got shape {value.shape}. Use jax.vmap for a "
            "batch."
        )
    return value.shape[0]


def check_shape(name: str, value: jax.Array, shape: tuple[int, ...], like: str) -> None:
    """Raise unless an array has the shape that `like` requires."""
    if value.shape != shape:
        raise ValueError(
            f"`{name}` must have shape {shape} to go with {like}, got {value.shape}."
        )


def _concrete(value: jax.Array) -> np.ndarray | None:
    """The value as a NumPy array, or None if it is traced."""
    return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def _check(
    name: str,
    value: jax.Array,
    holds: Callable[[np.ndarray], np.ndarray],
    expected: str,
    advice: str = "",
) -> None:
    """Raise, with the first wrong element, unless a condition holds for all of them."""
    array = _concrete(value)
    if array is None:
        return
    wrong = ~holds(array)
    if np.any(wrong):
        found = array[wrong][0]
        if np.isnan(found):
            expected = "must not be NaN"
        raise ValueError(f"`{name}` {expected}, got {found}. {advice}".rstrip())
