"""Frozen parameters, and leaves that have no gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax
from dissect_optax import explain_variance, value_grad_and_variance
from tests.gradient_variance.models import normal
from tests.gradient_variance.oracle import relative_error, variance_of_mean


def loss(params, x):
    h = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return jnp.square(h @ params["second"]["w"] + params["second"]["b"]).sum()


def make_params():
    return {
        "first": {"w": normal(4, 5), "b": normal(5)},
        "second": {"w": normal(5, 3), "b": normal(3)},
    }


def in_first(path, leaf):
    return path[0].key == "first"


@pytest.mark.parametrize(
    ("trainable", "frozen"),
    [
        ({"first": True, "second": False}, [("second", "w"), ("second", "b")]),
        (in_first, [("second", "w"), ("second", "b")]),
        (
            {"first": {"w": np.True_, "b": False}, "second": True},
            [("first", "b")],
        ),
        (True, []),
        (lambda path, leaf: leaf.ndim == 2, [("first", "b"), ("second", "b")]),
    ],
)
@pytest.mark.parametrize("microbatch_size", [None, 2])
@pytest.mark.usefixtures("x64")
def test_frozen_leaves_have_none_and_the_others_what_they_had(
    trainable, frozen, microbatch_size
):
    params, x = make_params(), normal(5, 4)
    measure = value_grad_and_variance(
        loss, trainable=trainable, microbatch_size=microbatch_size
    )
    value, grad, variance = jax.jit(measure)(params, x)
    gradients = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    assert relative_error(value, jax.vmap(loss, (None, 0))(params, x).mean()) < 1e-12
    for layer, names in params.items():
        for name in names:
            g, s = grad[layer][name], variance[layer][name]
            if (layer, name) in frozen:
                assert g is None
                assert s is None
            else:
                k = gradients[layer][name]
                assert relative_error(g, k.mean(0)) < 1e-12
                assert relative_error(s, variance_of_mean(k)) < 1e-12


def test_none_among_the_parameters_stays_none():
    params = make_params()
    params["first"]["b"] = None

    def without_bias(params, x):
        return jnp.square(x @ params["first"]["w"] @ params["second"]["w"]).sum()

    _, grad, variance = value_grad_and_variance(without_bias)(params, normal(5, 4))
    assert jax.tree.structure(grad) == jax.tree.structure(params)
    assert jax.tree.structure(variance) == jax.tree.structure(params)
    assert grad["first"]["b"] is None


def test_a_regularizer_sees_frozen_parameters_and_does_not_move_them():
    params, x = make_params(), normal(5, 4)

    def product(params):
        return (params["first"]["w"] @ params["second"]["w"]).sum()

    arguments = {"trainable": in_first}
    plain = value_grad_and_variance(loss, **arguments)(params, x)
    value, grad, _ = value_grad_and_variance(loss, regularizer=product, **arguments)(
        params, x
    )
    assert relative_error(value, plain[0] + product(params)) < 1e-6
    wanted = plain[1]["first"]["w"] + jax.grad(product)(params)["first"]["w"]
    assert relative_error(grad["first"]["w"], wanted) < 1e-6
    assert grad["second"] == {"w": None, "b": None}


def equations(measure, *arguments):
    return len(jax.make_jaxpr(measure)(*arguments).eqns)


@pytest.mark.parametrize("layer", ["first", "second"])
def test_frozen_leaves_cost_what_constants_cost(layer):
    params, x = make_params(), normal(5, 4)
    others = {k: v for k, v in params.items() if k != layer}

    def of_layer(part, x):
        return loss({layer: part, **others}, x)

    measure = value_grad_and_variance(
        loss, trainable=lambda path, leaf: path[0].key == layer
    )
    frozen = equations(measure, params, x)
    assert frozen == equations(value_grad_and_variance(of_layer), params[layer], x)
    assert frozen < equations(value_grad_and_variance(loss), params, x)


@pytest.mark.usefixtures("full_optimization")
def test_nothing_of_the_size_of_a_frozen_table_is_made():
    shapes = {"table": jax.ShapeDtypeStruct((5000, 64), jnp.float32)}
    shapes["w"] = jax.ShapeDtypeStruct((64, 3), jnp.float32)
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)

    def lookup(params, tokens):
        return jnp.sin(params["table"][tokens] @ params["w"]).sum()

    measure = value_grad_and_variance(lookup, trainable={"table": False, "w": True})
    compiled = jax.jit(measure).lower(shapes, tokens).compile()
    analysis = compiled.memory_analysis()
    size = 5000 * 64 * 4
    assert analysis.temp_size_in_bytes + analysis.output_size_in_bytes < size / 4


def test_optimizers_take_the_trainable_part():
    params, x = make_params(), normal(5, 4)
    mask = {"first": {"w": True, "b": False}, "second": {"w": False, "b": True}}
    measure = value_grad_and_variance(loss, trainable=mask)
    optimizer = dissect_optax.m_svag_mb(learning_rate=0.1)
    part = jax.tree.map(lambda p, t: p if t else None, params, mask)
    state = optimizer.init(part)
    for _ in range(2):
        _, grad, variance = measure(params, x)
        updates, state = optimizer.update(grad, state, part, grad_variance=variance)
        part = optax.apply_updates(part, updates)
        assert jax.tree.structure(part) == jax.tree.structure(grad)
    assert part["first"]["b"] is None
    assert not np.allclose(part["first"]["w"], params["first"]["w"])


def test_the_explanation_leaves_frozen_parameters_out_and_needs_shapes_only():
    shapes = jax.eval_shape(make_params)
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32)
    factor = jax.ShapeDtypeStruct((), jnp.float32)

    def scaled(params, x, factor, mode):
        assert mode == "a string"
        return factor * loss(params, x)

    report = explain_variance(scaled, trainable=in_first)(shapes, x, factor, "a string")
    assert [row.parameter for row in report] == ["['first']['b']", "['first']['w']"]


# ---- Leaves that have no gradient --------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (np.arange(3), r"int\d+"),
        (np.ones(2, np.uint8), "uint8"),
        (np.ones(2, bool), "bool"),
        (7, r"int\d+"),
        (True, "bool"),
        (jax.random.key(0), "key<"),
    ],
)
def test_leaves_that_are_not_numbers_of_a_continuum_are_named_by_path(leaf, dtype):
    params = make_params() | {"step": [leaf]}
    message = rf"\['step'\]\[0\] has dtype {dtype}.*Freeze it.*trainable.*argument"
    with pytest.raises(TypeError, match=message):
        value_grad_and_variance(loss)(params, normal(5, 4))
    with pytest.raises(TypeError, match=message):
        explain_variance(loss)(params, normal(5, 4))
    freeze = {"first": True, "second": True, "step": False}
    _, grad, _ = value_grad_and_variance(loss, trainable=freeze)(params, normal(5, 4))
    assert grad["step"] == [None]


def test_python_floats_and_low_precision_are_parameters():
    def scale(params, x):
        return params["a"] * params["b"].astype(jnp.float32) * x

    params = {"a": 2.0, "b": jnp.asarray(3, jnp.bfloat16)}
    _, grad, _ = value_grad_and_variance(scale)(params, np.ones(4, np.float32))
    assert float(grad["a"]) == 3
    assert float(grad["b"]) == 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A module in Equinox's manner: callable, a tree, its activation a leaf."""

    weight: jax.Array
    activation: object

    def __call__(self, x):
        return self.activation(x @ self.weight)


