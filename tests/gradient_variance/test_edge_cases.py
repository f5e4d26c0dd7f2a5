"""Forms of a program on which a rule could be wrong or fail; routes do not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dissect_optax
from tests.gradient_variance.models import normal
from tests.gradient_variance.oracle import relative_error, variance_of_mean
from tests.gradient_variance.test_models import in_pairs, scanned, unrolled


def errors(loss, params, batch):
    """Relative errors of gradient and variance."""
    measure = jax.jit(dissect_optax.value_grad_and_variance(loss))
    _, grad, variance = measure(params, batch)
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    for g, s, k in zip(*map(jax.tree.leaves, (grad, variance, each)), strict=True):
        yield relative_error(g, np.mean(k, axis=0))
        yield relative_error(s, variance_of_mean(k))


FAR = np.asarray([[2**32, 1], [2**32 + 1, 2], [3, -(2**33)], [0, 0]])


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
@pytest.mark.parametrize("mode", ["clip", "fill"])
@pytest.mark.usefixtures("x64")
def test_look_ups_far_beyond_the_table(mode, dtype):
    tokens = jnp.asarray((FAR % 2**32 - 2 if dtype is np.uint32 else FAR).astype(dtype))

    def loss(params, tokens):
        rows = params.at[tokens].get(mode=mode, fill_value=0.0)
        return jnp.sin(rows).sum() + jnp.square(rows).sum()

    assert max(errors(loss, normal(5, 3), tokens)) < 1e-12


@pytest.mark.parametrize("rows", [3, 25])
@pytest.mark.usefixtures("x64")
def test_windows_far_beyond_the_table(rows):
    starts = jnp.asarray([2**32 + 1, 1, -(2**33), 0])

    def loss(params, start):
        row = jax.lax.dynamic_slice(params, (start, 0), (1, 3))
        return jnp.square(jnp.tanh(row @ jnp.ones((3, 2)) + row[:, :2])).sum()

    assert max(errors(loss, normal(rows, 3), starts)) < 1e-12


@pytest.mark.parametrize(
    ("name", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02), ("float32", 1e-5)]
)
@pytest.mark.usefixtures("x64")
def test_kernels_in_loops_that_are_scaled_and_then_rounded(name, tolerance):
    dtype = getattr(jnp, name)

    def loss(params, images):
        def step(h, image):
            kernel = params.astype(dtype) * jnp.asarray(2, dtype)
            image = (h + image).astype(dtype)[None]
            h = jax.lax.conv_general_dilated(image, kernel, (1,), "SAME")[0]
            return jnp.tanh(h.astype(params.dtype)), None

        return jnp.square(jax.lax.scan(step, jnp.zeros((2, 8)), images)[0]).sum()

    assert max(errors(loss, normal(2, 2, 3), normal(4, 3, 2, 8))) < tolerance


@pytest.mark.parametrize(
    ("name", "tolerance"), [("bfloat16", 0.1), ("float16", 0.02), ("float32", 1e-5)]
)
@pytest.mark.usefixtures("x64")
def test_permuted_rows_of_rounded_weights(name, tolerance):
    dtype = getattr(jnp, name)

    def loss(params, x):
        y = x.astype(dtype) @ params.astype(dtype)[np.asarray([2, 0, 1])]
        return jnp.square(y.astype(params.dtype)).sum()

    assert max(errors(loss, normal(3, 2), normal(4, 3))) < tolerance


def hidden_division_loss(params, x):
    # The usual guard: no example sees what was divided by zero.
    divisor = jnp.asarray([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [2.0, 4.0, 1.0]])
    safe = divisor[:, :1] > 0
    guarded = jnp.where(safe, params, 1.0)
    w = jnp.where(safe, guarded / divisor, 0.0)
    return jnp.square(jnp.tanh(x @ w)).sum()


def hidden_division():
    return hidden_division_loss, normal(3, 3), normal(5, 3)


def no_tokens_loss(params, example):
    tokens, x = example
    h = jnp.tanh(tokens @ params["w"]).sum(0) + x
    return jnp.square(h @ params["v"]).sum()


def no_tokens():
    params = {"w": normal(4, 6), "v": normal(6, 3)}
    batch = (normal(5, 0, 4), normal(5, 6))
    return no_tokens_loss, params, batch


def no_channels_loss(params, x):
    y = jax.lax.conv_general_dilated(x[None], params, (1,), "SAME")
    return jnp.square(y).sum() + jnp.square(x).sum()


def no_channels():
    return no_channels_loss, normal(2, 0, 3), normal(3, 0, 5)


def scaled_parts_loss(scale, params, x):
    left, right = jnp.split(params * scale, [2], axis=1)
    return jnp.square(jnp.tanh(x @ left)).sum() + jnp.sin(x @ right).sum()


def cond_of_scaled_parts_loss(params, x):
    branches = [functools.partial(scaled_parts_loss, scale) for scale in (2.0, 3.0)]
    return jax.lax.cond(x[0] > 0, *branches, params, x)


def cond_of_scaled_parts():
    return cond_of_scaled_parts_loss, normal(12, 13), normal(6, 12)


def permuted_complex_loss(params, x):
    w = params[np.asarray([2, 0, 1])]
    return jnp.square(jnp.abs(x.astype(params.dtype) @ w)).sum()


def permuted_complex():
    params = normal(4, 3) + 1j * normal(4, 3, seed=1)
    return permuted_complex_loss, params, normal(5, 3)


def keys_in_a_loop_loss(params, example):
    xs, key = example

    def step(carry, x):
        h, key = carry
        key, own = jax.random.split(key)
        h = jnp.where(jax.random.bernoulli(own, 0.7, (4,)), h, 0.0)
        w = (params * jnp.arange(1.0, 17.0).reshape(4, 4))[np.asarray([1, 0, 3, 2])]
        return (jnp.tanh(h @ w + x), key), None

    (h, _), _ = jax.lax.scan(step, (jnp.ones(4), key), xs)
    return jnp.square(h).sum()


def keys_in_a_loop():
    batch = (normal(5, 3, 4), jax.random.split(jax.random.key(0), 5))
    return keys_in_a_loop_loss, normal(4, 4), batch


def penalty_in_a_condition_loss(params, x):
    """A gradient that only the loop's batching finds to be the same for all."""

    def one(w, h):
        return jnp.tanh(h), jnp.square(w).sum()

    def other(w, h):
        return 2 * h, jnp.sin(w).sum()

    def layer(h, w):
        first, second = jnp.split(w, 2)
        h, penalty = jax.lax.cond(params[0, 0, 0] > 0, one, other, first, h)
        return jnp.tanh(h[:2] @ second + h[2]), penalty

    h, penalties = jax.lax.scan(layer, x, params)
    return jnp.square(h).sum() + penalties.sum()


