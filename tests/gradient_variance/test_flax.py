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
        self.embed = nnx.Embed(11, 8, rngs=rngs)
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
