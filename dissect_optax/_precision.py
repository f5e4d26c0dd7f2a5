"""In which numbers to accumulate: at least float32, whatever the gradients are."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def wide_dtype(
    dtype: jax.typing.DTypeLike, accumulator_dtype: jax.typing.DTypeLike | None
) -> jnp.dtype:
    """The dtype that gradients of `dtype` are accumulated in; complex stays complex."""
    if accumulator_dtype is None:
        return jnp.promote_types(dtype, jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.promote_types(accumulator_dtype, jnp.complex64)
    return jnp.dtype(accumulator_dtype)


def real_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of |x|² for x of `dtype`."""
    return jnp.finfo(dtype).dtype


def widen(tree: Any) -> Any:
    """Cast every leaf to at least float32."""

    def cast(leaf: jax.typing.ArrayLike) -> jax.Array:
        leaf = jnp.asarray(leaf)
        return leaf.astype(wide_dtype(leaf.dtype, None))

    return jax.tree.map(cast, tree)


def zeros_in_wide(
    params: Any, accumulator_dtype: jax.typing.DTypeLike | None, *, real: bool = False
) -> Any:
    """Zeros shaped and sharded like the parameters, in their wide dtypes."""

    def zeros(leaf: jax.typing.ArrayLike) -> jax.Array:
        dtype = wide_dtype(jnp.result_type(leaf), accumulator_dtype)
        return jnp.zeros_like(leaf, dtype=real_dtype(dtype) if real else dtype)

    return jax.tree.map(zeros, params)


def cast_like(tree: Any, like: Any) -> Any:
    """Cast every leaf to the dtype of its counterpart."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), tree, like)


def in_wide_numbers(
    inner: optax.GradientTransformation,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in at least float32; updates come back in the gradient's dtype.

    Its state is stored as `inner` makes it for parameters of `accumulator_dtype`.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        return inner.init(zeros_in_wide(params, accumulator_dtype))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        gradients = widen(updates)
        wide, new_state = inner.update(gradients, state, params, **extra_args)
        narrow = jax.tree.map(lambda g, u: u.astype(jnp.result_type(g)), updates, wide)
        # A leaf without a gradient (None) keeps its state, and the state its structure
        # and dtypes, also where a hyperparameter is a wider array than the leaf.
        new_state = jax.tree.map(
            lambda new, old: old if new is None else new.astype(old.dtype),
            new_state,
            state,
            is_leaf=lambda leaf: leaf is None,
        )
        return narrow, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