def module_loss(module, x):
    return jnp.square(module(x)).sum()


def test_functions_among_the_leaves_are_named_with_what_to_do():
    module = Module(normal(4, 3), jnp.tanh)
    message = r"\.activation is the function `\w*tanh`.*trainable=.*equinox.partition"
    with pytest.raises(TypeError, match=message):
        value_grad_and_variance(module_loss)(module, normal(5, 4))
    module = Module(normal(4, 3), "tanh")
    with pytest.raises(TypeError, match=r"\.activation is an object of type `str`"):
        value_grad_and_variance(module_loss)(module, normal(5, 4))


@pytest.mark.parametrize(
    "trainable",
    [
        lambda path, leaf: isinstance(leaf, jax.Array),
        # A tree of bools is a module too, and callable.
        Module(True, False),
    ],
)
def test_functions_may_be_frozen(trainable):
    module, x = Module(normal(4, 3), jnp.tanh), normal(5, 4)
    _, grad, variance = value_grad_and_variance(module_loss, trainable=trainable)(
        module, x
    )
    assert grad.activation is None

    def of_weight(weight, x):
        return module_loss(Module(weight, jnp.tanh), x)

    gradients = jax.vmap(jax.grad(of_weight), (None, 0))(module.weight, x)
    assert relative_error(variance.weight, variance_of_mean(gradients)) < 1e-5
    report = explain_variance(module_loss, trainable=trainable)(module, x)
    assert [row.parameter for row in report] == [".weight"]


@pytest.mark.parametrize(
    ("trainable", "error", "message"),
    [
        (False, ValueError, r"freezes every parameter.*\['first'\]\['b'\]"),
        (lambda path, leaf: False, ValueError, "freezes every parameter"),
        ({"first": True}, ValueError, "structure of `params`"),
        ([True, False], ValueError, "structure of `params`"),
        ({"first": 1, "second": 0}, TypeError, "got int"),
        (lambda path, leaf: jnp.ones(()) > 0, TypeError, r"got .*\['first'\]\['b'\]"),
        (lambda path, leaf: None, TypeError, "got NoneType"),
    ],
)
def test_bad_choices_are_named(trainable, error, message):
    with pytest.raises(error, match=message):
        value_grad_and_variance(loss, trainable=trainable)(make_params(), normal(5, 4))
