"""CIFAR-10 with three convolutions and three dense layers (3c3d).

Section     §4 and §A; what the paper leaves out from DeepOBS 1.1.2's `cifar10_3c3d`
Command     python -m experiments reproduce cifar10
Time        on two CPU cores 0.27 s a step; the protocol wants an accelerator
Result      not run whole yet; 300 steps in experiments/results/cifar10_300_steps.json

Data        50 000 training and 10 000 test images of 32×32 pixels in red, green and
            blue, 10 classes, from TFDS; trained on random views, tested as they are
Parameters  895 210; Glorot's normal distribution, cut off at two standard deviations,
            in convolutions, his uniform one in dense layers; biases 0
Padding     none in the first two convolutions, zeros in the third, "SAME" in the pools
"""

import functools

import jax
from flax import nnx

from dissect_optax.dissection import Settings
from experiments.augmentation import random_view, standardize
from experiments.layers import convolve, max_pool
from experiments.problems.image_problem import image_problem
from experiments.tfds_sets import load_tfds


class Network(nnx.Module):
    """Three convolutions, each with a max-pool behind it, and three dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        convolution = functools.partial(
            nnx.Conv,
            kernel_init=nnx.initializers.glorot_normal(),
            conv_general_dilated=convolve,
            rngs=rngs,
        )
        dense = functools.partial(
            nnx.Linear, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs
        )
        self.convolution1 = convolution(3, 64, (5, 5), padding="VALID")
        self.convolution2 = convolution(64, 96, (3, 3), padding="VALID")
        self.convolution3 = convolution(96, 128, (3, 3))
        self.dense1 = dense(3 * 3 * 128, 512)
        self.dense2 = dense(512, 256)
        self.output = dense(256, 10)

    def __call__(
        self, inputs: jax.Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits `[..., 10]` of inputs `[..., 32, 32, 3]`."""
        del dropout_key  # No dropout here.
        # One batch axis all the way: XLA does not fuse over what adds and removes it.
        hidden = inputs.reshape(-1, *inputs.shape[-3:])
        for convolution in (self.convolution1, self.convolution2, self.convolution3):
            hidden = max_pool(nnx.relu(convolution(hidden)), 3, 2, "SAME")
        # Flat by row, column and channel.
        hidden = hidden.reshape(*inputs.shape[:-3], -1)
        hidden = nnx.relu(self.dense1(hidden))
        hidden = nnx.relu(self.dense2(hidden))
        return self.output(hidden)


PROBLEM = image_problem(
    name="cifar10",
    title="CIFAR-10",
    network_summary="conv 64, 96, 128 with max-pool; dense 512, 256, 10; ReLU",
    settings=Settings(steps=25_000, batch_size=256, evaluation_interval=500),
    smoke=Settings(steps=4, batch_size=8, evaluation_interval=2, examples=16),
    l2=0.002,
    load_data=functools.partial(load_tfds, "cifar10"),
    network=Network,
    test_input=standardize,
    augmented_input=random_view,
    published={
        "m_sgd": "84.5 ± 0.6 %",
        "adam": "84.8 ± 0.6 %",
        "m_ssd": "85.0 ± 0.4 %",
        "m_svag": "84.5 ± 0.8 %",
    },
)
