"""Errors in the caller's terms, raised where an argument comes in.

Only concrete numbers are looked at, so that traced hyperparameters pass.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dissect_optax._precision import real_dtype, wide_dtype


def check_decay(name: str, value: Any) -> None:
    """Raise unless a concrete decay lies in [0, 1)."""
    number = _concrete_number(name, value)
    if number is None or 0 <= number < 1:
        return
    # bfloat16 rounds 0.999 to one; the formulas then give the plain average.
    dtype = jnp.result_type(value)
    narrow = jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize < 4
    if number == 1 and narrow:
        return
    raise ValueError(
        f"`{name}` must lie in [0, 1), got {number}. Use 0.0 to switch the average off."
    )


def check_not_negative(name: str, value: Any) -> None:
    """Raise if a concrete number is negative or NaN."""
    number = _concrete_number(name, value)
    if number is not None and not number >= 0:
        raise ValueError(f"`{name}` must not be negative, got {number}.")


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
    """The variances that belong to the gradients, checked, in wide real numbers."""

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
        dtype = real_dtype(wide_dtype(jnp.result_type(gradient), None))
        matching.append(jnp.maximum(jnp.asarray(variance, dtype), 0.0))
    return treedef.unflatten(matching)


def _concrete_number(name: str, value: Any) -> float | None:
    """The value as a float, or None for a traced one."""
    if isinstance(value, jax.core.Tracer):
        return None
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"`{name}` must be a number, got {value!r}.")
