"""CIFAR-100 with nine convolutions and nothing else (All-CNN-C).

Section     §4 and §A; what the paper leaves out from DeepOBS 1.1.2's `cifar100_allcnnc`
Command     python -m experiments reproduce cifar100
Time        on two CPU cores 3.5 s a step; the protocol wants an accelerator
Result      not run whole yet; 200 steps in experiments/results/cifar100_200_steps.json

Data        50 000 training and 10 000 test images of 32×32 pixels in red, green and
            blue, 100 classes, from TFDS; trained on random views, tested as they are
Parameters  1 387 108; Glorot's normal distribution, cut off at two standard
            deviations; biases 0.1
Padding     zeros, but none in the seventh convolution
Dropout     one in five of the inputs, one half before the fourth and the seventh
            convolution; what is kept is scaled by 1/0.8 and 1/0.5
Output      a ReLU follows every convolution, the last one too: logits are averages of
            numbers that are not negative
Step size   divided by ten after 40 000 steps, and again after 50 000
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dissect_optax.dissection import Settings
from experiments.augmentation import random_view, standardize
from experiments.layers import convolve
from experiments.problems.image_problem import image_problem
from experiments.tfds_sets import load_tfds


class Network(nnx.Module):
    """Nine convolutions, and an average over what is left of the image."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        convolution = functools.partial(
            nnx.Conv,
            kernel_init=nnx.initializers.glorot_normal(),
            bias_init=nnx.initializers.constant(0.1),
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        self.dropout1 = nnx.Dropout(0.2)
        self.convolution1 = convolution(3, 96, (3, 3))
        self.convolution2 = convolution(96, 96, (3, 3))
        self.convolution3 = convolution(96, 96, (3, 3), strides=2)
        self.dropout2 = nnx.Dropout(0.5)
        self.convolution4 = convolution(96, 192, (3, 3))
        self.convolution5 = convolution(192, 192, (3, 3))
        self.convolution6 = convolution(192, 192, (3, 3), strides=2)
        self.dropout3 = nnx.Dropout(0.5)
        self.convolution7 = convolution(192, 192, (3, 3), padding="VALID")
        self.convolution8 = convolution(192, 192, (1, 1))
        self.convolution9 = convolution(192, 100, (1, 1))

    def __call__(
        self, inputs: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[..., 100]` of inputs `[..., 32, 32, 3]`."""
        off = dropout_key is None
        keys = [None] * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        # One batch axis all the way: XLA does not fuse over what adds and removes it.
        hidden = inputs.reshape(-1, *inputs.shape[-3:])
        hidden = self.dropout1(hidden, deterministic=off, rngs=keys[0])
        for convolution in (self.convolution1, self.convolution2, self.convolution3):
            hidden = nnx.relu(convolution(hidden))
        hidden = self.dropout2(hidden, deterministic=off, rngs=keys[1])
        for convolution in (self.convolution4, self.convolution5, self.convolution6):
            hidden = nnx.relu(convolution(hidden))
        hidden = self.dropout3(hidden, deterministic=off, rngs=keys[2])
        for convolution in (self.convolution7, self.convolution8, self.convolution9):
            hidden = nnx.relu(convolution(hidden))
        return jnp.mean(hidden, axis=(-3, -2)).reshape(*inputs.shape[:-3], -1)


def schedule(learning_rate: jax.typing.ArrayLike) -> optax.Schedule:
    """The tuned step size, a tenth of it, and a hundredth."""
    return optax.piecewise_constant_schedule(learning_rate, {40_000: 0.1, 50_000: 0.1})


PROBLEM = image_problem(
    name="cifar100",
    title="CIFAR-100",
    network_summary=(
        "All-CNN-C: conv 96, 96, 96/2, 192, 192, 192/2, 192, 192, 100; ReLU; mean"
    ),
    settings=Settings(steps=60_000, batch_size=256, evaluation_interval=1000),
    smoke=Settings(steps=4, batch_size=4, evaluation_interval=2, examples=8),
    l2=0.0005,
    load_data=functools.partial(load_tfds, "cifar100"),
    network=Network,
    test_input=standardize,
    augmented_input=random_view,
    schedule=schedule,
    published={
        "m_sgd": "67.8 ± 0.3 %",
        "adam": "58.3 ± 1.3 %",
        "m_ssd": "51.4 ± 4.9 %",
        "m_svag": "67.7 ± 0.2 %",
    },
)
