"""Losses that a gradient variance must take at a bounded cost, in plain JAX.

Each entry of `CASES` makes the loss of one example with parameters and a batch, at the
size that is measured or at a small one, and carries its limits: time over the time of
the plain gradient, and temporary memory in copies of an array that the case names. In
most of them the small factors of the gradient exist, and one step that does not depend
on the example comes after them: a constant mask, complex to real, a sum over a
broadcast axis, a reparametrization. The others test loops over layers and tables.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import networks

Params = Any


class Problem(NamedTuple):
    """Parameters, a batch of examples and the loss of one of them."""

    loss: Callable[..., jax.Array]
    """`loss(params, example, *shared)`."""
    params: Params
    batch: Any
    copy: Any
    """Arrays that count as one copy where memory is limited in copies."""
    shared: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss with what its variance may cost."""

    group: str
    """What the cases of one limit have in common."""
    make: Callable[..., Problem]
    """Function of sizes as keywords; their defaults are those that are measured."""
    small: Mapping[str, int]
    """Sizes at which all per-example gradients are cheap."""
    time_limit: float
    """Largest time over that of the plain gradient."""
    copy_limit: float
    """Largest memory beyond 1.5 times the plain gradient's, in copies."""


def _normal(random: np.random.Generator, *shape: int) -> jax.Array:
    """Standard normal numbers."""
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def _weights(random: np.random.Generator, *shape: int) -> jax.Array:
    """Normal weights [..., fan-in, fan-out] that keep the scale of their input."""
    return _normal(random, *shape) / float(np.sqrt(shape[-2]))


def _indices(random: np.random.Generator, bound: int, *shape: int) -> jax.Array:
    """Uniform integers from zero to `bound`."""
    return jnp.asarray(random.integers(0, bound, shape))


def _vectors(random: np.random.Generator, batch: int, width: int) -> Any:
    """Inputs and targets of a regression."""
    return _normal(random, batch, width), _normal(random, batch, width)


