"""Dtypes: accumulate in at least float32, return updates in the gradient's own.

Every dtype is chosen here without JAX's promotion, so that the user's setting of
`jax_numpy_dtype_promotion` does not matter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def accumulation_dtype(
    dtype: jax.typing.DTypeLike, accumulator_dtype: jax.typing.DTypeLike | None
) -> jnp.dtype:
    """The dtype that gradients of `dtype` are accumulated in; complex stays complex."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        if accumulator_dtype is None:
            return dtype
        double = real_dtype(accumulator_dtype).itemsize > 4
        return jnp.dtype(jnp.complex128 if double else jnp.complex64)
    if accumulator_dtype is not None:
        return jnp.dtype(accumulator_dtype)
    # Includes float8 on the one side, and integers and booleans on the other.
    wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4
    return dtype if wide else jnp.dtype(jnp.float32)


def real_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of |x|² for x of `dtype`."""
    return jnp.finfo(dtype).dtype


def update_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of an update for gradients of `dtype`: float32 for integers."""
    inexact = jnp.issubdtype(dtype, jnp.inexact)
    return jnp.dtype(dtype if inexact else jnp.float32)


def dtype_of(leaf: jax.typing.ArrayLike) -> jnp.dtype:
    """The dtype of an array or a Python number."""
    return jnp.dtype(jnp.result_type(leaf))


def cast(leaf: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The leaf in another dtype; a complex hyperparameter may have made it complex."""
    if jnp.iscomplexobj(leaf) and not jnp.issubdtype(dtype, jnp.complexfloating):
        leaf = leaf.real
    return leaf.astype(dtype)


def upcast(tree: Any) -> Any:
    """Cast every leaf to at least float32."""

    def cast_leaf(leaf: jax.typing.ArrayLike) -> jax.Array:
        dtype = dtype_of(leaf)
        if dtype == jax.dtypes.float0:  # The gradient of an integer: there is none.
            return jnp.zeros(jnp.shape(leaf), jnp.float32)
        return jnp.asarray(leaf).astype(accumulation_dtype(dtype, None))

    return jax.tree.map(cast_leaf, tree)


def zeros_for_accumulation(
    params: Any, accumulator_dtype: jax.typing.DTypeLike | None, *, real: bool = False
) -> Any:
    """Zeros shaped and sharded like the parameters, in their accumulation dtypes."""

    def zeros(leaf: jax.typing.ArrayLike) -> jax.Array:
        dtype = accumulation_dtype(dtype_of(leaf), accumulator_dtype)
        return jnp.zeros_like(leaf, dtype=real_dtype(dtype) if real else dtype)

    return jax.tree.map(zeros, params)


def cast_like(tree: Any, like: Any) -> Any:
    """Cast every leaf to the dtype of its counterpart."""
    return jax.tree.map(lambda leaf, other: cast(leaf, other.dtype), tree, like)


def scale_by_learning_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """As `optax.scale_by_learning_rate`, in the dtypes of the updates.

    Optax multiplies by an array as it is: one in another dtype, which
    `optax.inject_hyperparams` makes, would change that of the update, or fail where
    implicit promotion is an error.
    """
    if callable(learning_rate) or not hasattr(learning_rate, "dtype"):
        return optax.scale_by_learning_rate(learning_rate)
    rate = jnp.asarray(learning_rate)
    return optax.stateless_with_tree_map(lambda u, _: -cast(rate, u.dtype) * u)


def with_float32_accumulation(
    inner: optax.GradientTransformation,
    accumulator_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` in at least float32; updates come back in the gradient's dtype.

    Its state is stored as `inner` makes it for parameters of `accumulator_dtype`.
    Gradients of an integer or boolean dtype get updates in float32.
    """
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> optax.OptState:
        return inner.init(zeros_for_accumulation(params, accumulator_dtype))

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide, new_state = inner.update(upcast(updates), state, params, **extra_args)
        narrow = jax.tree.map(
            lambda g, u: cast(u, update_dtype(dtype_of(g))), updates, wide
        )
        # A leaf without a gradient (None) keeps its state, and the state its structure
        # and dtypes, also where a hyperparameter is a wider array than the leaf.
        new_state = jax.tree.map(
            lambda new, old: old if new is None else cast(new, old.dtype),
            new_state,
            state,
            is_leaf=lambda leaf: leaf is None,
        )
        return narrow, new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
