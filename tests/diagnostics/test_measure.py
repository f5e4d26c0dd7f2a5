"""`measure` against closed forms, exact Hessians and planted noise."""

import functools
import io
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dissect_optax import theory
from dissect_optax.diagnostics import Diagnostics, measure

DIRECTIONS = ("gradient", "sign", "adapted_gradient", "adapted_sign")


# ---- Stochastic quadratics ---------------------------------------------------------


PROBLEM = theory.quadratic_problem(
    jnp.logspace(0, 1, 8), theory.random_rotation(jax.random.key(0), 8), noise=1.0
)
THETA = jax.random.normal(jax.random.key(1), (8,))


def quadratic_loss(theta: jax.Array, x: jax.Array) -> jax.Array:
    return 0.5 * (theta - x) @ PROBLEM.hessian @ (theta - x)


def quadratic_data(seed: int, examples: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(examples, 8)).astype(np.float32)


def closed_forms(batch_size: int) -> dict[str, float]:
    gradient = PROBLEM.gradient(THETA)
    std = PROBLEM.gradient_std / math.sqrt(batch_size)
    covariance = PROBLEM.gradient_covariance / batch_size
    factor = theory.optimal_factor(gradient, std)
    directions = {
        "gradient": theory.gaussian_direction(gradient, covariance),
        "sign": theory.sign_direction(gradient, covariance),
        "adapted_gradient": theory.gaussian_direction(gradient, covariance, factor),
        "adapted_sign": theory.sign_direction(
            gradient, covariance, theory.adam_factor(gradient, std)
        ),
    }
    ratio = float(jnp.sum(std**2) / jnp.sum(gradient**2))
    return {
        "noise_scale": batch_size * ratio,
        "relative_variance": ratio,
        "sign_success": float(theory.success_probability(gradient, std).mean()),
        "dominance": float(PROBLEM.diagonal_dominance),
        **{
            name: float(
                theory.expected_improvement(direction, gradient, PROBLEM.hessian)
            )
            for name, direction in directions.items()
        },
    }


@functools.cache
def quadratic_diagnostics() -> Diagnostics:
    data = quadratic_data(0, 8 * 512)
    return measure(
        quadratic_loss, THETA, data, batch_size=8, level="full", max_batches=None
    )


def test_quadratic_in_closed_form() -> None:
    d, truth = quadratic_diagnostics(), closed_forms(8)
    assert d.noise_scale.value == pytest.approx(truth["noise_scale"], rel=0.1)
    assert d.relative_variance.value == pytest.approx(
        truth["relative_variance"], rel=0.1
    )
    assert d.sign_success.value == pytest.approx(truth["sign_success"], abs=0.02)
    assert d.predicted_sign_success == pytest.approx(truth["sign_success"], abs=0.02)
    for name in DIRECTIONS:
        interval = d.improvement[name]
        assert interval.value == pytest.approx(truth[name], rel=0.1)
        assert interval.high - interval.low < 0.5 * truth[name]
    assert d.dominance is not None
    # Eight columns: all of them, so that nothing is estimated.
    assert d.dominance.value == pytest.approx(truth["dominance"], rel=1e-4)
    assert d.dominance.low == d.dominance.value == d.dominance.high
    assert not [w for w in d.warnings if w.name == "EstimatorsDisagree"]


def test_intervals_cover_the_truth_and_not_something_else() -> None:
    """In 40 repetitions; the 400 of every interval are a benchmark's."""
    truth = closed_forms(8)
    right, wrong = dict.fromkeys(truth, 0), dict.fromkeys(truth, 0)
    names = ("noise_scale", "sign_success", *DIRECTIONS)
    for seed in range(40):
        data = quadratic_data(seed, 8 * 24)
        key = jax.random.key(seed)
        d = measure(quadratic_loss, THETA, data, batch_size=8, level="normal", key=key)
        found = {
            "noise_scale": d.noise_scale,
            "sign_success": d.sign_success,
            **d.improvement,
        }
        for name, interval in found.items():
            right[name] += interval.low <= truth[name] <= interval.high
            wrong[name] += interval.low <= 1.5 * truth[name] <= interval.high
    # Of 95 %, 33 or fewer have a probability of one in a thousand, of 70 % one half.
    assert {name: right[name] for name in names if right[name] <= 33} == {}
    assert {name: wrong[name] for name in names if wrong[name] > 30} == {}


