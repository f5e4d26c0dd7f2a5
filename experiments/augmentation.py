"""Random views of the CIFAR images, drawn inside the compiled training step.

The paper says "random crop, mirroring and colour distortion"; the operations, their
order and their ranges are those of DeepOBS 1.1.2: two black pixels on every side,
crop to the old size, mirror half of the time, brightness, saturation, contrast, and
then every image by itself to mean 0 and standard deviation 1. Pixels range over 0..255
and are nowhere clipped, as in TensorFlow's operations on float images.

What tells one view of an image from another is a `Distortion`: `draw_distortion` draws
one from a key, `distort` applies it and draws nothing. The pixel operations are PIX's.

What a reader may not expect:

1. The brightness moves by less than a quarter of one of the 256 levels: DeepOBS adds
   63/255, meant for pixels over 0..1, to 0..255. Next to nothing, but kept.
2. PIX documents its colours for pixels over 0..1. Saturation and contrast scale with
   the pixels, so that 0..255 gives the same images.
3. PIX has no crop at a given place; it is a `dynamic_slice`, as PIX recommends.
4. PIX has no standardisation. Ours averages the squares of the centred pixels, where
   TensorFlow subtracts the squared mean from the mean square: equal up to rounding.
"""

import math
from typing import NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp

_MARGIN = 2  # Black pixels on every side, out of which a crop may reach.

# Of the fields of `Distortion`; the first three are rounded down to whole numbers.
_RANGES = (
    (0, 2 * _MARGIN + 1),
    (0, 2 * _MARGIN + 1),
    (0, 2),
    (-63 / 255, 63 / 255),
    (0.5, 1.5),
    (0.2, 1.8),
)


class Distortion(NamedTuple):
    """What tells one view of an image from another; every field is a scalar."""

    row: jax.Array  # int32, the crop's first row in the image with its margin
    column: jax.Array  # int32, likewise
    mirrored: jax.Array  # bool, left and right exchanged
    brightness: jax.Array  # float32, added to every pixel
    saturation: jax.Array  # float32, factor
    contrast: jax.Array  # float32, factor


def draw_distortion(key: jax.Array) -> Distortion:
    """One distortion; its parts are uniform over their ranges and independent.

    Args:
      key: Key of this image in this step.

    Returns:
      The distortion.

    Examples:
      The crop begins at one of 5×5 places.

      >>> import jax
      >>> distortion = draw_distortion(jax.random.key(0))
      >>> bool(0 <= distortion.row <= 4) and bool(0 <= distortion.column <= 4)
      True
    """
    low, high = jnp.array(_RANGES, jnp.float32).T
    # One call for all of them: a random generator takes long to compile.
    row, column, mirrored, brightness, saturation, contrast = jax.random.uniform(
        key, (len(_RANGES),), jnp.float32, low, high
    )
    return Distortion(
        row=row.astype(jnp.int32),
        column=column.astype(jnp.int32),
        mirrored=mirrored >= 1,
        brightness=brightness,
        saturation=saturation,
        contrast=contrast,
    )


def distort(image: jax.Array, distortion: Distortion) -> jax.Array:
    """One view of an image, not yet standardised.

    Args:
      image: One image in red, green and blue over 0..255, `[height, width, 3]`.
      distortion: What to do to it.

    Returns:
      The view, float32 `[height, width, 3]`; contrast takes pixels out of 0..255.

    Raises:
      ValueError: If `image` is not a single image.

    Examples:
      A grey image has no saturation to change.

      >>> import jax, jax.numpy as jnp
      >>> grey = jnp.full((32, 32, 3), 100, jnp.uint8)
      >>> centre = Distortion(*map(jnp.asarray, (2, 2, False, 0.0, 1.5, 1.0)))
      >>> bool((jax.jit(distort)(grey, centre) == grey).all())
      True
    """
    _check_single(image)
    height, width, _ = image.shape
    view = pix.pad_to_size(image, height + 2 * _MARGIN, width + 2 * _MARGIN)
    start = (distortion.row, distortion.column, jnp.int32(0))
    view = jax.lax.dynamic_slice(view, start, image.shape)
    view = jnp.where(distortion.mirrored, pix.flip_left_right(view), view)
    view = pix.adjust_brightness(view.astype(jnp.float32), distortion.brightness)
    view = pix.adjust_saturation(view, distortion.saturation)
    return pix.adjust_contrast(view, distortion.contrast)


def standardize(image: jax.Array) -> jax.Array:
    """An image with mean 0 and standard deviation 1 over all of its entries.

        (x - mean) / max(std, 1/√n),    n the number of entries

    Args:
      image: One image over 0..255, `[height, width, channels]`.

    Returns:
      The standardised image, float32, of the same shape.

    Raises:
      ValueError: If `image` is not a single image.

    Edge cases:
      A constant image becomes exactly zero.

    Examples:
      >>> import jax.numpy as jnp
      >>> image = standardize(jnp.arange(48, dtype=jnp.uint8).reshape(4, 4, 3))
      >>> bool(jnp.allclose(image.mean(), 0, atol=1e-6) & jnp.allclose(image.std(), 1))
      True
    """
    _check_single(image)
    image = image.astype(jnp.float32)
    # Shifts cancel; this one keeps a constant image free of its mean's rounding error,
    # which √n would make as large as 0.5 (measured with JAX 0.7.0).
    image = image - image[0, 0, 0]
    smallest_deviation = 1 / math.sqrt(image.size)
    deviation = jnp.maximum(jnp.std(image), smallest_deviation)
    return (image - jnp.mean(image)) / deviation


def random_view(image: jax.Array, key: jax.Array) -> jax.Array:
    """A random view of an image, standardised: what a network sees in training.

    Args:
      image: One image in red, green and blue over 0..255, `[height, width, 3]`.
      key: Key of this image in this step.

    Returns:
      The view, float32 `[height, width, 3]`.

    Raises:
      ValueError: If `image` is not a single image.

    Examples:
      A batch needs a key for every image; the same key gives the same view.

      >>> import jax, jax.numpy as jnp
      >>> image = jnp.arange(32 * 32 * 3).astype(jnp.uint8).reshape(32, 32, 3)
      >>> keys = jax.random.split(jax.random.key(0))[jnp.array([0, 0, 1])]
      >>> views = jax.jit(jax.vmap(random_view))(jnp.stack([image] * 3), keys)
      >>> bool((views[0] == views[1]).all()), bool((views[0] == views[2]).all())
      (True, False)
    """
    return standardize(distort(image, draw_distortion(key)))


def _check_single(image: jax.Array) -> None:
    """A batch would pass for one image, standardised as a whole."""
    if image.ndim != 3:
        raise ValueError(
            "`image` must be one image [height, width, channels], got the shape "
            f"{image.shape}. Use `jax.vmap` for a batch."
        )
