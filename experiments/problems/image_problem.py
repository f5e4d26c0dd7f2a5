"""Classification of images with cross-entropy and L2: the paper's kind of problem."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dissect_optax.dissection import Data, Settings, constant
from experiments.problems.problem import (
    ExperimentProblem,
    NetworkFunctions,
    half_squared_norm,
)


class Examples(NamedTuple):
    """Images with their labels; both arrays have the same leading axis."""

    image: jax.Array
    label: jax.Array


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ImageProblem(ExperimentProblem):
    """A network on images; `image_problem` makes one.

    Attributes:
      network: From random streams to a Flax NNX module whose only variables are
        `nnx.Param`. Called with one image or a batch, and with the key of its dropout
        or None, which switches dropout off; it returns logits.
      training_input: From a stored image and a key to the network's input in training.
      test_input: From a stored image to the network's input.
      l2: λ of the penalty ½λ‖w‖² on the weights, not on the biases.
    """

    network: Callable[[nnx.Rngs], nnx.Module]
    training_input: Callable[[jax.Array, jax.Array], jax.Array]
    test_input: Callable[[jax.Array], jax.Array]
    l2: float


def l2_penalty(params: Any, strength: float) -> jax.Array:
    """½λ‖w‖² over the weights, which are called `kernel`; biases are free."""
    weights = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if "kernel" in jax.tree_util.keystr(path)
    ]
    return half_squared_norm(weights, strength)


def _cross_entropy(scores: jax.Array, label: jax.Array) -> jax.Array:
    """Mean cross-entropy of one example or of a mini-batch."""
    return jnp.mean(
        optax.losses.softmax_cross_entropy_with_integer_labels(scores, label)
    )


def image_problem(
    *,
    name: str,
    title: str,
    network_summary: str,
    settings: Settings,
    smoke: Settings,
    l2: float,
    load_data: Callable[[Path | None], Data],
    network: Callable[[nnx.Rngs], nnx.Module],
    test_input: Callable[[jax.Array], jax.Array],
    augmented_input: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    schedule: Callable[[jax.typing.ArrayLike], optax.ScalarOrSchedule] = constant,
    published: Mapping[str, str] | None = None,
) -> ImageProblem:
    """A network, its data and its loss as the engine takes them.

    Args:
      name: Name on the command line, and of the file in this folder.
      title: Name in figures and tables.
      network_summary: The network in a few words; part of every record.
      settings: The published settings.
      smoke: Settings with which a command does little but compile.
      l2: λ of the penalty ½λ‖w‖² on the weights.
      load_data: From a data directory, or None for the usual one, to the data.
      network: See `ImageProblem`.
      test_input: From a stored image to the network's input.
      augmented_input: The same with augmentation, from an image and a key; None to
        train on images as they are tested.
      schedule: From the tuned step size to the learning rate of every step.
      published: The paper's test accuracies, by the method's name.

    Returns:
      The problem. Its examples are `Examples`, its metric is `accuracy`.
    """

    def training_input(image: jax.Array, key: jax.Array) -> jax.Array:
        if augmented_input is None:
            return test_input(image)
        return augmented_input(image, key)

    functions = NetworkFunctions(network)

    def augment(example: Examples, key: jax.Array) -> Examples:
        return Examples(training_input(example.image, key), example.label)

    def loss(params: nnx.State, example: Examples, key: jax.Array) -> jax.Array:
        # A mini-batch goes through as a whole, with one key for its dropout.
        scores = functions.apply(params, example.image, key)
        return _cross_entropy(scores, example.label)

    def evaluate(
        params: nnx.State, example: Examples
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs = test_input(example.image)
        scores = functions.apply(params, inputs, None)
        return (
            _cross_entropy(scores, example.label),
            {"accuracy": jnp.argmax(scores) == example.label},
        )

    return ImageProblem(
        name=name,
        title=title,
        settings=settings,
        init=functions.init,
        loss=loss,
        batch_loss=loss,
        evaluate=evaluate,
        load_data=load_data,
        augment=augment,
        regularizer=functools.partial(l2_penalty, strength=l2),
        schedule=schedule,
        description={"network": network_summary, "l2": l2},
        smoke=smoke,
        network=network,
        training_input=training_input,
        test_input=test_input,
        l2=l2,
        published=published or {},
    )