def test_improvements_are_those_of_the_next_step() -> None:
    """The gain of a step along the sign with the best step size, by trying."""
    truth = closed_forms(8)
    data = quadratic_data(5, 8 * 4000).reshape(4000, 8, 8)
    gradients = jax.vmap(
        lambda batch: jax.vmap(jax.grad(quadratic_loss), (None, 0))(THETA, batch).mean(
            0
        )
    )(data)
    steps = jnp.linspace(0.0, 1.0, 101)

    def loss_after(step: jax.Array) -> jax.Array:
        moved = THETA[None] - step * jnp.sign(gradients)
        return jax.vmap(PROBLEM.excess_loss)(moved).mean()

    gain = PROBLEM.excess_loss(THETA) - jax.vmap(loss_after)(steps).min()
    assert float(gain) == pytest.approx(truth["sign"], rel=0.05)
    assert quadratic_diagnostics().improvement["sign"].value == pytest.approx(
        float(gain), rel=0.12
    )


def test_contributions_of_parameters_add_up() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return quadratic_loss(jnp.concatenate([params["a"], params["b"]]), x)

    params = {"a": THETA[:3], "b": THETA[3:]}
    d = measure(loss, params, quadratic_data(0, 512), batch_size=8, level="full")
    assert list(d.layers) == ["a", "b"]
    for name in DIRECTIONS:
        parts = [layer.improvement[name].value for layer in d.layers.values()]
        assert sum(parts) == pytest.approx(d.improvement[name].value, rel=1e-4)
    block = np.abs(np.asarray(PROBLEM.hessian))[:3, :3]
    assert d.layers["a"].dominance is not None
    assert d.layers["a"].dominance.value == pytest.approx(
        np.trace(block) / block.sum(), rel=1e-4
    )


# ---- Planted noise -----------------------------------------------------------------


def linear_loss(theta: jax.Array, x: jax.Array) -> jax.Array:
    return theta @ x


def planted(
    eta2: float, size: int, examples: int, batch_size: int, seed: int = 0
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = math.sqrt(eta2 * batch_size) * rng.normal(size=(examples, size))
    return (1.0 + noise).astype(np.float32)


@pytest.mark.parametrize("eta2", [0.25, 1.0, 9.0])
def test_relative_variance_quantiles_of_planted_noise(eta2: float) -> None:
    data = planted(eta2, 300, 8 * 128, 8)
    d = measure(linear_loss, jnp.zeros(300), data, batch_size=8)
    layer = d.layers["params"]
    assert d.relative_variance.value == pytest.approx(eta2, rel=0.1)
    assert layer.relative_variance_quantiles[0.5] == pytest.approx(eta2, rel=0.15)
    gamma = 1 / (1 + eta2)
    assert layer.factor_quantiles[0.5] == pytest.approx(gamma, rel=0.15)
    assert layer.sign_factor_quantiles[0.5] == pytest.approx(gamma**0.5, rel=0.1)
    quantiles = list(layer.relative_variance_quantiles.values())
    assert quantiles == sorted(quantiles)
    if eta2 != 1.0:
        assert d.noise_dominated == pytest.approx(float(eta2 > 1), abs=0.05)
    rho = 0.5 + 0.5 * math.erf(1 / math.sqrt(2 * eta2))
    assert d.sign_success.value == pytest.approx(rho, abs=0.01)
    assert d.counted_sign_success == pytest.approx(d.predicted_sign_success, abs=0.01)


def test_calibration_shows_where_noise_is_not_gaussian() -> None:
    """A gradient that is large and rare: its sign is mostly wrong."""
    rng = np.random.default_rng(0)
    rare = (rng.random(size=(2 * 256, 50)) < 0.05) * 40.0 - 1.0
    d = measure(
        linear_loss,
        jnp.zeros(50),
        rare.astype(np.float32),
        batch_size=2,
        max_batches=None,
    )
    assert d.counted_sign_success < 0.3
    assert d.predicted_sign_success > 0.5
    total = sum(b.elements for b in d.calibration)
    assert total == 50
    counted = sum(b.elements * b.counted for b in d.calibration if b.elements)
    assert counted / 50 == pytest.approx(d.counted_sign_success, rel=1e-5)


def test_signs_that_are_not_known_widen_the_interval() -> None:
    data = planted(400.0, 400, 8 * 32, 8)
    d = measure(linear_loss, jnp.zeros(400), data, batch_size=8)
    rho = 0.5 + 0.5 * math.erf(1 / math.sqrt(800))
    assert d.sign_success.low < rho < d.sign_success.high
    assert d.unresolved > 0.8
    assert "SignsNotResolved" in [w.name for w in d.warnings]


def test_a_gradient_that_is_only_noise_has_no_upper_noise_scale() -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(8 * 32, 20)).astype(np.float32)
    d = measure(linear_loss, jnp.zeros(20), noise, batch_size=8)
    assert d.noise_scale.high == math.inf
    assert d.noise_scale.low > 10
    assert "GradientNotResolved" in [w.name for w in d.warnings]


