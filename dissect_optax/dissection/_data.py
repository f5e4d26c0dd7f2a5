"""Data on the device: whole data sets, mini-batches drawn from a key and a step.

A data set lives on the device as it is stored, and a mini-batch is a gather inside the
compiled training loop. Indices are uniform and independent, drawn with replacement as
in §1 of the paper, from a key folded with the step: the batch of step 1 000 does not
depend on how the run reached step 1 000.
"""

import hashlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The training loss is a mean over this many training examples at most. Test losses are
# means over every test example.
TRAINING_EXAMPLES_EVALUATED = 10_000


class Data(NamedTuple):
    """Training and test examples in random order; each a tree with a leading axis.

    Attributes:
      training: The training set.
      test: The test set, or None.
      validation: Examples held out of training, or None.
    """

    training: Any
    test: Any = None
    validation: Any = None


def number_of_examples(examples: Any) -> int:
    """Length of the leading axis that all arrays share.

    Args:
      examples: A tree of arrays `[examples, ...]`.

    Returns:
      The length.

    Raises:
      ValueError: There is no array, one has no axes, or the lengths differ.

    Examples:
      >>> number_of_examples({"image": np.zeros((5, 2)), "label": np.zeros(5)})
      5
      >>> number_of_examples({"image": np.zeros((5, 2)), "label": np.zeros(4)})
      Traceback (most recent call last):
      ValueError: All arrays of the data must have the same number of examples ...
    """
    leaves = jax.tree_util.tree_leaves_with_path(examples)
    lengths = {
        jax.tree_util.keystr(path) or "data": np.shape(leaf)[:1]
        for path, leaf in leaves
    }
    if not lengths or () in lengths.values():
        raise ValueError(
            "Expected data as a tree of arrays with a leading axis of examples, got"
            f" {lengths or 'no array at all'}."
        )
    if len(set(lengths.values())) > 1:
        listing = ", ".join(f"{name}: {length}" for name, (length,) in lengths.items())
        raise ValueError(
            "All arrays of the data must have the same number of examples (length of"
            f" axis 0), got {listing}."
        )
    return int(next(iter(lengths.values()))[0])


def without_keys(array: jax.Array) -> jax.Array:
    """The array, or the numbers behind it if it is one of random keys."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(array) if is_key else array


def numbers_of(array: Any) -> np.ndarray:
    """The numbers of an array, also of one of random keys."""
    return np.asarray(without_keys(array) if isinstance(array, jax.Array) else array)


def fingerprint(data: Data) -> str:
    """Digest of all training and test examples.

    Args:
      data: Data without a validation set.

    Returns:
      The sizes of both sets, and a digest of every array in their order.

    Examples:
      >>> import jax.numpy as jnp
      >>> fingerprint(Data(training=jnp.arange(50), test=jnp.arange(10)))
      '50 + 10 examples, ...'
    """
    content = hashlib.sha256()
    for array in jax.tree.leaves(data):
        # `tobytes` takes bfloat16, which Python's buffers do not have.
        content.update(np.asarray(array).tobytes())
    sizes = [number_of_examples(part) for part in data[:2] if part is not None]
    return f"{' + '.join(map(str, sizes))} examples, {content.hexdigest()[:12]}"


def first_examples(examples: Any, count: int | None) -> Any:
    """The first examples; with None, all of them."""
    return jax.tree.map(lambda array: array[:count], examples)


def hold_out(data: Data, fraction: float) -> Data:
    """Moves the end of the training set to the validation set.

    Args:
      data: Data without a validation set.
      fraction: Fraction of the training set to move; 0.0 leaves it whole.

    Returns:
      The data in three parts, or as they were.

    Examples:
      >>> import jax.numpy as jnp
      >>> split = hold_out(Data(training=jnp.arange(50), test=jnp.arange(50)), 0.1)
      >>> len(split.training), len(split.validation)
      (45, 5)
    """
    held_out = round(fraction * number_of_examples(data.training))
    if not held_out:
        return data
    return data._replace(
        training=jax.tree.map(lambda array: array[:-held_out], data.training),
        validation=jax.tree.map(lambda array: array[-held_out:], data.training),
    )


def sample_batch(
    training: Any, key: jax.Array, step: jax.Array, batch_size: int
) -> Any:
    """Mini-batch of one step, drawn uniformly with replacement.

    Args:
      training: The training set.
      key: Key of the run's data stream.
      step: Number of steps taken before this one, int32 scalar.
      batch_size: Number of examples to draw.

    Returns:
      A tree of arrays `[batch_size, ...]`.

    Examples:
      The batch depends on key and step alone.

      >>> import jax.numpy as jnp
      >>> first, again, other = (
      ...     sample_batch(jnp.arange(50), jax.random.key(0), jnp.int32(step), 8)
      ...     for step in (7, 7, 8)
      ... )
      >>> bool((first == again).all()), bool((first == other).all())
      (True, False)
    """
    indices = jax.random.randint(
        jax.random.fold_in(key, step), (batch_size,), 0, number_of_examples(training)
    )
    return jax.tree.map(lambda array: array[indices], training)