def penalty_in_a_condition():
    return penalty_in_a_condition_loss, normal(3, 4, 4), normal(5, 4)


FORMS = (
    keys_in_a_loop,
    penalty_in_a_condition,
    hidden_division,
    no_tokens,
    no_channels,
    cond_of_scaled_parts,
    permuted_complex,
)


@pytest.mark.parametrize("make", FORMS)
@pytest.mark.usefixtures("x64")
def test_once(make):
    assert max(errors(*make())) < 1e-12


@pytest.mark.parametrize("form", [unrolled, scanned])
@pytest.mark.parametrize("make", FORMS)
@pytest.mark.usefixtures("x64")
def test_twice(make, form):
    loss, params, batch = make()
    assert max(errors(form(loss), params, in_pairs(batch))) < 1e-12


@pytest.mark.usefixtures("x64")
def test_a_large_penalty_in_a_condition_has_no_variance():
    def loss(params, x):
        def layer(h, w):
            one, other = (
                lambda w, h, f=f: (f(h), f(w).sum()) for f in (jnp.sin, jnp.cos)
            )
            return jax.lax.cond(params[0, 0, 0] > 0, one, other, w, h)

        h, penalties = jax.lax.scan(layer, x, params)
        return jnp.square(h).sum() + penalties.sum()

    params, batch = normal(2, 300, 300), normal(3, 4)
    measure = jax.jit(dissect_optax.value_grad_and_variance(loss))
    _, grad, variance = measure(params, batch)
    assert relative_error(grad, jax.grad(loss)(params, batch[0])) < 1e-12
    # Squares minus the squared mean, of gradients up to one.
    assert variance.max() < 1e-15
