"""Loops that train the same network: the experiments', a plain one, and PyTorch's.

Each is made warm by its first turn and then says how long a step took.
"""

import dataclasses
import functools
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dissect_optax.dissection import (
    Data,
    Method,
    Replica,
    Settings,
    advance,
    initialise,
)
from experiments.problems.image_problem import Examples, ImageProblem, l2_penalty

TORCH_SCRIPT = Path(__file__).parent / "training_torch.py"
LEARNING_RATE = 1e-3


# ---- The experiments' loop ---------------------------------------------------------


class OurLoop:
    """A group of runs as the experiments train it: one program for many steps."""

    def __init__(
        self,
        problem: ImageProblem,
        method: Method,
        settings: Settings,
        dataset: Data,
        members: int = 1,
    ):
        """Initialise the group."""
        group = Replica(
            jnp.full(members, LEARNING_RATE, jnp.float32),
            jnp.arange(members, dtype=jnp.uint32),
        )
        self._what = problem, method, settings
        self._inputs = dataset, group
        self._state = initialise(problem, method, group)

    def turn(self, steps: int) -> float:
        """Seconds per step of some steps."""
        start = time.perf_counter()
        self._state = advance(*self._what, steps, *self._inputs, self._state)
        jax.block_until_ready(self._state)
        return (time.perf_counter() - start) / steps


def without_augmentation(problem: ImageProblem) -> ImageProblem:
    """The same problem, trained on images as it is tested on them."""

    def augment(example: Examples, key: jax.Array) -> Examples:
        del key
        return Examples(problem.test_input(example.image), example.label)

    return dataclasses.replace(problem, augment=augment)


# ---- A plain loop ------------------------------------------------------------------


class LoopState(NamedTuple):
    """What the plain loop hands from one step to the next."""

    params: nnx.State
    optimizer_state: optax.OptState
    key: jax.Array


class PlainLoop:
    """One jitted call per step, on mini-batches from the host; it waits for none."""

    def __init__(
        self, problem: ImageProblem, method: Method, settings: Settings, dataset: Data
    ):
        """Initialise network and optimizer."""
        structure, params = nnx.split(problem.network(nnx.Rngs(0)), nnx.Param)
        optimizer = method.factory(problem.schedule(LEARNING_RATE))
        step = functools.partial(_plain_step, problem, settings, optimizer, structure)
        self.step = jax.jit(step, donate_argnums=0)
        self.state = LoopState(params, optimizer.init(params), jax.random.key(0))
        images, labels = map(np.asarray, dataset.training)
        self._batches = shuffled_batches(images, labels, settings.batch_size)

    def turn(self, steps: int) -> float:
        """Seconds per step of some steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.state = self.step(self.state, *next(self._batches))
        jax.block_until_ready(self.state)
        return (time.perf_counter() - start) / steps


def _plain_step(
    problem: ImageProblem,
    settings: Settings,
    optimizer: optax.GradientTransformation,
    structure: nnx.GraphDef,
    state: LoopState,
    images: jax.Array,
    labels: jax.Array,
) -> LoopState:
    """One step on a mini-batch that is given."""
    key, augmentation_key, dropout_key = jax.random.split(state.key, 3)
    keys = jax.random.split(augmentation_key, settings.batch_size)
    inputs = jax.vmap(problem.training_input)(images, keys)
    gradient = jax.grad(_plain_loss)(
        state.params, structure, problem.l2, inputs, labels, dropout_key
    )
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer_state, state.params
    )
    return LoopState(optax.apply_updates(state.params, updates), optimizer_state, key)


def _plain_loss(
    params: nnx.State,
    structure: nnx.GraphDef,
    l2: float,
    inputs: jax.Array,
    labels: jax.Array,
    dropout_key: jax.Array,
) -> jax.Array:
    """Mean cross-entropy of a mini-batch, and the penalty."""
    logits = nnx.merge(structure, params)(inputs, dropout_key)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(loss) + l2_penalty(params, l2)


def shuffled_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Mini-batches on the host, epoch after epoch, each in another order."""
    random = np.random.default_rng(0)
    while True:
        order = random.permutation(len(labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            indices = order[start : start + batch_size]
            yield images[indices], labels[indices]


# ---- PyTorch's loop ----------------------------------------------------------------


class TorchProcess:
    """PyTorch in a process of its own, which answers one request after the other."""

    def __init__(self, python: str, images: int):
        """Start it, with as many threads as JAX has cores and so many images."""
        threads = len(os.sched_getaffinity(0))
        self._process = subprocess.Popen(
            [python, str(TORCH_SCRIPT), str(threads), str(images)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.environment = self._answer()

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to a request; the script says what both may be."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        """What it prints next."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise RuntimeError(
                "PyTorch's process ended without an answer. Expected `--torch` to be a"
                " Python that imports torch; what went wrong is printed above."
            )
        return json.loads(line)

    def close(self) -> None:
        """Let it end: there is nothing more to read for it."""
        self._process.communicate()


class TorchLoop:
    """A network of PyTorch."""

    def __init__(
        self,
        process: TorchProcess,
        problem: ImageProblem,
        method: Method,
        settings: Settings,
        *,
        augmented: bool,
        channels_last: bool,
    ):
        """Say what to train."""
        params = nnx.state(problem.network(nnx.Rngs(0)), nnx.Param)
        self._process = process
        self._training = {
            "problem": problem.name,
            "optimizer": method.name,
            "learning_rate": LEARNING_RATE,
            "batch_size": settings.batch_size,
            "l2": problem.l2,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "augmented": augmented,
            "channels_last": channels_last,
        }

    def turn(self, steps: int) -> float:
        """Seconds per step of some steps."""
        return self._process.ask(self._training | {"steps": steps})