def test_a_gradient_without_noise() -> None:
    data = np.ones((32, 5), np.float32)
    d = measure(linear_loss, jnp.zeros(5), data, batch_size=4, level="normal")
    assert d.noise_scale == (0.0, 0.0, 0.0)
    assert d.sign_success == (1.0, 1.0, 1.0)
    assert d.layers["params"].factor_quantiles[0.5] == 1.0


def test_no_gradient_at_all() -> None:
    data = np.ones((32, 5), np.float32)
    d = measure(lambda p, x: 0.0 * p @ x, jnp.zeros(5), data, batch_size=4)
    assert d.noise_scale.value == math.inf
    assert math.isnan(d.sign_success.value)
    print(d)


@pytest.mark.parametrize("batches", [1, 2, 3, 5])
def test_few_mini_batches_bound_nothing(batches: int) -> None:
    data = quadratic_data(0, 8 * batches)
    d = measure(quadratic_loss, THETA, data, batch_size=8, level="normal")
    assert d.batches == batches
    assert "FewBatches" in [w.name for w in d.warnings]
    assert d.noise_scale.value > 0
    if batches < 3:
        assert d.noise_scale[1:] == (0.0, math.inf)
        assert d.sign_success[1:] == (0.0, 1.0)
        assert all(i[1:] == (0.0, math.inf) for i in d.improvement.values())
    print(d)


# ---- A network ---------------------------------------------------------------------


def network() -> tuple[Callable[..., jax.Array], Any, Any]:
    keys = jax.random.split(jax.random.key(2), 4)
    params = {
        "in": {"w": 0.5 * jax.random.normal(keys[0], (5, 4)), "b": jnp.zeros(4)},
        "out": 0.5 * jax.random.normal(keys[1], (4, 3)),
    }
    x = jax.random.normal(keys[2], (400, 5))
    y = jax.random.randint(keys[3], (400,), 0, 3)
    return network_loss, params, {"x": x, "y": y}


def outputs(params: Any, example: Any) -> jax.Array:
    hidden = jnp.tanh(example["x"] @ params["in"]["w"] + params["in"]["b"])
    return hidden @ params["out"]


def loss_of_outputs(logits: jax.Array, example: Any) -> jax.Array:
    return -jax.nn.log_softmax(logits)[example["y"]]


def network_loss(params: Any, example: Any) -> jax.Array:
    return loss_of_outputs(outputs(params, example), example)


