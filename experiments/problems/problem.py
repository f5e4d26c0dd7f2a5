"""What a test problem is: data, network, loss, settings."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import optax
from flax import nnx

from experiments.data import Dataset


@dataclasses.dataclass(frozen=True)
class Settings:
    """How long and on what a network is trained; part of every record.

    Attributes:
      steps: Number of optimizer steps.
      batch_size: Examples per mini-batch.
      l2: λ of the penalty ½λ‖w‖² on the weights, not on the biases.
      evaluation_interval: Steps between two evaluations; divides `steps`.
      validation_fraction: Share of the training set that is held out of training, to
          choose the step size on; with 0.0 the test set serves, as in the paper.
      images: Number of images that each half of the data set is cut to, for a smoke
          test; None for all of them.
    """

    steps: int
    batch_size: int
    l2: float
    evaluation_interval: int
    validation_fraction: float = 0.0
    images: int | None = None

    def __post_init__(self) -> None:
        if self.evaluation_interval < 1 or self.steps % self.evaluation_interval:
            raise ValueError(
                "`evaluation_interval` must divide `steps` so that the last step is"
                f" evaluated, got {self.evaluation_interval} and {self.steps}."
            )


def constant(learning_rate: jax.typing.ArrayLike) -> optax.ScalarOrSchedule:
    """The step size itself, in every step."""
    return learning_rate


@dataclasses.dataclass(frozen=True)
class Problem:
    """A data set and a network to train on it.

    The training loop knows nothing else about a problem. Functions are told apart by
    identity, so define them at module level.

    Attributes:
      name: Name on the command line, and of the file in this folder.
      title: Name in figures and tables.
      network_summary: The network in a few words; part of every record.
      settings: The published settings.
      smoke: Settings with which a command does little but compile.
      load_data: From a data directory (or None for the usual one) to the data set,
          each half in random order.
      network: From random streams to a Flax NNX module whose only variables are
          `nnx.Param`. Called with one image or a batch, and with the key of its
          dropout or None, which switches dropout off; it returns logits. Arrays
          named `kernel` are weights, on which L2 acts.
      test_input: From a stored image to the network's input.
      augmented_input: The same with augmentation, from an image and a key; None where
          training is shown what the test is.
      schedule: From the tuned step size to the learning rate of every step.
      published: The paper's test accuracies as it prints them, by the method's name.
    """

    name: str
    title: str
    network_summary: str
    settings: Settings
    smoke: Settings
    load_data: Callable[[Path | None], Dataset]
    network: Callable[[nnx.Rngs], nnx.Module]
    test_input: Callable[[jax.Array], jax.Array]
    augmented_input: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    schedule: Callable[[jax.typing.ArrayLike], optax.ScalarOrSchedule] = constant
    published: Mapping[str, str] = dataclasses.field(
        default_factory=dict, compare=False
    )

    def training_input(self, image: jax.Array, key: jax.Array) -> jax.Array:
        """What the network is shown of a stored image in a training step."""
        if self.augmented_input is None:
            return self.test_input(image)
        return self.augmented_input(image, key)
