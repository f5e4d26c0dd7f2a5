"""Modules of Flax: routes and values, for Linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dissect_optax import explain_variance, value_grad_and_variance
from tests.gradient_variance.models import normal
from tests.gradient_variance.oracle import relative_error, variance_of_mean

EXPECTED = {
    "Conv": "product per example (conv_general_dilated)",
    "Dense": "outer product (dot_general)",
    "Embed": "table rows (scatter-add)",
    "LayerNorm": "stored gradients",
}


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, image, token):
        x = nn.relu(nn.Conv(4, (3, 3))(image[None])[0]).reshape(-1)
        x = nn.LayerNorm()(nn.Dense(8)(x))
        return nn.Dense(3)(x * nn.Embed(11, 8)(token))


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.embed = nnx.Embed(11, 8, dtype=jnp.result_type(float), rngs=rngs)
        self.dense = nnx.Linear(100, 8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, image, token):
        x = nnx.relu(self.conv(image[None])[0]).reshape(-1)
        return self.out(self.norm(self.dense(x)) * self.embed(token))


def make_linen():
    network = LinenNetwork()
    params = network.init(jax.random.key(0), jnp.zeros((5, 5, 2)), jnp.int32(0))
    return params, network.apply


def make_nnx():
    graph, params = nnx.split(NnxNetwork(nnx.Rngs(0)))
    return params, lambda params, *inputs: nnx.merge(graph, params)(*inputs)


@pytest.mark.parametrize("make", [make_linen, make_nnx])
@pytest.mark.usefixtures("x64")
# Flax broadcasts biases and scales.
@pytest.mark.filterwarnings("ignore:.*rank.promotion:UserWarning")
def test_flax_modules_are_exact_and_take_the_fast_routes(make):
    with jax.numpy_rank_promotion("allow"):
        params, apply = make()
        params = jax.tree.map(lambda p: p.astype(float), params)

        def loss(params, example):
            return jnp.square(apply(params, *example)).sum()

        batch = normal(3, 5, 5, 2), jnp.asarray([1, 7, 1])
        _, grad, variance = jax.jit(value_grad_and_variance(loss))(params, batch)
        gradients = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
        report = explain_variance(loss)(params, batch)
    for g, s, k in zip(*map(jax.tree.leaves, (grad, variance, gradients)), strict=True):
        assert relative_error(g, k.mean(0)) < 1e-12
        assert relative_error(s, variance_of_mean(k)) < 1e-12
    routes = {row.shape: row.routes[0].partition(" (sel")[0] for row in report}
    assert routes[3, 3, 2, 4] == EXPECTED["Conv"]
    assert routes[100, 8] == routes[8, 3] == EXPECTED["Dense"]
    assert routes[11, 8] == EXPECTED["Embed"]
    assert routes[8,].startswith(EXPECTED["LayerNorm"])


# ---- Modules with state ------------------------------------------------------------


class LinenWithState(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(3)(x))
        return nn.Dropout(0.5, deterministic=not self.train)(x)


class ConvolutionWithState(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3))(x.reshape(-1, 2, 2, 1))
        return nn.BatchNorm(use_running_average=not self.train)(x)


def linen_loss(network, key):
    state = network.init(jax.random.key(0), jnp.zeros((2, 4)))

    def loss(params, x):
        y, _ = network.apply(
            {**state, "params": params},
            x,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.square(y - 1).mean()

    return loss, state["params"]


def nnx_loss(train):
    model = nnx.Sequential(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    )
    (model.train if train else model.eval)()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        return jnp.square(nnx.merge(graph, params, rest, copy=True)(x) - 1).mean()

    return loss, params


def kernel_of(gradient):
    (kernel,) = (leaf for leaf in jax.tree.leaves(gradient) if leaf.shape == (4, 3))
    return kernel


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("library", ["linen", "nnx"])
@pytest.mark.filterwarnings("ignore:.*rank.promotion:UserWarning")
def test_batch_normalization_in_training_mode_is_a_warning(library, batched):
    def make(train):
        if library == "nnx":
            return nnx_loss(train)
        return linen_loss(LinenWithState(train), jax.random.key(1))

    x = normal(5, 4)
    with jax.numpy_rank_promotion("allow"):
        loss, params = make(train=True)
        with pytest.warns(UserWarning, match="Batch normalization") as warned:
            _, grad, _ = value_grad_and_variance(loss, batched=batched)(params, x)
        assert len(warned) == 1
        # What the warning is about: no error, and no gradient.
        assert jnp.abs(kernel_of(grad)).max() < 1e-6
        loss, params = make(train=False)
        _, grad, _ = value_grad_and_variance(loss, batched=batched)(params, x)
        assert jnp.abs(kernel_of(grad)).max() > 1e-3


@pytest.mark.filterwarnings("ignore:.*rank.promotion:UserWarning")
def test_batch_normalization_over_images_is_seen_in_a_batched_loss():
    with jax.numpy_rank_promotion("allow"):
        loss, params = linen_loss(ConvolutionWithState(True), jax.random.key(1))
        with pytest.warns(UserWarning, match="lets examples meet"):
            value_grad_and_variance(loss, batched=True)(params, normal(5, 4))
        loss, params = linen_loss(ConvolutionWithState(False), jax.random.key(1))
        value_grad_and_variance(loss, batched=True)(params, normal(5, 4))


@pytest.mark.filterwarnings("ignore:.*rank.promotion:UserWarning")
def test_the_whole_state_of_an_nnx_model_with_what_is_trainable():
    model = nnx.Sequential(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
    )
    model.eval()
    graph, state = nnx.split(model)

    def loss(state, x):
        return jnp.square(nnx.merge(graph, state, copy=True)(x)).sum()

    x = normal(5, 4)
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(TypeError, match=r"rngs.*has dtype .*trainable"):
            value_grad_and_variance(loss)(state, x)
        measure = value_grad_and_variance(
            loss, trainable=lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
        )
        _, grad, variance = jax.jit(measure)(state, x)
        weight = model.layers[0].kernel[...]
        bias = model.layers[0].bias[...]
        gradients = jax.vmap(
            jax.grad(lambda w, x: jnp.square(x @ w + bias).sum()), (None, 0)
        )(weight, x)
    leaves = jax.tree.leaves(variance)
    assert [leaf.shape for leaf in leaves] == [(3,), (4, 3)]
    assert relative_error(leaves[1], variance_of_mean(gradients)) < 1e-5
    assert len(jax.tree.leaves(grad)) == 2
