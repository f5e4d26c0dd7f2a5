"""A problem: parameters, the loss of one example, data, and how to train on them."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from dissect_optax.dissection._data import Data

PyTree = Any

Loss = Callable[[PyTree, PyTree, jax.Array], jax.Array]
Evaluate = Callable[[PyTree, PyTree], tuple[jax.Array, Mapping[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Length, batch size and evaluations of a run; part of its record.

    Attributes:
      steps: Number of optimizer steps.
      batch_size: Examples per mini-batch.
      evaluation_interval: Steps between two evaluations; divides `steps`.
      validation_fraction: Fraction of the training set that is held out of training,
        to choose the step size on.
      examples: Number of examples that the training and the test set are cut to, for
        a smoke test; None for all of them.

    Raises:
      ValueError: A number is out of range, or the interval does not divide the steps.
      TypeError: A number has another type.
    """

    steps: int
    batch_size: int
    evaluation_interval: int
    validation_fraction: float = 0.0
    examples: int | None = None

    def __post_init__(self) -> None:
        counts = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "evaluation_interval": self.evaluation_interval,
            "examples": 1 if self.examples is None else self.examples,
        }
        for name, value in counts.items():
            if type(value) is not int:
                raise TypeError(f"`{name}` must be an integer, got {value!r}.")
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0.0 <= self.validation_fraction < 1.0:
            raise ValueError(
                "`validation_fraction` must lie in [0, 1), got"
                f" {self.validation_fraction}."
            )
        if self.steps % self.evaluation_interval:
            raise ValueError(
                "`evaluation_interval` must divide `steps` so that the last step is"
                f" evaluated, got {self.evaluation_interval} and {self.steps}."
            )


def constant(learning_rate: jax.typing.ArrayLike) -> optax.ScalarOrSchedule:
    """The step size itself, in every step."""
    return learning_rate


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What is trained. The engine knows nothing else about a model and its data.

    A problem is compared by identity, and compiled programs are kept for it: define one
    at module level, or keep it for as long as it is trained.

    Attributes:
      name: Name in records and on the command line: letters, digits, `-`, `_`, `.`.
      title: Name in figures and tables.
      settings: Length, batch size and evaluations.
      init: From a random key to parameters, any tree of arrays.
      loss: `loss(params, example, key)`, a scalar: the loss of one example in training.
      evaluate: `evaluate(params, example)`, the loss of one example without dropout
        and augmentation, and further metrics by name, all scalars.
      load_data: From a data directory, or None for the usual one, to the data, in
        random order.
      batch_loss: `batch_loss(params, batch, key)`, the mean loss of a mini-batch where
        that is cheaper than a `jax.vmap` of `loss`. It is used by methods that need no
        gradient variance, and draws its random numbers in its own way.
      augment: `augment(example, key)`, the example as it is shown in training; it is
        not differentiated. None shows examples as they are.
      regularizer: Function of the parameters that is added to the mean loss. It moves
        the gradient, not its variance.
      schedule: From the tuned step size to the learning rate of every step.
      description: Everything else that makes it this problem and no other, such as the
        network's layers; part of the identity of every record.
    """

    name: str
    title: str
    settings: Settings
    init: Callable[[jax.Array], PyTree]
    loss: Loss
    evaluate: Evaluate
    load_data: Callable[[Path | None], Data]
    batch_loss: Loss | None = None
    augment: Callable[[PyTree, jax.Array], PyTree] | None = None
    regularizer: Callable[[PyTree], jax.Array] | None = None
    schedule: Callable[[jax.typing.ArrayLike], optax.ScalarOrSchedule] = constant
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict)
