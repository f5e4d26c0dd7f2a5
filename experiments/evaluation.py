"""Losses and accuracy of a group of runs, over every image that counts.

Images are measured 1000 at a time: one jitted program, between two calls of which an
evaluation can be given up. Sums over the pieces are float64, so that an accuracy is the
float32 nearest to a share of images.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data import Dataset, Examples, evaluated_training_examples
from experiments.problems.problem import Problem, Settings
from experiments.training import Member, for_each_member, l2_penalty, logits

# So many numbers in the images that a CPU evaluates at once, together for all members:
# 50 images of CIFAR. Of All-CNN-C, 250 need 1.8 GB and half as much time again.
_ENTRIES_EVALUATED_AT_ONCE = 50 * 32 * 32 * 3

# An evaluation can be given up between two pieces.
_IMAGES_IN_A_PIECE = 1000


class Evaluation(NamedTuple):
    """One evaluation; arrays are float32 `[members]`.

    A loss is the mean cross-entropy plus the L2 penalty. It is measured without
    dropout and augmentation, over the whole test set. Without a validation set, its
    values are not a number.
    """

    training_loss: np.ndarray
    training_cross_entropy: np.ndarray
    test_loss: np.ndarray
    test_cross_entropy: np.ndarray
    test_accuracy: np.ndarray
    validation_loss: np.ndarray
    validation_accuracy: np.ndarray
    learning_rate: np.ndarray


# ---- One run ----------------------------------------------------------------------


def _measure(
    problem: Problem, params: nnx.State, example: Examples
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of one example, and whether it is recognised."""
    scores = logits(problem, params, problem.test_input(example.image))
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(scores, example.label)
    return loss, jnp.argmax(scores) == example.label


def _measure_piece(
    problem: Problem,
    at_once: int,
    examples: Examples,
    start: jax.typing.ArrayLike,
    first: jax.typing.ArrayLike,
    params: nnx.State,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies, and how many are recognised, from `first` on.

    The piece begins at `start`, so that the last piece is as long as the others.
    """
    count = min(_IMAGES_IN_A_PIECE, len(examples.label))
    piece = jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, count), examples
    )
    loss, correct = jax.lax.map(
        functools.partial(_measure, problem, params),
        piece,
        batch_size=min(at_once, count),
    )
    is_new = jnp.arange(count) + start >= first
    return jnp.sum(jnp.where(is_new, loss, 0.0)), jnp.sum(is_new & correct)


def _measure_rest(
    problem: Problem,
    settings: Settings,
    member: Member,
    step: jax.Array,
    params: nnx.State,
) -> tuple[jax.Array, jax.Array]:
    """The penalty, and the learning rate of the step: what needs no images."""
    learning_rate = problem.schedule(member.learning_rate)
    if callable(learning_rate):
        learning_rate = learning_rate(step)
    return l2_penalty(params, settings.l2), jnp.asarray(learning_rate)


def _evaluated_at_once(settings: Settings, dataset: Dataset, members: int) -> int:
    """Examples of one member in one piece of an evaluation."""
    if jax.default_backend() == "cpu":
        entries = members * math.prod(dataset.test.image.shape[1:])
        return max(_ENTRIES_EVALUATED_AT_ONCE // entries, 1)
    # Where a step is taken there is room for as many.
    return settings.batch_size


# ---- A group of runs --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("problem", "at_once"))
def _measure_pieces(
    problem: Problem,
    at_once: int,
    examples: Examples,
    start: jax.typing.ArrayLike,
    first: jax.typing.ArrayLike,
    params: nnx.State,
) -> tuple[jax.Array, jax.Array]:
    """`_measure_piece` for every member."""
    measure = functools.partial(
        _measure_piece, problem, at_once, examples, start, first
    )
    return for_each_member(measure, params)


@functools.partial(jax.jit, static_argnames=("problem", "settings"))
def _measure_rests(
    problem: Problem,
    settings: Settings,
    members: Member,
    step: jax.Array,
    params: nnx.State,
) -> tuple[jax.Array, jax.Array]:
    """`_measure_rest` for every member."""
    measure = functools.partial(_measure_rest, problem, settings)
    return for_each_member(measure, members, step, params)


def _measure_all(
    problem: Problem,
    at_once: int,
    examples: Examples,
    params: nnx.State,
    stop: Callable[[], bool],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean cross-entropy, and the share that is recognised, over every example."""
    count = len(examples.label)
    sums = []
    for first in range(0, count, _IMAGES_IN_A_PIECE):
        if stop():
            return None
        start = max(min(first, count - _IMAGES_IN_A_PIECE), 0)
        piece = _measure_pieces(problem, at_once, examples, start, first, params)
        sums.append(jax.device_get(piece))
    loss, correct = (np.array(column, np.float64) for column in zip(*sums, strict=True))
    return loss.sum(axis=0) / count, correct.sum(axis=0) / count


def evaluate(
    problem: Problem,
    settings: Settings,
    dataset: Dataset,
    members: Member,
    step: jax.Array,
    params: nnx.State,
    stop: Callable[[], bool] = bool,
) -> Evaluation | None:
    """Losses and accuracy of every member.

    Args:
      problem: The test problem.
      settings: L2 strength.
      dataset: The data, on the device.
      members: Step sizes and seeds, each `[members]`.
      step: Steps taken, `[members]`.
      params: Parameters of the group.
      stop: Asked every 1000 images whether to give up; the default never does.

    Returns:
      The evaluation; None if it was given up.
    """
    at_once = _evaluated_at_once(settings, dataset, len(members.seed))
    parts = [evaluated_training_examples(dataset.training), dataset.test]
    if dataset.validation is not None:
        parts.append(dataset.validation)
    measured = []
    for examples in parts:
        means = _measure_all(problem, at_once, examples, params, stop)
        if means is None:
            return None
        measured.append(means)
    if dataset.validation is None:
        measured.append((np.full(len(members.seed), np.nan),) * 2)
    (training, _), (test, accuracy), (validation, validation_accuracy) = measured
    penalty, learning_rate = jax.device_get(
        _measure_rests(problem, settings, members, step, params)
    )
    columns = Evaluation(
        training_loss=training + penalty,
        training_cross_entropy=training,
        test_loss=test + penalty,
        test_cross_entropy=test,
        test_accuracy=accuracy,
        validation_loss=validation + penalty,
        validation_accuracy=validation_accuracy,
        learning_rate=learning_rate,
    )
    return Evaluation(*(column.astype(np.float32) for column in columns))
