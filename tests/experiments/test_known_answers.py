"""What the literature says of these problems, at a size that takes seconds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from dissect_optax.dissection import (
    FOUR_METHODS,
    Job,
    Settings,
    SilentMonitor,
    Store,
    complete,
    dissect_problem,
    get_method,
    mean_log_loss,
)
from experiments.problems import imbalance
from experiments.studies.calibration_settings import block_quadratic, rotated_digits

pytestmark = pytest.mark.usefixtures("quick_compilation")


def with_one_decay(name, decay=0.95):
    """A method with one decay for everything, as in Orvieto & Gower (2025)."""
    decays = {"b1": decay, "b2": decay} if name == "adam" else {"momentum": decay}
    return dataclasses.replace(
        get_method(name), factory=functools.partial(getattr(do, name), **decays)
    )


def test_heterogeneous_blocks_need_the_sign_and_reward_both():
    result = dissect_problem(
        block_quadratic("heterogeneous", steps=500),
        [with_one_decay(name) for name in FOUR_METHODS],
        (3,),
        level=None,
        monitor=SilentMonitor(),
    )
    sign, interaction = (result.effects[3][n] for n in ("sign", "interaction"))
    assert sign.high < 0
    assert sign.estimate < -1
    # The sign gains more with variance adaptation than without.
    assert interaction.high < 0
    assert interaction.decided


# ---- Class imbalance --------------------------------------------------------------


def class_losses(optimizer, steps):
    """Loss of every class after steps on the whole data, and the classes' shares."""
    labels = imbalance.load_data(None).training
    shares = jnp.bincount(labels, length=imbalance.CLASSES) / len(labels)
    classes = jnp.arange(imbalance.CLASSES)

    def losses(weights):
        return jax.vmap(lambda k: imbalance.evaluate(weights, k)[0])(classes)

    def step(_, carry):
        weights, state = carry
        gradient = jax.grad(lambda w: shares @ losses(w))(weights)
        updates, state = optimizer.update(gradient, state, weights)
        return optax.apply_updates(weights, updates), state

    weights = imbalance.init(jax.random.key(0))
    start = (weights, optimizer.init(weights))
    weights, _ = jax.jit(lambda: jax.lax.fori_loop(0, steps, step, start))()
    return np.asarray(losses(weights)), np.asarray(shares)


def test_gradient_descent_learns_a_class_in_proportion_to_its_share():
    steps = 20_000
    losses, shares = class_losses(do.sgd(1.0), steps)
    # With C classes, ℓ_k·π_k·t → (C − 1)/C.
    scaled = losses * shares * steps
    limit = 1 - 1 / imbalance.CLASSES
    frequent = shares * steps > 500
    assert frequent.sum() > 5
    np.testing.assert_allclose(scaled[frequent], limit, rtol=0.02)
    np.testing.assert_allclose(scaled, limit, rtol=0.2)
    # The rarest class is worse by about as much as it is rarer.
    assert losses.max() / losses.min() > 50


def test_sign_descent_learns_all_classes_alike():
    losses, _ = class_losses(do.ssd(0.01), 400)
    assert losses.max() < 0.1 * np.log(imbalance.CLASSES)
    np.testing.assert_allclose(losses, losses[0], rtol=1e-3)


# ---- Rotation ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotation(quick_compilation):
    """Mean log losses by rotation, method and step size, over three seeds."""
    found = {}
    for rotated in (False, True):
        problem = dataclasses.replace(
            rotated_digits(8, rotated=rotated),
            settings=Settings(
                steps=200, batch_size=8, evaluation_interval=20, examples=500
            ),
        )
        job = Job(problem, problem.settings, Store(None), SilentMonitor())
        for name, rates in {
            "m_sgd": [0.03],
            "m_ssd": [0.003, 0.006, 0.01, 0.03],
        }.items():
            method = get_method(name)
            configs = [job.config(method, r, seed) for r in rates for seed in (1, 2, 3)]
            records = complete(job, method, name, configs)
            outcomes = np.reshape([mean_log_loss(r) for r in records], (len(rates), 3))
            found[name, rotated] = outcomes
    return found


def test_rotated_coordinates_leave_sgd_as_it_is(rotation):
    before, after = rotation["m_sgd", False], rotation["m_sgd", True]
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert np.std(before) > 1e-3


def test_rotated_coordinates_make_a_sign_method_worse(rotation):
    best = [
        rotation["m_ssd", rotated][rotation["m_ssd", rotated].mean(1).argmin()]
        for rotated in (False, True)
    ]
    assert np.all(best[1] - best[0] > 0.05)
