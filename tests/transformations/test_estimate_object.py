"""An Estimate is for this library's transformations: everything else must say so."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do

SENTENCE = (
    r"^An Estimate \(an update direction and its variance\) met code that expects"
)
TREE = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5, 0.25])}
TREES = {"tree": TREE, "nested": {"layer": (TREE, [TREE["w"]])}, "array": TREE["w"]}


def all_of(params: Any, value: Any) -> Any:
    return jax.tree.map(lambda _: value, params)


# What people put into a chain, made for given parameters.
FOREIGN: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "scale": lambda p: optax.scale(0.5),
    "scale by an array": lambda p: optax.scale(jnp.float32(0.5)),
    "clip": lambda p: optax.clip(1.0),
    "clip_by_global_norm": lambda p: optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda p: optax.clip_by_block_rms(1.0),
    "adaptive_grad_clip": lambda p: optax.adaptive_grad_clip(0.1),
    "scale_by_schedule": lambda p: optax.scale_by_schedule(lambda count: 0.1),
    "normalize_by_update_norm": lambda p: optax.normalize_by_update_norm(),
    "scale_by_learning_rate": lambda p: optax.scale_by_learning_rate(0.1),
    "learning rate schedule": lambda p: optax.scale_by_learning_rate(
        optax.constant_schedule(0.1)
    ),
    "trace": lambda p: optax.trace(0.9),
    "ema": lambda p: optax.ema(0.9),
    "scale_by_adam": lambda p: optax.scale_by_adam(),
    "scale_by_rms": lambda p: optax.scale_by_rms(),
    "scale_by_sign": lambda p: optax.scale_by_sign(),
    "scale_by_trust_ratio": lambda p: optax.scale_by_trust_ratio(),
    "add_decayed_weights": lambda p: optax.add_decayed_weights(0.1),
    "add_noise": lambda p: optax.add_noise(0.1, 0.5, jax.random.key(0)),
    "centralize": lambda p: optax.centralize(),
    "zero_nans": lambda p: optax.zero_nans(),
    "set_to_zero": lambda p: optax.set_to_zero(),
    "masked": lambda p: optax.masked(optax.scale(0.5), all_of(p, True)),
    "masked by nothing": lambda p: optax.masked(optax.scale(0.5), all_of(p, False)),
    "masked by a function": lambda p: optax.masked(
        do.scale_by_sign(), lambda q: all_of(q, True)
    ),
    "partition": lambda p: optax.partition({"a": optax.scale(0.5)}, all_of(p, "a")),
    "apply_if_finite": lambda p: optax.apply_if_finite(do.scale_by_sign(), 3),
    "MultiSteps": lambda p: optax.MultiSteps(
        do.scale_by_sign(), 2
    ).gradient_transformation(),
    "stateless_with_tree_map": lambda p: optax.stateless_with_tree_map(lambda u, _: -u),
}


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("call", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_foreign_transformation_between_estimate_and_adaptation(
    name: str, params: Any, call: Callable[..., Any]
) -> None:
    tx = optax.chain(
        do.moving_average_estimate(0.9),
        FOREIGN[name](params),
        do.adapt_to_variance(),
    )
    with pytest.raises(TypeError, match=SENTENCE) as error:
        call(tx.update)(params, tx.init(params), params)
    for remedy in ("adapt_to_variance()", "dissect_optax.masked", "`mean`"):
        assert remedy in str(error.value)


@pytest.mark.parametrize("params", TREES.values(), ids=TREES)
def test_an_estimate_that_reaches_the_parameters(params: Any) -> None:
    tx = do.moving_average_estimate()
    estimate, _ = tx.update(params, tx.init(params))
    with pytest.raises((TypeError, ValueError), match="Estimate"):
        optax.apply_updates(params, estimate)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "e + 1": lambda e: e + 1,
    "1 + e": lambda e: 1 + e,
    "array + e": lambda e: jnp.ones(2) + e,
    "NumPy + e": lambda e: np.ones(2) + e,
    "NumPy number * e": lambda e: np.float32(2) * e,
    "e - e": lambda e: e - e,
    "2 - e": lambda e: 2 - e,
    "0.5 * e": lambda e: 0.5 * e,
    "e * array": lambda e: e * jnp.ones(2),
    "e / 2": lambda e: e / 2,
    "2 / e": lambda e: 2 / e,
    "e // 2": lambda e: e // 2,
    "e % 2": lambda e: e % 2,
    "e ** 2": lambda e: e**2,
    "2 ** e": lambda e: 2**e,
    "e @ e": lambda e: e @ e,
    "array @ e": lambda e: jnp.ones(2) @ e,
    "e += 1": lambda e: operator.iadd(e, 1),
    "e *= 2": lambda e: operator.imul(e, 2),
    "-e": operator.neg,
    "abs(e)": abs,
    "e < 1": lambda e: e < 1,
    "e >= 1": lambda e: e >= 1,
    "array > e": lambda e: jnp.ones(2) > e,
    "if e": bool,
    "float(e)": float,
    "len(e)": len,
    "mean, variance = e": list,
    "e[0]": lambda e: e[0],
    "1 in e": lambda e: 1 in e,
    "np.asarray": np.asarray,
    "jnp.asarray": jnp.asarray,
    "jnp.where": lambda e: jnp.where(True, e, 0.0),
    "jnp.sign": jnp.sign,
    "jnp.clip": lambda e: jnp.clip(e, -1, 1),
    "jax.tree.map": lambda e: jax.tree.map(jnp.negative, e),
    "jax.tree.map with parameters": lambda e: jax.tree.map(jnp.add, e, TREE),
    "jax.tree.leaves": jax.tree.leaves,
    "jax.jit": lambda e: jax.jit(lambda e: e.mean)(e),
    "out of jax.jit": lambda e: jax.jit(lambda: e)(),
    "jax.flatten_util": jax.flatten_util.ravel_pytree,
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_whatever_is_done_with_it_says_what_to_do(
    operation: Callable[[Any], Any],
) -> None:
    estimate = do.Estimate(TREE["w"], jnp.ones(2))
    with pytest.raises(TypeError, match=r"^An Estimate \(an update direction"):
        operation(estimate)


def test_it_is_an_object_with_three_fields() -> None:
    mean = {"w": jnp.ones(2, jnp.bfloat16), "none": None, "b": jnp.ones(1)}
    estimate = do.Estimate(mean, mean)
    assert estimate.mean is mean
    assert estimate.variance is mean
    assert estimate.dtypes == (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
    assert not hasattr(estimate, "__dict__")
    assert repr(do.Estimate(1.0, 2.0)) == (
        "Estimate(mean=1.0, variance=2.0, dtypes=('float32',))"
    )
    assert estimate != do.Estimate(mean, mean)  # By identity.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int8])
def test_its_parts_may_leave_a_jitted_function_and_come_back(dtype: Any) -> None:
    gradients = [jnp.array([2, -3, 1], dtype), jnp.array([1, -1, -1], dtype)]
    source = do.moving_average_estimate(0.5, 0.75, eps=1e-3)
    rest = optax.chain(do.scale_by_sign(), do.adapt_to_variance(do.inverse_sqrt))
    whole = optax.chain(source, rest)

    @jax.jit
    def estimate(gradient: Any, state: Any) -> Any:
        estimate, state = source.update(gradient, state)
        return estimate.mean, estimate.variance, state

    @jax.jit
    def finish(mean: Any, variance: Any) -> Any:
        pair = do.Estimate(mean, variance, (dtype,))
        return rest.update(pair, rest.init(gradients[0]))[0]

    state, whole_state = source.init(gradients[0]), whole.init(gradients[0])
    for gradient in gradients:
        mean, variance, state = estimate(gradient, state)
        expected, whole_state = whole.update(gradient, whole_state)
    updates = finish(mean, variance)
    assert updates.dtype == expected.dtype
    np.testing.assert_allclose(
        updates.astype(np.float32), expected.astype(np.float32), rtol=1e-5
    )


def test_low_precision_pairs_are_adapted_in_float32() -> None:
    """In float16 the square of 1e-3 would be below the smallest normal number."""
    estimate = do.Estimate(jnp.array([1e-3], jnp.float16), jnp.array([1e-6]))
    tx = do.adapt_to_variance()
    updates, _ = tx.update(estimate, tx.init(None))
    assert updates.dtype == jnp.float16
    np.testing.assert_allclose(updates, [5e-4], rtol=2e-2)


def test_hyperparameters_may_be_injected_between_the_parts() -> None:
    inject = optax.inject_hyperparams(
        do.correct_for_momentum, hyperparam_dtype=jnp.float32
    )
    tx, plain = (
        optax.chain(do.moving_average_estimate(0.9), correct, do.adapt_to_variance())
        for correct in (inject(momentum=0.9), do.correct_for_momentum(0.9))
    )
    state, plain_state = tx.init(TREE), plain.init(TREE)
    for size in (1.0, -3.0):
        gradients = jax.tree.map(lambda p, s=size: s * p, TREE)
        updates, state = jax.jit(tx.update)(gradients, state, TREE)
        expected, plain_state = plain.update(gradients, plain_state)
    for ours, theirs in zip(
        jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# ---- States -------------------------------------------------------------------------

STATEFUL = {
    "one decay": do.moving_average_estimate(0.9),
    "two decays": do.moving_average_estimate(0.9, 0.999),
    "momentum": optax.chain(do.attach_variance(), do.accumulate_momentum(0.9)),
    "correction": optax.chain(do.attach_variance(), do.correct_for_momentum(0.9)),
    "m_sgd": do.m_sgd(0.1),
}


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("other", [*STATEFUL, "a tuple"])
def test_a_state_of_another_kind(name: str, other: str) -> None:
    tx, params = STATEFUL[name], jnp.ones(2)

    def state_of(name: str) -> Any:
        if name == "a tuple":
            return (jnp.int32(3), jnp.ones(2), jnp.ones(2))
        return STATEFUL[name].init(params)

    if name in ("momentum", "correction", "m_sgd"):  # Chains have tuples of states.
        own = state_of(name)
        state = (*own[:-1], state_of(other))
        if name == "m_sgd":
            state = (state_of(other), own[-1])
        if other == name or other in ("momentum", "correction", "m_sgd"):
            pytest.skip("a chain of another length")
    else:
        state = state_of(other)
        if other == name:
            tx.update(params, state)
            return
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(TypeError, match=r"needs a state of type .*, got one of"):
            update(params, state, grad_variance=jnp.ones(2))
