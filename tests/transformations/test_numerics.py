"""What floating point does to the formulas, and what the library does about it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from tests import oracles
from tests.transformations.streams import stream, trajectory

STATEFUL = {
    "svag": (do.svag, oracles.svag),
    "m_sgd": (do.m_sgd, oracles.m_sgd),
    "m_ssd": (do.m_ssd, oracles.m_ssd),
    "m_svag": (do.m_svag, oracles.m_svag),
    "adam": (do.adam, oracles.adam),
    "adam_star": (do.adam_star, oracles.adam_star),
}
MINIBATCH = {
    "m_svag_mb": (do.m_svag_mb, oracles.m_svag_mb),
    "adam_star_mb": (do.adam_star_mb, oracles.adam_star_mb),
}
ADAPTED = {
    "svag": do.svag,
    "m_svag": do.m_svag,
    "m_svag debiased": lambda lr: do.m_svag(lr, debias_variance=True),
    "adam": do.adam,
    "adam without eps": lambda lr: do.adam(lr, eps=0.0),
    "adam_star": do.adam_star,
    "m_svag_mb": do.m_svag_mb,
    "adam_star_mb": do.adam_star_mb,
}


def variances_for(make: Any, gradients: np.ndarray) -> np.ndarray | None:
    """Mini-batch variances, half of g², for the optimizers that want some."""
    if make not in (do.m_svag_mb, do.adam_star_mb):
        return None
    return np.square(np.abs(gradients)) / 2


# ---- Cancellation -----------------------------------------------------------------


def cancelling_stream(kind: str = "noise", steps: int = 300) -> np.ndarray:
    """1000 ± 0.001: one standard deviation is sixteen float32 numbers wide."""
    rng = np.random.default_rng(0)
    shape = (steps, 400)
    spread = rng.normal(size=shape) if kind == "noise" else rng.choice([-1, 1], shape)
    return (1000 + 1e-3 * spread).astype(np.float32)


def variance_error(decay: float, gradients: np.ndarray, t: int) -> np.ndarray:
    """Relative to the variance in float64 of the same float32 gradients."""
    _, variance = trajectory(do.moving_average_estimate(decay), gradients[:t])
    _, exact = oracles.mean_and_variance(decay, gradients[:t].astype(np.float64))
    assert np.all(np.isfinite(variance))
    assert np.all(variance >= 0)
    return (variance[-1] - exact) / np.mean(exact)


@pytest.mark.parametrize("kind", ["noise", "signs"])
@pytest.mark.parametrize("t", [30, 300])
def test_variance_of_a_cancelling_stream(kind: str, t: int) -> None:
    """Right to 1 % on average; single elements see the rounding of their mean.

    The mean moves in steps of 6e-5, a sixteenth of the deviation.
    """
    error = variance_error(0.9, cancelling_stream(kind), t)
    assert abs(np.mean(error)) < 0.01
    assert np.sqrt(np.mean(error**2)) < 0.03
    assert np.max(np.abs(error)) < 0.15


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999])
def test_variance_of_a_cancelling_stream_with_other_decays(decay: float) -> None:
    error = variance_error(decay, cancelling_stream(), 300)
    assert abs(np.mean(error)) < 0.04
    assert np.max(np.abs(error)) < 0.3


def test_the_subtraction_would_have_lost_all_digits() -> None:
    """So that the tests above are known to tell the two apart."""
    gradients = cancelling_stream()
    m = trajectory(optax.ema(0.9), gradients)[-1]
    v = trajectory(optax.ema(0.9), np.square(gradients))[-1]
    _, exact = oracles.mean_and_variance(0.9, gradients.astype(np.float64))
    error = (v - np.square(m) - exact) / np.mean(exact)
    assert np.min(v - np.square(m)) < 0
    assert np.sqrt(np.mean(error**2)) > 1


@pytest.mark.parametrize("name", ["m_svag", "svag", "adam_star"])
def test_optimizers_on_a_cancelling_stream(name: str) -> None:
    make, oracle = STATEFUL[name]
    gradients = cancelling_stream(steps=50)[:, :8]
    expected = oracle(gradients.astype(np.float64), 1.0)
    np.testing.assert_allclose(trajectory(make(1.0), gradients), expected, rtol=1e-6)


# ---- Zeros, first steps, sizes ----------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ADAPTED)
def test_gradients_of_exactly_zero_give_updates_of_exactly_zero(
    name: str, dtype: Any
) -> None:
    make = ADAPTED[name]
    zeros = np.zeros((3, 2), dtype)
    updates = trajectory(make(1.0), zeros, variances_for(make, zeros))
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates.astype(np.float32), 0)


@pytest.mark.parametrize("name", ADAPTED)
def test_zeros_meet_no_nan_on_the_way_and_have_finite_derivatives(name: str) -> None:
    """Guarded divisions: nothing for `jax_debug_nans` to stop at, or to meta-learn."""
    tx, zeros = ADAPTED[name](1.0), jnp.zeros(2)

    def update(gradient: Any) -> Any:
        extra = {"grad_variance": gradient} if name.endswith("_mb") else {}
        return jnp.sum(tx.update(gradient, tx.init(zeros), **extra)[0])

    with jax.debug_nans(True):
        assert update(zeros) == 0
        assert np.all(np.isfinite(jax.grad(update)(zeros)))


@pytest.mark.parametrize("accumulator_dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-60])
def test_zeros_where_eps_underflows_in_the_accumulators(
    eps: float, accumulator_dtype: Any
) -> None:
    tx = do.adam(1.0, eps=eps, accumulator_dtype=accumulator_dtype)
    zeros = np.zeros((3, 2), np.float16)
    np.testing.assert_array_equal(trajectory(tx, zeros), zeros)


@pytest.mark.parametrize("eps", [1e-8, 0.0, 1e-60])
def test_adam_with_a_traced_eps_equals_adam_with_a_number(eps: float) -> None:
    gradients = np.concatenate([np.zeros((5, 4)), stream(0)]).astype(np.float32)
    traced = jax.jit(lambda eps: trajectory_of_adam(eps, gradients))(eps)
    np.testing.assert_allclose(traced, trajectory_of_adam(eps, gradients), rtol=1e-6)


def trajectory_of_adam(eps: Any, gradients: np.ndarray) -> Any:
    return scanned(do.adam(1.0, eps=eps), gradients)


def scanned(tx: optax.GradientTransformation, gradients: np.ndarray) -> jax.Array:
    """As `trajectory`, but open to traced hyperparameters."""

    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state)
        return state, updates

    return jax.lax.scan(step, tx.init(jnp.asarray(gradients[0])), gradients)[1]


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1.0, 1e12])
@pytest.mark.parametrize("name", ADAPTED)
def test_first_step_is_the_whole_direction(name: str, size: float) -> None:
    make = ADAPTED[name]
    gradient = (size * np.array([[1.0, -0.3, 0.0, 2.0]])).astype(np.float32)
    variance = np.zeros_like(gradient) if name.endswith("_mb") else None
    updates = trajectory(make(1.0), gradient, variance)[0]
    direction = -np.sign(gradient) if "adam" in name else -gradient
    if name == "adam":
        direction = -gradient / (np.abs(gradient) + 1e-8)
    # Adam takes the root of a square that has no normal number below 1e-19.
    np.testing.assert_allclose(updates, direction[0], rtol=2e-6)


@pytest.mark.parametrize("size", [1e-16, 1e-9, 1e6, 1e12, 1e17])
@pytest.mark.parametrize("name", [*STATEFUL, *MINIBATCH])
def test_trajectories_of_every_size(name: str, size: float) -> None:
    """From 1e-16 to 1e12, and above, the updates in float32 are those of float64."""
    make, oracle = {**STATEFUL, **MINIBATCH}[name]
    # Steps of unit size, without the zeros and signs that round to either side. None is
    # less than a tenth of `size`: what svag does to still smaller ones is tested below.
    rng = np.random.default_rng(7)
    noise = np.maximum(rng.normal(size=(40, 6)), -1.8)
    gradients = (size * (1 + 0.5 * noise)).astype(np.float32)
    variances = variances_for(make, gradients)
    wide = [g.astype(np.float64) for g in (gradients, variances) if g is not None]
    expected = oracle(*wide, learning_rate=1.0)
    actual = trajectory(make(1.0), gradients, variances)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5 * scale)


def test_svag_loses_the_variance_of_small_gradients_only() -> None:
    """η²|g|² below the smallest normal number counts as zero, η² being known or not.

    γ is then wrong by less than `tiny`/g², and the update by less than `tiny`/|g|.
    """
    ordinary = np.tile([1.0, 0.7, 1.6, 0.9], 5)[:, None] * 1e-12
    small = np.geomspace(1.2e-19, 1e-14, 200)[None]
    gradients = np.concatenate([np.tile(ordinary, 200), small]).astype(np.float32)
    expected = STATEFUL["svag"][1](gradients.astype(np.float64), learning_rate=1.0)[-1]
    error = np.abs(trajectory(do.svag(1.0), gradients)[-1] - expected)
    lost = float(jnp.finfo(jnp.float32).tiny) / small[0]
    assert np.all(error <= lost + 2e-5 * np.abs(expected))
    assert np.max(error / np.abs(expected)) > 0.01  # It is lost, in the smallest.


@pytest.mark.parametrize("name", ADAPTED)
def test_sizes_mixed_in_one_stream_leave_no_nan(name: str) -> None:
    """Jumps over all sizes, both ways, in steps and in coordinates."""
    make = ADAPTED[name]
    rng = np.random.default_rng(8)
    sizes = 10.0 ** rng.uniform(-18, 12, size=(80, 40))
    gradients = (sizes * rng.choice([-1, 0, 1], size=sizes.shape)).astype(np.float32)
    updates = trajectory(make(1.0), gradients, variances_for(make, gradients))
    assert np.all(np.isfinite(updates))
    assert np.max(np.abs(updates)) <= np.sum(np.abs(gradients), axis=0).max()


@pytest.mark.parametrize("after", ["zeros", "decay"])
@pytest.mark.parametrize("name", ADAPTED)
def test_streams_that_decay_to_underflow_leave_no_nan(name: str, after: str) -> None:
    """Dead units under L2: averages sink through every size down to zero."""
    make = ADAPTED[name]
    rng = np.random.default_rng(9)
    start = rng.normal(size=(10, 6))
    # From 1 down to 1e-60 in the one case; momentum itself decays in the other.
    sizes = np.geomspace(1, 1e-60, 900)[:, None] * (after == "decay")
    tail = sizes * (1 + rng.normal(size=(900, 6)))
    gradients = np.concatenate([start, tail]).astype(np.float32)
    updates = trajectory(make(1.0), gradients, variances_for(make, gradients))
    assert np.all(np.isfinite(updates))
    assert np.all(np.abs(updates) <= np.maximum(1, 10 * np.abs(gradients).max()))


# ---- Two decays, and one step of one ----------------------------------------------


@pytest.mark.parametrize("slow_mean", [False, True])
def test_adam_stays_adam_where_its_variance_is_negative(slow_mean: bool) -> None:
    """A sudden rise: v has seen a thousandth of it, m a tenth."""
    gradients = np.full((40, 2), 1e-3)
    gradients[20:] = [1.0, 1e3]
    gradients = gradients.astype(np.float32)
    b1, b2 = (0.9, 0.999) if not slow_mean else (0.5, 0.9999)
    _, variance = trajectory(do.moving_average_estimate(b1, b2), gradients)
    assert np.all(variance[25:] < 0)
    expected = oracles.adam(gradients.astype(np.float64), 1.0, b1, b2)
    assert np.max(np.abs(expected)) > 1.2
    actual = trajectory(do.adam(1.0, b1, b2), gradients)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_adam_stays_adam_where_the_second_moment_is_nearly_nothing() -> None:
    """v ≪ m²: 1 + η² = v/m² would be lost in rounding if it came from v - m²."""
    b1, b2 = 0.0, 0.9999999
    gradients = np.concatenate([np.full((30, 1), 1e-6), np.ones((1, 1))])
    gradients = gradients.astype(np.float32)
    ours = trajectory(do.adam(1.0, b1, 0.999, eps=0.0), gradients)
    expected = oracles.adam(gradients.astype(np.float64), 1.0, b1, 0.999, eps=0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    state = do.TwoMovingAveragesEstimateState(
        jnp.int32(10**6), jnp.zeros(1), jnp.zeros(1)
    )
    estimator = do.moving_average_estimate(b1, b2, eps=0.0)
    tx = optax.chain(
        estimator, do.scale_by_sign(), do.adapt_to_variance(do.inverse_sqrt)
    )
    # The newest gradient has the weight w in v, so that m/√v = 1/√w, about 1000. In
    # 1 + η² = w three digits remain, half of the error in its root.
    updates, _ = tx.update(jnp.ones(1), (state, *tx.init(jnp.zeros(1))[1:]))
    decay = float(np.float32(b2))
    weight = (1 - decay) / -np.expm1((10**6 + 1) * np.log(decay))
    np.testing.assert_allclose(updates, [weight**-0.5], rtol=0.05)


def test_debias_variance_in_the_first_steps() -> None:
    gradients = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    tx = do.moving_average_estimate(0.9, debias_variance=True)
    _, variance = trajectory(tx, gradients)
    np.testing.assert_array_equal(variance[0], [0, 0])
    # Two gradients, nearly equal weights: nearly the sample variance, 2.
    weights = np.array([0.9, 1.0]) / 1.9
    expected = np.prod(weights) * 4 / (1 - np.sum(weights**2))
    np.testing.assert_allclose(variance[1], [expected, 0], rtol=1e-5)
    updates = trajectory(do.m_svag(1.0, debias_variance=True), gradients)
    np.testing.assert_array_equal(updates[0], -gradients[0])


# ---- Low precision ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", [*STATEFUL, *MINIBATCH])
def test_low_precision_gradients_lose_digits_once_only(name: str, dtype: Any) -> None:
    """Accumulated in float32, rounded at the end: half a unit in the last place."""
    make, oracle = {**STATEFUL, **MINIBATCH}[name]
    gradients = stream(11, (6,), steps=200).astype(dtype)
    variances = variances_for(make, gradients.astype(np.float32))
    wide = [g.astype(np.float64) for g in (gradients, variances) if g is not None]
    expected = oracle(*wide, learning_rate=1.0)
    actual = trajectory(make(1.0), gradients, variances)
    assert actual.dtype == dtype
    unit = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        actual.astype(np.float64), expected, rtol=0.51 * unit + 1e-4, atol=2e-5
    )


def test_low_precision_accumulators_would_have_lost_more() -> None:
    """So that the test above is known to tell them apart."""
    gradients = stream(11, (6,), steps=200).astype(jnp.bfloat16)
    expected = oracles.m_svag(gradients.astype(np.float64), 1.0)
    narrow = trajectory(do.m_svag(1.0, accumulator_dtype=jnp.bfloat16), gradients)
    error = np.abs(narrow.astype(np.float64) - expected)
    assert np.max(error / (np.abs(expected) + 1e-3)) > 0.02


def buffer_dtypes(state: Any) -> set[Any]:
    return {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.ndim}


@pytest.mark.parametrize("name", [*STATEFUL, *MINIBATCH])
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_buffers_are_float32_unless_told_otherwise(name: str, dtype: Any) -> None:
    make = {**STATEFUL, **MINIBATCH}[name][0]
    params = jnp.ones(3, dtype)
    assert buffer_dtypes(make(0.1).init(params)) == {jnp.dtype(jnp.float32)}
    narrow = make(0.1, accumulator_dtype=dtype)
    assert buffer_dtypes(narrow.init(params)) == {jnp.dtype(dtype)}


@pytest.mark.parametrize("name", [*STATEFUL, *MINIBATCH])
@pytest.mark.parametrize("accumulator_dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_accumulators_stay_narrow_and_finite(
    name: str, accumulator_dtype: Any
) -> None:
    make = {**STATEFUL, **MINIBATCH}[name][0]
    gradients = stream(12).astype(np.float32)
    tx = make(0.1, accumulator_dtype=accumulator_dtype)
    updates = trajectory(tx, gradients, variances_for(make, gradients))
    assert updates.dtype == np.float32
    assert np.all(np.isfinite(updates))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", [*STATEFUL, *MINIBATCH])
def test_wide_accumulators_for_float32_gradients(name: str) -> None:
    make, oracle = {**STATEFUL, **MINIBATCH}[name]
    gradients = stream(13).astype(np.float32)
    variances = variances_for(make, gradients)
    tx = make(0.1, accumulator_dtype=jnp.float64)
    assert buffer_dtypes(tx.init(jnp.asarray(gradients[0]))) == {jnp.dtype(jnp.float64)}
    wide = [g.astype(np.float64) for g in (gradients, variances) if g is not None]
    actual = trajectory(tx, gradients, variances)
    assert actual.dtype == np.float32
    expected = oracle(*wide, learning_rate=0.1)
    np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=1e-12)


def test_accumulators_of_complex_leaves_are_complex_and_real() -> None:
    params = jnp.ones(2, jnp.complex64)
    for accumulator_dtype in (None, jnp.float32, jnp.bfloat16):
        tx = do.moving_average_estimate(accumulator_dtype=accumulator_dtype)
        state = tx.init(params)
        assert state.mean.dtype == jnp.complex64
        assert state.variance.dtype == jnp.float32


# ---- Numbers and traced values ----------------------------------------------------

NUMBERS: dict[str, tuple[Callable[..., Any], tuple[float, ...]]] = {
    "svag": (lambda b: do.svag(1.0, b), (0.9,)),
    "m_sgd": (lambda b: do.m_sgd(1.0, b), (0.9,)),
    "m_svag": (lambda b: do.m_svag(1.0, b), (0.999,)),
    "m_svag debiased": (lambda b: do.m_svag(1.0, b, debias_variance=True), (0.999,)),
    "adam": (lambda b1, b2: do.adam(1.0, b1, b2), (0.9, 0.999)),
    "adam with a slow second moment": (
        lambda b1, b2: do.adam(1.0, b1, b2),
        (0.9, 0.99999),
    ),
    "adam_star": (lambda b: do.adam_star(1.0, b), (0.99,)),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_and_a_traced_value_agree_to_the_last_digits(name: str) -> None:
    make, numbers = NUMBERS[name]
    gradients = np.abs(stream(14)).astype(np.float32) + np.float32(0.1)
    plain = jax.jit(lambda g: scanned(make(*numbers), g))(gradients)
    traced = jax.jit(lambda b, g: scanned(make(*b), g))(numbers, gradients)
    # XLA rounds the two differently. In `svag`, which has the most operations, each is
    # within 3 units of float64.
    np.testing.assert_array_max_ulp(np.asarray(plain), np.asarray(traced), maxulp=6)


def test_optax_adam_would_not_pass_this() -> None:
    """1 - 0.999 and 1 - float32(0.999) differ by 1e-5, which is why it is tested."""
    gradients = np.abs(stream(14)).astype(np.float32) + np.float32(0.1)

    def run(b2: Any, g: Any) -> Any:
        return scanned(optax.adam(1.0, b2=b2), g)

    plain = jax.jit(lambda g: run(0.999, g))(gradients)
    traced = jax.jit(run)(0.999, gradients)
    difference = np.abs(np.asarray(plain) / np.asarray(traced) - 1)
    assert np.max(difference) > 4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("decay", [0.999, 0.99999])
def test_weights_of_a_slow_average_keep_their_digits(decay: float) -> None:
    """1 - β and 1 - β^t, each a small difference of numbers next to one."""
    gradients = np.arange(1.0, 31.0, dtype=np.float32)[:, None]
    mean, variance = trajectory(do.moving_average_estimate(decay), gradients)
    rounded = float(np.float32(decay))
    m, s = oracles.mean_and_variance(rounded, gradients.astype(np.float64))
    np.testing.assert_allclose(mean[-1], m, rtol=1e-6)
    np.testing.assert_allclose(variance[-1], s, rtol=1e-5)


# ---- NaN --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTED)
def test_nan_stays_in_its_coordinate(name: str) -> None:
    make = ADAPTED[name]
    gradients = stream(15).astype(np.float32)
    clean = trajectory(make(1.0), gradients, variances_for(make, gradients))
    gradients[20, 1] = np.nan
    updates = trajectory(make(1.0), gradients, variances_for(make, gradients))
    np.testing.assert_array_equal(np.isnan(updates[20]), [False, True, False, False])
    others = [0, 2, 3]
    np.testing.assert_array_equal(updates[:, others], clean[:, others])


@pytest.mark.parametrize("name", ["m_svag_mb", "adam_star_mb"])
def test_nan_in_a_variance_is_not_hidden(name: str) -> None:
    gradients = stream(15).astype(np.float32) + np.float32(0.01)
    variances = np.square(gradients)
    variances[20, 1] = np.nan
    updates = trajectory(ADAPTED[name](1.0), gradients, variances)
    np.testing.assert_array_equal(np.isnan(updates[20]), [False, True, False, False])


# ---- The whole chain in wide numbers ----------------------------------------------


@pytest.mark.parametrize("name", ["m_sgd", "m_svag_mb"])
def test_a_float16_momentum_may_exceed_float16(name):
    optimizer = getattr(do, name)(0.1)
    gradient = jnp.full(2, 3e4, jnp.float16)
    state = optimizer.init(gradient)
    extra = {} if name == "m_sgd" else {"grad_variance": jnp.zeros(2)}
    for _ in range(5):
        updates, state = optimizer.update(gradient, state, **extra)
    # 3e4 (1 + 0.9 + … + 0.9⁴) is above the largest float16, 65504; a tenth is not.
    np.testing.assert_allclose(np.asarray(updates, np.float64), -12285.3, rtol=2e-3)


def test_an_array_as_learning_rate_keeps_the_dtype():
    gradient = jnp.ones(2, jnp.bfloat16)
    optimizer = do.sgd(jnp.float32(0.1))
    updates, _ = optimizer.update(gradient, optimizer.init(gradient))
    assert updates.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["adam", "svag", "m_svag"])
def test_a_square_that_overflows_silences_its_element_only(name):
    optimizer = getattr(do, name)(1.0)
    gradients = jnp.array([[1.0, 1e20], [1.0, 1.0], [1.0, 1.0]])
    state = optimizer.init(gradients[0])
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state)
        assert not jnp.isnan(updates).any()
    np.testing.assert_allclose(updates[0], -1.0, rtol=1e-5)


def test_a_negative_attached_variance_counts_as_zero():
    optimizer = do.m_svag_mb(1.0)
    gradient = jnp.ones(2)
    variance = jnp.array([-1e-3, 0.0])
    updates, _ = optimizer.update(
        gradient, optimizer.init(gradient), grad_variance=variance
    )
    np.testing.assert_array_equal(updates, [-1.0, -1.0])


@pytest.mark.parametrize("name", ["sgd", "ssd", "svag", "m_sgd", "m_svag", "adam"])
def test_python_numbers_are_gradients_too(name):
    optimizer = getattr(do, name)(0.5)
    updates, _ = optimizer.update({"a": 1.0}, optimizer.init({"a": 1.0}))
    np.testing.assert_allclose(updates["a"], -0.5, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_an_alternating_stream_that_cancels_is_right_to_two_percent(decay):
    gradients = (1000 + 1e-3 * (-1.0) ** np.arange(2000)).astype(np.float32)
    tx = do.moving_average_estimate(decay)

    def step(state, gradient):
        estimate, state = tx.update(gradient, state)
        return state, estimate.variance

    _, variances = jax.lax.scan(step, tx.init(gradients[0]), gradients)
    exact = np.asarray(gradients, np.float64)
    for t in (50, 51, 1999, 2000):
        weights = float(np.float32(decay)) ** np.arange(t - 1, -1, -1)
        mean = np.average(exact[:t], weights=weights)
        variance = np.average((exact[:t] - mean) ** 2, weights=weights)
        np.testing.assert_allclose(variances[t - 1], variance, rtol=0.025)


# ---- Long after the last gradient ---------------------------------------------------


@pytest.mark.parametrize("size", [1e-10, 1e-3, 1e3])
@pytest.mark.parametrize(
    "make",
    [do.adam_star, lambda lr: do.adam(lr, 0.9, 0.9, eps=0.0), do.adam_star_mb],
    ids=["adam_star", "adam", "adam_star_mb"],
)
def test_no_sign_method_steps_along_what_is_left_of_an_average(
    make: Any, size: float
) -> None:
    """The variance underflows first: what is left of the mean looks like a sure one."""
    gradients = np.zeros((1300, 3), np.float32)
    gradients[:50] = size * (1 + 0.1 * stream(16, (3,), steps=50))
    variances = np.square(gradients) if make is do.adam_star_mb else None
    updates = trajectory(make(1.0), gradients, variances)
    assert np.max(np.abs(updates[:50])) > 0.1
    assert np.max(np.abs(updates[700:])) < 1e-12


def test_a_row_seen_once_moves_as_in_float64() -> None:
    gradients = np.zeros((1200, 1), np.float32)
    gradients[0] = 1e-3
    moved = np.sum(np.abs(trajectory(do.adam_star(1.0), gradients)))
    expected = np.sum(np.abs(oracles.adam_star(gradients.astype(np.float64), 1.0)))
    np.testing.assert_allclose(moved, expected, rtol=1e-4)
