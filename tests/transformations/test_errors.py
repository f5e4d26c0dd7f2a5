"""Every error in the caller's terms: what was expected, what came, what to do."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do

# (call that takes the decay, its name)
DECAYS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "moving_average_estimate b1": (do.moving_average_estimate, "b1"),
    "moving_average_estimate b2": (lambda b: do.moving_average_estimate(0.9, b), "b2"),
    "accumulate_momentum": (do.accumulate_momentum, "momentum"),
    "correct_for_momentum": (do.correct_for_momentum, "momentum"),
    "svag": (lambda decay: do.svag(0.1, decay), "decay"),
    "m_sgd": (lambda momentum: do.m_sgd(0.1, momentum), "momentum"),
    "m_ssd": (lambda momentum: do.m_ssd(0.1, momentum), "momentum"),
    "m_svag": (lambda momentum: do.m_svag(0.1, momentum), "momentum"),
    "adam b1": (lambda b1: do.adam(0.1, b1), "b1"),
    "adam b2": (lambda b2: do.adam(0.1, b2=b2), "b2"),
    "adam_star": (lambda momentum: do.adam_star(0.1, momentum), "momentum"),
    "m_svag_mb": (lambda momentum: do.m_svag_mb(0.1, momentum), "momentum"),
    "adam_star_mb": (lambda momentum: do.adam_star_mb(0.1, momentum), "momentum"),
}
every_decay = pytest.mark.parametrize(
    ("call", "name"), DECAYS.values(), ids=list(DECAYS)
)


@every_decay
@pytest.mark.parametrize(
    "value", [1.0, 1.2, -0.1, float("nan"), 1, np.float32(1), np.float64(1.5)]
)
def test_decay_outside_the_interval(
    call: Callable[..., Any], name: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` must lie in \[0, 1\), got") as e:
        call(value)
    assert f"got {float(value)}" in str(e.value)
    assert "Use 0.0 to switch the average off." in str(e.value)


@every_decay
@pytest.mark.parametrize("value", ["0.9", [0.9, 0.8], np.array([0.9, 0.8]), 0.9 + 0j])
def test_decay_that_is_no_number(
    call: Callable[..., Any], name: str, value: Any
) -> None:
    with pytest.raises(TypeError, match=f"^`{name}` must be a number, got"):
        call(value)


@every_decay
@pytest.mark.parametrize("value", [0.0, 0, 0.999, np.float32(0.5), jnp.float32(0.5)])
def test_decay_inside_the_interval_passes(
    call: Callable[..., Any], name: str, value: Any
) -> None:
    del name
    assert isinstance(call(value), optax.GradientTransformationExtraArgs)


@every_decay
def test_traced_decays_pass_whatever_their_value(
    call: Callable[..., Any], name: str
) -> None:
    del name
    assert jax.jit(lambda value: (call(value), value)[1])(1.5) == 1.5


@pytest.mark.parametrize("eps", [-1e-8, -1.0, float("nan")])
@pytest.mark.parametrize(
    "call",
    [
        lambda eps: do.moving_average_estimate(eps=eps),
        lambda eps: do.adam(0.1, eps=eps),
    ],
)
def test_negative_eps(call: Callable[..., Any], eps: float) -> None:
    with pytest.raises(ValueError, match=r"^`eps` must not be negative, got") as e:
        call(eps)
    assert str(eps) in str(e.value)


@pytest.mark.parametrize("factor", [0.5, None, jnp.ones(3), "inverse"])
def test_factor_that_is_not_callable(factor: Any) -> None:
    with pytest.raises(TypeError, match=r"^`factor` must be a function of .*η², got"):
        do.adapt_to_variance(factor)


# ---- Estimates where gradients belong, and the other way round ----------------------

GRADIENT = {"w": jnp.ones(2)}


@pytest.mark.parametrize(
    "name", ["adapt_to_variance", "accumulate_momentum", "correct_for_momentum"]
)
def test_plain_gradient_where_an_estimate_belongs(name: str) -> None:
    tx = getattr(do, name)()
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(TypeError, match=f"^`{name}` needs an Estimate") as e:
            update(GRADIENT, tx.init(GRADIENT))
        assert "got a plain dict of gradients" in str(e.value)
        for remedy in ("moving_average_estimate", "attach_variance", "aggregate_per_"):
            assert remedy in str(e.value)


@pytest.mark.parametrize(
    "name", ["moving_average_estimate", "attach_variance", "aggregate_per_example"]
)
def test_estimate_where_a_gradient_belongs(name: str) -> None:
    tx = getattr(do, name)()
    estimate = do.Estimate(GRADIENT, GRADIENT)
    with pytest.raises(TypeError, match=f"^`{name}` makes an Estimate from plain"):
        tx.update(estimate, tx.init(GRADIENT), grad_variance=GRADIENT)


@pytest.mark.parametrize("update", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_estimate_that_leaves_a_chain(update: Callable[..., Any]) -> None:
    tx = optax.chain(do.moving_average_estimate(), optax.scale_by_learning_rate(0.1))
    params = jnp.ones(2)

    def step(params: Any, state: Any) -> Any:
        updates, _ = tx.update(params, state, params)
        return optax.apply_updates(params, updates)

    with pytest.raises(TypeError, match="met code that expects plain updates") as e:
        update(step)(params, tx.init(params))
    assert "after adapt_to_variance()" in str(e.value)


@pytest.mark.parametrize(
    "params",
    [{"w": jnp.ones(2)}, (jnp.ones(2), jnp.ones(2)), [jnp.ones(2), jnp.ones(2)]],
    ids=["dict", "pair", "list"],
)
def test_estimate_never_passes_for_an_update(params: Any) -> None:
    """JAX may compare the trees in its own words, but loudly all the same."""
    tx = do.moving_average_estimate()
    updates, _ = tx.update(params, tx.init(params))
    with pytest.raises((TypeError, ValueError)):
        optax.apply_updates(params, updates)


def test_with_relative_variance_of_something_that_makes_no_estimate() -> None:
    tx = do.with_relative_variance_of(optax.trace(0.9))
    with pytest.raises(TypeError, match="needs an estimator that returns an Estimate"):
        tx.update(GRADIENT, tx.init(GRADIENT))


# ---- grad_variance ------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [do.attach_variance, lambda: do.m_svag_mb(0.1), lambda: do.adam_star_mb(0.1)],
    ids=["attach_variance", "m_svag_mb", "adam_star_mb"],
)
def test_missing_grad_variance(make: Callable[[], Any]) -> None:
    tx = make()
    with pytest.raises(TypeError, match="needs the variance of the gradient") as e:
        tx.update(GRADIENT, tx.init(GRADIENT), GRADIENT)
    assert "grad_variance=variance" in str(e.value)
    assert "value_grad_and_variance" in str(e.value)


@pytest.mark.parametrize(
    "variance",
    [
        {"v": jnp.ones(2)},
        {"w": jnp.ones(2), "v": jnp.ones(2)},
        [jnp.ones(2)],
        {},
        {"w": {"deeper": jnp.ones(2)}},
    ],
)
def test_grad_variance_of_another_structure(variance: Any) -> None:
    tx = do.attach_variance()
    with pytest.raises(ValueError, match=r"must be a tree like the gradients|shapes"):
        tx.update(GRADIENT, tx.init(GRADIENT), grad_variance=variance)


@pytest.mark.parametrize("variance", [jnp.ones(3), jnp.ones(()), jnp.ones((1, 2)), 1.0])
def test_grad_variance_of_another_shape(variance: Any) -> None:
    tx = do.attach_variance()
    with pytest.raises(ValueError, match="must have the shapes of the gradients") as e:
        tx.update(GRADIENT, tx.init(GRADIENT), grad_variance={"w": variance})
    assert f"got {jnp.shape(variance)} for a gradient of shape (2,)" in str(e.value)
    assert "['w']" in str(e.value)


@pytest.mark.parametrize("dtype", [jnp.complex64, np.complex128])
@pytest.mark.parametrize("gradient", [jnp.ones(2), jnp.ones(2, jnp.complex64)])
def test_grad_variance_that_is_complex(gradient: Any, dtype: Any) -> None:
    """It lost its imaginary part without a word."""
    tx, variance = do.attach_variance(), np.array([1 + 2j, 3], dtype)
    with pytest.raises(ValueError, match=r"must be real, .* complex one at \['w'\]"):
        tx.update({"w": gradient}, tx.init(None), grad_variance={"w": variance})
    with pytest.raises(ValueError, match="must be real"):
        do.m_svag_mb(0.1).update(
            gradient, do.m_svag_mb(0.1).init(gradient), grad_variance=variance
        )


@pytest.mark.parametrize("shape", [(), (2,)])
def test_grad_variance_of_none_for_a_gradient(shape: tuple[int, ...]) -> None:
    tx, gradient = do.attach_variance(), {"w": jnp.ones(shape)}
    with pytest.raises(ValueError, match="grad_variance"):
        tx.update(gradient, tx.init(gradient), grad_variance={"w": None})


# ---- Per-example gradients ----------------------------------------------------------


@pytest.mark.parametrize(
    ("per_example", "sentence"),
    [
        ({"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}, "one batch size .* [2, 4]"),
        ({"a": jnp.ones((1, 3))}, "at least two examples .* batch of 1"),
        ({"a": jnp.ones((0, 3))}, "at least two examples .* batch of 0"),
        (
            {"a": jnp.ones((2, 3)), "b": jnp.ones(())},
            r"\[batch, \*parameter\].* scalar",
        ),
    ],
    ids=["two batch sizes", "one example", "no example", "no batch axis"],
)
def test_per_example_gradients(per_example: Any, sentence: str) -> None:
    tx = do.aggregate_per_example()
    pattern = sentence.replace("[2, 4]", r"\[2, 4\]")
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=pattern) as e:
            update(per_example, tx.init(None))
        assert str(e.value).startswith("`aggregate_per_example` needs")


@pytest.mark.parametrize(
    "factory",
    [
        do.moving_average_estimate,
        do.accumulate_momentum,
        *(
            functools.partial(getattr(do, name), 0.1)
            for name in ("svag", "m_sgd", "m_ssd", "m_svag", "adam", "m_svag_mb")
        ),
    ],
)
def test_accumulator_dtype_that_holds_no_fractions(factory):
    with pytest.raises(ValueError, match=r"`accumulator_dtype` .* got int32"):
        factory(accumulator_dtype=jnp.int32)


def test_an_integer_one_is_no_rounded_decay():
    with pytest.raises(ValueError, match="must lie in"):
        do.m_svag(0.1, np.int8(1))
