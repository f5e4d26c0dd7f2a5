"""The problems' networks: size, initial weights, what they compute, and schedules."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from dissect_optax import explain_variance, value_grad_and_variance
from experiments.problems import get_problem
from tests.gradient_variance.oracle import relative_error, variance_of_mean

PARAMETERS = {
    "digits": 12_060,
    "mnist": 1_336_610,
    "cifar10": 895_210,
    "cifar100": 1_387_108,
}
CLASSES = {"digits": 10, "mnist": 10, "cifar10": 10, "cifar100": 100}
STORED_SHAPE = {"digits": (64,), "mnist": (28, 28, 1)}
CIFARS = ("cifar10", "cifar100")
DENSE = ("dense1", "dense2", "output")
LAYERS = {
    "mnist": ("hidden1", "hidden2", "hidden3", "output"),
    "cifar10": ("convolution1", "convolution2", "convolution3", *DENSE),
    "cifar100": tuple(f"convolution{i}" for i in range(1, 10)),
}


@functools.cache
def parameters(name):
    """Freshly initialised."""
    network = get_problem(name).network
    return jax.jit(lambda: nnx.state(network(nnx.Rngs(0)), nnx.Param))()


def logits(name, params, inputs, dropout_key=None):
    network = nnx.eval_shape(lambda: get_problem(name).network(nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(network), params)(inputs, dropout_key)


def kernels_and_biases(name, params):
    """Layer by layer, in float64."""
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return [
        tuple(
            next(v for k, v in leaves.items() if f"'{layer}'" in k and kind in k)
            for kind in ("kernel", "bias")
        )
        for layer in LAYERS[name]
    ]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters_and_shape_of_logits(name):
    problem = get_problem(name)
    network = nnx.eval_shape(lambda: problem.network(nnx.Rngs(0)))
    _, params, others = nnx.split(network, nnx.Param, ...)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    assert not jax.tree.leaves(others)
    stored = jax.ShapeDtypeStruct(STORED_SHAPE.get(name, (32, 32, 3)), jnp.uint8)
    one = jax.eval_shape(problem.test_input, stored)
    for batch in ((), (5,)):
        inputs = jax.ShapeDtypeStruct((*batch, *one.shape), one.dtype)
        result = jax.eval_shape(functools.partial(logits, name), params, inputs)
        assert result.shape == (*batch, CLASSES[name])


# ---- Initial weights --------------------------------------------------------------


def initial_distribution(name, kernel, scale=1.0):
    """What the weights of a kernel are drawn from, or the same in another scale."""
    cut_off = stats.truncnorm(-2, 2)
    if name == "mnist":
        return stats.truncnorm(-2, 2, scale=0.03 * scale)
    *window, channels, features = kernel.shape
    deviation = math.sqrt(2 / (math.prod(window) * (channels + features)))
    if window:
        return stats.truncnorm(-2, 2, scale=deviation / cut_off.std() * scale)
    width = 2 * math.sqrt(3) * deviation * scale
    return stats.uniform(-width / 2, width)


def agreement(weights, distribution):
    """Probability of a larger distance between the two."""
    return stats.kstest(weights, distribution.cdf, method="asymp").pvalue


@pytest.mark.parametrize("name", LAYERS)
def test_initial_weights(name):
    layers = kernels_and_biases(name, parameters(name))
    for kernel, bias in layers:
        assert np.all(bias == np.float32(0.1 if name == "cifar100" else 0.0))
        weights = kernel.ravel()[:: max(kernel.size // 5000, 1)]
        right = initial_distribution(name, kernel)
        assert np.abs(kernel).max() <= right.support()[1] * (1 + 1e-6)
        assert agreement(weights, right) > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert agreement(weights, initial_distribution(name, kernel, wrong)) < 1e-6
    # No layer's weights are another's in another scale.
    starts = [kernel.ravel()[:500] for kernel, _ in layers]
    correlations = np.corrcoef(starts) - np.eye(len(starts))
    assert np.abs(correlations).max() < 5 / math.sqrt(500)


# ---- What the networks compute ----------------------------------------------------


def windows(batch, window, stride, padding, fill):
    """All windows: [images, rows, columns, channels, height, width]."""
    if padding == "SAME":
        size = batch.shape[1]
        # Enough for a window at every `stride`-th pixel; the odd one goes behind.
        total = max((-(-size // stride) - 1) * stride + window - size, 0)
        ends = (total // 2, total - total // 2)
        batch = np.pad(batch, [(0, 0), ends, ends, (0, 0)], constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(batch, (window, window), (1, 2))
    return view[:, ::stride, ::stride]


def convolved(batch, kernel, bias, stride=1, padding="SAME"):
    """Convolution, bias and ReLU."""
    view = windows(batch, len(kernel), stride, padding, 0.0)
    return np.maximum(np.tensordot(view, kernel, ((4, 5, 3), (0, 1, 2))) + bias, 0)


def pooled(batch):
    return windows(batch, 3, 2, "SAME", -np.inf).max((-2, -1))


def forward_3c3d(layers, batch):
    paddings = ("VALID", "VALID", "SAME")
    for layer, padding in zip(layers[:3], paddings, strict=True):
        batch = pooled(convolved(batch, *layer, padding=padding))
    batch = batch.reshape(len(batch), 3 * 3 * 128)
    for kernel, bias in layers[3:5]:
        batch = np.maximum(batch @ kernel + bias, 0)
    return batch @ layers[5][0] + layers[5][1]


def forward_all_cnn_c(layers, batch):
    for i, layer in enumerate(layers, start=1):
        stride = 2 if i in (3, 6) else 1
        batch = convolved(batch, *layer, stride, "VALID" if i == 7 else "SAME")
    return batch.mean((1, 2))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("name", "forward"), [("cifar10", forward_3c3d), ("cifar100", forward_all_cnn_c)]
)
@pytest.mark.usefixtures("x64")
def test_forward_pass_against_numpy(name, forward, platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    # Unlike the initial biases, these tell channels apart.
    params = jax.tree.map(
        lambda leaf: (
            jnp.float64(leaf) + 0.1 * (leaf.ndim == 1) * normal(0, *leaf.shape)
        ),
        parameters(name),
    )
    batch = normal(1, 2, 32, 32, 3)
    wanted = forward(kernels_and_biases(name, params), np.asarray(batch))
    actual = jax.jit(functools.partial(logits, name))(params, batch)
    assert relative_error(actual, wanted) < 1e-13


# ---- Dropout ----------------------------------------------------------------------

# By convolution: the share of its inputs that is dropped.
DROPPED = {1: 0.2, 4: 0.5, 7: 0.5}


@pytest.fixture
def kept(monkeypatch):
    """Runs All-CNN-C; gives inputs of convolutions over what the last one put out.

    By convolution from 1; not a number where nothing came in.
    """
    convolve = nnx.Conv.__call__
    seen = []

    def listen(layer, inputs):
        outputs = convolve(layer, inputs)
        seen.append((inputs, outputs))
        return outputs

    monkeypatch.setattr(nnx.Conv, "__call__", listen)

    def ratios(image, key):
        seen.clear()
        logits("cifar100", parameters("cifar100"), image, key)
        outputs = [image, *(nnx.relu(after) for _, after in seen)]
        return [
            inputs.ravel() / before.ravel()
            for (inputs, _), before in zip(seen, outputs, strict=False)
        ]

    with_keys, without_keys = (
        jax.jit(jax.vmap(ratios, axes)) for axes in ((0, 0), (0, None))
    )

    def run(images, keys):
        found = (without_keys if keys is None else with_keys)(images, keys)
        return dict(enumerate(map(np.asarray, found), start=1))

    return run


def test_dropout_drops_its_share_and_keeps_the_mean(kept):
    images = normal(0, 4, 32, 32, 3).astype(jnp.float32)
    for number, ratio in kept(images, jax.random.split(jax.random.key(0), 4)).items():
        ratio = ratio[~np.isnan(ratio)]
        if number not in DROPPED:
            assert np.all(ratio == 1)
            continue
        share = DROPPED[number]
        is_kept = ratio != 0
        np.testing.assert_allclose(ratio[is_kept], 1 / (1 - share), rtol=1e-6)
        five_errors = 5 * math.sqrt(share * (1 - share) / ratio.size)
        assert abs(is_kept.mean() - (1 - share)) < five_errors < share / 3
        # What is kept is scaled up, so that the mean stays.
        assert abs(ratio.mean() - 1) < five_errors / (1 - share)


def test_dropout_is_independent_by_image_place_and_key(kept):
    images = jnp.broadcast_to(normal(0, 32, 32, 3).astype(jnp.float32), (2, 32, 32, 3))
    keys = jax.random.split(jax.random.key(0), 2)
    first, again, other = (
        kept(images, keys[np.array(pair)]) for pair in ((0, 1), (0, 1), (1, 0))
    )
    masks = []
    for number in DROPPED:
        np.testing.assert_array_equal(first[number], again[number])
        np.testing.assert_array_equal(first[number], other[number][::-1])
        masks.extend(first[number][:, :3072])
    seen = ~np.isnan(masks).any(0)
    assert seen.sum() > 300
    correlations = np.corrcoef(np.array(masks)[:, seen] != 0) - np.eye(len(masks))
    assert np.abs(correlations).max() < 5 / math.sqrt(seen.sum())


def test_without_a_key_nothing_is_dropped(kept):
    images = normal(0, 2, 32, 32, 3).astype(jnp.float32)
    ratios = kept(images, None)
    assert len(ratios) == 9
    for ratio in ratios.values():
        assert np.all(ratio[~np.isnan(ratio)] == 1)


# ---- Variance of the gradient -----------------------------------------------------


def cross_entropy(name, params, example):
    image, label, dropout_key = example
    return optax.losses.softmax_cross_entropy_with_integer_labels(
        logits(name, params, image, dropout_key), label
    )


@pytest.mark.parametrize("name", CIFARS)
@pytest.mark.usefixtures("x64")
def test_variance_of_the_gradient_against_one_gradient_per_example(name):
    params = jax.tree.map(jnp.float64, parameters(name))
    keys = jax.random.split(jax.random.key(0), 3)
    batch = normal(0, 3, 32, 32, 3), jnp.array([1, 7, 1]), keys
    loss = functools.partial(cross_entropy, name)

    @jax.jit
    def run(params, batch):
        _, gradient, variance = value_grad_and_variance(loss)(params, batch)
        return gradient, variance, jax.vmap(jax.grad(loss), (None, 0))(params, batch)

    for g, s, each in zip(*map(jax.tree.leaves, run(params, batch)), strict=True):
        assert relative_error(g, each.mean(0)) < 1e-12
        assert relative_error(s, variance_of_mean(each)) < 1e-11


# At how many places of an image every kernel is applied.
PLACES = {
    "cifar10": [28**2, 12**2, 6**2, 1, 1, 1],
    "cifar100": [32**2, 32**2, 16**2, 16**2, 16**2, 8**2, 6**2, 6**2, 6**2],
}


@pytest.mark.parametrize("name", CIFARS)
# Kernels whose gradient is smaller than the patches that it is a product of.
@pytest.mark.filterwarnings("ignore:The gradients of:UserWarning")
def test_variance_stores_no_more_than_the_forward_pass_does(name):
    batch = jax.eval_shape(
        lambda: (
            jnp.zeros((256, 32, 32, 3)),
            jnp.zeros(256, int),
            jax.random.split(jax.random.key(0), 256),
        )
    )
    loss = functools.partial(cross_entropy, name)
    report = explain_variance(loss)(parameters(name), batch)
    kernels = [row for row in report if len(row.shape) > 1]
    assert len(report) == 2 * len(kernels) == 2 * len(LAYERS[name])
    for row, places in zip(kernels, PLACES[name], strict=True):
        # What is multiplied by the kernel, and the product.
        at_a_place = math.prod(row.shape[:-1]) + row.shape[-1]
        assert row.numbers <= 256 * places * at_a_place


# ---- Step sizes -------------------------------------------------------------------


def test_step_size_of_cifar100_is_divided_by_ten_twice():
    steps = jnp.array([0, 39_999, 40_000, 49_999, 50_000, 59_999])
    step_sizes = jnp.array([0.06, 3.0])

    @jax.jit
    def scheduled(step_size, step):
        return get_problem("cifar100").schedule(step_size)(step)

    over_steps = jax.vmap(scheduled, (None, 0))
    actual = jax.vmap(over_steps, (0, None))(step_sizes, steps)
    factors = np.array([1, 1, 0.1, 0.1, 0.01, 0.01])
    np.testing.assert_allclose(actual, np.outer(step_sizes, factors), rtol=1e-6)


@pytest.mark.parametrize("name", ["digits", "mnist", "cifar10"])
def test_other_step_sizes_are_constant(name):
    assert get_problem(name).schedule(0.3) == 0.3


def test_published_settings():
    problems = [get_problem(name) for name in ("mnist", *CIFARS)]
    published = [(p.settings.steps, p.settings.batch_size, p.l2) for p in problems]
    assert published == [
        (4_000, 128, 0.02),
        (25_000, 256, 0.002),
        (60_000, 256, 0.0005),
    ]