def _squared_error(y: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error of a bounded output."""
    return jnp.square(jnp.tanh(y) - target).mean()


# ---- Steps after the product: constant masks, complex numbers, low rank ------------


def _lora_loss(params: Params, example: Any, frozen: jax.Array) -> jax.Array:
    x, target = example
    return _squared_error(x @ (frozen + params["a"] @ params["b"]), target)


def lora_merged(batch: int = 128, width: int = 768, rank: int = 8) -> Problem:
    """A low-rank update that is added to the frozen weight before the product."""
    random = np.random.default_rng(0)
    frozen = _weights(random, width, width)
    params = {"a": _weights(random, width, rank), "b": _weights(random, rank, width)}
    examples = _vectors(random, batch, width)
    return Problem(_lora_loss, params, examples, frozen, (frozen,))


def _masked_loss(params: Params, example: Any, mask: jax.Array) -> jax.Array:
    x, target = example
    return _squared_error(x @ jnp.where(mask, params, 0), target)


def masked_where(batch: int = 128, width: int = 768) -> Problem:
    """A weight of which a constant mask takes a half."""
    random = np.random.default_rng(0)
    mask = jnp.asarray(random.random((width, width)) < 0.5)
    w = _weights(random, width, width)
    return Problem(_masked_loss, w, _vectors(random, batch, width), w, (mask,))


def _triangular_loss(params: Params, example: Any) -> jax.Array:
    x, target = example
    return _squared_error(x @ jnp.tril(params), target)


def masked_tril(batch: int = 128, width: int = 768) -> Problem:
    """The lower triangle of a weight."""
    random = np.random.default_rng(0)
    w = _weights(random, width, width)
    return Problem(_triangular_loss, w, _vectors(random, batch, width), w)


def _complex_loss(params: Params, example: Any) -> jax.Array:
    y = (example[0] + 1j * example[1]) @ (params["re"] + 1j * params["im"])
    return jnp.log1p(jnp.square(y.real) + jnp.square(y.imag)).mean()


def complex_from_real(batch: int = 128, width: int = 512) -> Problem:
    """A complex weight from two real ones.

    The two together are a copy.
    """
    random = np.random.default_rng(0)
    w = {"re": _weights(random, width, width), "im": _weights(random, width, width)}
    return Problem(_complex_loss, w, _vectors(random, batch, width), w)


def _fno_loss(params: Params, example: Any) -> jax.Array:
    x, target = example
    weight = params["re"] + 1j * params["im"]
    modes = weight.shape[0]
    # Every frequency has a matrix of its own; high ones are dropped.
    y = jnp.einsum("ki,kio->ko", jnp.fft.rfft(x, axis=0)[:modes], weight)
    y = jnp.fft.irfft(y, n=x.shape[0], axis=0) + x @ params["skip"]
    return _squared_error(y, target)


def fno_layer(
    batch: int = 64, grid: int = 64, width: int = 64, modes: int = 32
) -> Problem:
    """A layer of a Fourier neural operator.

    Its spectral weights are a copy.
    """
    random = np.random.default_rng(0)
    spectral = {
        "re": _weights(random, modes, width, width),
        "im": _weights(random, modes, width, width),
    }
    params = spectral | {"skip": _weights(random, width, width)}
    examples = _normal(random, batch, grid, width), _normal(random, batch, grid, width)
    return Problem(_fno_loss, params, examples, spectral)


def _symmetric_loss(params: Params, example: Any) -> jax.Array:
    x, target = example
    return _squared_error(x @ (params + params.T), target)


def symmetric(batch: int = 128, width: int = 768) -> Problem:
    """A symmetric weight, w + wᵀ."""
    random = np.random.default_rng(0)
    w = _weights(random, width, width)
    return Problem(_symmetric_loss, w, _vectors(random, batch, width), w)


def _row_norm_loss(params: Params, example: Any) -> jax.Array:
    x, target = example
    v = params["v"]
    norm = jax.vmap(functools.partial(jnp.linalg.norm, keepdims=True))(v)
    return _squared_error((v * params["g"] / norm) @ x, target)


def weight_norm_rows(batch: int = 128, width: int = 512) -> Problem:
    """Weight normalization as in Equinox: v·g/‖v‖ for each row, one per output."""
    random = np.random.default_rng(0)
    v = _weights(random, width, width)
    params = {"v": v, "g": jnp.linalg.norm(v, axis=1, keepdims=True)}
    return Problem(_row_norm_loss, params, _vectors(random, batch, width), v)


def _column_norm_loss(params: Params, example: Any) -> jax.Array:
    x, target = example
    kernel = params["kernel"]
    squares = (kernel * kernel).sum(axis=0, keepdims=True)
    normalized = kernel * jax.lax.rsqrt(squares + 1e-12)
    return _squared_error(x @ (normalized * params["scale"].reshape(1, -1)), target)


def weight_norm_columns(batch: int = 128, width: int = 512) -> Problem:
    """Weight normalization as in NNX: by a reciprocal root, for each column."""
    random = np.random.default_rng(0)
    kernel = _weights(random, width, width)
    params = {"kernel": kernel, "scale": jnp.ones(width)}
    examples = _vectors(random, batch, width)
    return Problem(_column_norm_loss, params, examples, kernel)


# ---- Tables ------------------------------------------------------------------------


def _bigram_loss(params: Params, example: Any) -> jax.Array:
    tokens, target = example
    return jnp.square(params[tokens[:-1], tokens[1:]].sum() - target)


def bigram(batch: int = 64, vocabulary: int = 1000, tokens: int = 2) -> Problem:
    """One number for each pair of successive tokens."""
    random = np.random.default_rng(0)
    table = _normal(random, vocabulary, vocabulary)
    examples = _indices(random, vocabulary, batch, tokens), _normal(random, batch)
    return Problem(_bigram_loss, table, examples, table)


def _table(random: np.random.Generator, vocabulary: int, width: int) -> jax.Array:
    """An embedding of tokens."""
    return _normal(random, vocabulary, width) / float(np.sqrt(width))


def _two_tower_loss(params: Params, example: Any) -> jax.Array:
    history, item, label = example
    score = params[history].mean(0) @ params[item]
    return jax.nn.softplus(-label * score)


def two_tower(
    batch: int = 256, vocabulary: int = 20_000, width: int = 128, history: int = 10
) -> Problem:
    """The items that a user has seen, and one more, in one table."""
    random = np.random.default_rng(0)
    table = _table(random, vocabulary, width)
    examples = (
        _indices(random, vocabulary, batch, history),
        _indices(random, vocabulary, batch),
        jnp.sign(_normal(random, batch)),
    )
    return Problem(_two_tower_loss, table, examples, table)


def _word2vec_loss(params: Params, example: Any) -> jax.Array:
    center, context, negatives = example
    h = params[center]
    positive = jax.nn.softplus(-h @ params[context])
    return positive + jax.nn.softplus(params[negatives] @ h).sum()


def word2vec(
    batch: int = 256, vocabulary: int = 20_000, width: int = 128, negatives: int = 5
) -> Problem:
    """Skip-grams with negative samples, all from one table."""
    random = np.random.default_rng(0)
    table = _table(random, vocabulary, width)
    examples = (
        _indices(random, vocabulary, batch),
        _indices(random, vocabulary, batch),
        _indices(random, vocabulary, batch, negatives),
    )
    return Problem(_word2vec_loss, table, examples, table)


def _siamese_table_loss(params: Params, example: Any) -> jax.Array:
    left, right, label = example
    distance = jnp.square(params[left] - params[right]).sum()
    return jax.nn.softplus(label * (distance - 1))


def siamese_embedding(
    batch: int = 256, vocabulary: int = 20_000, width: int = 128
) -> Problem:
    """The distance of two rows of a table."""
    random = np.random.default_rng(0)
    table = _table(random, vocabulary, width)
    examples = (
        _indices(random, vocabulary, batch),
        _indices(random, vocabulary, batch),
        jnp.sign(_normal(random, batch)),
    )
    return Problem(_siamese_table_loss, table, examples, table)


def _cbow_loss(params: Params, example: Any) -> jax.Array:
    context, word = example
    return -jax.nn.log_softmax(params @ params[context].mean(0))[word]


def cbow(
    batch: int = 64, vocabulary: int = 20_000, width: int = 128, window: int = 4
) -> Problem:
    """A word from the words around it; embedding and output layer are one table."""
    random = np.random.default_rng(0)
    table = _table(random, vocabulary, width)
    examples = (
        _indices(random, vocabulary, batch, window),
        _indices(random, vocabulary, batch),
    )
    return Problem(_cbow_loss, table, examples, table)


def _task_loss(params: Params, example: Any) -> jax.Array:
    x, task, target = example
    h = jnp.tanh(x @ params["trunk"])
    return _squared_error(h @ params["heads"][task], target)


def task_heads(
    batch: int = 64, tasks: int = 50, width: int = 256, outputs: int = 64
) -> Problem:
    """A head for each task, all in one array; the task is part of the example."""
    random = np.random.default_rng(0)
    heads = _weights(random, tasks, width, outputs)
    params = {"trunk": _weights(random, width, width), "heads": heads}
    examples = (
        _normal(random, batch, width),
        _indices(random, tasks, batch),
        _normal(random, batch, outputs),
    )
    return Problem(_task_loss, params, examples, heads)


# ---- Loops over layers -------------------------------------------------------------


def _layers(
    loss: Callable[..., jax.Array], batch: int, layers: int, width: int
) -> Problem:
    """Layers of one shape in one array, on single vectors."""
    random = np.random.default_rng(0)
    w = _weights(random, layers, width, width)
    return Problem(loss, w, _vectors(random, batch, width), w)


def _scan_scaled_loss(params: Params, example: Any) -> jax.Array:
    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ (w * 0.5)), None

    x, target = example
    return _squared_error(jax.lax.scan(layer, x, params)[0], target)


def scan_scaled(batch: int = 64, layers: int = 8, width: int = 256) -> Problem:
    """Weights that are multiplied by a constant in a scan over layers."""
    return _layers(_scan_scaled_loss, batch, layers, width)


def _scan_split_loss(params: Params, example: Any) -> jax.Array:
    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        left, right = jnp.split(w, 2, axis=1)
        return jnp.concatenate([jnp.tanh(h @ left), jnp.sin(h @ right)]), None

    x, target = example
    return _squared_error(jax.lax.scan(layer, x, params)[0], target)


def scan_split(batch: int = 64, layers: int = 8, width: int = 256) -> Problem:
    """Weights that are split in a scan over layers."""
    return _layers(_scan_split_loss, batch, layers, width)


def _tanh_layer(h: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(h @ w)


def _sin_layer(h: jax.Array, w: jax.Array) -> jax.Array:
    return h + jnp.sin(h @ w)


def _scan_cond_loss(params: Params, example: Any) -> jax.Array:
    def layer(h: jax.Array, numbered: Any) -> tuple[jax.Array, None]:
        number, w = numbered
        return jax.lax.cond(number % 2 == 0, _tanh_layer, _sin_layer, h, w), None

    x, target = example
    numbers = jnp.arange(params.shape[0])
    return _squared_error(jax.lax.scan(layer, x, (numbers, params))[0], target)


def scan_cond(batch: int = 64, layers: int = 8, width: int = 256) -> Problem:
    """Two kinds of layers, by number, in a scan."""
    return _layers(_scan_cond_loss, batch, layers, width)


def _scan_indexed_loss(params: Params, example: Any) -> jax.Array:
    def layer(h: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(h @ params[number]), None

    x, target = example
    numbers = jnp.arange(params.shape[0])
    return _squared_error(jax.lax.scan(layer, x, numbers)[0], target)


def scan_indexed(batch: int = 64, layers: int = 8, width: int = 256) -> Problem:
    """Weights that the body of a scan takes by their number."""
    return _layers(_scan_indexed_loss, batch, layers, width)


def _fori_indexed_loss(params: Params, example: Any) -> jax.Array:
    def layer(number: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.tanh(h @ params[number])

    x, target = example
    return _squared_error(jax.lax.fori_loop(0, params.shape[0], layer, x), target)


def fori_indexed(batch: int = 64, layers: int = 8, width: int = 256) -> Problem:
    """Weights that the body of a `fori_loop` takes by their number."""
    return _layers(_fori_indexed_loss, batch, layers, width)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of one image [height, width, channels]."""
    return jax.lax.conv_general_dilated(
        x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


def _scan_convolution_loss(params: Params, example: Any) -> jax.Array:
    def layer(h: jax.Array, kernel: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(_convolve(h, kernel)), None

    x, target = example
    return _squared_error(jax.lax.scan(layer, x, params)[0], target)


def scan_convolution(
    batch: int = 64, layers: int = 8, channels: int = 32, size: int = 8
) -> Problem:
    """Convolutions in a scan over layers."""
    random = np.random.default_rng(0)
    kernels = _weights(random, layers, 3, 3, channels, channels) / 3
    shape = batch, size, size, channels
    examples = _normal(random, *shape), _normal(random, *shape)
    return Problem(_scan_convolution_loss, kernels, examples, kernels)


def _cond_per_layer_loss(params: Params, example: Any) -> jax.Array:
    x, kept, target = example
    for number, w in enumerate(params):
        x = jax.lax.cond(kept[number], _sin_layer, _skip_layer, x, w)
    return _squared_error(x, target)


def _skip_layer(h: jax.Array, w: jax.Array) -> jax.Array:
    return h


def cond_per_layer(batch: int = 64, layers: int = 8, width: int = 256) -> Problem:
    """Stochastic depth: every example says which layers it goes through."""
    random = np.random.default_rng(0)
    params = [_weights(random, width, width) for _ in range(layers)]
    x, target = _vectors(random, batch, width)
    kept = jnp.asarray(random.random((batch, layers)) < 0.7)
    return Problem(_cond_per_layer_loss, params, (x, kept, target), params)


def _conv_lstm_loss(params: Params, example: Any) -> jax.Array:
    def step(state: Any, x: jax.Array) -> tuple[Any, None]:
        h, c = state
        gates = _convolve(jnp.concatenate([x, h], -1), params["kernel"])
        i, f, g, o = jnp.split(gates + params["bias"][None, None], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    frames, target = example
    start = jnp.zeros(target.shape, target.dtype)
    (h, _), _ = jax.lax.scan(step, (start, start), frames)
    return _squared_error(h, target)


def conv_lstm(
    batch: int = 16, steps: int = 8, size: int = 8, channels: int = 64
) -> Problem:
    """An LSTM whose gates are convolutions, over time."""
    random = np.random.default_rng(0)
    kernel = _weights(random, 3, 3, 2 * channels, 4 * channels) / 3
    params = {"kernel": kernel, "bias": jnp.zeros(4 * channels)}
    shape = size, size, channels
    examples = _normal(random, batch, steps, *shape), _normal(random, batch, *shape)
    return Problem(_conv_lstm_loss, params, examples, kernel)


def _normalized(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Root-mean-square normalization."""
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale[None]


def _decoder_layer(heads: int, x: jax.Array, w: Params) -> tuple[jax.Array, None]:
    """Causal attention and two dense layers."""
    tokens, width = x.shape
    qkv = _normalized(x, w["scale"][0]) @ w["qkv"]
    q, k, v = jnp.moveaxis(qkv.reshape(tokens, 3, heads, -1), 1, 0)
    scores = jnp.einsum("qhd,khd->hqk", q, k) / np.sqrt(width / heads)
    causal = jnp.tril(jnp.ones((1, tokens, tokens), bool))
    shares = jax.nn.softmax(jnp.where(causal, scores, -1e9))
    mixed = jnp.einsum("hqk,khd->qhd", shares, v)
    x = x + mixed.reshape(tokens, width) @ w["out"]
    h = jax.nn.gelu(_normalized(x, w["scale"][1]) @ w["up"])
    return x + h @ w["down"], None


def _decoder_loss(heads: int, params: Params, tokens: jax.Array) -> jax.Array:
    layer = jax.checkpoint(functools.partial(_decoder_layer, heads))
    x = params["table"][tokens[:-1]]
    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = jax.nn.log_softmax(x @ params["head"])
    return -jnp.take_along_axis(logits, tokens[1:, None], -1).mean()


def decoder(
    batch: int = 16,
    layers: int = 16,
    tokens: int = 128,
    width: int = 256,
    heads: int = 8,
    vocabulary: int = 1000,
) -> Problem:
    """A language model with `remat` in a scan over its layers.

    Their weights are a copy.
    """
    random = np.random.default_rng(0)
    stack = {
        "scale": jnp.ones((layers, 2, width)),
        "qkv": _weights(random, layers, width, 3 * width),
        "out": _weights(random, layers, width, width),
        "up": _weights(random, layers, width, 4 * width),
        "down": _weights(random, layers, 4 * width, width),
    }
    params = {
        "table": _normal(random, vocabulary, width),
        "layers": stack,
        "head": _weights(random, width, vocabulary),
    }
    loss = functools.partial(_decoder_loss, heads)
    return Problem(loss, params, _indices(random, vocabulary, batch, tokens + 1), stack)


# ---- Several uses of one network ---------------------------------------------------


def _embed(params: Params, x: jax.Array) -> jax.Array:
    """Two dense layers on one vector."""
    return jnp.tanh(x @ params[0]) @ params[1]


def _siamese_mlp_loss(params: Params, example: Any) -> jax.Array:
    left, right, label = example
    distance = jnp.square(_embed(params, left) - _embed(params, right)).mean()
    return jax.nn.softplus(label * (distance - 1))


def siamese_mlp(batch: int = 128, width: int = 768) -> Problem:
    """One network on two vectors."""
    random = np.random.default_rng(0)
    params = [_weights(random, width, width) for _ in range(2)]
    label = jnp.sign(_normal(random, batch))
    examples = (*_vectors(random, batch, width), label)
    return Problem(_siamese_mlp_loss, params, examples, params)


def _triplet_loss(params: Params, example: Any) -> jax.Array:
    anchor, same, other = (_embed(params, x) for x in example)
    near, far = (jnp.square(anchor - x).mean() for x in (same, other))
    return jax.nn.softplus(near - far)


def triplet_mlp(batch: int = 128, width: int = 768) -> Problem:
    """One network on three vectors."""
    random = np.random.default_rng(0)
    params = [_weights(random, width, width) for _ in range(2)]
    examples = (*_vectors(random, batch, width), _normal(random, batch, width))
    return Problem(_triplet_loss, params, examples, params)


# ---- The networks that users have --------------------------------------------------


def _network(name: str, batch: int) -> Problem:
    """One of `benchmarks.networks`; all parameters are a copy."""
    network = networks.NETWORKS[name](batch)
    return Problem(network.loss, network.params, network.batch, network.params)


def _network_case(name: str, batch: int, time_limit: float) -> Case:
    """A network whose variance costs about a gradient; memory as plain times 1.5."""
    make = functools.partial(_network, name, batch=batch)
    return Case("networks", make, {"batch": 3}, time_limit, 0)


_WIDTH = {"batch": 5, "width": 6}
_TABLE = {"batch": 5, "vocabulary": 11, "width": 4}
_LAYERS = {"batch": 5, "layers": 3, "width": 6}
_NORM = "weight norm"
_LOOP = "step on weights in a loop over layers"
_TWICE = "one table looked up twice"
_USES = "several uses on single vectors"
_ONE_OF_MANY = "one of many weights"

CASES: dict[str, Case] = {
    "lora_merged": Case("LoRA", lora_merged, {**_WIDTH, "rank": 2}, 2, 4),
    "masked_where": Case("constant mask", masked_where, _WIDTH, 2.5, 2),
    "masked_tril": Case("constant mask", masked_tril, _WIDTH, 2.5, 2),
    "complex_from_real": Case("complex from real", complex_from_real, _WIDTH, 3, 3),
    "fno_layer": Case(
        "complex from real",
        fno_layer,
        {"batch": 5, "grid": 12, "width": 4, "modes": 3},
        3,
        3,
    ),
    "bigram": Case("number of a table", bigram, {"batch": 5, "vocabulary": 7}, 4, 2),
    "bigram_sequence": Case(
        "number of a table",
        functools.partial(bigram, tokens=17),
        {"batch": 5, "vocabulary": 7},
        4,
        2,
    ),
    "two_tower": Case(_TWICE, two_tower, {**_TABLE, "history": 3}, 4, 2),
    "word2vec": Case(_TWICE, word2vec, {**_TABLE, "negatives": 3}, 4, 2),
    "siamese_embedding": Case(_TWICE, siamese_embedding, _TABLE, 4, 2),
    "cbow": Case("tied embedding, few tokens", cbow, {**_TABLE, "window": 3}, 3, 2),
    "weight_norm_rows_256": Case(
        _NORM, functools.partial(weight_norm_rows, width=256), _WIDTH, 3, 4
    ),
    "weight_norm_rows_512": Case(_NORM, weight_norm_rows, _WIDTH, 3, 4),
    "weight_norm_columns_256": Case(
        _NORM, functools.partial(weight_norm_columns, width=256), _WIDTH, 3, 4
    ),
    "weight_norm_columns_512": Case(_NORM, weight_norm_columns, _WIDTH, 3, 4),
    "scan_scaled": Case(_LOOP, scan_scaled, _LAYERS, 2, 2),
    "scan_convolution": Case(
        _LOOP,
        scan_convolution,
        {"batch": 4, "layers": 2, "channels": 3, "size": 4},
        2,
        2,
    ),
    "scan_split": Case(_LOOP, scan_split, _LAYERS, 2, 2),
    "scan_cond": Case(_LOOP, scan_cond, _LAYERS, 2, 2),
    "scan_indexed": Case(_LOOP, scan_indexed, _LAYERS, 2, 2),
    "fori_indexed": Case(_LOOP, fori_indexed, _LAYERS, 2, 2),
    "siamese_mlp": Case(_USES, siamese_mlp, _WIDTH, 2.5, 2),
    "triplet_mlp": Case(_USES, triplet_mlp, _WIDTH, 2.5, 2),
    "symmetric": Case(_USES, symmetric, _WIDTH, 2.5, 2),
    "decoder": Case(
        "remat in a scan over layers",
        decoder,
        {"batch": 4, "layers": 3, "tokens": 5, "width": 8, "heads": 2, "vocabulary": 7},
        1.2,
        1,
    ),
    "conv_lstm": Case(
        _ONE_OF_MANY,
        conv_lstm,
        {"batch": 4, "steps": 3, "size": 4, "channels": 2},
        2,
        2,
    ),
    "task_heads": Case(
        _ONE_OF_MANY,
        task_heads,
        {"batch": 6, "tasks": 3, "width": 5, "outputs": 2},
        2,
        2,
    ),
    "cond_per_layer": Case(_ONE_OF_MANY, cond_per_layer, _LAYERS, 2, 2),
    # Their limits are the slowest of three runs on 2026-11-23.
    "mnist_mlp": _network_case("mnist_mlp", 128, 1.69),
    "cifar10_3c3d": _network_case("cifar10_3c3d", 256, 0.91),
    "cifar100_allcnnc_16": _network_case("cifar100_allcnnc", 16, 1.01),
    "cifar100_allcnnc_32": _network_case("cifar100_allcnnc", 32, 0.96),
    "transformer_block": _network_case("transformer_block", 32, 1.01),
    "lstm": _network_case("lstm", 32, 1.28),
    "embedding": _network_case("embedding", 32, 1.12),
}
