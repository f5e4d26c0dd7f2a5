"""The networks on which the gradient variance is measured, in plain JAX.

Each entry of `NETWORKS` makes parameters and a batch for `loss(params, example)`, the
cross-entropy of one example. The first three are the paper's networks without dropout
and L2; the others are a transformer block, an LSTM, and an embedding of 32 000 tokens
before a transformer block.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Params = Any
Example = tuple[jax.Array, jax.Array]


class Network(NamedTuple):
    """Parameters, a batch of examples and the loss of one of them."""

    loss: Callable[[Params, Example], jax.Array]
    params: Params
    batch: Example


def _weights(random: np.random.Generator, *shape: int) -> jax.Array:
    """Normal weights that keep the scale of what they multiply."""
    fan_in = int(np.prod(shape[:-1]))
    return jnp.asarray(random.normal(size=shape) / np.sqrt(fan_in), jnp.float32)


def _dense(random: np.random.Generator, *widths: int) -> list[Params]:
    """Weights and biases of dense layers."""
    return [
        {"w": _weights(random, n, m), "b": jnp.zeros(m)}
        for n, m in itertools.pairwise(widths)
    ]


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Softmax cross-entropy with one label."""
    return -jax.nn.log_softmax(logits)[label]


def _run_dense(layers: list[Params], x: jax.Array) -> jax.Array:
    """Dense layers with ReLU between them."""
    for layer in layers[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ layers[-1]["w"] + layers[-1]["b"]


def _convolve(
    x: jax.Array, layer: Params, stride: int = 1, padding: str = "SAME"
) -> jax.Array:
    """Convolution with bias of one image [height, width, channels], and ReLU."""
    y = jax.lax.conv_general_dilated(
        x[None],
        layer["w"],
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )[0]
    return jax.nn.relu(y + layer["b"][None, None])


def _pool(x: jax.Array) -> jax.Array:
    """Maximum over windows of 3×3 with stride 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (3, 3, 1), (2, 2, 1), "SAME")


def _images(random: np.random.Generator, batch: int, classes: int) -> Example:
    """Random images of the size of CIFAR's, with labels."""
    x = jnp.asarray(random.normal(size=(batch, 32, 32, 3)), jnp.float32)
    return x, jnp.asarray(random.integers(0, classes, batch))


def _mlp_loss(params: Params, example: Example) -> jax.Array:
    x, label = example
    return _cross_entropy(_run_dense(params, x), label)


def mnist_mlp(batch: int) -> Network:
    """784-1000-500-100-10, the paper's MNIST network."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, 784)), jnp.float32)
    y = jnp.asarray(random.integers(0, 10, batch))
    return Network(_mlp_loss, _dense(random, 784, 1000, 500, 100, 10), (x, y))


def _cifar10_loss(params: Params, example: Example) -> jax.Array:
    x, label = example
    for layer, padding in zip(params["conv"], ("VALID", "VALID", "SAME"), strict=True):
        x = _pool(_convolve(x, layer, padding=padding))
    return _cross_entropy(_run_dense(params["dense"], x.reshape(-1)), label)


def _kernels(
    random: np.random.Generator, shapes: Sequence[tuple[int, ...]]
) -> list[Params]:
    """Kernels and biases of convolutions."""
    return [{"w": _weights(random, *s), "b": jnp.zeros(s[-1])} for s in shapes]


def cifar10_3c3d(batch: int) -> Network:
    """Three convolutions and three dense layers, the paper's CIFAR-10 network."""
    random = np.random.default_rng(0)
    kernels = [(5, 5, 3, 64), (3, 3, 64, 96), (3, 3, 96, 128)]
    params = {
        "conv": _kernels(random, kernels),
        "dense": _dense(random, 1152, 512, 256, 10),
    }
    return Network(_cifar10_loss, params, _images(random, batch, 10))


def _cifar100_loss(params: Params, example: Example) -> jax.Array:
    x, label = example
    strides = (1, 1, 2, 1, 1, 2, 1, 1, 1)
    for i, (layer, stride) in enumerate(zip(params, strides, strict=True)):
        x = _convolve(x, layer, stride, "VALID" if i == 6 else "SAME")
    return _cross_entropy(x.mean((0, 1)), label)


def cifar100_allcnnc(batch: int) -> Network:
    """All-CNN-C, the paper's CIFAR-100 network."""
    random = np.random.default_rng(0)
    widths = (3, 96, 96, 96, 192, 192, 192, 192, 192, 100)
    sizes = (3, 3, 3, 3, 3, 3, 3, 1, 1)
    kernels = [
        (size, size, n, m)
        for size, n, m in zip(sizes, widths[:-1], widths[1:], strict=True)
    ]
    return Network(
        _cifar100_loss, _kernels(random, kernels), _images(random, batch, 100)
    )


def _block_params(random: np.random.Generator, width: int) -> Params:
    """A transformer block and a classifier."""
    return {
        "scale": [jnp.ones(width), jnp.ones(width)],
        "attention": [_weights(random, width, width) for _ in range(4)],
        "dense": _dense(random, width, 4 * width, width),
        "out": _dense(random, width, 10),
    }


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalization."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None]


def _block_loss(heads: int, params: Params, example: Example) -> jax.Array:
    """Attention, dense layers, mean over tokens."""
    x, label = example
    tokens, width = x.shape
    query, key, value, out = params["attention"]
    h = _normalized(x, params["scale"][0])
    q, k, v = ((h @ w).reshape(tokens, heads, -1) for w in (query, key, value))
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(width / heads)
    mixed = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v)
    x = x + mixed.reshape(tokens, width) @ out
    h = _normalized(x, params["scale"][1])
    first, second = params["dense"]
    x = x + jax.nn.gelu(h @ first["w"] + first["b"][None]) @ second["w"]
    x = x + second["b"][None]
    return _cross_entropy(_run_dense(params["out"], x.mean(0)), label)


