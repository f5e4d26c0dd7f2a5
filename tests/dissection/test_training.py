"""The training loop against NumPy, and a group of runs against its replicas."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dissect_optax.dissection import (
    Data,
    Settings,
    advance,
    evaluate,
    get_method,
    hold_out,
    initialise,
    sample_batch,
)
from tests.dissection.toys import (
    L2,
    LAYERS,
    PROBLEM,
    SETTINGS,
    init,
    job,
    load_data,
    loss,
    penalty,
    replicas,
    train,
    without_seconds,
)


@pytest.fixture(scope="module")
def data():
    return load_data(None)


def trained(method_name, data, group, steps=20, problem=PROBLEM):
    method = get_method(method_name)
    state = initialise(problem, method, group)
    return advance(problem, method, SETTINGS, steps, data, group, state)


def layers(params):
    """Kernels and biases of the first replica of a group, in float64."""
    return [
        tuple(np.float64(params[layer][kind][0]) for kind in ("kernel", "bias"))
        for layer in LAYERS
    ]


def forward(network, inputs):
    """Every layer's input, and the logits."""
    (kernel, bias), (output_kernel, output_bias) = network
    hidden = np.maximum(inputs @ kernel + bias, 0)
    return inputs, hidden, hidden @ output_kernel + output_bias


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def cross_entropy(network, examples):
    labels = np.asarray(examples["label"])
    logits = forward(network, np.float64(examples["input"]))[-1]
    losses = -np.log(softmax(logits)[np.arange(len(labels)), labels])
    return losses, logits.argmax(1) == labels


def test_mini_batches_are_uniform_with_replacement():
    draw = jax.vmap(
        lambda step: sample_batch(jnp.arange(5), jax.random.key(0), step, 10)
    )
    labels = np.asarray(draw(jnp.arange(2000)))
    counts = np.bincount(labels.ravel(), minlength=5)
    # Five standard deviations of a binomial count.
    assert np.all(abs(counts - 4000) < 5 * np.sqrt(20000 * 0.2 * 0.8))
    assert all(len(set(batch)) < 10 for batch in labels)
    assert len({tuple(batch) for batch in labels}) > 1990


@pytest.mark.parametrize("method_name", ["sgd", "m_svag_mb"])
def test_first_step_against_numpy(data, method_name):
    rate, group = 0.5, replicas([0.5, 0.1], [3, 2])
    before = layers(initialise(PROBLEM, get_method("sgd"), group).params)
    after = layers(trained(method_name, data, group, steps=1).params)

    # The batch that belongs to seed 3 and step 0.
    data_key = jax.random.split(jax.random.key(3, impl="threefry2x32"), 3)[1]
    batch = sample_batch(data.training, data_key, jnp.int32(0), SETTINGS.batch_size)
    labels = np.asarray(batch["label"])
    *activations, logits = forward(before, np.float64(batch["input"]))
    delta = softmax(logits) - np.eye(3)[labels]
    for index in (1, 0):
        kernel, bias = before[index]
        per_example = activations[index][:, :, None] * delta[:, None, :]
        for found, start, gradients, penalty_gradient in (
            (after[index][0], kernel, per_example, L2 * kernel),
            (after[index][1], bias, delta, 0.0),
        ):
            step = gradients.mean(0) + penalty_gradient
            if method_name == "m_svag_mb":
                # The penalty moves the gradient, not its variance.
                variance = gradients.var(0, ddof=1) / len(labels)
                step = step**3 / np.maximum(step**2 + variance, 1e-300)
            np.testing.assert_allclose(found, start - rate * step, atol=1e-6)
        delta = (delta @ kernel.T) * (activations[index] > 0)


def test_evaluation_is_over_every_test_example(data):
    group = replicas([0.01, 0.01], [1, 2])
    state = trained("m_sgd", data, group)
    found = evaluate(PROBLEM, SETTINGS, data, group, state.step, state.params)
    network = layers(state.params)
    regularizer = 0.5 * L2 * sum((kernel**2).sum() for kernel, _ in network)
    for name, examples in (("training", data.training), ("test", data.test)):
        losses, is_right = cross_entropy(network, examples)
        assert found[f"{name}_data_loss"][0] == pytest.approx(losses.mean(), 1e-5)
        assert found[f"{name}_loss"][0] == pytest.approx(
            losses.mean() + regularizer, 1e-5
        )
        assert found[f"{name}_accuracy"][0] == np.float32(is_right.mean())
    assert found["learning_rate"][0] == np.float32(0.01)
    assert not any(name.startswith("validation") for name in found)