def flat_hessian(params: Any, data: Any) -> np.ndarray:
    flat, unflatten = ravel_pytree(params)

    def mean_loss(theta: jax.Array) -> jax.Array:
        return jax.vmap(network_loss, (None, 0))(unflatten(theta), data).mean()

    return np.asarray(jax.hessian(mean_loss)(flat))


def test_dominance_of_a_network_is_that_of_its_hessian() -> None:
    loss, params, data = network()
    d = measure(
        loss,
        params,
        data,
        batch_size=20,
        level="full",
        curvature_examples=400,
        cauchy_products=64,
    )
    magnitudes = np.abs(flat_hessian(params, data))
    expected = np.trace(magnitudes) / magnitudes.sum()
    assert d.dominance is not None
    assert d.dominance.value == pytest.approx(expected, rel=1e-4)
    assert d.dominance_by_cauchy is not None
    assert d.dominance_by_cauchy.value == pytest.approx(expected, rel=0.5)


def test_improvement_of_a_network_by_its_exact_hessian() -> None:
    """One mini-batch of everything that the mini-batches hold, in NumPy."""
    loss, params, data = network()
    d = measure(loss, params, data, batch_size=10, level="normal", max_batches=None)
    each = np.asarray(
        jax.vmap(lambda e: ravel_pytree(jax.grad(loss)(params, e))[0])(data)
    )
    hessian = flat_hessian(params, data)
    mean, covariance = each.mean(0), np.cov(each, rowvar=False) / 10
    # ‖∇L‖² without the noise of the 400 examples.
    slope = mean @ mean - np.trace(covariance) / 40
    curvature = np.trace(hessian @ covariance) + mean @ hessian @ mean
    curvature -= np.trace(hessian @ covariance) / 40
    assert d.improvement["gradient"].value == pytest.approx(
        slope**2 / (2 * curvature), rel=0.15
    )


def test_gauss_newton_is_never_negative_and_agrees_at_the_outputs() -> None:
    loss, params, data = network()
    run = functools.partial(measure, loss, params, data, batch_size=20, level="full")
    with_matrix = run(gauss_newton=(outputs, loss_of_outputs), curvature_examples=400)

    def jacobian_of(example: Any) -> np.ndarray:
        flat, unflatten = ravel_pytree(params)
        return jax.jacobian(lambda t: outputs(unflatten(t), example))(flat)

    jacobians = np.asarray(jax.vmap(jacobian_of)(data))
    logits = jax.vmap(outputs, (None, 0))(params, data)
    inner = np.asarray(jax.vmap(jax.hessian(loss_of_outputs))(logits, data))
    matrix = np.abs(np.einsum("kai,kab,kbj->ij", jacobians, inner, jacobians))
    assert with_matrix.dominance is not None
    assert with_matrix.dominance.value == pytest.approx(
        np.trace(matrix) / matrix.sum(), rel=1e-3
    )


def test_negative_curvature_is_reported() -> None:
    def loss(theta: jax.Array, x: jax.Array) -> jax.Array:
        return -jnp.sum((theta - x) ** 2)

    data = planted(0.1, 4, 64, 4)
    d = measure(loss, jnp.zeros(4), data, batch_size=4, level="normal")
    assert d.improvement["sign"] == (math.inf, 0.0, math.inf)
    assert "NegativeCurvature" in [w.name for w in d.warnings]


# ---- Other forms of the same -------------------------------------------------------


def numbers_of(d: Diagnostics) -> list[float]:
    found = [d.loss, *d.noise_scale, *d.sign_success]
    for interval in d.improvement.values():
        found += interval
    return found


def test_micro_batches_change_nothing() -> None:
    loss, params, data = network()
    run = functools.partial(
        measure, loss, params, data, batch_size=10, level="normal", max_batches=12
    )
    expected = numbers_of(run())
    actual = numbers_of(run(microbatch_size=3))
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-5)
    gauss_newton = (outputs, loss_of_outputs)
    expected = numbers_of(run(gauss_newton=gauss_newton))
    actual = numbers_of(run(gauss_newton=gauss_newton, microbatch_size=4))
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-5)


