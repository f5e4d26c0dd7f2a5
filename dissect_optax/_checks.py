"""Errors in the caller's terms, raised where an argument comes in.

Only concrete numbers are looked at, so that traced hyperparameters pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax._precision import accumulation_dtype, dtype_of, real_dtype


def checked_decay(name: str, value: Any) -> Any:
    """The decay, as a real number; an error unless a concrete one lies in [0, 1)."""
    number = _concrete_number(name, value)
    # bfloat16 rounds 0.999 to one; the formulas then give the plain average.
    narrow = jnp.issubdtype(jnp.result_type(value), jnp.inexact) and (
        jnp.result_type(value).itemsize < 4
    )
    if number is None or 0 <= number < 1 or (number == 1 and narrow):
        return _real(value)
    raise ValueError(
        f"`{name}` must lie in [0, 1), got {number}. Use 0.0 to switch the average off."
    )


def checked_not_negative(name: str, value: Any) -> Any:
    """The value, as a real number; an error if a concrete one is negative or NaN."""
    number = _concrete_number(name, value)
    if number is not None and not number >= 0:
        raise ValueError(f"`{name}` must not be negative, got {number}.")
    return _real(value)


def check_state(name: str, state: Any, expected: type) -> None:
    """Raise unless the state is one that `init` of this transformation makes."""
    if not isinstance(state, expected):
        raise TypeError(
            f"`{name}` needs a state of type {expected.__name__}, got one of type "
            f"{type(state).__name__}. Make it with `init` of the same transformation; "
            "one decay and two decays have states of different types."
        )


def check_floating(name: str, dtype: jax.typing.DTypeLike | None) -> None:
    """Raise unless the dtype is a floating-point one, or None."""
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.inexact):
        raise ValueError(
            f"`{name}` must be a floating-point dtype, got {jnp.dtype(dtype).name}. "
            "Use jnp.float32, for instance, or None for at least float32."
        )


def check_callable(name: str, value: Any, expected: str) -> None:
    """Raise unless `value` can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be {expected}, got {value!r}.")


def check_batch(per_example: Any) -> None:
    """Raise unless all leaves share a leading batch axis of two examples or more."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(per_example)]
    sizes = sorted({shape[0] for shape in shapes if shape})
    if not all(shapes):
        raise ValueError(
            "`aggregate_per_example` needs gradients of shape [batch, *parameter], got "
            "a scalar. Compute them with jax.vmap(jax.grad(loss), in_axes=(None, 0))."
        )
    if len(sizes) > 1:
        raise ValueError(
            "`aggregate_per_example` needs one batch size for all leaves, got leading "
            f"axes of {sizes}."
        )
    if sizes and sizes[0] < 2:
        raise ValueError(
            "`aggregate_per_example` needs at least two examples to see a variance, "
            f"got a batch of {sizes[0]}."
        )


def matching_variance(
    gradients: optax.Updates, grad_variance: optax.Updates
) -> optax.Updates:
    """The variances that belong to the gradients, checked, real, at least float32."""

    def absent(leaf: Any) -> bool:
        return leaf is None or isinstance(leaf, optax.MaskedNode)

    treedef: Any
    leaves, treedef = jax.tree_util.tree_flatten_with_path(gradients, is_leaf=absent)
    try:
        variances = treedef.flatten_up_to(grad_variance)
    except ValueError as error:
        raise ValueError(
            "`grad_variance` must be a tree like the gradients, one variance for each "
            f"gradient: {error}"
        ) from None
    matching = []
    for (path, gradient), variance in zip(leaves, variances, strict=True):
        if absent(gradient):
            matching.append(gradient)
            continue
        is_array = jax.tree_util.all_leaves([variance])
        if not is_array or jnp.shape(variance) != jnp.shape(gradient):
            came = jnp.shape(variance) if is_array else type(variance).__name__
            raise ValueError(
                "`grad_variance` must have the shapes of the gradients, got "
                f"{came} for a gradient of shape {jnp.shape(gradient)} "
                f"at {jax.tree_util.keystr(path) or 'the root'}."
            )
        if jnp.iscomplexobj(variance):
            raise ValueError(
                "`grad_variance` must be real, got a complex one at "
                f"{jax.tree_util.keystr(path) or 'the root'}. The variance of a "
                "complex gradient is E|g - E g|²."
            )
        dtype = real_dtype(accumulation_dtype(dtype_of(gradient), None))
        variance = jnp.asarray(variance).astype(dtype)
        # Not `maximum`, which would halve the derivative at zero.
        matching.append(jnp.where(variance < 0, 0.0, variance))
    return treedef.unflatten(matching)


def _concrete_number(name: str, value: Any) -> float | None:
    """The value as a float, or None for a traced one."""
    if isinstance(value, jax.core.Tracer):
        return None
    # `optax.inject_hyperparams` casts to the dtype of complex parameters.
    array = isinstance(value, jax.Array | np.ndarray | np.generic)
    if array and np.iscomplexobj(value) and not np.any(np.imag(value)):
        value = np.real(value)
    try:
        if not isinstance(value, str) and not np.iscomplexobj(value):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"`{name}` must be a number, got {value!r}.")


def _real(value: Any) -> Any:
    """The real part of a complex array, anything else as it is."""
    return value.real if jnp.iscomplexobj(value) else value
