"""Logistic regression on one of scikit-learn's tables.

Command     python -m experiments dissect logistic
Time        about two minutes on two CPU cores
Result      docs/dissect.md

Data        569 tumours with 30 measurements each, "Breast Cancer Wisconsin
            (Diagnostic)", scaled to mean zero and variance one; 114 are for the test
L2          0.001: the classes can nearly be separated, and without a penalty weights
            grow for ever
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

from dissect_optax.dissection import Data, Settings
from experiments.problems.problem import (
    ExperimentProblem,
    half_squared_norm,
    loss_without_noise,
)

_L2 = 0.001


class Patients(NamedTuple):
    """Measurements `[examples, 30]`, and whether the tumour is benign."""

    features: jax.Array
    label: jax.Array


class Params(NamedTuple):
    """Weights `[30]` and bias of the linear predictor."""

    weights: jax.Array
    bias: jax.Array


def load_data(data_dir: Path | None) -> Data:
    """The fixed split; `data_dir` is ignored, the table comes with scikit-learn."""
    del data_dir
    features, labels = load_breast_cancer(return_X_y=True)
    split = train_test_split(
        features, labels, test_size=0.2, stratify=labels, random_state=0
    )
    training, test, training_labels, test_labels = split
    mean, std = training.mean(axis=0), training.std(axis=0)
    parts = ((training, training_labels), (test, test_labels))
    return Data(
        *(
            Patients(
                jnp.asarray((table - mean) / std, jnp.float32),
                jnp.asarray(found.astype(np.float32)),
            )
            for table, found in parts
        )
    )


def init(key: jax.Array) -> Params:
    """Small random weights."""
    return Params(0.1 * jax.random.normal(key, (30,)), jnp.zeros(()))


def evaluate(
    params: Params, patient: Patients
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Log loss of one example, and whether it is classified correctly."""
    score = patient.features @ params.weights + params.bias
    loss = jax.nn.softplus(score) - patient.label * score
    return loss, {"accuracy": (score > 0) == (patient.label > 0.5)}


PROBLEM = ExperimentProblem(
    name="logistic",
    title="Logistic regression",
    settings=Settings(steps=500, batch_size=16, evaluation_interval=25),
    smoke=Settings(steps=10, batch_size=8, evaluation_interval=5),
    init=init,
    loss=loss_without_noise(evaluate),
    evaluate=evaluate,
    load_data=load_data,
    regularizer=lambda params: half_squared_norm(params.weights, _L2),  # Not the bias.,
    description={"network": "linear 30, 1", "l2": _L2},
)
