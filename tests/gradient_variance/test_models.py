"""Exactness and routes of `value_grad_and_variance` on every kind of model."""

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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("x64")
def test_equals_per_example_gradients_and_takes_the_expected_route(name):
    loss, params, batch, routes, shared = MODELS[name]()
    measure = jax.jit(dissect_optax.value_grad_and_variance(loss))
    value, grad, variance = measure(params, batch, *shared)

    axes = (None, 0, *(None,) * len(shared))
    each = jax.jit(jax.vmap(jax.value_and_grad(loss), axes))
    values, gradients = each(params, batch, *shared)
    assert relative_error(value, np.mean(values)) < 1e-12
    for g, s, k in zip(*map(jax.tree.leaves, (grad, variance, gradients)), strict=True):
        assert relative_error(g, np.mean(k, axis=0)) < 1e-12
        assert relative_error(s, variance_of_mean(k)) < 1e-12
        assert relative_error(s, variance_by_equation_44(k)) < 1e-11

    report = dissect_optax.explain_variance(loss)(params, batch, *shared)
    taken = {row.parameter: ", ".join(row.routes) for row in report}
    taken = {
        k: re.sub(r"(stored gradients) \([^)]*\)", r"\1", r) for k, r in taken.items()
    }
    assert taken == routes
