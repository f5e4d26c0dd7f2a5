"""The engine knows nothing of a problem but what `Problem` says of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dissect_optax.dissection import (
    Data,
    Problem,
    Protocol,
    UserError,
    advance,
    best_accuracy,
    evaluate,
    fingerprint,
    first_examples,
    get_method,
    hold_out,
    initialise,
    number_of_examples,
    sample_batch,
    tune,
)
from dissect_optax.dissection._training import lower_gradient
from tests.dissection.toys import SETTINGS, job, replicas, train, without_seconds

# ---- The same least squares in many forms -----------------------------------------


def points(count=60):
    """Inputs and noisy values of a linear function."""
    random = np.random.default_rng(0)
    inputs = np.float32(random.normal(size=(count, 3)))
    values = inputs @ np.float32([1.0, -2.0, 0.5]) + random.normal(size=count)
    return jnp.asarray(inputs), jnp.asarray(values, jnp.float32)


def squared_error(weights, inputs, value):
    return jnp.square(inputs @ weights - value)


START = np.float32([0.1, 0.2, 0.3])


class Point(NamedTuple):
    inputs: jax.Array
    value: jax.Array


class Linear(nnx.Module):
    def __init__(self):
        self.weights = nnx.Param(jnp.asarray(START))


STRUCTURE, STATE = nnx.split(nnx.eval_shape(Linear), nnx.Param)


# By name: from the usual parameters to others, and back.
PARAMETERS = {
    "array": (lambda weights: weights, lambda params: params),
    "dict": (
        lambda weights: {"first": weights[:1], "others": {"rest": weights[1:]}},
        lambda params: jnp.concatenate([params["first"], params["others"]["rest"]]),
    ),
    "list and tuple": (
        lambda weights: [weights[0], (weights[1], weights[2:])],
        lambda params: jnp.stack([params[0], params[1][0], params[1][1][0]]),
    ),
    "module": (
        lambda weights: jax.tree.map(lambda _: weights, STATE),
        lambda params: nnx.merge(STRUCTURE, params).weights[...],
    ),
}

EXAMPLES = {
    "named tuple": (Point, lambda example: example),
    "dict": (
        lambda inputs, values: {"x": inputs, "y": values},
        lambda example: (example["x"], example["y"]),
    ),
    "tuple": (lambda inputs, values: (inputs, values), lambda example: example),
    "array": (
        lambda inputs, values: jnp.concatenate([inputs, values[:, None]], axis=1),
        lambda example: (example[:3], example[3]),
    ),
}


def least_squares(parameters="array", examples="tuple", **changes):
    to_params, from_params = PARAMETERS[parameters]
    to_examples, from_example = EXAMPLES[examples]

    def loss(params, example, key):
        del key
        return squared_error(from_params(params), *from_example(example))

    def load_data(_):
        inputs, values = points()
        return Data(
            training=to_examples(inputs[:40], values[:40]),
            test=to_examples(inputs[40:], values[40:]),
        )

    arguments = {
        "name": "least_squares",
        "title": "Least squares",
        "settings": SETTINGS,
        "init": lambda key: to_params(jnp.asarray(START)),
        "loss": loss,
        "evaluate": lambda params, example: (loss(params, example, None), {}),
        "load_data": load_data,
    }
    return Problem(**(arguments | changes))


PLAIN = least_squares()


def plain_run(method="m_svag_mb"):
    return train(job(None, problem=PLAIN), method, 0.01)


def assert_equal_runs(record, expected, rtol=1e-5):
    assert len(record.evaluations) == len(expected.evaluations)
    for line, other in zip(record.evaluations, expected.evaluations, strict=True):
        assert line.step == other.step
        assert line.values == pytest.approx(other.values, rel=rtol)


# The variance is a tree like the parameters.
@pytest.mark.parametrize("parameters", [*PARAMETERS][1:])
def test_parameters_are_any_tree(parameters):
    problem = least_squares(parameters)
    assert_equal_runs(train(job(None, problem=problem), "m_svag_mb", 0.01), plain_run())


@pytest.mark.parametrize("examples", EXAMPLES)
def test_examples_are_any_tree(examples):
    problem = least_squares(examples=examples)
    assert_equal_runs(train(job(None, problem=problem), "m_svag_mb", 0.01), plain_run())


@pytest.mark.parametrize("parameters", PARAMETERS)
def test_parameters_of_any_kind_are_resumed(parameters, tmp_path, stop_at_first_report):
    problem = least_squares(parameters)
    runs = job(tmp_path, problem=problem)
    stop_at_first_report(lambda: train(runs, "adam", 0.01))
    record = train(runs, "adam", 0.01)
    whole = train(job(None, problem=problem), "adam", 0.01)
    assert without_seconds(record) == without_seconds(whole)


def test_run_against_numpy():
    """SGD and its losses, with nothing of the engine but its mini-batches."""
    inputs, values = map(np.float64, points())
    record = train(job(None, problem=PLAIN), "sgd", 0.05)
    key = jax.random.split(jax.random.key(0, impl="threefry2x32"), 3)[1]
    weights = np.float64(START)
    for step in range(21):
        if step % 10 == 0:
            errors = np.square(inputs @ weights - values)
            found = record.evaluations[step // 10]
            assert found.step == step
            assert found["training_loss"] == pytest.approx(errors[:40].mean(), 1e-5)
            assert found["test_loss"] == pytest.approx(errors[40:].mean(), 1e-5)
        batch = np.asarray(sample_batch(jnp.arange(40), key, jnp.int32(step), 8))
        residuals = inputs[batch] @ weights - values[batch]
        weights -= 0.05 * 2 * (residuals[:, None] * inputs[batch]).mean(0)


# ---- Without ----------------------------------------------------------------------


def test_problem_without_a_test_set(tmp_path):
    def load_data(_):
        return Data(training=points(40))

    problem = least_squares(load_data=load_data)
    on_disk, in_memory = (
        train(job(root, problem=problem), "adam", 0.01) for root in (tmp_path, None)
    )
    assert without_seconds(on_disk) == without_seconds(in_memory)
    names = set(on_disk.evaluations[-1].values)
    assert names == {"training_loss", "training_data_loss", "learning_rate"}
    assert on_disk.environment["data"].startswith("40 examples, ")
    # Held-out examples are there all the same.
    settings = dataclasses.replace(SETTINGS, validation_fraction=0.25)
    record = train(job(None, problem=problem, settings=settings), "adam", 0.01)
    assert "validation_loss" in record.evaluations[-1].values
    assert "test_loss" not in record.evaluations[-1].values


def test_problem_without_metrics_is_tuned_by_a_merit_of_its_own():
    runs = job(None, problem=PLAIN, replicas=10)

    def low_test_loss(record):
        return (-min(record.curve("test_loss")),)

    tuned = tune(runs, Protocol(SETTINGS, low_test_loss), get_method("m_sgd"))
    best = {r.config.learning_rate: low_test_loss(r) for r in tuned.candidates}
    assert best[tuned.learning_rate] == max(best.values())


def test_losses_without_a_regularizer_are_those_of_the_data():
    for line in plain_run().evaluations:
        assert line["training_loss"] == line["training_data_loss"]
        assert line["test_loss"] == line["test_data_loss"]


def test_regularizer_is_in_the_loss_and_not_in_the_loss_of_the_data():
    regularized = least_squares(regularizer=lambda weights: 3.0 + 0.0 * weights.sum())
    record = train(job(None, problem=regularized), "m_svag_mb", 0.01)
    for line, plain in zip(record.evaluations, plain_run().evaluations, strict=True):
        for name in ("training", "test"):
            data_loss = line[f"{name}_data_loss"]
            assert data_loss == pytest.approx(plain[f"{name}_data_loss"], rel=1e-5)
            assert line[f"{name}_loss"] == pytest.approx(data_loss + 3.0, rel=1e-6)


# ---- With a loss of a mini-batch, and with random numbers --------------------------


def test_loss_per_example_is_its_loss_of_a_mini_batch():
    calls = []

    def batch_loss(weights, batch, key):
        del key
        calls.append(batch)
        inputs, values = batch
        return jnp.mean(jnp.square(inputs @ weights - values))

    problem = least_squares(batch_loss=batch_loss)
    assert_equal_runs(
        train(job(None, problem=problem), "m_svag", 0.01), plain_run("m_svag")
    )
    assert calls
    # A method that asks for the variance needs the losses of the examples.
    calls.clear()
    assert_equal_runs(train(job(None, problem=problem), "m_svag_mb", 0.01), plain_run())
    assert not calls


def noisy_loss(weights, example, key):
    """Another input of every example in every step, as by dropout."""
    inputs, value = example
    kept = jax.random.bernoulli(key, 0.5, inputs.shape)
    return squared_error(weights, 2 * kept * inputs, value)


@pytest.mark.parametrize("method", ["sgd", "m_svag_mb"])
def test_random_numbers_of_the_loss_are_independent_and_repeated(method):
    problem = least_squares(loss=noisy_loss)
    record = train(job(None, problem=problem), method, 0.01)
    assert without_seconds(record) == without_seconds(
        train(job(None, problem=problem), method, 0.01)
    )
    # Evaluations have none: before the first step they are those without noise.
    plain = plain_run(method)
    assert record.evaluations[0].values == plain.evaluations[0].values
    assert record.evaluations[1].values != plain.evaluations[1].values
    other = train(job(None, problem=problem), method, 0.01, seed=1)
    assert other.evaluations[1].values != record.evaluations[1].values


def test_every_example_and_every_step_has_a_key_of_its_own():
    seen = []

    def loss(weights, example, key):
        jax.debug.callback(
            lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key)
        )
        return squared_error(weights, *example)

    def augment(example, key):
        jax.debug.callback(
            lambda data: seen.append(tuple(data.tolist())), jax.random.key_data(key)
        )
        return example

    problem = least_squares(loss=loss, augment=augment)
    group, method = replicas([0.01], [0]), get_method("sgd")
    data = problem.load_data(None)
    state = initialise(problem, method, group)
    state = advance(problem, method, SETTINGS, 3, data, group, state)
    jax.block_until_ready(state)
    jax.effects_barrier()
    # Per step and example, one of the augmentation and one of the loss.
    assert len(set(seen)) == 2 * 3 * SETTINGS.batch_size


def test_augmentation_is_seen_in_training_only():
    def double(example, key):
        del key
        inputs, value = example
        return 2 * inputs, value

    problem = least_squares(augment=double)

    def load_doubled(_):
        data = PLAIN.load_data(None)
        return data._replace(training=(2 * data.training[0], data.training[1]))

    record = train(job(None, problem=problem), "m_svag_mb", 0.01)
    doubled = train(
        job(None, problem=least_squares(load_data=load_doubled)), "m_svag_mb", 0.01
    )
    for line, other, plain in zip(
        record.evaluations,
        doubled.evaluations,
        plain_run().evaluations,
        strict=True,
    ):
        # Trained on the same examples, and evaluated on those that are stored.
        assert line["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)
        if line.step == 0:
            assert line.values == plain.values
        else:
            assert line["test_loss"] != pytest.approx(plain["test_loss"], rel=1e-3)


def test_cost_of_a_gradient_is_that_of_the_examples_as_they_are_shown():
    def widen(example, key):
        del key
        inputs, value = example
        return jnp.tile(inputs, 100)[:3], value

    problem = least_squares(augment=widen)
    training = problem.load_data(None).training
    lowered, params = lower_gradient(
        problem, get_method("m_svag_mb"), SETTINGS, training
    )
    assert params.shape == (3,)
    gradient, extra_args = lowered.out_info
    assert gradient.shape == extra_args["grad_variance"].shape == (3,)


# ---- Metrics ----------------------------------------------------------------------


def with_metrics(**metrics):
    def evaluate_example(weights, example):
        inputs, value = example
        return squared_error(weights, inputs, value), {
            name: metric(inputs @ weights, value) for name, metric in metrics.items()
        }

    return least_squares(evaluate=evaluate_example)


def evaluated(problem):
    group = replicas([0.01, 0.02], [0, 1])
    state = initialise(problem, get_method("sgd"), group)
    data = problem.load_data(None)
    return evaluate(problem, SETTINGS, data, group, state.step, state.params)


def test_metrics_are_means_by_name():
    problem = with_metrics(
        absolute_error=lambda guess, value: abs(guess - value),
        is_above=lambda guess, value: guess > value,
        rounded=lambda guess, value: jnp.int32(jnp.round(10 * guess)),
    )
    found = evaluated(problem)
    inputs, values = map(np.float64, points())
    guesses = inputs @ START
    for name, part in (("training", slice(40)), ("test", slice(40, None))):
        guess, value = guesses[part], values[part]
        expected = {
            "absolute_error": abs(guess - value).mean(),
            "is_above": (guess > value).mean(),
            "rounded": np.round(10 * guess).mean(),
        }
        for metric, mean in expected.items():
            np.testing.assert_allclose(found[f"{name}_{metric}"], [mean] * 2, rtol=1e-5)
            assert found[f"{name}_{metric}"].dtype == np.float32


def test_means_have_more_digits_than_bfloat16():
    problem = with_metrics(one=lambda guess, value: jnp.bfloat16(1.0078125))
    np.testing.assert_array_equal(evaluated(problem)["test_one"], np.float32(1.0078125))


@pytest.mark.parametrize("name", ["loss", "data_loss"])
def test_metric_that_is_called_like_the_loss_is_refused(name):
    with pytest.raises(ValueError, match=f"is called '{name}'"):
        evaluated(with_metrics(**{name: lambda guess, value: guess}))


def test_metric_that_is_an_array_is_refused():
    problem = with_metrics(both=lambda guess, value: jnp.stack([guess, value]))
    with pytest.raises(ValueError, match=r"scalar metrics.*'both': \(2,\)"):
        evaluated(problem)


def test_merit_that_asks_for_what_is_not_measured_is_named():
    with pytest.raises(UserError, match=r"test_accuracy.*test_loss"):
        best_accuracy(plain_run())


# ---- Data -------------------------------------------------------------------------


def test_data_are_told_apart_by_any_number():
    inputs, values = points()
    data = Data((inputs, values), (inputs[:5], values[:5]))
    assert fingerprint(data).startswith("60 + 5 examples, ")
    others = [
        data._replace(test=None),
        data._replace(training=(inputs.at[59, 2].add(1e-3), values)),
        data._replace(test=(inputs[:5], values[1:6])),
    ]
    found = [fingerprint(some) for some in (data, *others)]
    assert len(set(found)) == len(found)
    assert fingerprint(jax.tree.map(np.asarray, data)) == found[0]


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "int8", "bool", "complex64", "float8_e4m3fn"]
)
def test_data_of_any_type_have_a_fingerprint(dtype):
    data = Data(jnp.ones((5, 2), dtype))
    other = Data(jnp.zeros((5, 2), dtype))
    assert fingerprint(data) != fingerprint(other)


def test_examples_are_counted_cut_and_held_out_in_any_tree():
    inputs, values = points(10)
    data = Data({"x": inputs, "rest": [values]})
    assert number_of_examples(data.training) == 10
    assert number_of_examples(first_examples(data.training, 4)) == 4
    assert first_examples(None, 4) is None
    parts = hold_out(data, 0.3)
    np.testing.assert_array_equal(parts.validation["rest"][0], values[7:])
    np.testing.assert_array_equal(parts.training["x"], inputs[:7])


@pytest.mark.parametrize("examples", [(), {"x": 1.0}, (jnp.ones(3), jnp.float32(1))])
def test_data_without_examples_are_refused(examples):
    with pytest.raises(ValueError, match="leading axis of examples"):
        number_of_examples(examples)
