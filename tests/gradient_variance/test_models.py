"""Exactness and routes of `value_grad_and_variance` on every kind of model."""

import functools
import re

import jax
import numpy as np
import pytest

import dissect_optax
from tests.gradient_variance.models import MODELS
from tests.gradient_variance.oracle import (
    relative_error,
    variance_by_equation_44,
    variance_of_mean,
)


def routes_of(loss, params, batch, shared):
    """The route of each parameter, without the primitives that stored gradients met."""
    report = dissect_optax.explain_variance(loss)(params, batch, *shared)
    return {row.parameter: plain_route(", ".join(row.routes)) for row in report}


def plain_route(route):
    route = re.sub(r"(stored gradients) \([^)]*\)", r"\1", route)
    while "stored gradients + stored gradients" in route:
        route = route.replace("stored gradients + stored", "stored")
    return route


@functools.cache
def every_example(name):
    """Values and gradients of all examples of a model, in float64."""
    loss, params, batch, _, shared = MODELS[name]()
    axes = (None, 0, *(None,) * len(shared))
    each = jax.jit(jax.vmap(jax.value_and_grad(loss), axes))
    return jax.tree.map(np.asarray, each(params, batch, *shared))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_equals_per_example_gradients_and_takes_the_expected_route(name):
    loss, params, batch, routes, shared = MODELS[name]()
    measure = jax.jit(dissect_optax.value_grad_and_variance(loss))
    value, grad, variance = measure(params, batch, *shared)

    values, gradients = every_example(name)
    assert relative_error(value, np.mean(values)) < 1e-12
    for g, s, k in zip(*map(jax.tree.leaves, (grad, variance, gradients)), strict=True):
        assert relative_error(g, np.mean(k, axis=0)) < 1e-12
        assert relative_error(s, variance_of_mean(k)) < 1e-12
        assert relative_error(s, variance_by_equation_44(k)) < 1e-11

    assert routes_of(loss, params, batch, shared) == routes


def in_pairs(batch):
    """Every example becomes two examples that are used one after the other."""

    def pair(leaf):
        leaf = jax.numpy.asarray(leaf)
        return jax.numpy.stack([leaf, leaf[::-1]], axis=1)

    return jax.tree.map(pair, batch)


def unrolled(loss):
    def loss_of_both(params, pair, *shared):
        parts = [jax.tree.map(lambda leaf, k=k: leaf[k], pair) for k in range(2)]
        return sum(loss(params, part, *shared) for part in parts)

    return loss_of_both


def scanned(loss):
    def loss_of_both(params, pair, *shared):
        def step(total, part):
            return total + loss(params, part, *shared), None

        return jax.lax.scan(step, jax.numpy.zeros(()), pair)[0]

    return loss_of_both


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_a_loop_takes_the_route_that_its_unrolled_steps_take(name):
    loss, params, batch, _, shared = MODELS[name]()
    batch = in_pairs(batch)
    assert routes_of(scanned(loss), params, batch, shared) == routes_of(
        unrolled(loss), params, batch, shared
    )


# The three networks of the experiments compile for a minute in each form.
SMALL = [n for n in MODELS if not n.startswith(("mnist", "cifar"))]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("x64")
def test_several_uses_equal_per_example_gradients(name):
    loss, params, batch, _, shared = MODELS[name]()
    # Each pair is an example and the one as far from the end: gradients add up.
    values, gradients = jax.tree.map(lambda k: k + k[::-1], every_example(name))
    for form in (unrolled, scanned):
        measure = jax.jit(dissect_optax.value_grad_and_variance(form(loss)))
        value, grad, variance = measure(params, in_pairs(batch), *shared)
        assert relative_error(value, np.mean(values)) < 1e-12
        for g, s, k in zip(
            *map(jax.tree.leaves, (grad, variance, gradients)), strict=True
        ):
            assert relative_error(g, np.mean(k, axis=0)) < 1e-12
            assert relative_error(s, variance_of_mean(k)) < 1e-12
