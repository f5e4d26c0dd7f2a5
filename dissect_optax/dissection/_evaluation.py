"""Losses and metrics of a group of runs, over every example that counts.

Examples are measured 1000 at a time: one jitted program, between two calls of which an
evaluation can be given up. Sums over the pieces are float64, so that an accuracy is the
float32 nearest to a fraction of the examples.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dissect_optax.dissection._data import (
    TRAINING_EXAMPLES_EVALUATED,
    Data,
    first_examples,
    number_of_examples,
)
from dissect_optax.dissection._meshes import (
    DATA,
    REPLICA,
    constrain,
    everywhere,
    make_mesh,
)
from dissect_optax.dissection._problem import Problem, Settings
from dissect_optax.dissection._training import Replica, for_each_replica, penalty

PyTree = Any

# So many numbers in the examples that a CPU evaluates at once, together for all runs:
# 50 images of CIFAR. Of All-CNN-C, 250 need 1.8 GB and half as much time again.
_ENTRIES_EVALUATED_AT_ONCE = 50 * 32 * 32 * 3

# An evaluation can be given up between two pieces.
_EXAMPLES_IN_A_PIECE = 1000


# ---- One run ----------------------------------------------------------------------


def _measure(problem: Problem, params: PyTree, example: PyTree) -> dict[str, jax.Array]:
    """Loss and metrics of one example; booleans count as zero and one."""
    loss, metrics = problem.evaluate(params, example)
    if reserved := {"loss", "data_loss"} & metrics.keys():
        raise ValueError(
            f"A metric of {problem.name} is called '{reserved.pop()}', like the loss"
            " that `evaluate` returns before the metrics. Give it another name."
        )
    measured = {"loss": loss, **metrics}
    if shapes := {name: jnp.shape(m) for name, m in measured.items() if jnp.shape(m)}:
        raise ValueError(
            f"`evaluate` of {problem.name} must return a scalar loss and scalar metrics"
            f" of one example, got arrays of these shapes: {shapes}."
        )
    # Sums over examples have more digits than bfloat16.
    return {name: _at_least_float32(value) for name, value in measured.items()}


def _at_least_float32(value: jax.typing.ArrayLike) -> jax.Array:
    """The value in float32 if it is a float of fewer bits."""
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
        return value.astype(jnp.float32)
    return value


def _measure_piece(
    problem: Problem,
    at_once: int,
    mesh: Mesh,
    examples: PyTree,
    start: jax.typing.ArrayLike,
    first: jax.typing.ArrayLike,
    params: PyTree,
) -> dict[str, jax.Array]:
    """Sums of losses and metrics from `first` on.

    The piece begins at `start`, so that the last piece is as long as the others.
    """
    count = min(_EXAMPLES_IN_A_PIECE, number_of_examples(examples))
    piece = jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, count), examples
    )
    is_new = jnp.arange(count) + start >= first

    def measure(piece: PyTree, is_new: jax.Array) -> dict[str, jax.Array]:
        values = jax.lax.map(
            functools.partial(_measure, problem, params),
            piece,
            batch_size=min(at_once, len(is_new)),
        )
        return {
            name: jnp.sum(jnp.where(is_new, value, jnp.zeros_like(value)))
            for name, value in values.items()
        }

    devices = mesh.shape[DATA]
    if devices == 1:
        return measure(piece, is_new)
    # As many examples for each device; those that fill up do not count.
    places = np.arange(-(-count // devices) * devices).reshape(devices, -1)
    piece = jax.tree.map(lambda array: array[places % count], piece)
    is_new = is_new[places % count] & (places < count)
    parts = jax.vmap(measure, spmd_axis_name=DATA)(
        *constrain((piece, is_new), mesh, DATA)
    )
    return {name: jnp.sum(part, axis=0) for name, part in parts.items()}


def _measure_rest(
    problem: Problem, replica: Replica, step: jax.Array, params: PyTree
) -> tuple[jax.Array, jax.Array]:
    """The penalty, and the learning rate of the step: what needs no examples."""
    learning_rate = problem.schedule(replica.learning_rate)
    if callable(learning_rate):
        learning_rate = learning_rate(step)
    return penalty(problem, params), jnp.asarray(learning_rate)


def _evaluated_at_once(settings: Settings, data: Data, replicas: int) -> int:
    """Examples of one run in one piece of an evaluation."""
    if jax.default_backend() == "cpu":
        sizes = (math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(data.training))
        return max(_ENTRIES_EVALUATED_AT_ONCE // (replicas * max(sizes)), 1)
    # Where a step is taken there is room for as many.
    return settings.batch_size


# ---- A group of runs --------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("problem", "at_once", "mesh"))
def _measure_pieces(
    problem: Problem,
    at_once: int,
    mesh: Mesh,
    examples: PyTree,
    start: jax.typing.ArrayLike,
    first: jax.typing.ArrayLike,
    params: PyTree,
) -> dict[str, jax.Array]:
    """`_measure_piece` for every run."""
    measure = functools.partial(
        _measure_piece, problem, at_once, mesh, examples, start, first
    )
    # A few numbers, which every process reads.
    return jax.lax.with_sharding_constraint(
        for_each_replica(measure, params), everywhere(mesh)
    )


@functools.partial(jax.jit, static_argnames=("problem", "mesh"))
def _measure_rests(
    problem: Problem, mesh: Mesh, replicas: Replica, step: jax.Array, params: PyTree
) -> tuple[jax.Array, jax.Array]:
    """`_measure_rest` for every run."""
    measure = functools.partial(_measure_rest, problem)
    return jax.lax.with_sharding_constraint(
        for_each_replica(measure, replicas, step, params), everywhere(mesh)
    )


def _measure_all(
    problem: Problem,
    at_once: int,
    mesh: Mesh,
    examples: PyTree,
    params: PyTree,
    stop: Callable[[], bool],
) -> dict[str, np.ndarray] | None:
    """Mean loss and metrics over every example; None if it was given up."""
    count = number_of_examples(examples)
    pieces = []
    for first in range(0, count, _EXAMPLES_IN_A_PIECE):
        if stop():
            return None
        start = max(min(first, count - _EXAMPLES_IN_A_PIECE), 0)
        pieces.append(
            jax.device_get(
                _measure_pieces(problem, at_once, mesh, examples, start, first, params)
            )
        )
    return {
        name: np.sum([np.float64(piece[name]) for piece in pieces], axis=0) / count
        for name in pieces[0]
    }


def evaluate(
    problem: Problem,
    settings: Settings,
    data: Data,
    replicas: Replica,
    step: jax.Array,
    params: PyTree,
    stop: Callable[[], bool] = bool,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray] | None:
    """Losses and metrics of every run, without dropout and augmentation.

    Args:
      problem: The problem.
      settings: Batch size.
      data: The data, on every device.
      replicas: Step sizes and seeds, each `[replicas]`.
      step: Steps taken, `[replicas]`.
      params: Parameters of the group.
      stop: Asked every 1000 examples whether to give up; the default never does.
      mesh: The devices of the group; None for one.

    Returns:
      By name, float32 `[replicas]`; None if it was given up. `training_data_loss`,
      `test_data_loss` and `validation_data_loss` are mean losses over examples,
      `training_loss` and so on the same plus the regularizer, `test_accuracy` and so
      on the mean of a metric. Sets that do not exist are left out. `learning_rate` is
      that of the next step.
    """
    mesh = mesh or make_mesh({})
    runs_of_a_device = len(replicas.seed) // mesh.shape[REPLICA]
    at_once = _evaluated_at_once(settings, data, runs_of_a_device)
    regularizer, learning_rate = jax.device_get(
        _measure_rests(problem, mesh, replicas, step, params)
    )
    values = {"learning_rate": learning_rate}
    sets = data._replace(
        training=first_examples(data.training, TRAINING_EXAMPLES_EVALUATED)
    )
    for name, examples in sets._asdict().items():
        if examples is None:
            continue
        means = _measure_all(problem, at_once, mesh, examples, params, stop)
        if means is None:
            return None
        data_loss = means.pop("loss")
        values |= {
            f"{name}_loss": data_loss + regularizer,
            f"{name}_data_loss": data_loss,
            **{f"{name}_{metric}": value for metric, value in means.items()},
        }
    return {name: value.astype(np.float32) for name, value in values.items()}
