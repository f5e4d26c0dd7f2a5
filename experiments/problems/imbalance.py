"""Classes of very different frequency, the linear model of Kunstner et al. (2024).

Command     python -m experiments dissect imbalance
Time        about two minutes on two CPU cores
Result      docs/dissect.md

L2          0.001: the classes are separable, so without a penalty every step size is
            stable, and absurd ones are the best

Data        64 classes; class k has ⌈256/k⌉ examples and an input of its own, e_k
Network     a matrix W from zero: class k is learned from its own examples alone, so
            gradient descent brings the loss of class k down in proportion to its
            frequency, and sign descent brings all of them down alike
            (Heavy-Tailed Class Imbalance and Why Adam Outperforms Gradient Descent on
            Language Models, NeurIPS 2024)
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dissect_optax.dissection import Data, Settings
from experiments.problems.problem import (
    ExperimentProblem,
    half_squared_norm,
    loss_without_noise,
)

CLASSES = 64
_MOST_FREQUENT = 256
_L2 = 0.001


def load_data(data_dir: Path | None) -> Data:
    """The class of every example; training and test are the same, for rates alone."""
    del data_dir
    counts = [-(-_MOST_FREQUENT // k) for k in range(1, CLASSES + 1)]
    labels = np.repeat(np.arange(CLASSES, dtype=np.int32), counts)
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(labels))
    return Data(training=shuffled, test=shuffled)


def init(key: jax.Array) -> jax.Array:
    """The matrix W `[classes, classes]`, zero."""
    del key
    return jnp.zeros((CLASSES, CLASSES))


def evaluate(
    weights: jax.Array, label: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of W e_k, and whether it is largest at k."""
    logits = jax.nn.one_hot(label, CLASSES) @ weights
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    return loss, {"accuracy": jnp.argmax(logits) == label}


PROBLEM = ExperimentProblem(
    name="imbalance",
    title="Class imbalance",
    settings=Settings(steps=500, batch_size=32, evaluation_interval=25),
    smoke=Settings(steps=10, batch_size=8, evaluation_interval=5),
    init=init,
    loss=loss_without_noise(evaluate),
    evaluate=evaluate,
    load_data=load_data,
    regularizer=functools.partial(half_squared_norm, strength=_L2),
    description={"network": "linear 64, 64 from zero", "l2": _L2},
)
