"""What the rules do not know costs speed, and is never wrong or an exception."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

import dissect_optax
from dissect_optax.gradient_variance import _program, _rules
from tests.gradient_variance.models import normal
from tests.gradient_variance.oracle import relative_error, variance_of_mean

# A linear primitive that nobody knows: three times its operand.
TRIPLE = Primitive("triple_for_test")
TRIPLE.def_impl(lambda x: 3 * x)
TRIPLE.def_abstract_eval(lambda x: x)
batching.defvectorized(TRIPLE)
ad.deflinear2(TRIPLE, lambda cotangent, _: [TRIPLE.bind(cotangent)])
mlir.register_lowering(TRIPLE, mlir.lower_fun(lambda x: 3 * x, multiple_results=False))


def dense_loss(params, x):
    return jnp.square(jnp.tanh(x @ params)).sum()


def loss_through_a_made_up_primitive(params, x):
    return dense_loss(TRIPLE.bind(params), x)


def scan_loss(params, xs):
    def step(h, x):
        return jnp.tanh(h @ params + x), None

    return jnp.square(jax.lax.scan(step, jnp.ones(6), xs)[0]).sum()


def other_loss(params, x):
    return jnp.sin(x @ params).sum()


def cond_loss(params, x):
    return jax.lax.cond(x[0] > 0, dense_loss, other_loss, params, x)


def assert_exact(loss, params, batch):
    measure = jax.jit(dissect_optax.value_grad_and_variance(loss))
    _, grad, variance = measure(params, batch)
    each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    assert relative_error(grad, np.mean(each, axis=0)) < 1e-12
    assert relative_error(variance, variance_of_mean(each)) < 1e-12


def route(loss, params, batch):
    (row,) = dissect_optax.explain_variance(loss)(params, batch)
    return row.routes[0]


@pytest.mark.usefixtures("x64")
def test_a_made_up_primitive_is_stored():
    params, batch = normal(4, 6), normal(5, 4)
    loss = loss_through_a_made_up_primitive
    assert route(loss, params, batch) == "stored gradients (triple_for_test)"
    assert_exact(loss, params, batch)


@pytest.mark.usefixtures("x64")
def test_a_made_up_primitive_in_a_loop_is_stored():
    params, batch = normal(6, 6), normal(5, 3, 6)

    def loss(params, xs):
        return scan_loss(TRIPLE.bind(params), xs)

    assert route(loss, params, batch).startswith("stored gradients")
    assert_exact(loss, params, batch)


@pytest.mark.usefixtures("x64")
def test_a_scan_with_other_parameters_is_stored(monkeypatch):
    """As JAX 0.12 renamed `num_carry`; here the names are hidden from the reader."""
    params, batch = normal(6, 6), normal(5, 3, 6)
    assert route(scan_loss, params, batch).startswith("3 outer products")

    known = _program.loop_of

    class Renamed:
        """An equation whose parameters have other names."""

        def __init__(self, equation):
            self.primitive, self.invars = equation.primitive, equation.invars
            self.params = {f"new_{k}": v for k, v in equation.params.items()}

    def loop_of(equation):
        return known(Renamed(equation))

    for module in (_program, _rules):
        monkeypatch.setattr(module, "loop_of", loop_of)
    assert route(scan_loss, params, batch) == "stored gradients (scan)"
    assert_exact(scan_loss, params, batch)


@pytest.mark.parametrize(
    ("primitive", "loss", "batch"),
    [
        ("dot_general", dense_loss, normal(5, 6)),
        ("scan", scan_loss, normal(5, 3, 6)),
        ("cond", cond_loss, normal(5, 6)),
    ],
)
@pytest.mark.usefixtures("x64")
def test_a_parameter_that_a_rule_does_not_know_is_not_ignored(
    monkeypatch, primitive, loss, batch
):
    """A newer JAX may say there what the product means."""
    params = normal(6, 6)
    before = route(loss, params, batch)
    known = _rules.RULES[primitive]
    monkeypatch.setitem(
        _rules.RULES, primitive, _rules.Registered(known.rule, frozenset())
    )
    after = route(loss, params, batch)
    assert "outer product" in before
    assert after == f"stored gradients ({primitive})"
    assert_exact(loss, params, batch)


@pytest.mark.parametrize("error", [KeyError, AttributeError, TypeError, ValueError])
@pytest.mark.usefixtures("x64")
def test_a_rule_that_fails_costs_speed_only(monkeypatch, error):
    def broken(walk, equation, output):
        raise error("a new form")

    params, batch = normal(6, 6), normal(5, 6)
    known = _rules.RULES["dot_general"].knows
    monkeypatch.setattr(_rules, "STRICT", False)
    monkeypatch.setitem(_rules.RULES, "dot_general", _rules.Registered(broken, known))
    assert route(dense_loss, params, batch) == "stored gradients (dot_general)"
    assert_exact(dense_loss, params, batch)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_factors_in_eight_bits(name):
    dtype = getattr(jnp, name)

    def loss(params, x):
        x, w = (v.astype(dtype) for v in (x, params))
        dimensions = (((0,), (0,)), ((), ()))
        y = jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
        return jnp.square(y.astype(jnp.float32)).sum()

    params, batch = (v.astype(jnp.float32) for v in (normal(4, 3), normal(5, 4)))
    _, grad, variance = dissect_optax.value_grad_and_variance(loss)(params, batch)
    each = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
    # The gradient of each example is rounded to eight bits; ours is not.
    assert relative_error(grad, np.mean(each, axis=0)) < 0.2
    assert relative_error(variance, variance_of_mean(each)) < 0.5
    assert variance.dtype == jnp.float32
