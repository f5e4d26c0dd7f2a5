"""Convolution and max-pooling against XLA's own operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from experiments.layers import convolve, max_pool
from tests.gradient_variance.oracle import relative_error

LAYOUT = ("NHWC", "HWIO", "NHWC")

# Height and width, channels, kernel, features, strides, padding.
CONVOLUTIONS = {
    "valid": ((9, 8), 3, (5, 5), 4, (1, 1), "VALID"),
    "same": ((7, 6), 2, (3, 3), 5, (1, 1), "SAME"),
    "same, stride 2, even": ((8, 6), 3, (3, 3), 4, (2, 2), "SAME"),
    "same, stride 2, odd": ((7, 9), 3, (3, 3), 4, (2, 2), "SAME"),
    "single pixels": ((5, 4), 6, (1, 1), 3, (1, 1), "SAME"),
    "rows and columns differ": ((9, 5), 2, (4, 3), 3, (3, 2), [(1, 2), (2, 0)]),
    "image smaller than kernel": ((2, 3), 2, (3, 3), 4, (1, 1), "SAME"),
}

# Height and width, window, stride, padding.
POOLS = {
    "same, even": ((8, 6), 3, 2, "SAME"),
    "same, odd": ((7, 9), 3, 2, "SAME"),
    "same, stride 1": ((5, 4), 3, 1, "SAME"),
    "same, image smaller than window": ((2, 1), 5, 2, "SAME"),
    "valid": ((8, 7), 3, 2, "VALID"),
    "valid, with gaps": ((9, 8), 2, 3, "VALID"),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def contains(primitive, function, *arguments):
    return f" {primitive}[" in str(jax.make_jaxpr(function)(*arguments))


def value_and_gradients(function, *arguments):
    """The value, and gradients of its inner product with whole numbers."""
    value, pull_back = jax.vjp(function, *arguments)
    weights = np.random.default_rng(2).integers(-9, 9, value.shape)
    return value, *pull_back(jnp.asarray(weights, value.dtype))


def assert_same_value_and_gradients(forms, wanted, arguments, tolerance):
    """Compared in one program."""

    @jax.jit
    def run(*arguments):
        return [value_and_gradients(form, *arguments) for form in (wanted, *forms)]

    first, *others = run(*arguments)
    for other in others:
        for a, b in zip(other, first, strict=True):
            assert relative_error(a, b) <= tolerance


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.usefixtures("x64")
def test_convolution_equals_xlas(case):
    size, channels, window, features, strides, padding = CONVOLUTIONS[case]
    images = normal(0, 3, *size, channels)
    kernel = normal(1, *window, channels, features)
    ours, xla = (
        functools.partial(
            form, window_strides=strides, padding=padding, dimension_numbers=LAYOUT
        )
        for form in (convolve, lax.conv_general_dilated)
    )

    def one_by_one(images, kernel):
        return jax.vmap(lambda image: ours(image[None], kernel)[0])(images)

    assert contains("dot_general", ours, images, kernel)
    assert not contains("conv_general_dilated", ours, images, kernel)
    assert_same_value_and_gradients([ours, one_by_one], xla, (images, kernel), 1e-13)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_convolve_as_xla_does(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    ours, xla = (
        functools.partial(
            form, window_strides=(1, 1), padding="SAME", dimension_numbers=LAYOUT
        )
        for form in (convolve, lax.conv_general_dilated)
    )
    images, kernel = jnp.zeros((2, 32, 32, 1)), jnp.zeros((3, 3, 1, 2))
    ours, xla = (jax.make_jaxpr(form)(images, kernel) for form in (ours, xla))
    assert str(ours) == str(xla)


@pytest.mark.parametrize(
    "options",
    [
        {"strides": 2, "padding": "VALID"},
        {"padding": ((0, 2), (1, 0))},
        {"kernel_dilation": 2},
        {"input_dilation": 2, "padding": 1},
        {"feature_group_count": 2},
    ],
    ids=str,
)
def test_flax_convolves_with_it(options):
    ours, xla = (
        nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), **options, **form)
        for form in ({"conv_general_dilated": convolve}, {})
    )

    @jax.jit
    def run(images):
        return ours(images), ours(images[0]), xla(images)

    batch, single, wanted = run(normal(0, 2, 9, 8, 4))
    assert relative_error(batch, wanted) < 1e-6
    assert relative_error(single, wanted[0]) < 1e-6


def xla_max_pool(images, window, stride, padding):
    windows, strides = (1, window, window, 1), (1, stride, stride, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, windows, strides, padding)


@pytest.mark.parametrize("case", POOLS)
def test_max_pool_equals_xlas_also_in_the_gradient_of_equal_maxima(case):
    size, window, stride, padding = POOLS[case]
    ours, xla = (
        functools.partial(pool, window=window, stride=stride, padding=padding)
        for pool in (max_pool, xla_max_pool)
    )
    # Most are negative: a padding of zeros would show.
    distinct = normal(0, 3, *size, 4) - 1
    tied = jnp.round(distinct)
    images = jnp.concatenate([distinct, tied, nnx.relu(tied)])
    assert not contains("reduce_window_max", ours, images)
    assert_same_value_and_gradients([ours, jax.vmap(ours)], xla, (images,), 0)


@pytest.mark.parametrize("shape", [(6, 6, 2), (2, 3, 6, 6, 2)])
def test_max_pool_of_accelerators_is_xlas(shape, monkeypatch):
    pool = functools.partial(max_pool, window=3, stride=2, padding="SAME")
    images = normal(0, *shape)
    wanted = jax.jit(lambda images: pool(images))(images)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert contains("reduce_window_max", pool, images)
    assert np.array_equal(pool(images), wanted)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_max_pool_passes_on_what_is_not_a_number(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    image = normal(0, 6, 6, 2).at[3, 2, 0].set(jnp.nan)
    maxima = max_pool(image, 3, 2, "SAME")
    # Windows start in rows and columns 0, 2 and 4.
    wanted = np.zeros((3, 3, 2), bool)
    wanted[1, 0:2, 0] = True
    assert np.array_equal(jnp.isnan(maxima), wanted)
