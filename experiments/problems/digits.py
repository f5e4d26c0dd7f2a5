"""Scikit-learn's handwritten digits with a small dense network; needs no download.

Section     §4 and §A in miniature; the data set is ours, not the paper's
Command     python -m experiments        (the same as: ... reproduce digits)
Time        under two minutes on two CPU cores, compilation included
Result      experiments/results/digits.json, shown in docs/results.md

Data        1 797 grey images of 8×8 pixels with 17 levels, 10 classes; the copy of
            UCI's "Optical Recognition of Handwritten Digits" that scikit-learn ships
Split       500 test images, 1 297 training images, stratified by class:
            train_test_split(test_size=500, stratify=labels, random_state=0)
Settings    1 000 steps of 16 images are 12 passes over the training set (the paper's
            MNIST has 8.5); the small batch makes gradients noisy on so easy a set
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dissect_optax.dissection import Data, Settings
from experiments.problems.image_problem import Examples, image_problem


def load_data(data_dir: Path | None) -> Data:
    """The fixed split; `data_dir` is ignored, the images come with scikit-learn."""
    del data_dir
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        images.astype(np.uint8),
        labels.astype(np.int32),
        test_size=500,
        stratify=labels,
        random_state=0,
    )
    training_images, test_images, training_labels, test_labels = map(jnp.asarray, split)
    return Data(
        training=Examples(training_images, training_labels),
        test=Examples(test_images, test_labels),
    )


class Network(nnx.Module):
    """Two hidden layers of rectified units."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden1 = nnx.Linear(64, 100, rngs=rngs)
        self.hidden2 = nnx.Linear(100, 50, rngs=rngs)
        self.output = nnx.Linear(50, 10, rngs=rngs)

    def __call__(
        self, inputs: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[..., 10]` of inputs `[..., 64]`."""
        del dropout_key  # No dropout here.
        hidden = nnx.relu(self.hidden1(inputs))
        hidden = nnx.relu(self.hidden2(hidden))
        return self.output(hidden)


def test_input(image: jax.Array) -> jax.Array:
    """Pixels scaled from 0..16 to 0..1."""
    return image.astype(jnp.float32) / 16


PROBLEM = image_problem(
    name="digits",
    title="Digits",
    network_summary="dense 100, 50, 10; ReLU",
    settings=Settings(steps=1000, batch_size=16, evaluation_interval=20),
    smoke=Settings(steps=20, batch_size=8, evaluation_interval=10),
    l2=0.002,
    load_data=load_data,
    network=Network,
    test_input=test_input,
)
