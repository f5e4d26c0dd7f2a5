"""The training loop of every problem: vmapped over runs, looped over steps, jitted.

A group of runs of one method differs in step size and seed only and is one program.
`advance` takes the group some steps on. What a run needs to go on is its `TrainState`,
one tree of arrays; everything random in it follows from the seed and the number of the
step, so a run that is resumed, or that has other neighbours in its group, is the same
run.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dissect_optax import value_grad_and_variance
from experiments.data import Dataset, sample_batch
from experiments.methods import Method
from experiments.problems.problem import Problem, Settings


class Member(NamedTuple):
    """What tells the runs of a group apart; both arrays are `[members]` in a group."""

    learning_rate: jax.Array  # float32
    seed: jax.Array  # uint32


class TrainState(NamedTuple):
    """All that a run needs to go on; leaves are `[members, ...]` in a group."""

    step: jax.Array  # int32, the number of steps taken
    params: nnx.State
    optimizer_state: optax.OptState


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


def logits(
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
    scores = logits(problem, params, inputs.values, inputs.dropout_key)
    return jnp.mean(
        optax.losses.softmax_cross_entropy_with_integer_labels(scores, inputs.label)
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


def for_each_member(function: Callable[..., Any], *group: Any) -> Any:
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
    return for_each_member(take_steps, members, state)