def test_held_out_examples_are_measured_and_not_trained_on(data):
    held_out = hold_out(data, 0.1)
    assert (len(held_out.training["label"]), len(held_out.validation["label"])) == (
        1170,
        130,
    )
    assert hold_out(data, 0.0) == data
    group = replicas([0.01], [1])
    state = trained("m_sgd", held_out, group)
    found = evaluate(PROBLEM, SETTINGS, held_out, group, state.step, state.params)
    losses, is_right = cross_entropy(layers(state.params), held_out.validation)
    assert found["validation_data_loss"][0] == pytest.approx(losses.mean(), 1e-5)
    assert found["validation_accuracy"][0] == np.float32(is_right.mean())
    # Other numbers in the held-out part change nothing.
    other = held_out._replace(validation=jax.tree.map(jnp.zeros_like, data.test))
    jax.tree.map(np.testing.assert_array_equal, state, trained("m_sgd", other, group))


def test_evaluation_can_be_given_up_between_pieces(data):
    # 1 300 examples are two pieces and 500 are one.
    group = replicas([0.01], [0])
    state = initialise(PROBLEM, get_method("m_sgd"), group)
    arguments = PROBLEM, SETTINGS, data, group, state.step, state.params
    answers = iter([False, False, True])
    assert evaluate(*arguments, stop=lambda: next(answers)) is None
    answers = iter([False, False, False])
    assert evaluate(*arguments, stop=lambda: next(answers)) is not None


def test_evaluation_in_pieces_is_the_same(data, monkeypatch):
    # 1 300 and 500 are not multiples of 32.
    group = replicas([0.01, 0.01], [1, 2])
    state = initialise(PROBLEM, get_method("m_sgd"), group)
    arguments = PROBLEM, SETTINGS, data, group, state.step, state.params
    whole = evaluate(*arguments)
    # 32 of each of the two replicas, whose examples have 4 entries.
    monkeypatch.setattr(
        "dissect_optax.dissection._evaluation._ENTRIES_EVALUATED_AT_ONCE", 64 * 4
    )
    pieces = evaluate(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), whole, pieces)


# The one with the most arithmetic, and the one that rounding can upset most.
@pytest.mark.parametrize("method_name", ["m_svag", "m_ssd"])
def test_group_equals_its_replicas_alone(data, method_name):
    rates, seeds = [0.001, 0.003], [0, 5]
    together = trained(method_name, data, replicas(rates, seeds))
    for index, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        alone = trained(method_name, data, replicas([rate], [seed]))
        jax.tree.map(
            lambda group, single, i=index: np.testing.assert_allclose(
                group[i], single[0], rtol=1e-4, atol=2e-5
            ),
            together.params,
            alone.params,
        )


def test_diverged_replica_does_not_touch_the_others(data):
    healthy = trained("m_sgd", data, replicas([0.01, 0.01], [1, 2]))
    beside = trained("m_sgd", data, replicas([1e30, 0.01], [1, 2]))
    leaf, reference = (jax.tree.leaves(s.params)[-1] for s in (beside, healthy))
    assert not np.isfinite(leaf[0]).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[1], b[1]),
        beside.params,
        healthy.params,
    )
    assert np.isfinite(reference).all()


def test_steps_in_two_parts_are_the_same_steps(data):
    group, method = replicas([0.01, 0.01], [1, 2]), get_method("m_sgd")
    whole = trained("m_sgd", data, group)
    state = initialise(PROBLEM, method, group)
    for _ in range(2):
        state = advance(PROBLEM, method, SETTINGS, 10, data, group, state)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_seed_decides_parameters_and_step_size_does_not():
    method = get_method("m_sgd")
    one, other = (
        layers(initialise(PROBLEM, method, replicas(*group)).params)[0][0]
        for group in (([0.1, 0.1], [4, 4]), ([0.2, 0.2], [4, 4]))
    )
    np.testing.assert_array_equal(one, other)
    third = layers(initialise(PROBLEM, method, replicas([0.1, 0.1], [5, 4])).params)
    assert not np.array_equal(one, third[0][0])


def test_interval_must_divide_the_steps():
    with pytest.raises(ValueError, match=r"must divide `steps`.*got 30 and 100"):
        Settings(steps=100, batch_size=8, evaluation_interval=30)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"steps": 0}, ValueError),
        ({"steps": 20.0}, TypeError),
        ({"steps": True}, TypeError),
        ({"batch_size": -1}, ValueError),
        ({"batch_size": None}, TypeError),
        ({"evaluation_interval": 0}, ValueError),
        ({"examples": 0}, ValueError),
        ({"examples": "all"}, TypeError),
        ({"validation_fraction": 1.0}, ValueError),
        ({"validation_fraction": -0.1}, ValueError),
        ({"validation_fraction": float("nan")}, ValueError),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, error):
    with pytest.raises(error, match=next(iter(change))):
        dataclasses.replace(SETTINGS, **change)


