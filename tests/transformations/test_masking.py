"""Some leaves of an Estimate: the sign, the momentum or the factor for these only."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from tests.transformations.streams import as_arrays, trajectory, tree_stream

MASK = {"scalar": False, "vector": True, "matrix": False}
MASKS: dict[str, Any] = {
    "tree": MASK,
    "function": lambda tree: {name: name == "vector" for name in tree},
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def finished(*middle: Any) -> optax.GradientTransformation:
    return optax.chain(do.moving_average_estimate(0.9), *middle)


@every_mask
@pytest.mark.parametrize(
    "inner",
    [
        do.scale_by_sign,
        lambda: do.correct_for_momentum(0.9),
        lambda: do.accumulate_momentum(0.8),
        lambda: optax.chain(do.correct_for_momentum(0.9), do.scale_by_sign()),
        lambda: optax.inject_hyperparams(
            do.correct_for_momentum, hyperparam_dtype=jnp.float32
        )(momentum=0.9),
    ],
    ids=["sign", "correction", "momentum", "chain", "injected"],
)
def test_the_chosen_leaves_get_inner_and_the_others_stay(
    inner: Callable[[], Any], mask: Any
) -> None:
    gradients = tree_stream()
    actual = trajectory(finished(do.masked(inner(), mask)), gradients)
    everywhere = trajectory(finished(inner()), gradients)
    nowhere = trajectory(finished(), gradients)
    for part in (0, 1):  # mean, variance
        for name, chosen in MASK.items():
            expected = (everywhere if chosen else nowhere)[part][name]
            np.testing.assert_allclose(actual[part][name], expected, rtol=1e-6)
        assert not np.allclose(actual[part]["vector"], nowhere[part]["vector"]) or (
            part == 0
        )


@every_mask
def test_adaptation_of_some_leaves_ends_the_estimate_of_all(mask: Any) -> None:
    gradients = tree_stream()
    actual = trajectory(finished(do.masked(do.adapt_to_variance(), mask)), gradients)
    adapted = trajectory(finished(do.adapt_to_variance()), gradients)
    means, _ = trajectory(finished(), gradients)
    np.testing.assert_allclose(actual["vector"], adapted["vector"], rtol=1e-6)
    for name in ("scalar", "matrix"):
        np.testing.assert_array_equal(actual[name], means[name])
        assert not np.allclose(actual[name], adapted[name])


@pytest.mark.parametrize(
    ("dtype", "returned"),
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.int8, jnp.float32)],
)
def test_all_leaves_come_back_in_the_gradients_dtype(dtype: Any, returned: Any) -> None:
    params = {"a": jnp.ones(2, dtype), "b": None, "c": jnp.ones(3)}
    for mask in (
        {"a": True, "b": False, "c": False},
        {"a": False, "b": True, "c": True},
    ):
        tx = finished(
            do.masked(do.scale_by_sign(), mask), do.masked(do.adapt_to_variance(), mask)
        )
        updates, state = jax.jit(tx.update)(params, tx.init(params), params)
        assert (updates["a"].dtype, updates["c"].dtype) == (returned, jnp.float32)
        assert updates["b"] is None
        assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_masks_by_prefix_by_shape_and_of_one_kind_only() -> None:
    params = {
        "dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
        "g": jnp.ones(1),
    }
    twice = jax.tree.map(lambda p: 2 * p, params)

    def signs(mask: Any) -> Any:
        tx = finished(do.masked(do.scale_by_sign(), mask))
        return as_arrays(tx.update(twice, tx.init(params), params)[0])[0]

    by_prefix = signs({"dense": True, "g": False})
    assert np.all(by_prefix["dense"]["kernel"] == 1)
    assert np.all(by_prefix["g"] == 2)
    by_shape = signs(lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree))
    assert np.all(by_shape["dense"]["kernel"] == 1)
    assert np.all(by_shape["dense"]["bias"] == 2)
    for mask, value in ((True, 1), (False, 2)):
        assert all(np.all(leaf == value) for leaf in jax.tree.leaves(signs(mask)))


@every_mask
def test_plain_updates_are_masked_as_by_optax(mask: Any) -> None:
    gradients = tree_stream()
    for inner in (do.scale_by_sign(), optax.trace(0.9), do.m_svag(0.1)):
        ours = trajectory(do.masked(inner, mask), gradients)
        theirs = trajectory(optax.masked(inner, mask), gradients)
        for name in gradients:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_only_the_chosen_leaves_have_a_state() -> None:
    params = {"large": jnp.ones(1000), "small": jnp.ones(2)}
    tx = do.masked(do.accumulate_momentum(0.9), {"large": False, "small": True})
    assert isinstance(tx.init(params), optax.MaskedState)
    assert sum(leaf.size for leaf in jax.tree.leaves(tx.init(params))) == 4
    touched = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(params))
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(touched))


def test_a_masked_source_of_variance() -> None:
    tx = do.masked(do.moving_average_estimate(), MASK)
    gradients = jax.tree.map(lambda g: jnp.asarray(g[0]), tree_stream())
    with pytest.raises(TypeError, match="cannot make an Estimate of some leaves only"):
        tx.update(gradients, tx.init(gradients))


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_inside_a_wrapper_of_optax(wrapper: str) -> None:
    """Leaves hidden by the outer mask, and leaves hidden by the inner one."""
    gradients = {name: jnp.asarray(g[0]) for name, g in tree_stream().items()}
    inner = optax.chain(
        do.attach_variance(),
        do.masked(
            do.scale_by_sign(),
            lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 1, tree),
        ),
        do.adapt_to_variance(),
    )
    outer = {"scalar": False, "vector": True, "matrix": True}
    if wrapper == "masked":
        tx = optax.masked(inner, outer)
    else:
        groups = {name: "ours" if chosen else "rest" for name, chosen in outer.items()}
        tx = optax.partition({"ours": inner, "rest": optax.identity()}, groups)
    variances = jax.tree.map(jnp.square, gradients)
    updates, _ = tx.update(
        gradients, tx.init(gradients), gradients, grad_variance=variances
    )
    np.testing.assert_array_equal(updates["scalar"], gradients["scalar"])
    np.testing.assert_allclose(
        updates["vector"], np.sign(gradients["vector"]) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(updates["matrix"], gradients["matrix"] / 2, rtol=1e-6)


def test_several_steps_accumulated_around_a_masked_chain() -> None:
    gradients = {name: jnp.asarray(g[0]) for name, g in tree_stream().items()}
    tx = finished(do.masked(do.scale_by_sign(), MASK), do.adapt_to_variance())
    wrapped = optax.MultiSteps(tx, 2)
    state = wrapped.init(gradients)
    for _ in range(2):
        updates, state = jax.jit(wrapped.update)(gradients, state, gradients)
    expected, _ = tx.update(gradients, tx.init(gradients))
    for name in gradients:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-6)
