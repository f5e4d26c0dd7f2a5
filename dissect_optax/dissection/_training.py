"""The training loop of every problem: vmapped over runs, looped over steps, jitted.

A group of runs of one method differs in step size and seed only and is one program.
`advance` takes the group some steps on. The whole state of a run is its `TrainState`,
one tree of arrays; everything random in it follows from the seed and the number of the
step, so a run that is resumed, or that has other neighbours in its group, is the same
run. Runs and mini-batches are divided over a mesh of devices by constraints in this one
program, which one device removes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from dissect_optax import value_grad_and_variance
from dissect_optax.dissection._data import Data, sample_batch
from dissect_optax.dissection._meshes import (
    DATA,
    REPLICA,
    constrain,
    make_mesh,
    over_replicas,
)
from dissect_optax.dissection._methods import Method
from dissect_optax.dissection._problem import Problem, Settings

PyTree = Any


class Replica(NamedTuple):
    """What differs between the runs of a group; both are `[replicas]` in a group."""

    learning_rate: jax.Array  # float32
    seed: jax.Array  # uint32


class TrainState(NamedTuple):
    """Everything that a run needs to go on; leaves are `[replicas, ...]` in a group."""

    step: jax.Array  # int32, the number of steps taken
    params: PyTree
    optimizer_state: optax.OptState


class _Keys(NamedTuple):
    """The independent random streams of a run."""

    parameters: jax.Array
    data: jax.Array
    noise: jax.Array


def _keys(seed: jax.Array) -> _Keys:
    """The streams that belong to a seed."""
    # By name: another default generator would train other networks under the same seed.
    return _Keys(*jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3))


# ---- One run ----------------------------------------------------------------------


def penalty(problem: Problem, params: PyTree) -> jax.Array:
    """The regularizer at these parameters, zero without one."""
    if problem.regularizer is None:
        return jnp.zeros(())
    return problem.regularizer(params)


def _optimizer(
    problem: Problem, method: Method, learning_rate: jax.Array
) -> optax.GradientTransformationExtraArgs:
    """The method at this step size, on the problem's schedule."""
    return optax.with_extra_args_support(
        method.factory(problem.schedule(learning_rate))
    )


def _initial_params(problem: Problem, seed: jax.Array) -> PyTree:
    """Parameters before the first step; they depend on the seed alone."""
    return problem.init(_keys(seed).parameters)


def _initial_state(
    problem: Problem, method: Method, replica: Replica, params: PyTree
) -> TrainState:
    """A run before its first step."""
    optimizer = _optimizer(problem, method, replica.learning_rate)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def _example_keys(batch: PyTree, key: jax.Array) -> jax.Array:
    """A key for every example of a mini-batch."""
    return jax.random.split(key, len(jax.tree.leaves(batch)[0]))


def _batch_loss(
    problem: Problem, params: PyTree, batch: PyTree, key: jax.Array
) -> jax.Array:
    """Mean loss of a mini-batch."""
    if problem.batch_loss is not None:
        return problem.batch_loss(params, batch, key)
    losses = jax.vmap(problem.loss, in_axes=(None, 0, 0))
    return jnp.mean(losses(params, batch, _example_keys(batch, key)))


def _gradient(
    problem: Problem, method: Method, params: PyTree, batch: PyTree, key: jax.Array
) -> tuple[PyTree, dict[str, PyTree]]:
    """Gradient of the mean loss, and what else the optimizer asks for."""
    if not method.needs_variance:
        loss = functools.partial(_batch_loss, problem)
        return jax.grad(loss)(params, batch, key), {}

    def loss_of_example(params: PyTree, example_and_key: PyTree) -> jax.Array:
        return problem.loss(params, *example_and_key)

    _, gradient, variance = value_grad_and_variance(loss_of_example)(
        params, (batch, _example_keys(batch, key))
    )
    return gradient, {"grad_variance": variance}


def _shown(problem: Problem, batch: PyTree, key: jax.Array) -> PyTree:
    """The mini-batch as it is shown in training."""
    if problem.augment is None:
        return batch
    return jax.vmap(problem.augment)(batch, _example_keys(batch, key))


def _train_step(
    problem: Problem,
    method: Method,
    batch_size: int,
    mesh: Mesh,
    data: Data,
    replica: Replica,
    state: TrainState,
) -> TrainState:
    """One step of one run."""
    keys = _keys(replica.seed)
    batch = sample_batch(data.training, keys.data, state.step, batch_size)
    batch = constrain(batch, mesh, DATA)
    noise_key = jax.random.fold_in(keys.noise, state.step)
    augmentation_key, loss_key = jax.random.split(noise_key)
    batch = _shown(problem, batch, augmentation_key)
    gradient, extra_args = _gradient(problem, method, state.params, batch, loss_key)
    if problem.regularizer is not None:
        # It is not a random variable: it moves the gradient, not its variance.
        gradient = jax.tree.map(
            jnp.add, gradient, jax.grad(problem.regularizer)(state.params)
        )
    optimizer = _optimizer(problem, method, replica.learning_rate)
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer_state, state.params, **extra_args
    )
    params = optax.apply_updates(state.params, updates)
    return constrain(TrainState(state.step + 1, params, optimizer_state), mesh)


def _advance(
    problem: Problem,
    method: Method,
    batch_size: int,
    mesh: Mesh,
    steps: jax.typing.ArrayLike,
    data: Data,
    replica: Replica,
    state: TrainState,
) -> TrainState:
    """Some steps of one run."""
    step = functools.partial(
        _train_step, problem, method, batch_size, mesh, data, replica
    )
    return jax.lax.fori_loop(0, steps, lambda _, state: step(state), state)


