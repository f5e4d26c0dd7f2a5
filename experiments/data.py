"""Data on the device: whole data sets, mini-batches drawn from a key and a step.

A data set lives on the device as it is stored (images as uint8), and a mini-batch is a
gather inside the compiled training loop. Indices are uniform and independent, drawn
with replacement as in §1 of the paper, from a key folded with the step: the batch of
step 1 000 does not depend on how the run reached step 1 000.
"""

import hashlib
from typing import NamedTuple

import jax
import numpy as np

# Both losses are averages over this many training images at most (and every test one).
TRAINING_IMAGES_EVALUATED = 10_000


class Examples(NamedTuple):
    """Images with their labels; every array has the same leading axis."""

    image: jax.Array
    label: jax.Array


class Dataset(NamedTuple):
    """A training and a test set, in random order, and what is held out of training."""

    training: Examples
    test: Examples
    validation: Examples | None = None


def fingerprint(dataset: Dataset) -> str:
    """What tells these data from others, in a few words.

    Args:
      dataset: A data set without a validation set.

    Returns:
      The sizes of both halves, and a digest of every image and label in their order.

    Examples:
      >>> import jax.numpy as jnp
      >>> images = Examples(jnp.arange(50), jnp.arange(50))
      >>> fingerprint(Dataset(training=images, test=first_images(images, 10)))
      '50 + 10 images, ...'
    """
    content = hashlib.sha256()
    for array in jax.tree.leaves(dataset):
        content.update(np.ascontiguousarray(array).data)
    sizes = f"{len(dataset.training.label)} + {len(dataset.test.label)}"
    return f"{sizes} images, {content.hexdigest()[:12]}"


def first_images(examples: Examples, count: int | None) -> Examples:
    """The first examples; with None, all of them."""
    if count is None:
        return examples
    return jax.tree.map(lambda array: array[:count], examples)


def hold_out(dataset: Dataset, fraction: float) -> Dataset:
    """Moves the end of the training set to the validation set.

    Args:
      dataset: A data set without a validation set.
      fraction: Share of the training set to move; 0.0 leaves it whole.

    Returns:
      The data set in three parts, or as it was.

    Examples:
      >>> import jax.numpy as jnp
      >>> images = Examples(jnp.arange(50), jnp.arange(50))
      >>> split = hold_out(Dataset(training=images, test=images), 0.1)
      >>> len(split.training.label), len(split.validation.label)
      (45, 5)
    """
    held_out = round(fraction * len(dataset.training.label))
    if not held_out:
        return dataset
    return dataset._replace(
        training=jax.tree.map(lambda array: array[:-held_out], dataset.training),
        validation=jax.tree.map(lambda array: array[-held_out:], dataset.training),
    )


def sample_batch(
    training: Examples, key: jax.Array, step: jax.Array, batch_size: int
) -> Examples:
    """Mini-batch of one step, drawn uniformly with replacement.

    Args:
      training: The training set.
      key: Key of the run's data stream.
      step: Number of steps taken before this one, int32 scalar.
      batch_size: Number of examples to draw.

    Returns:
      `batch_size` examples.

    Examples:
      The batch depends on key and step alone.

      >>> import jax.numpy as jnp
      >>> training = Examples(jnp.arange(50), jnp.arange(50))
      >>> first, again = (
      ...     sample_batch(training, jax.random.key(0), jnp.int32(7), 8)
      ...     for _ in range(2)
      ... )
      >>> bool((first.label == again.label).all())
      True
      >>> other = sample_batch(training, jax.random.key(0), jnp.int32(8), 8)
      >>> bool((first.label == other.label).all())
      False
    """
    indices = jax.random.randint(
        jax.random.fold_in(key, step), (batch_size,), 0, len(training.label)
    )
    return jax.tree.map(lambda array: array[indices], training)


def evaluated_training_examples(training: Examples) -> Examples:
    """The training examples on which the training loss is measured."""
    return first_images(training, TRAINING_IMAGES_EVALUATED)
