"""Convolution and max-pooling in the form that is fast where they run.

On accelerators both are XLA's own operations. On CPUs those are slow in parts, so that

1. the maximum over windows is a running maximum of shifted slices, along one axis
   after the other, and
2. a convolution is a product: shifted slices side by side, which are the patches,
   times the kernel. Inside a compiled loop, where training needs it, XLA's own takes
   fifteen times as long as outside (All-CNN-C, JAX 0.10.2); the product does not. The
   patches repeat a pixel once per kernel entry: memory is the price.

Values and gradients are the same up to rounding. The platform is the one that
`jax.default_backend()` names while a program is traced. `jax.lax.platform_dependent`
would choose later, but it leaves a `cond` in the program, behind which
`dissect_optax.value_grad_and_variance` does not see that a convolution is a product.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: tuple[int, int],
    padding: str | Sequence[tuple[int, int]],
    *,
    lhs_dilation: tuple[int, int] = (1, 1),
    rhs_dilation: tuple[int, int] = (1, 1),
    feature_group_count: int = 1,
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> jax.Array:
    """Convolution of images, for `flax.nnx.Conv(..., conv_general_dilated=convolve)`.

    Args:
      inputs: Images `[batch, height, width, channels]`.
      kernel: Weights `[height, width, channels, features]`.
      window_strides: Steps of the window along height and width.
      padding: "SAME", "VALID", or the zeros before and after height and width.
      lhs_dilation: This and what follows is as in `jax.lax.conv_general_dilated`.
      rhs_dilation: See there.
      feature_group_count: See there.
      precision: See there.
      **options: See there; Flax says that the layout is NHWC.

    Returns:
      Features `[batch, height, width, features]`.

    Examples:
      >>> images, kernel = jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 4))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> features = convolve(images, kernel, (2, 2), "VALID", dimension_numbers=layout)
      >>> features.shape, float(features[0, 0, 0, 0])
      ((2, 2, 2, 4), 27.0)
    """
    is_plain = (*lhs_dilation, *rhs_dilation, feature_group_count) == (1,) * 5
    if is_plain and _on_cpu():
        windows = _windows(inputs, kernel.shape[:2], window_strides, padding)
        patches = _patches(inputs, *windows)
        # As two matrices: over more axes XLA would transpose, and multiply at a
        # quarter of the speed, in the kernel's gradient (64 features, 200 704 rows).
        features = jnp.matmul(
            patches.reshape(-1, patches.shape[-1]),
            kernel.reshape(-1, kernel.shape[-1]),
            precision=precision,
        )
        return features.reshape(*patches.shape[:-1], kernel.shape[-1])
    return lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        feature_group_count=feature_group_count,
        precision=precision,
        **options,
    )


def max_pool(inputs: jax.Array, window: int, stride: int, padding: str) -> jax.Array:
    """Maximum over square windows of an image.

    Args:
      inputs: Images `[..., height, width, channels]`.
      window: Height and width of a window.
      stride: Step of the window along height and width.
      padding: "SAME", where what is added never is the maximum, or "VALID".

    Returns:
      Maxima `[..., height, width, channels]`.

    Edge cases:
      Equal maxima: the gradient goes to the first of them, row by row, in both forms.
      Behind a ReLU windows of zeros are common.
      Not a number: where a window holds one, the maximum is none in both forms.

    Examples:
      >>> image = jnp.arange(16.0).reshape(4, 4, 1)
      >>> max_pool(image, 3, 2, "SAME")[..., 0].tolist()
      [[10.0, 11.0], [14.0, 15.0]]
    """
    sizes, strides = (window, window), (stride, stride)
    if _on_cpu():
        # Columns first: then the first of equal maxima is the same as XLA's.
        for along in reversed(_windows(inputs, sizes, strides, padding)):
            slices = along.shifted(inputs, -jnp.inf)
            inputs = functools.reduce(_first_maximum, slices)
        return inputs
    ones = (1,) * (inputs.ndim - 3)
    return lax.reduce_window(
        inputs, -jnp.inf, lax.max, (*ones, *sizes, 1), (*ones, *strides, 1), padding
    )


def _on_cpu() -> bool:
    """Whether programs that are traced now run on a CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


class _Windows(NamedTuple):
    """Windows along one axis of an image."""

    axis: int
    size: int
    stride: int
    padding: tuple[int, int]
    positions: int

    def shifted(self, inputs: jax.Array, fill: float) -> list[jax.Array]:
        """For every place in a window, what all windows hold there."""
        widths = [(0, 0, 0)] * inputs.ndim
        widths[self.axis] = (*self.padding, 0)
        # Along one axis at a time, a CPU pads in passing.
        padded = lax.pad(inputs, jnp.array(fill, inputs.dtype), widths)
        last = (self.positions - 1) * self.stride
        return [
            lax.slice_in_dim(padded, place, place + last + 1, self.stride, self.axis)
            for place in range(self.size)
        ]


def _windows(
    inputs: jax.Array,
    sizes: Sequence[int],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
) -> list[_Windows]:
    """The windows along height, and along width."""
    shape = inputs.shape[-3:-1]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(shape, sizes, strides, padding)
    return [
        _Windows(axis, size, stride, pads, (length + sum(pads) - size) // stride + 1)
        for axis, length, size, stride, pads in zip(
            (-3, -2), shape, sizes, strides, padding, strict=True
        )
    ]


def _patches(inputs: jax.Array, rows: _Windows, columns: _Windows) -> jax.Array:
    """What the kernel sees at every position, in the order of the kernel's entries."""
    slices = [
        entry
        for row in rows.shifted(inputs, 0.0)
        for entry in columns.shifted(row, 0.0)
    ]
    return jnp.concatenate(slices, axis=-1)


def _first_maximum(first: jax.Array, second: jax.Array) -> jax.Array:
    """The larger one; all of the gradient goes to the first of equals."""
    # `jnp.maximum` would give each of them one half.
    return jnp.where((first >= second) | jnp.isnan(first), first, second)