def lower_gradient(
    problem: Problem, method: Method, settings: Settings, training: PyTree
) -> tuple[jax.stages.Lowered, PyTree]:
    """The gradient of one step, not compiled yet, to ask what it costs.

    Args:
      problem: The problem.
      method: The optimizer, which may ask for a variance beside the gradient.
      settings: Batch size.
      training: The training set, or its shapes.

    Returns:
      The program, and the shapes of its parameters.
    """
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    params = jax.eval_shape(functools.partial(_initial_params, problem), seed)
    key = jax.eval_shape(functools.partial(jax.random.key, impl="threefry2x32"), 0)
    stored = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(
            (settings.batch_size, *array.shape[1:]), array.dtype
        ),
        training,
    )
    batch = jax.eval_shape(functools.partial(_shown, problem), stored, key)
    gradient = functools.partial(_gradient, problem, method)
    return jax.jit(gradient).lower(params, batch, key), params


# ---- A group of runs: one compiled program each -----------------------------------


def for_each_replica(function: Callable[..., Any], *group: Any) -> Any:
    """Maps a function of one run over a group."""
    if len(jax.tree.leaves(group)[0]) > 1:
        return jax.vmap(function, spmd_axis_name=REPLICA)(*group)
    # A batch axis of one costs a CPU a sixth of its speed (MNIST, CIFAR-10).
    only = jax.tree.map(lambda array: array[0], group)
    return jax.tree.map(lambda array: array[None], function(*only))


@functools.partial(jax.jit, static_argnames=("problem", "mesh"))
def _initialise_params(problem: Problem, mesh: Mesh, seeds: jax.Array) -> PyTree:
    """Parameters of a group before the first step."""

    # One after the other: vmapped random numbers take more than twice as long to
    # compile, and all this runs only once.
    def initialise_each(seeds: jax.Array) -> PyTree:
        return jax.lax.map(functools.partial(_initial_params, problem), seeds)

    if mesh.shape[REPLICA] > 1:
        # No device holds the parameters of another one's runs.
        initialise_each = jax.shard_map(
            initialise_each,
            mesh=mesh,
            in_specs=PartitionSpec(REPLICA),
            out_specs=PartitionSpec(REPLICA),
            check_vma=False,
        )
    return _on_its_devices(initialise_each(seeds), mesh)


def _on_its_devices(group: PyTree, mesh: Mesh) -> PyTree:
    """Constrains arrays `[replicas, ...]` to the devices of their runs."""
    return jax.lax.with_sharding_constraint(group, over_replicas(mesh))


def initial_params(
    problem: Problem, seeds: jax.Array, mesh: Mesh | None = None
) -> PyTree:
    """Parameters of a group before the first step, the same for every method."""
    return _initialise_params(problem, mesh or make_mesh({}), seeds)


@functools.partial(jax.jit, static_argnames=("problem", "method", "mesh"))
def _initialise_optimizer(
    problem: Problem, method: Method, mesh: Mesh, replicas: Replica, params: PyTree
) -> TrainState:
    """The group before its first step, from its parameters."""
    initialise_one = functools.partial(_initial_state, problem, method)
    state = jax.vmap(initialise_one, spmd_axis_name=REPLICA)(replicas, params)
    return _on_its_devices(state, mesh)


def initialise(
    problem: Problem, method: Method, replicas: Replica, mesh: Mesh | None = None
) -> TrainState:
    """The group before its first step.

    Args:
      problem: The problem.
      method: The optimizer of every run.
      replicas: Step sizes and seeds, each `[replicas]`.
      mesh: The devices; None for one.

    Returns:
      The state of the group, each run on its devices.
    """
    mesh = mesh or make_mesh({})
    params = initial_params(problem, replicas.seed, mesh)
    return _initialise_optimizer(problem, method, mesh, replicas, params)


@functools.partial(
    jax.jit,
    static_argnames=("problem", "method", "batch_size", "mesh"),
    donate_argnames=("state",),
)
def _advance_group(
    problem: Problem,
    method: Method,
    batch_size: int,
    mesh: Mesh,
    steps: jax.typing.ArrayLike,
    data: Data,
    replicas: Replica,
    state: TrainState,
) -> TrainState:
    """Some steps of every run of a group."""
    take_steps = functools.partial(
        _advance, problem, method, batch_size, mesh, steps, data
    )
    state = for_each_replica(take_steps, replicas, state)
    return _on_its_devices(state, mesh)


def advance(
    problem: Problem,
    method: Method,
    settings: Settings,
    steps: jax.typing.ArrayLike,
    data: Data,
    replicas: Replica,
    state: TrainState,
    mesh: Mesh | None = None,
) -> TrainState:
    """The group after some more steps.

    Args:
      problem: The problem.
      method: The optimizer of every run.
      settings: Batch size.
      steps: Number of steps to take; any number is the same program.
      data: The data, on every device.
      replicas: Step sizes and seeds, each `[replicas]`.
      state: State of the group; its buffers are donated.
      mesh: The devices, which divide runs and mini-batch evenly; None for one.

    Returns:
      The new state. A run that diverges does not touch the others.
    """
    # Of the settings, the batch size alone is part of the program.
    return _advance_group(
        problem,
        method,
        settings.batch_size,
        mesh or make_mesh({}),
        steps,
        data,
        replicas,
        state,
    )