def test_loss_of_a_batch_regularizer_aux_and_frozen_parameters() -> None:
    loss, params, data = network()
    run = functools.partial(
        measure, data=data, batch_size=10, level="normal", max_batches=12
    )
    expected = numbers_of(run(loss, params))

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jax.vmap(loss, (None, 0))(params, batch).mean()

    np.testing.assert_allclose(
        numbers_of(run(mean_loss, params, batched=True)), expected, rtol=1e-3, atol=1e-5
    )
    with_aux = run(lambda p, e: (loss(p, e), e), params, has_aux=True, level="cheap")
    np.testing.assert_allclose(numbers_of(with_aux), expected[:7], rtol=1e-3, atol=1e-5)

    frozen = {**params, "count": jnp.arange(3), "function": jnp.tanh}
    part = run(
        loss,
        frozen,
        trainable={"in": True, "out": True, "count": False, "function": False},
        level="cheap",
    )
    np.testing.assert_allclose(numbers_of(part), expected[:7], rtol=1e-3, atol=1e-5)

    def penalty(params: Any) -> jax.Array:
        return 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    inside = run(lambda p, e: loss(p, e) + penalty(p), params)
    outside = run(loss, params, regularizer=penalty)
    np.testing.assert_allclose(
        numbers_of(outside), numbers_of(inside), rtol=1e-3, atol=1e-5
    )


