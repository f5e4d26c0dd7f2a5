"""MNIST with a dense network, the first column of the paper's Figure 3.

Section     §4 and §A; initial weights from DeepOBS 1.1.2's `mnist_mlp`
Command     python -m experiments reproduce mnist
Time        about 40 minutes on two CPU cores
Result      experiments/results/mnist.json, shown in docs/results.md

Data        60 000 training and 10 000 test images of 28×28 grey levels, from TFDS
L2          The paper does not say how strong. Without L2 this network reaches 98 %, so
            the paper's 92 % says that it was strong; momentum SGD at 0.03 ends at 96.4,
            92.0 and 86.7 % with λ = 0.005, 0.02 and 0.05. Hence 0.02.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dissect_optax.dissection import Settings
from experiments.problems.image_problem import image_problem
from experiments.tfds_sets import load_tfds


class Network(nnx.Module):
    """Three hidden layers of rectified units."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        layer = functools.partial(
            nnx.Linear,
            kernel_init=nnx.initializers.truncated_normal(stddev=0.03),
            rngs=rngs,
        )
        self.hidden1 = layer(28 * 28, 1000)
        self.hidden2 = layer(1000, 500)
        self.hidden3 = layer(500, 100)
        self.output = layer(100, 10)

    def __call__(
        self, inputs: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[..., 10]` of inputs `[..., 784]`."""
        del dropout_key  # No dropout here.
        hidden = nnx.relu(self.hidden1(inputs))
        hidden = nnx.relu(self.hidden2(hidden))
        hidden = nnx.relu(self.hidden3(hidden))
        return self.output(hidden)


def test_input(image: jax.Array) -> jax.Array:
    """Pixels in a row, scaled from 0..255 to 0..1."""
    return image.reshape(-1).astype(jnp.float32) / 255


PROBLEM = image_problem(
    name="mnist",
    title="MNIST",
    network_summary="dense 1000, 500, 100, 10; ReLU",
    settings=Settings(steps=4000, batch_size=128, evaluation_interval=200),
    smoke=Settings(steps=4, batch_size=8, evaluation_interval=2, examples=16),
    l2=0.02,
    load_data=functools.partial(load_tfds, "mnist"),
    network=Network,
    test_input=test_input,
    published={
        "m_sgd": "92.0 ± 0.2 %",
        "adam": "91.8 ± 0.3 %",
        "m_ssd": "92.0 ± 0.2 %",
        "m_svag": "91.6 ± 0.4 %",
    },
)
