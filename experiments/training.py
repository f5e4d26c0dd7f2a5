"""The training loop of every problem: vmapped over runs, looped over steps, jitted.

A group of runs of one method differs in step size and seed only and is one program.
`advance` takes the group some steps on, `evaluate` measures it; between the two lie
progress and checkpoints. What a run needs to go on is its `TrainState`, one tree of
arrays; everything random in it follows from the seed and the number of the step, so a
run that is resumed, or that has other neighbours in its group, is the same run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dissect_optax import value_grad_and_variance
from experiments.data import (
    Dataset,
    Examples,
    evaluated_training_examples,
    sample_batch,
)
from experiments.methods import Method
from experiments.problems.problem import Problem, Settings

# So many numbers in the images that a CPU evaluates at once, together for all members:
# 50 images of CIFAR. Of All-CNN-C, 250 need 1.8 GB and half as much time again.
_ENTRIES_EVALUATED_AT_ONCE = 50 * 32 * 32 * 3


# An evaluation can be given up between two pieces.
IMAGES_IN_A_PIECE = 1000


class Member(NamedTuple):
    """What tells the runs of a group apart; both arrays are `[members]` in a group."""

    learning_rate: jax.Array  # float32
    seed: jax.Array  # uint32


class TrainState(NamedTuple):
    """All that a run needs to go on; leaves are `[members, ...]` in a group."""

    step: jax.Array  # int32, the number of steps taken
    params: nnx.State
    optimizer_state: optax.OptState


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


class _Input(NamedTuple):
    """One example as the network sees it in a training step, or a mini-batch of them.

    One key is enough for the dropout of a mini-batch that goes through as a whole.
    """

    values: jax.Array
    label: jax.Array
    dropout_key: jax.Array


class _Keys(NamedTuple):
    """The independent random streams of a run."""

    parameters: jax.Array
    data: jax.Array
    noise: jax.Array


def _keys(seed: jax.Array) -> _Keys:
    """The streams that belong to a seed."""
    return _Keys(*jax.random.split(jax.random.key(seed), 3))


# ---- One run ----------------------------------------------------------------------


def _network(problem: Problem, key: jax.Array) -> nnx.Module:
    """A freshly initialised network."""
    return problem.network(nnx.Rngs(key))


@functools.cache
def _network_structure(problem: Problem) -> nnx.GraphDef:
    """The network without its parameters."""
    build = functools.partial(_network, problem)
    structure, _ = nnx.split(nnx.eval_shape(build, jax.random.key(0)), nnx.Param)
    return structure


def _logits(
    problem: Problem,
    params: nnx.State,
    inputs: jax.Array,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """What the network says."""
    return nnx.merge(_network_structure(problem), params)(inputs, dropout_key)


def l2_penalty(params: Any, strength: float) -> jax.Array:
    """½λ‖w‖² over the weights, which are called `kernel`; biases are free."""
    squares = [
        jnp.sum(jnp.square(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    return 0.5 * strength * sum(squares, start=jnp.zeros(()))


def _optimizer(
    problem: Problem, method: Method, learning_rate: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The method at this step size, on the problem's schedule."""
    return optax.with_extra_args_support(
        method.factory(problem.schedule(learning_rate))
    )


def _initial_params(problem: Problem, seed: jax.Array) -> nnx.State:
    """Parameters before the first step; they depend on the seed alone."""
    return nnx.state(_network(problem, _keys(seed).parameters), nnx.Param)


def _initial_state(
    problem: Problem, method: Method, member: Member, params: nnx.State
) -> TrainState:
    """A run before its first step."""
    optimizer = _optimizer(problem, method, member.learning_rate)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _loss(problem: Problem, params: nnx.State, inputs: _Input) -> jax.Array:
    """Cross-entropy of one example, or its mean over a mini-batch."""
    logits = _logits(problem, params, inputs.values, inputs.dropout_key)
    return jnp.mean(
        optax.losses.softmax_cross_entropy_with_integer_labels(logits, inputs.label)
    )


def _gradient(
    problem: Problem, method: Method, params: nnx.State, batch: _Input
) -> tuple[nnx.State, dict[str, nnx.State]]:
    """Gradient of the mean cross-entropy, and what else the optimizer asks for."""
    loss = functools.partial(_loss, problem)
    if method.needs_variance:  # From examples, each with a key of its own.
        keys = jax.random.split(batch.dropout_key, len(batch.label))
        examples = batch._replace(dropout_key=keys)
        _, gradient, variance = value_grad_and_variance(loss)(params, examples)
        return gradient, {"grad_variance": variance}
    return jax.grad(loss)(params, batch), {}


def _train_step(
    problem: Problem,
    method: Method,
    settings: Settings,
    dataset: Dataset,
    member: Member,
    state: TrainState,
) -> TrainState:
    """One step of one run."""
    keys = _keys(member.seed)
    batch = sample_batch(dataset.training, keys.data, state.step, settings.batch_size)
    noise_key = jax.random.fold_in(keys.noise, state.step)
    augmentation_key, dropout_key = jax.random.split(noise_key)
    augmentation_keys = jax.random.split(augmentation_key, settings.batch_size)
    inputs = jax.vmap(problem.training_input)(batch.image, augmentation_keys)
    gradient, extra_args = _gradient(
        problem, method, state.params, _Input(inputs, batch.label, dropout_key)
    )
    # The penalty is no random variable: it moves the gradient, not its variance.
    gradient = jax.tree.map(
        jnp.add, gradient, jax.grad(l2_penalty)(state.params, settings.l2)
    )
    optimizer = _optimizer(problem, method, member.learning_rate)
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer_state, state.params, **extra_args
    )
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, optimizer_state)


