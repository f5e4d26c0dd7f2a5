"""The edge cases of the family's parts, and the errors of their arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from dissect_optax import family
from tests.transformations.streams import stream, trajectory

# ---- Directions -------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_averages_start_as_they_are_told() -> None:
    gradients, decay = stream(0), 0.75
    for start, initial in (("zero", 0.0), ("zero", 2.0), ("first", 0.0)):
        mean = gradients[0] if start == "first" else np.full(4, initial)
        expected = []
        for t, g in enumerate(gradients):
            if start == "zero" or t > 0:
                mean = decay * mean + (1 - decay) * g
            expected.append(mean)
        tx = family.moving_average(decay, start=start, initial_value=initial)
        np.testing.assert_allclose(trajectory(tx, gradients), expected, rtol=1e-12)
        assert np.all(tx.init(jnp.zeros(4)).mean == initial)


def test_a_decay_rounded_to_one_is_the_plain_average() -> None:
    tx = family.moving_average(jnp.bfloat16(1.0))
    means = trajectory(tx, np.arange(1.0, 6.0, dtype=np.float32))
    np.testing.assert_allclose(means, [1.0, 1.5, 2.0, 2.5, 3.0], rtol=1e-6)
    tx = family.estimate(tx, family.second_moment(jnp.bfloat16(1.0), increment=1.0))
    estimate, _ = tx.update(jnp.array([2.0]), tx.init(jnp.zeros(1)))
    assert np.all(np.isfinite(estimate.variance))


@pytest.mark.parametrize(
    "make", [family.moving_average, family.nesterov, family.second_moment]
)
def test_an_unknown_start_is_an_error(make: Any) -> None:
    with pytest.raises(ValueError, match=r"`start` must be one of .*got 'warm'"):
        make(0.9, start="warm")


# ---- Sources ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "kept"),
    [
        (family.deviation_from_mean(), "a mean"),
        (family.deviation_from_previous_mean(), "a mean"),
        (family.extrapolated_gradient(), "the gradient before"),
    ],
)
def test_a_source_says_what_its_direction_does_not_keep(of: Any, kept: str) -> None:
    tx = family.estimate(optax.identity(), family.second_moment(0.9, of))
    with pytest.raises(TypeError, match=f"needs a direction that keeps {kept}"):
        tx.update(jnp.ones(1), tx.init(jnp.ones(1)))


def test_a_mean_of_its_own_serves_a_source() -> None:
    deviations = family.second_moment(0.5, family.deviation_from_mean())
    tx = family.estimate(
        optax.identity(),
        deviations,
        mean=family.moving_average(0.5),
        minus_square=False,
    )
    means, variances = trajectory(tx, np.array([1.0, 4.0], np.float32))
    np.testing.assert_allclose(means, [1.0, 4.0])
    np.testing.assert_allclose(variances, [0.0, 2 / 3], rtol=1e-6)


def variances_of(source: family.Source, gradients: Any) -> np.ndarray:
    tx = family.estimate(optax.identity(), source, minus_square=False)
    return trajectory(tx, np.asarray(gradients, np.float32))[1]


def test_the_maximum_never_falls_and_the_source_does() -> None:
    gradients = [1.0, 3.0, 0.0, 0.0]
    plain = variances_of(family.second_moment(0.5), gradients)
    largest = variances_of(family.maximum(family.second_moment(0.5)), gradients)
    assert plain[3] < plain[1]
    np.testing.assert_allclose(largest, np.maximum.accumulate(plain))


@pytest.mark.parametrize(("first", "expected"), [(None, 1.0), (0.0, 0.0), (9.0, 9.0)])
def test_a_decorrelated_source_is_one_step_old(
    first: float | None, expected: float
) -> None:
    gradients = [1.0, 3.0, 0.5, 2.0]
    plain = variances_of(family.second_moment(0.5), gradients)
    source = family.decorrelated(family.second_moment(0.5), first=first)
    delayed = variances_of(source, gradients)
    np.testing.assert_allclose(delayed, [expected, *plain[:-1]], rtol=1e-6)
    # A delay within a delay is one.
    twice = variances_of(family.decorrelated(source), gradients)
    np.testing.assert_allclose(twice[1:], plain[:-1], rtol=1e-6)


def test_sources_with_a_maximum_can_be_delayed() -> None:
    gradients = [1.0, 3.0, 0.0, 0.0]
    source = family.maximum(family.second_moment(0.5))
    expected = variances_of(source, gradients)
    delayed = variances_of(family.decorrelated(source), gradients)
    np.testing.assert_allclose(delayed[1:], expected[:-1], rtol=1e-6)


@pytest.mark.parametrize(
    "source",
    [
        family.centred_second_moment(0.5, initial_value=3.0),
        family.sign_controlled_second_moment(0.5),
        family.factored_second_moment(0.5, smallest_axis=2),
    ],
    ids=["centred", "sign-controlled", "factored"],
)
def test_every_source_reads_what_it_returned(source: family.Source) -> None:
    state = source.init(jnp.zeros((2, 3)))
    for g in stream(1, (2, 3), steps=4):
        seen = family.Observation(None, jnp.asarray(g, jnp.float32))
        moment, state = source.update(seen, state)
        np.testing.assert_allclose(source.read(state), moment, rtol=1e-6)


@pytest.mark.parametrize(
    "source",
    [family.second_moment(0.9), family.sign_controlled_second_moment(0.9)],
    ids=["average", "sign-controlled"],
)
def test_a_square_that_overflows_silences_its_element(source: family.Source) -> None:
    tx = optax.chain(
        family.estimate(family.moving_average(0.5), source),
        do.scale_by_sign(),
        do.adapt_to_variance(do.inverse_sqrt),
    )
    gradients = np.array([[1.0, 1.0], [1e30, 1.0], [1e30, 1.0]], np.float32)
    updates = trajectory(tx, gradients)
    assert np.all(np.isfinite(updates))
    assert updates[1, 0] == 0
    assert updates[2, 1] > 0.1


def test_the_sign_controlled_moment_forgets_a_large_gradient_slowly() -> None:
    gradients = np.ones(20, np.float32)
    gradients[5] = 100.0
    average = variances_of(family.second_moment(0.9, start="zero"), gradients)
    yogi = variances_of(family.sign_controlled_second_moment(0.9), gradients)
    assert yogi[-1] > 2 * average[-1]


def test_a_state_of_another_source_is_an_error() -> None:
    one = family.estimate(optax.identity(), family.second_moment())
    other = family.estimate(optax.identity(), family.centred_second_moment())
    with pytest.raises(TypeError, match="needs a state of type SecondMomentState"):
        one.update(jnp.ones(1), other.init(jnp.ones(1)))


# ---- Estimates --------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_eps_eps_root_and_floor_stand_where_they_should() -> None:
    g = jnp.array([3.0, 1e-3])
    for arguments, root in (
        ({"eps": 0.5}, np.abs(g) + 0.5),
        ({"eps_root": 0.25}, np.sqrt(g**2 + 0.25)),
        ({"floor": 0.5}, np.maximum(np.abs(g), 0.5)),
    ):
        for minus_square in (True, False):
            tx = family.estimate(
                optax.identity(),
                family.second_moment(0.9),
                minus_square=minus_square,
                **arguments,
            )
            pair, _ = tx.update(g, tx.init(g))
            expected = root**2 - minus_square * g**2
            np.testing.assert_allclose(pair.variance, expected, atol=1e-12)


@pytest.mark.parametrize("argument", ["eps", "eps_root", "floor"])
def test_negative_numbers_are_errors(argument: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must not be negative"):
        family.estimate(optax.identity(), family.second_moment(), **{argument: -1.0})


def test_an_estimate_is_made_of_gradients() -> None:
    tx = family.estimate(optax.identity(), family.second_moment())
    estimate, state = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    with pytest.raises(TypeError, match="one source of variance"):
        tx.update(estimate, state)


# ---- Factors ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_pole_of_the_reciprocal_is_bounded_by_the_rounding_unit(
    dtype: Any,
) -> None:
    eta2 = jnp.array([-0.5, 0.0, 1e-38, 4.0, jnp.inf], dtype)
    most = 1 / jnp.finfo(dtype).eps
    gamma = family.reciprocal(eta2)
    np.testing.assert_array_equal(gamma, jnp.array([most] * 3 + [0.5, 0.0], dtype))
    at_most = family.bounded(family.reciprocal, 3.0)(eta2)
    np.testing.assert_array_equal(at_most, jnp.array([3.0] * 3 + [0.5, 0.0], dtype))


@pytest.mark.parametrize(
    "factor",
    [
        family.reciprocal,
        family.bounded(family.reciprocal, 10.0),
        family.signal_to_noise(0.1),
    ],
    ids=["reciprocal", "bounded", "signal to noise"],
)
def test_factors_have_finite_values_and_derivatives(factor: Any) -> None:
    eta2 = jnp.array([0.0, 1e-38, 1e-30, 1e-12, 1e-2, 1.0, 1e12, 1e38, jnp.inf])
    gamma, slope = jax.vmap(jax.value_and_grad(factor))(eta2)
    assert np.all(np.isfinite(gamma))
    assert np.all(np.isfinite(slope))
    assert np.all(gamma >= 0)


def test_the_signal_to_noise_ratio_leaves_certain_elements_alone() -> None:
    factor = family.signal_to_noise(0.1)
    alone = factor(jnp.array([1.0, 4.0]))
    with_certain = factor(jnp.array([1.0, 4.0, 0.0]))
    np.testing.assert_allclose(with_certain, [*alone, 1.0])
    np.testing.assert_array_equal(factor(jnp.zeros(2)), 1.0)


# ---- Updates ----------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("nesterov", [False, True])
def test_heavy_ball_is_the_trace_of_optax(nesterov: bool) -> None:
    gradients = stream(2)
    ours = trajectory(family.heavy_ball(0.8, nesterov=nesterov), gradients)
    theirs = trajectory(optax.trace(0.8, nesterov=nesterov), gradients)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_clipping_keeps_the_phase_of_a_complex_element() -> None:
    tx = family.clip_by_schedule(lambda step: 2.0 + 0 * step)
    updates, _ = tx.update(jnp.array([3.0 + 4.0j]), tx.init(jnp.zeros(1, complex)))
    np.testing.assert_allclose(updates, [1.2 + 1.6j], rtol=1e-6)


def test_weight_decay_needs_parameters_only_if_there_is_some() -> None:
    gradient = jnp.ones(1)
    tx = family.add_decayed_weights(0.0)
    np.testing.assert_array_equal(tx.update(gradient, tx.init(gradient))[0], gradient)
    tx = family.add_decayed_weights(0.5)
    with pytest.raises(ValueError, match="needs the parameters, got None"):
        tx.update(gradient, tx.init(gradient))
    with pytest.raises(ValueError, match="`weight_decay` must not be negative"):
        family.add_decayed_weights(-0.5)


def test_weight_decay_takes_a_schedule_and_a_mask() -> None:
    params = {"matrix": jnp.full((1, 1), 4.0), "bias": jnp.full(1, 4.0)}
    tx = family.add_decayed_weights(
        lambda step: 0.5 * step, mask=lambda tree: {"matrix": True, "bias": False}
    )
    zeros, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    for expected in (0.0, 2.0):
        updates, state = tx.update(zeros, state, params)
        assert updates["matrix"][0, 0] == expected
        assert updates["bias"][0] == 0


def test_a_cautious_update_keeps_its_size_and_never_disagrees() -> None:
    tx = family.cautious(family.moving_average(0.9))
    gradients = stream(4, (50,)).astype(np.float32)
    updates = trajectory(tx, gradients)
    assert np.all(updates * gradients >= 0)
    assert np.mean(updates[-1] == 0) > 0.1
    bad = family.cautious(do.moving_average_estimate(0.9))
    state = bad.init(jnp.ones(1))
    with pytest.raises(TypeError, match="got an Estimate"):
        bad.update(jnp.ones(1), state)
    # Where nothing agrees nothing is divided by zero.
    against = family.cautious(optax.scale(-1.0))
    updates, _ = against.update(jnp.ones(2), against.init(jnp.ones(2)))
    np.testing.assert_array_equal(updates, 0.0)
