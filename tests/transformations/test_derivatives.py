"""Derivatives of updates, as meta-learning takes them: right, and never NaN."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dissect_optax as do
from tests.transformations.streams import stream

pytestmark = pytest.mark.usefixtures("quick_compilation")

Make = Callable[..., optax.GradientTransformation]


# name -> (optimizer of its decays, their values, whether it wants a variance)
METHODS: dict[str, tuple[Make, tuple[float, ...], bool]] = {
    "svag": (lambda b: do.svag(1.0, b), (0.9,), False),
    "svag debiased": (lambda b: do.svag(1.0, b, debias_variance=True), (0.9,), False),
    "m_sgd": (lambda b: do.m_sgd(1.0, b), (0.9,), False),
    "m_svag": (lambda b: do.m_svag(1.0, b), (0.9,), False),
    "m_svag debiased": (
        lambda b: do.m_svag(1.0, b, debias_variance=True),
        (0.9,),
        False,
    ),
    "adam": (lambda b1, b2: do.adam(1.0, b1, b2), (0.9, 0.999), False),
    "adam without eps": (
        lambda b1, b2: do.adam(1.0, b1, b2, eps=0.0),
        (0.9, 0.999),
        False,
    ),
    "adam_star": (lambda b: do.adam_star(1.0, b), (0.9,), False),
    "one decay with eps": (
        lambda b, eps: optax.chain(
            do.moving_average_estimate(b, eps=eps), do.adapt_to_variance()
        ),
        (0.9, 0.1),
        False,
    ),
    "gaussian_sign": (
        lambda b: optax.chain(
            do.with_relative_variance_of(do.moving_average_estimate(b)),
            do.scale_by_sign(),
            do.adapt_to_variance(do.gaussian_sign),
        ),
        (0.9,),
        False,
    ),
    "m_svag_mb": (lambda b: do.m_svag_mb(1.0, b), (0.9,), True),
    "adam_star_mb": (lambda b: do.adam_star_mb(1.0, b), (0.9,), True),
}
every_method = pytest.mark.parametrize("name", METHODS)


def last_update(name: str, gradients: Any, variances: Any, *decays: Any) -> jax.Array:
    """The update after the last of these gradients."""
    tx = optax.with_extra_args_support(METHODS[name][0](*decays))
    state = tx.init(gradients[0])
    for gradient, variance in zip(gradients, variances, strict=True):
        updates, state = tx.update(gradient, state, grad_variance=variance)
    return updates


@functools.cache
def loss(name: str, slope: bool = False) -> Callable[..., Any]:
    """A weighted sum of the last update, or all derivatives of it, compiled once."""

    def value(gradients: Any, variances: Any, *decays: Any) -> jax.Array:
        updates = last_update(name, gradients, variances, *decays)
        weights = jnp.arange(1, updates.size + 1, dtype=updates.dtype)
        return jnp.sum(weights * updates)

    numbers = tuple(range(2 + len(METHODS[name][1])))
    return jax.jit(jax.grad(value, argnums=numbers) if slope else value)


def all_derivatives(name: str, *arguments: Any) -> Any:
    return loss(name, slope=True)(*arguments)


def difference_quotient(
    f: Callable[..., Any], arguments: list[Any], which: int, one_sided: bool
) -> np.ndarray:
    """By central differences, or by one-sided ones of second order; in float64."""
    x = np.asarray(arguments[which], np.float64)
    slope, h = np.zeros(x.shape), 1e-5

    def at(index: Any, step: float) -> float:
        moved = x.copy()
        moved[index] += step
        return float(
            f(*[*arguments[:which], jnp.asarray(moved), *arguments[which + 1 :]])
        )

    for index in np.ndindex(x.shape):
        if one_sided:
            ends = -3 * at(index, 0) + 4 * at(index, h) - at(index, 2 * h)
            slope[index] = ends / (2 * h)
        else:
            slope[index] = (at(index, h) - at(index, -h)) / (2 * h)
    return slope


@pytest.mark.usefixtures("x64")
@every_method
@pytest.mark.parametrize("decay", ["usual", 0.5, 0.0])
def test_derivatives_are_those_of_finite_differences(
    name: str, decay: str | float
) -> None:
    decays = METHODS[name][1]
    if decay != "usual":
        decays = tuple(float(decay) for _ in decays)
    if name.endswith("debiased") and decay == 0:
        pytest.skip("s/(1-κ) jumps from 0/0, taken as zero, at a decay of zero")
    gradients = jnp.asarray(2 + stream(0, (2,), steps=4))
    variances = jnp.asarray(0.5 + stream(1, (2,), steps=4) ** 2)
    arguments = [gradients, variances, *map(jnp.asarray, decays)]
    derivatives = all_derivatives(name, *arguments)
    for which, derivative in enumerate(derivatives):
        at_zero = which >= 2 and decay == 0
        expected = difference_quotient(loss(name), arguments, which, at_zero)
        np.testing.assert_allclose(derivative, expected, rtol=2e-5, atol=2e-7)


SIZES = [0.0, 1e-30, 1e-21, 1e-19, 1e-16, 1e-8, 1.0, 1e12, 1e19, 1e21, 1e30]


@every_method
@pytest.mark.parametrize("decay", ["usual", 0.0])
def test_no_size_of_gradient_makes_a_derivative_nan(
    name: str, decay: str | float
) -> None:
    decays = METHODS[name][1]
    if decay != "usual":
        decays = tuple(0.0 for _ in decays)
    signs = jnp.array([[1.0, -1.0, 1.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    for steps, size in itertools.product((1, 3), SIZES):
        gradients = size * signs[:steps]
        variances, numbers = jnp.square(gradients), map(jnp.float32, decays)
        for derivative in all_derivatives(name, gradients, variances, *numbers):
            assert not np.any(np.isnan(derivative)), size
            if 1e-16 <= size <= 1e12 or size == 0:
                assert np.all(np.isfinite(derivative)), size


@pytest.mark.parametrize("factor", [do.inverse, do.inverse_sqrt, do.gaussian_sign])
def test_factors_have_finite_derivatives(factor: Callable[[Any], Any]) -> None:
    eta2 = jnp.array([0.0, 1e-38, 1e-30, 1e-26, 1e-12, 1e-2, 1.0, 1e12, 1e38, jnp.inf])
    slope = jax.vmap(jax.grad(factor))(eta2)
    assert np.all(np.isfinite(slope))
    assert np.all(slope <= 0)
    assert slope[6] < -0.1


@pytest.mark.usefixtures("x64")
def test_the_derivative_of_gaussian_sign_is_that_of_the_error_function() -> None:
    eta2 = np.geomspace(1e-4, 1e3, 40)
    slope = jax.vmap(jax.grad(do.gaussian_sign))(jnp.asarray(eta2))
    expected = -np.exp(-1 / (2 * eta2)) / np.sqrt(2 * np.pi) * eta2**-1.5
    np.testing.assert_allclose(slope, expected, rtol=1e-9, atol=1e-17)


@pytest.mark.parametrize("name", ["m_svag_mb", "adam_star_mb"])
def test_derivative_by_a_variance_of_zero_is_the_whole_one(name: str) -> None:
    """It was half of it, as the derivative of max(x, 0) is at zero."""
    gradient = jnp.array([2.0])

    def update(variance: Any) -> Any:
        return last_update(name, [gradient], [variance], 0.9)[0]

    whole = {"m_svag_mb": 1 / 2, "adam_star_mb": 1 / 8}[name]
    np.testing.assert_allclose(jax.grad(update)(jnp.zeros(1)), [whole], rtol=1e-6)


def exact_slopes(decay: float, t: int) -> tuple[float, float]:
    """dw/dβ and dκ/dβ in float64: of w = 1/Σβ^i and κ = Σβ^2i/(Σβ^i)², as sums."""
    i, total = np.arange(t), np.sum(decay ** np.arange(t))
    weight = -np.sum(i[1:] * decay ** (i[1:] - 1.0)) / total**2
    # Σ_i Σ_j 2(i-j) β^(2i+j-1), each pair i > j with its mirror image: one sign.
    i, j = np.nonzero(np.arange(t)[:, None] > np.arange(t)[None, :])
    pairs = decay ** (i + 2.0 * j - 1) * np.expm1((i - j) * np.log(max(decay, 1e-300)))
    return weight, np.sum(2 * (i - j) * pairs) / total**3


@jax.jit
def slopes(decay: Any, count: Any) -> tuple[Any, Any]:
    """dw/dβ and dκ/dβ at step count+1, as they multiply ones."""
    one, zero = jnp.ones(()), jnp.zeros(())

    def kappa(momentum: Any) -> Any:
        state = do.CorrectForMomentumState(count)
        tx = do.correct_for_momentum(momentum)
        return tx.update(do.Estimate(one, one), state)[0].variance

    def weight(decay: Any) -> Any:
        state = do.MovingAverageEstimateState(count, zero, zero)
        return do.moving_average_estimate(decay).update(one, state)[0].mean

    return jax.grad(weight)(decay), jax.grad(kappa)(decay)


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.5, 0.9, 0.99, 0.999, 0.999999])
def test_slopes_of_the_weight_and_of_kappa_in_float32(decay: float) -> None:
    for t in (1, 2, 3, 10, 200):
        actual = slopes(np.float32(decay), jnp.int32(t - 1))
        expected = exact_slopes(float(np.float32(decay)), t)
        np.testing.assert_allclose(actual, expected, rtol=2e-4, atol=1e-12)


def test_a_step_size_and_decays_can_be_learned_through_an_update() -> None:
    """A few steps of gradient descent on them improve the parameters after training."""

    def after_training(logits: Any) -> Any:
        rate, decay = jnp.exp(logits["rate"]), jax.nn.sigmoid(logits["decay"])
        tx = do.m_svag(rate, decay)

        def step(carry: Any, noise: Any) -> Any:
            params, state = carry
            updates, state = tx.update(params + noise, state)
            return (optax.apply_updates(params, updates), state), None

        noises = jax.random.normal(jax.random.key(0), (20, 3))
        start = jnp.array([5.0, -5.0, 0.0])
        (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), noises)
        return jnp.sum(jnp.square(params))

    logits = {"rate": jnp.log(0.01), "decay": jnp.float32(2.0)}
    slope = jax.jit(jax.value_and_grad(after_training))
    first, _ = slope(logits)
    for _ in range(10):
        _, gradient = slope(logits)
        logits = jax.tree.map(lambda p, g: p - 0.1 * jnp.sign(g), logits, gradient)
    assert slope(logits)[0] < 0.5 * first