def _loop_body(
    problem: Problem,
    method: Method,
    settings: Settings,
    dataset: Dataset,
    member: Member,
    _: jax.Array,
    state: TrainState,
) -> TrainState:
    """One step in the form that `jax.lax.fori_loop` expects."""
    return _train_step(problem, method, settings, dataset, member, state)


def _advance(
    problem: Problem,
    method: Method,
    settings: Settings,
    steps: jax.typing.ArrayLike,
    dataset: Dataset,
    member: Member,
    state: TrainState,
) -> TrainState:
    """Some steps of one run."""
    body = functools.partial(_loop_body, problem, method, settings, dataset, member)
    return jax.lax.fori_loop(0, steps, body, state)


def _measure(
    problem: Problem, params: nnx.State, example: Examples
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of one example, and whether it is recognised."""
    logits = _logits(problem, params, problem.test_input(example.image))
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, example.label)
    return loss, jnp.argmax(logits) == example.label


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
    count = min(IMAGES_IN_A_PIECE, len(examples.label))
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


def lower_gradient(
    problem: Problem, method: Method, settings: Settings, image_shape: tuple[int, ...]
) -> tuple[jax.stages.Lowered, nnx.State]:
    """The gradient of one step, not compiled yet, to ask what it costs.

    Args:
      problem: The test problem.
      method: The optimizer, which may ask for a variance beside the gradient.
      settings: Batch size.
      image_shape: Shape of one stored image.

    Returns:
      The program, and the shapes of its parameters.
    """
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    params = jax.eval_shape(functools.partial(_initial_params, problem), seed)
    images = jax.ShapeDtypeStruct((settings.batch_size, *image_shape), jnp.uint8)
    labels: Any = jax.ShapeDtypeStruct((settings.batch_size,), jnp.int32)
    batch = _Input(
        values=jax.eval_shape(jax.vmap(problem.test_input), images),
        label=labels,
        dropout_key=jax.eval_shape(jax.random.key, 0),
    )
    gradient = functools.partial(_gradient, problem, method)
    return jax.jit(gradient).lower(params, batch), params


# ---- A group of runs: one compiled program each -----------------------------------


def _for_each_member(function: Callable[..., Any], *group: Any) -> Any:
    """The function of every member."""
    if len(jax.tree.leaves(group)[0]) > 1:
        return jax.vmap(function)(*group)
    # A batch axis of one costs a CPU a sixth of its speed (MNIST, CIFAR-10).
    return jax.tree.map(_as_group, function(*jax.tree.map(_only, group)))


def _only(array: jax.Array) -> jax.Array:
    """What the only member of a group has."""
    return array[0]


def _as_group(array: jax.Array) -> jax.Array:
    """The same for a group of one."""
    return array[None]


@functools.partial(jax.jit, static_argnames=("problem",))
def _initialise_params(problem: Problem, seeds: jax.Array) -> nnx.State:
    """Parameters of the group, the same for every method."""
    # One after the other: vmapped random numbers take more than twice as long to
    # compile, and all this runs only once.
    return jax.lax.map(functools.partial(_initial_params, problem), seeds)


@functools.partial(jax.jit, static_argnames=("problem", "method"))
def _initialise_optimizer(
    problem: Problem, method: Method, members: Member, params: nnx.State
) -> TrainState:
    """The group before its first step, from its parameters."""
    initialise_one = functools.partial(_initial_state, problem, method)
    return jax.vmap(initialise_one)(members, params)


def initialise(problem: Problem, method: Method, members: Member) -> TrainState:
    """The group before its first step.

    Args:
      problem: The test problem.
      method: The optimizer of every member.
      members: Step sizes and seeds, each `[members]`.

    Returns:
      The state of the group.
    """
    params = _initialise_params(problem, members.seed)
    return _initialise_optimizer(problem, method, members, params)


@functools.partial(
    jax.jit,
    static_argnames=("problem", "method", "settings"),
    donate_argnames=("state",),
)
def advance(
    problem: Problem,
    method: Method,
    settings: Settings,
    steps: jax.typing.ArrayLike,
    dataset: Dataset,
    members: Member,
    state: TrainState,
) -> TrainState:
    """The group after some more steps.

    Args:
      problem: The test problem.
      method: The optimizer of every member.
      settings: Batch size and L2 strength.
      steps: Number of steps to take; any number is the same program.
      dataset: The data, on the device.
      members: Step sizes and seeds, each `[members]`.
      state: State of the group; its buffers are given away and reused.

    Returns:
      The new state. A member that diverges does not touch the others.
    """
    take_steps = functools.partial(_advance, problem, method, settings, steps, dataset)
    return _for_each_member(take_steps, members, state)


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
    return _for_each_member(measure, params)


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
    return _for_each_member(measure, members, step, params)


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
    for first in range(0, count, IMAGES_IN_A_PIECE):
        if stop():
            return None
        start = max(min(first, count - IMAGES_IN_A_PIECE), 0)
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
