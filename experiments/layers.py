"""Convolution and max-pooling in the form that is fast where they run.

On accelerators both are XLA's own operations. On CPUs those are slow in parts, so that

1. the maximum over windows is a running maximum of shifted slices, along one axis
   after the other, and
2. a convolution with small patches is a product: shifted slices side by side, which
   are the patches, times the kernel.

Values and gradients are the same up to rounding. The platform is the one that
`jax.default_backend()` names while a program is traced. `jax.lax.platform_dependent`
would choose later, but it leaves a `cond` in the program, behind which
`dissect_optax.value_grad_and_variance` does not see that a convolution is a product.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Up to this many entries in all patches of one image, a CPU multiplies patches. They
# repeat a pixel once per kernel entry, and the backward pass keeps them: larger ones
# would save All-CNN-C a tenth of its time for almost four times the memory.
_MOST_PATCH_ENTRIES = 100_000

_HEIGHT, _WIDTH = -3, -2


def convolve(
    inputs: jax.Array,
    kernel: jax.Array,
    window_strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
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
        window = kernel.shape[0], kernel.shape[1]
        padded = _padded(inputs, window, window_strides, padding, 0.0)
        if _patch_entries(padded, kernel, window_strides) <= _MOST_PATCH_ENTRIES:
            patches = _patches(padded, window, window_strides)
            matrix = kernel.reshape(-1, kernel.shape[-1])
            return jnp.matmul(patches, matrix, precision=precision)
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
    sizes, steps = (window, window), (stride, stride)
    if _on_cpu():
        maxima = _padded(inputs, sizes, steps, padding, -jnp.inf)
        # Rows inside, columns outside would turn round which maximum is the first.
        for axis in (_WIDTH, _HEIGHT):
            slices = _shifted(maxima, axis, window, stride)
            maxima = functools.reduce(_first_maximum, slices)
        return maxima
    return lax.reduce_window(
        inputs,
        -jnp.inf,
        lax.max,
        (*(1,) * (inputs.ndim - 3), *sizes, 1),
        (*(1,) * (inputs.ndim - 3), *steps, 1),
        padding,
    )


def _on_cpu() -> bool:
    """Whether programs that are traced now run on a CPU unless told otherwise."""
    return jax.default_backend() == "cpu"


def _padded(
    inputs: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int],
    padding: str | list[tuple[int, int]],
    value: float,
) -> jax.Array:
    """Images with all that their windows reach over."""
    if isinstance(padding, str):
        shape = inputs.shape[_HEIGHT : _WIDTH + 1]
        padding = lax.padtype_to_pads(shape, window, strides, padding)
    widths = [(0, 0)] * (inputs.ndim - 3) + [*padding, (0, 0)]
    return jnp.pad(inputs, widths, constant_values=value)


def _shifted(inputs: jax.Array, axis: int, window: int, stride: int) -> list[jax.Array]:
    """For every place in a window, what all windows along an axis hold there."""
    last = _positions(inputs.shape[axis], window, stride) * stride
    return [
        lax.slice_in_dim(inputs, place, place + last - stride + 1, stride, axis)
        for place in range(window)
    ]


def _positions(size: int, window: int, stride: int) -> int:
    """Number of windows along an axis."""
    return (size - window) // stride + 1


def _patch_entries(
    padded: jax.Array, kernel: jax.Array, strides: tuple[int, int]
) -> int:
    """Number of entries in all patches of one image."""
    height, width = map(_positions, padded.shape[1:3], kernel.shape[:2], strides)
    return height * width * math.prod(kernel.shape[:-1])


def _patches(
    padded: jax.Array, window: tuple[int, int], strides: tuple[int, int]
) -> jax.Array:
    """What the kernel sees at every position, in the order of the kernel's entries."""
    slices = [
        entry
        for row in _shifted(padded, _HEIGHT, window[0], strides[0])
        for entry in _shifted(row, _WIDTH, window[1], strides[1])
    ]
    return jnp.concatenate(slices, axis=-1)


def _first_maximum(first: jax.Array, second: jax.Array) -> jax.Array:
    """The larger one; all of the gradient goes to the first of equals."""
    # `jnp.maximum` would give each of them one half.
    return jnp.where((first >= second) | jnp.isnan(first), first, second)
