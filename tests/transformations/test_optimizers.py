"""The named algorithms, against the paper's sums and against Optax."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from tests import oracles
from tests.transformations.streams import STEPS, stream, trajectory, tree_stream

LEARNING_RATE = 0.3


# ---- Against the oracle -----------------------------------------------------------

# (optimizer, oracle, arguments of both, wants variances)
ALGORITHMS: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {
    "sgd": (do.sgd, oracles.sgd, {}, False),
    "ssd": (do.ssd, oracles.ssd, {}, False),
    "svag": (do.svag, oracles.svag, {}, False),
    "svag, debiased": (do.svag, oracles.svag, {"debias_variance": True}, False),
    "svag, decay 0": (do.svag, oracles.svag, {"decay": 0.0}, False),
    "m_sgd": (do.m_sgd, oracles.m_sgd, {}, False),
    "m_sgd, momentum 0.5": (do.m_sgd, oracles.m_sgd, {"momentum": 0.5}, False),
    "m_ssd": (do.m_ssd, oracles.m_ssd, {}, False),
    "m_svag": (do.m_svag, oracles.m_svag, {}, False),
    "m_svag, momentum 0": (do.m_svag, oracles.m_svag, {"momentum": 0.0}, False),
    "m_svag, momentum 0.99": (do.m_svag, oracles.m_svag, {"momentum": 0.99}, False),
    "m_svag, debiased": (do.m_svag, oracles.m_svag, {"debias_variance": True}, False),
    "adam": (do.adam, oracles.adam, {}, False),
    "adam, one decay": (do.adam, oracles.adam, {"b1": 0.9, "b2": 0.9}, False),
    "adam, slow mean": (do.adam, oracles.adam, {"b1": 0.99, "b2": 0.9}, False),
    "adam, large eps": (do.adam, oracles.adam, {"eps": 0.5}, False),
    "adam, eps 0": (do.adam, oracles.adam, {"eps": 0.0}, False),
    "adam_star": (do.adam_star, oracles.adam_star, {}, False),
    "adam_star, momentum 0.5": (
        do.adam_star,
        oracles.adam_star,
        {"momentum": 0.5},
        False,
    ),
    "m_svag_mb": (do.m_svag_mb, oracles.m_svag_mb, {}, True),
    "m_svag_mb, momentum 0": (do.m_svag_mb, oracles.m_svag_mb, {"momentum": 0.0}, True),
    "adam_star_mb": (do.adam_star_mb, oracles.adam_star_mb, {}, True),
}


def assert_follows_oracle(
    name: str, gradients: Any, rtol: float, atol: float, **options: Any
) -> None:
    ours, oracle, arguments, wants_variance = ALGORITHMS[name]
    variances = None
    if wants_variance:
        variances = {
            leaf: np.square(stream(99, g.shape[1:], len(g))).astype(g.real.dtype)
            for leaf, g in gradients.items()
        }
    tx = ours(LEARNING_RATE, **arguments, **options)
    actual = trajectory(tx, gradients, variances)
    for leaf, history in gradients.items():
        wide = np.complex128 if np.iscomplexobj(history) else np.float64
        inputs = [history.astype(wide)]
        if variances is not None:
            inputs.append(variances[leaf].astype(np.float64))
        expected = oracle(*inputs, learning_rate=LEARNING_RATE, **arguments)
        np.testing.assert_allclose(actual[leaf], expected, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_trajectory_in_float64(name: str) -> None:
    assert_follows_oracle(name, tree_stream(np.float64), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trajectory_in_float32(name: str) -> None:
    assert_follows_oracle(name, tree_stream(np.float32), rtol=2e-4, atol=2e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_trajectory_of_complex_gradients(name: str) -> None:
    gradients = {"complex": stream(5, (3,), imaginary=True)}
    assert_follows_oracle(name, gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("momentum", "t"), [(0.9, 1), (0.9, 7), (0.999, 3), (0.0, 4)])
def test_oracle_kappa_is_the_closed_form(momentum: float, t: int) -> None:
    """Eq. (19), so that the oracle and the paper's formula check each other."""
    closed = (1 - momentum) * (1 + momentum**t) / ((1 + momentum) * (1 - momentum**t))
    np.testing.assert_allclose(oracles.kappa(momentum, t), closed, rtol=1e-12)


# ---- Against Optax, where the algorithms coincide ---------------------------------

# The float32 tolerance is Optax's own: it forms 1-β and β^t from a Python float.
TWINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sgd": (do.sgd, optax.sgd),
    "m_sgd": (do.m_sgd, lambda lr: optax.sgd(lr, momentum=0.9)),
    "ssd": (do.ssd, optax.sign_sgd),
    "adam": (do.adam, optax.adam),
    "adam with other numbers": (
        lambda lr: do.adam(lr, b1=0.7, b2=0.95, eps=1e-3),
        lambda lr: optax.adam(lr, b1=0.7, b2=0.95, eps=1e-3),
    ),
    "a learning rate schedule": (
        lambda lr: do.adam(optax.cosine_decay_schedule(lr, STEPS)),
        lambda lr: optax.adam(optax.cosine_decay_schedule(lr, STEPS)),
    ),
}
if hasattr(optax, "signum"):
    TWINS["m_ssd"] = (do.m_ssd, lambda lr: optax.signum(lr, beta=0.9))