def test_random_losses_have_one_key_per_example() -> None:
    def loss(theta: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        return theta @ (x + jax.random.normal(key, x.shape))

    data = np.ones((512, 30), np.float32)
    run = functools.partial(measure, loss, jnp.zeros(30), data, batch_size=8)
    d = run()
    # Noise of variance one in each of the elements, and a gradient of ones.
    assert d.noise_scale.value == pytest.approx(1.0, rel=0.15)
    assert run().noise_scale == d.noise_scale
    assert run(key=jax.random.key(7)).noise_scale != d.noise_scale

    def of_batch(theta: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        return jax.vmap(loss, (None, 0, None))(theta, x, key).mean()

    both = measure(of_batch, jnp.zeros(30), data, batch_size=8, batched=True)
    assert both.noise_scale.value == pytest.approx(d.noise_scale.value, rel=1e-3)


def test_complex_parameters_count_as_two_numbers() -> None:
    def complex_loss(theta: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.abs(theta - x[:3] - 1j * x[3:]) ** 2)

    def real_loss(theta: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum((theta.reshape(-1) - x) ** 2)

    data = planted(0.5, 6, 256, 8)
    arguments: dict[str, Any] = {"batch_size": 8, "level": "normal"}
    ours = measure(complex_loss, jnp.zeros(3, jnp.complex64), data, **arguments)
    real = measure(real_loss, jnp.zeros((2, 3)), data, **arguments)
    np.testing.assert_allclose(numbers_of(ours), numbers_of(real), rtol=1e-4)
    assert ours.layers["params"].shape == (2, 3)


def test_half_precision_parameters_are_measured_in_single() -> None:
    loss, params, data = network()
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    data = {"x": data["x"].astype(jnp.bfloat16), "y": data["y"]}
    d = measure(loss, half, data, batch_size=10, level="normal")
    exact = measure(loss, params, data, batch_size=10, level="normal")
    assert d.noise_scale.value == pytest.approx(exact.noise_scale.value, rel=0.1)


def test_python_lists_and_device_arrays_are_data() -> None:
    data = planted(1.0, 4, 64, 8)
    run = functools.partial(measure, linear_loss, jnp.zeros(4), batch_size=8)
    assert run(jnp.asarray(data)).noise_scale == run(data).noise_scale


def test_columns_and_products_disagree_where_few_columns_are_large() -> None:
    """One row and column in a thousand, which a few sampled columns miss."""

    def loss(theta: jax.Array, x: jax.Array) -> jax.Array:
        spike = 30.0 * theta[17] * jnp.sum(theta)
        return 0.5 * jnp.sum(theta**2) + spike * x[0]

    data = np.ones((8, 1), np.float32)
    d = measure(
        loss,
        jnp.ones(4000),
        data,
        batch_size=2,
        level="full",
        columns=8,
        cauchy_products=32,
    )
    names = [w.name for w in d.warnings]
    alike = measure(
        lambda t, x: 0.5 * jnp.sum(t**2) * x[0],
        jnp.ones(4000),
        data,
        batch_size=2,
        level="full",
        columns=8,
        cauchy_products=32,
    )
    assert "EstimatorsDisagree" in names
    assert "EstimatorsDisagree" not in [w.name for w in alike.warnings]
    assert alike.dominance is not None
    assert alike.dominance.value == pytest.approx(1.0)


# ---- What is shown -----------------------------------------------------------------


def test_text_fits_in_eighty_columns_and_recommends_nothing() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return quadratic_loss(params["a_module_with_a_long_name"]["kernel"], x)

    params = {"a_module_with_a_long_name": {"kernel": THETA}}
    d = measure(loss, params, quadratic_data(0, 512), batch_size=8, level="full")
    text = str(d)
    assert max(map(len, text.splitlines())) <= 80
    assert "next step" in text
    assert "does not say which method trains better" in " ".join(text.split())
    assert "kernel" in text
    for word in ("recommend", "should use", "better to use", "we suggest"):
        assert word not in text.lower()
    shown = io.StringIO()
    print(d, file=shown)
    assert shown.getvalue().rstrip() == text


def test_dictionary_is_json_with_every_number() -> None:
    d = quadratic_diagnostics()
    plain = json.loads(json.dumps(d.to_dict(), allow_nan=False))
    assert plain["noise_scale"]["value"] == d.noise_scale.value
    assert plain["improvement"]["sign"]["high"] == d.improvement["sign"].high
    assert plain["layers"]["params"]["shape"] == [8]
    unbounded = measure(quadratic_loss, THETA, quadratic_data(0, 8), batch_size=8)
    assert json.loads(json.dumps(unbounded.to_dict(), allow_nan=False))
    assert unbounded.to_dict()["noise_scale"]["high"] == "inf"


def test_an_improvement_that_was_not_measured_says_so() -> None:
    d = measure(quadratic_loss, THETA, quadratic_data(0, 64), batch_size=8)
    for improvement in (d.improvement, d.layers["params"].improvement):
        assert not improvement
        with pytest.raises(KeyError, match='measure at level "normal"'):
            improvement["sign"]
    assert d.dominance is None


def test_progress_is_counted() -> None:
    seen: list[tuple[int, int]] = []
    data = quadratic_data(0, 64)
    measure(
        quadratic_loss,
        THETA,
        data,
        batch_size=8,
        level="full",
        progress=lambda done, total: seen.append((done, total)),
    )
    steps = 2 * 8 + 8 + 16
    assert seen == [(i + 1, steps) for i in range(steps)]


def test_a_bar_appears_where_rich_is_and_something_takes_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    from dissect_optax.diagnostics import _progress

    monkeypatch.setattr(_progress, "SECONDS_WITHOUT_BAR", 0.0)
    run = functools.partial(
        measure, quadratic_loss, THETA, quadratic_data(0, 64), batch_size=8
    )
    run(progress=True)
    assert "Measuring" in capsys.readouterr().err
    run(progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(progress=True)
    assert capsys.readouterr().err == ""


# ---- Mistakes ----------------------------------------------------------------------


def test_data_is_checked() -> None:
    run = functools.partial(measure, linear_loss, jnp.zeros(3))
    ones = np.ones((8, 3), np.float32)
    with pytest.raises(ValueError, match=r"disagree on the number of examples.*'y'"):
        run({"x": ones, "y": np.ones(5)}, batch_size=4)
    with pytest.raises(ValueError, match="holds no arrays"):
        run({}, batch_size=4)
    with pytest.raises(ValueError, match="are scalars"):
        run({"x": ones, "y": np.float32(1)}, batch_size=4)
    with pytest.raises(ValueError, match="holds 8 examples only"):
        run(ones, batch_size=9)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        run(ones, batch_size=1)
    for size in (2.0, True, "4"):
        with pytest.raises(TypeError, match="`batch_size` must be an integer"):
            run(ones, batch_size=size)  # type: ignore[arg-type]


def test_parameters_are_checked() -> None:
    data = np.ones((8, 3), np.float32)
    with pytest.raises(TypeError, match=r"floating-point and complex.*int32"):
        measure(linear_loss, jnp.zeros(3, jnp.int32), data, batch_size=4)
    with pytest.raises(ValueError, match="holds no parameters"):
        measure(linear_loss, {}, data, batch_size=4)
    with pytest.raises(ValueError, match="params holds NaN or infinite"):
        measure(linear_loss, jnp.full(3, jnp.nan), data, batch_size=4)


def test_the_loss_is_checked() -> None:
    data = np.ones((8, 3), np.float32)
    run = functools.partial(measure, params=jnp.ones(3), data=data, batch_size=4)
    with pytest.raises(TypeError, match=r"real scalar, got an array of shape \(3,\)"):
        run(lambda p, x: p * x)
    with pytest.raises(TypeError, match="use `has_aux=True`"):
        run(lambda p, x: (p @ x, x))
    with pytest.raises(TypeError, match="must return a pair"):
        run(lambda p, x: p @ x, has_aux=True)
    with pytest.raises(ValueError, match="loss of mini-batch 0 is nan"):
        run(lambda p, x: jnp.log(-jnp.sum(p * x)))
    with pytest.raises(ValueError, match=r"its gradient is not.*by params"):
        run(lambda p, x: jnp.sqrt(jnp.sum((p - x) ** 2)))
    with pytest.raises(TypeError, match="`loss` must be a function"):
        run(3)
    later = data.copy()
    later[6] = np.nan
    with pytest.raises(ValueError, match=r"loss of mini-batch \d is nan"):
        measure(lambda p, x: p @ x, jnp.ones(3), later, batch_size=4)


def test_a_loss_of_a_batch_gives_itself_away() -> None:
    data = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)

    def fails_on_one(params: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean(batch.reshape(batch.shape[0], 12) @ params)

    with pytest.raises(TypeError, match="Pass `batched=True`"):
        measure(fails_on_one, jnp.ones(12), data, batch_size=4)
    assert measure(fails_on_one, jnp.ones(12), data, batch_size=4, batched=True)

    def runs_on_one(params: jax.Array, batch: jax.Array) -> jax.Array:
        pooled = jnp.max(batch @ params, axis=1 if batch.ndim == 3 else 0)
        return jnp.mean(jnp.sum(jnp.exp(pooled)) / batch.shape[0])

    with pytest.raises(TypeError, match="seems to be the mean over a batch"):
        measure(runs_on_one, jnp.ones(3), data, batch_size=4)
    # A mean over whatever it gets is the same on bare examples, and no mistake.
    flat = data[:, 0]
    assert measure(lambda p, x: jnp.mean(x * p), jnp.ones(3), flat, batch_size=4)


def test_other_arguments_are_checked() -> None:
    run = functools.partial(
        measure, linear_loss, jnp.zeros(3), np.ones((8, 3), np.float32), batch_size=4
    )
    with pytest.raises(ValueError, match="`level` must be one of cheap, normal, full"):
        run(level="expensive")
    for name in ("max_batches", "microbatch_size", "columns", "cauchy_products"):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer"):
            run(**{name: 0})
    with pytest.raises(TypeError, match="`progress` must be a function"):
        run(progress="yes")