def transformer_block(batch: int, tokens: int = 64, width: int = 256) -> Network:
    """One transformer block on vectors."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, tokens, width)), jnp.float32)
    y = jnp.asarray(random.integers(0, 10, batch))
    loss = functools.partial(_block_loss, 8)
    return Network(loss, _block_params(random, width), (x, y))


def _lstm_step(
    params: Params, state: tuple[jax.Array, jax.Array], x: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], None]:
    """One step of an LSTM."""
    h, c = state
    gates = x @ params["in"] + h @ params["state"] + params["b"]
    i, f, g, o = jnp.split(gates, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None


def _lstm_loss(params: Params, example: Example) -> jax.Array:
    x, label = example
    width = params["state"].shape[0]
    start = (jnp.zeros(width, x.dtype), jnp.zeros(width, x.dtype))
    (h, _), _ = jax.lax.scan(functools.partial(_lstm_step, params), start, x)
    return _cross_entropy(_run_dense(params["out"], h), label)


def lstm(batch: int, steps: int = 64, width: int = 256) -> Network:
    """An LSTM and a classifier of its last state."""
    random = np.random.default_rng(0)
    params = {
        "in": _weights(random, width, 4 * width),
        "state": _weights(random, width, 4 * width),
        "b": jnp.zeros(4 * width),
        "out": _dense(random, width, 10),
    }
    x = jnp.asarray(random.normal(size=(batch, steps, width)), jnp.float32)
    return Network(_lstm_loss, params, (x, jnp.asarray(random.integers(0, 10, batch))))


def _embedding_loss(params: Params, example: Example) -> jax.Array:
    tokens, label = example
    return _block_loss(8, params["block"], (params["table"][tokens], label))


def embedding(
    batch: int, vocabulary: int = 32_000, tokens: int = 64, width: int = 256
) -> Network:
    """An embedding table and a transformer block."""
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(vocabulary, width)), jnp.float32)
    x = jnp.asarray(random.integers(0, vocabulary, (batch, tokens)))
    y = jnp.asarray(random.integers(0, 10, batch))
    params = {"table": table, "block": _block_params(random, width)}
    return Network(_embedding_loss, params, (x, y))


NETWORKS: dict[str, Callable[[int], Network]] = {
    "mnist_mlp": mnist_mlp,
    "cifar10_3c3d": cifar10_3c3d,
    "cifar100_allcnnc": cifar100_allcnnc,
    "transformer_block": transformer_block,
    "lstm": lstm,
    "embedding": embedding,
}