def assert_equals_optax(name: str, gradients: Any, rtol: float, atol: float) -> None:
    ours, theirs = (trajectory(make(LEARNING_RATE), gradients) for make in TWINS[name])
    for leaf in gradients:
        np.testing.assert_allclose(ours[leaf], theirs[leaf], rtol=rtol, atol=atol)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", TWINS)
def test_equals_optax_in_float64(name: str) -> None:
    assert_equals_optax(name, tree_stream(np.float64), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TWINS)
def test_equals_optax_in_float32(name: str) -> None:
    assert_equals_optax(name, tree_stream(np.float32), rtol=1e-4, atol=2e-6)


# ---- What sets the methods apart --------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_adam_star_is_adam_with_one_decay_but_for_kappa() -> None:
    """κ is what tells ADAM* from Adam: without it the two coincide, with it not."""
    gradients = {"vector": stream(0)}
    adam = trajectory(do.adam(1.0, b1=0.9, b2=0.9, eps=0.0), gradients)["vector"]
    without_kappa = optax.chain(
        do.moving_average_estimate(0.9),
        do.scale_by_sign(),
        do.adapt_to_variance(do.inverse_sqrt),
        optax.scale_by_learning_rate(1.0),
    )
    same = trajectory(without_kappa, gradients)["vector"]
    np.testing.assert_allclose(same, adam, rtol=1e-9, atol=1e-12)
    star = trajectory(do.adam_star(1.0), gradients)["vector"]
    assert np.all(np.abs(star[5:]) > np.abs(adam[5:]))


@pytest.mark.parametrize("name", ["m_svag_mb", "adam_star_mb"])
def test_without_variance_the_minibatch_methods_keep_the_whole_momentum(
    name: str,
) -> None:
    gradients = {"vector": stream(3).astype(np.float32)}
    zeros = jax.tree.map(np.zeros_like, gradients)
    ours = trajectory(getattr(do, name)(LEARNING_RATE), gradients, zeros)
    plain = {"m_svag_mb": do.m_sgd, "adam_star_mb": do.m_ssd}[name]
    expected = trajectory(plain(LEARNING_RATE), gradients)
    np.testing.assert_allclose(ours["vector"], expected["vector"], rtol=1e-6)


def test_debiased_variance_shortens_the_steps() -> None:
    gradients = {"vector": stream(4).astype(np.float32)}
    plain = trajectory(do.m_svag(1.0), gradients)["vector"]
    debiased = trajectory(do.m_svag(1.0, debias_variance=True), gradients)["vector"]
    np.testing.assert_array_equal(debiased[0], plain[0])
    assert np.all(np.abs(debiased[1:]) <= np.abs(plain[1:]))
    assert np.any(np.abs(debiased[1:]) < 0.99 * np.abs(plain[1:]))


def test_an_own_recombination_is_one_chain() -> None:
    """The erf factor on a momentum's sign, for one layer group only."""
    recombined = optax.chain(
        do.moving_average_estimate(0.9),
        do.correct_for_momentum(0.9),
        do.scale_by_sign(),
        do.adapt_to_variance(do.gaussian_sign),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )
    tx = optax.partition(
        {"ours": recombined, "theirs": optax.sgd(LEARNING_RATE)},
        {"vector": "ours", "matrix": "theirs", "scalar": "theirs"},
    )
    gradients = tree_stream()
    updates = trajectory(tx, gradients)
    star = trajectory(do.adam_star(LEARNING_RATE), gradients)["vector"]
    # The erf factor is close to (1+η²)^(-1/2), Figure 5, but not the same.
    np.testing.assert_allclose(updates["vector"], star, atol=0.08 * LEARNING_RATE)
    assert np.max(np.abs(updates["vector"] - star)) > 0.02 * LEARNING_RATE
    np.testing.assert_allclose(
        updates["matrix"], -LEARNING_RATE * gradients["matrix"], rtol=1e-6
    )


def test_an_own_factor_is_a_plain_function() -> None:
    def cutoff(eta2: jax.Array) -> jax.Array:
        return jnp.where(eta2 < 1, 1.0, 0.0)

    tx = optax.chain(do.attach_variance(), do.adapt_to_variance(cutoff))
    g = jnp.array([1.0, -2.0, 3.0])
    updates, _ = tx.update(g, tx.init(g), grad_variance=jnp.array([2.0, 1.0, 9.0]))
    np.testing.assert_array_equal(updates, [0.0, -2.0, 0.0])