def test_accuracy_is_the_nearest_number_to_the_share():
    group = replicas([0.01], [0])
    state = initialise(PROBLEM, get_method("m_sgd"), group)
    guess = int(forward(layers(state.params), np.ones((1, 4)))[-1].argmax())
    # Every example is the same to the network, and 974 labels agree with it.
    labels = jnp.where(jnp.arange(10_000) < 974, guess, (guess + 1) % 3)
    examples = {"input": jnp.ones((10_000, 4)), "label": labels}
    data = Data(examples, examples)
    found = evaluate(PROBLEM, SETTINGS, data, group, state.step, state.params)
    assert found["test_accuracy"][0] == np.float32(0.0974)


def test_training_loss_is_over_the_first_ten_thousand_examples():
    group = replicas([0.01], [0])
    state = initialise(PROBLEM, get_method("m_sgd"), group)
    guess = int(forward(layers(state.params), np.ones((1, 4)))[-1].argmax())
    labels = jnp.where(jnp.arange(11_000) < 10_000, guess, (guess + 1) % 3)
    examples = {"input": jnp.ones((11_000, 4)), "label": labels}
    data = Data(examples, examples)
    found = evaluate(PROBLEM, SETTINGS, data, group, state.step, state.params)
    assert found["training_accuracy"][0] == 1.0
    assert found["test_accuracy"][0] == np.float32(10 / 11)


def test_learning_rate_of_a_schedule_is_that_of_the_next_step(data):
    def schedule(step_size):
        return lambda step: jnp.where(step < 10, step_size, step_size / 10)

    problem = dataclasses.replace(PROBLEM, schedule=schedule)
    group = replicas([0.1, 0.3], [0, 1])
    state = trained("m_sgd", data, group, steps=10, problem=problem)
    found = evaluate(problem, SETTINGS, data, group, state.step, state.params)
    np.testing.assert_allclose(found["learning_rate"], [0.01, 0.03], rtol=1e-6)
    before = evaluate(problem, SETTINGS, data, group, state.step - 1, state.params)
    np.testing.assert_allclose(before["learning_rate"], [0.1, 0.3], rtol=1e-6)
    # It is the one that the optimizer takes.
    constant = trained("m_sgd", data, group, steps=10)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        state.params,
        constant.params,
    )


def test_regularizer_of_the_problem_is_the_one_that_is_differentiated(data):
    group = replicas([0.1], [0])
    bare = dataclasses.replace(PROBLEM, regularizer=None)
    free = trained("sgd", data, group, steps=1, problem=bare).params
    pulled = trained("sgd", data, group, steps=1).params
    start = initialise(PROBLEM, get_method("sgd"), group).params
    gradient = jax.tree.map(
        lambda leaf: leaf[None],
        jax.grad(penalty)(jax.tree.map(lambda leaf: leaf[0], start)),
    )
    jax.tree.map(
        lambda f, p, g: np.testing.assert_allclose(f - p, 0.1 * g, atol=1e-6),
        free,
        pulled,
        gradient,
    )


def test_random_streams_do_not_depend_on_the_usual_generator():
    """As `JAX_DEFAULT_PRNG_IMPL` sets it; functions of a problem get the same keys."""
    seen = []

    def note(key):
        seen.append(str(jax.random.key_impl(key)))
        return key

    def noisy_loss(params, example, key):
        return loss(params, example, key) * jax.random.uniform(note(key))

    def noisy_example(example, key):
        noise = jax.random.normal(note(key), (4,))
        return {**example, "input": example["input"] + noise}

    problem = dataclasses.replace(
        PROBLEM,
        init=lambda key: init(note(key)),
        loss=noisy_loss,
        augment=noisy_example,
    )
    usual = train(job(None, problem=problem), "m_svag_mb", 0.3)
    count = len(seen)
    with jax.default_prng_impl("rbg"):
        assert str(jax.random.key_impl(jax.random.key(0))) == "rbg"
        # Another problem, for which programs are traced again.
        again = dataclasses.replace(problem)
        other = train(job(None, problem=again), "m_svag_mb", 0.3)
    assert len(seen) == 2 * count >= 6
    assert len(set(seen)) == 1
    assert "fry" in seen[0]
    assert without_seconds(other) == without_seconds(usual)
    assert other.config == usual.config
