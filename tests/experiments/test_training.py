"""The training loop against NumPy, and a group of runs against its members."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data import Dataset, Examples, sample_batch
from experiments.evaluation import evaluate
from experiments.methods import get_method
from experiments.problems import PROBLEMS, Settings, get_problem
from experiments.training import Member, advance, initialise, l2_penalty

SETTINGS = Settings(steps=20, batch_size=8, l2=0.02, evaluation_interval=10)


@pytest.fixture(scope="module")
def problem():
    return get_problem("digits")


@pytest.fixture(scope="module")
def dataset(problem):
    return problem.load_data(None)


def members(learning_rates, seeds):
    return Member(jnp.array(learning_rates, jnp.float32), jnp.array(seeds, jnp.uint32))


def trained(problem, method_name, dataset, group, steps=20):
    method = get_method(method_name)
    state = initialise(problem, method, group)
    return advance(problem, method, SETTINGS, steps, dataset, group, state)


def layers(params):
    """Kernels and biases of the first member of a group, in float64."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = {jax.tree_util.keystr(path): np.float64(leaf[0]) for path, leaf in leaves}
    return [
        tuple(
            next(v for k, v in named.items() if layer in k and kind in k)
            for kind in ("kernel", "bias")
        )
        for layer in ("hidden1", "hidden2", "output")
    ]


def forward(network, inputs):
    """Every layer's input, and the logits."""
    activations = [inputs]
    for index, (kernel, bias) in enumerate(network):
        linear = activations[-1] @ kernel + bias
        activations.append(linear if index == 2 else np.maximum(linear, 0))
    return activations


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def cross_entropy(network, images, labels):
    logits = forward(network, images / 16)[-1]
    return -np.log(softmax(logits)[np.arange(len(labels)), labels]), logits


def test_split_is_the_one_in_the_header(dataset):
    assert dataset.training.image.shape == (1297, 64)
    assert dataset.test.image.shape == (500, 64)
    assert dataset.test.image.dtype == jnp.uint8
    assert int(dataset.test.image.max()) == 16
    assert np.bincount(dataset.test.label).tolist() == [
        50, 51, 49, 51, 50, 51, 50, 50, 48, 50,
    ]  # fmt: skip
    assert dataset.test.label[:10].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8]


def test_mini_batches_are_uniform_with_replacement():
    training = Examples(jnp.arange(5), jnp.arange(5))
    draw = jax.vmap(lambda step: sample_batch(training, jax.random.key(0), step, 10))
    labels = np.asarray(draw(jnp.arange(2000)).label)
    counts = np.bincount(labels.ravel(), minlength=5)
    # Five standard deviations of a binomial count.
    assert np.all(abs(counts - 4000) < 5 * np.sqrt(20000 * 0.2 * 0.8))
    assert all(len(set(batch)) < 10 for batch in labels)
    assert len({tuple(batch) for batch in labels}) > 1990


@pytest.mark.parametrize("method_name", ["sgd", "m_svag_mb"])
def test_first_step_against_numpy(problem, dataset, method_name):
    rate, group = 0.5, members([0.5, 0.1], [3, 2])
    before = layers(initialise(problem, get_method("sgd"), group).params)
    after = layers(trained(problem, method_name, dataset, group, steps=1).params)

    # The batch that belongs to seed 3 and step 0.
    data_key = jax.random.split(jax.random.key(3), 3)[1]
    batch = sample_batch(dataset.training, data_key, jnp.int32(0), SETTINGS.batch_size)
    labels = np.asarray(batch.label)
    activations = forward(before, np.float64(batch.image) / 16)
    delta = softmax(activations[-1]) - np.eye(10)[labels]
    for index in (2, 1, 0):
        kernel, bias = before[index]
        per_example = activations[index][:, :, None] * delta[:, None, :]
        for found, start, gradients, penalty in (
            (after[index][0], kernel, per_example, SETTINGS.l2 * kernel),
            (after[index][1], bias, delta, 0.0),
        ):
            step = gradients.mean(0) + penalty
            if method_name == "m_svag_mb":
                # The penalty moves the gradient, not its variance.
                variance = gradients.var(0, ddof=1) / len(labels)
                step = step**3 / np.maximum(step**2 + variance, 1e-300)
            np.testing.assert_allclose(found, start - rate * step, atol=1e-6)
        delta = (delta @ kernel.T) * (activations[index] > 0)


def test_evaluation_is_over_every_test_image(problem, dataset):
    group = members([0.01, 0.01], [1, 2])
    state = trained(problem, "m_sgd", dataset, group)
    found = evaluate(problem, SETTINGS, dataset, group, state.step, state.params)
    network = layers(state.params)
    penalty = 0.5 * SETTINGS.l2 * sum((kernel**2).sum() for kernel, _ in network)
    for name, half in (("training", dataset.training), ("test", dataset.test)):
        images, labels = np.float64(half.image), np.asarray(half.label)
        losses, logits = cross_entropy(network, images, labels)
        measured = found._asdict()
        assert measured[f"{name}_cross_entropy"][0] == pytest.approx(
            losses.mean(), 1e-5
        )
        assert measured[f"{name}_loss"][0] == pytest.approx(
            losses.mean() + penalty, 1e-5
        )
    # The last half that the loop saw is the test set.
    accuracy = (logits.argmax(1) == labels).mean()
    assert found.test_accuracy[0] == pytest.approx(accuracy, 1e-6)
    assert found.learning_rate[0] == np.float32(0.01)


def test_evaluation_can_be_given_up_between_pieces(problem, dataset):
    # 1 297 images are two pieces and 500 are one.
    group = members([0.01], [0])
    state = initialise(problem, get_method("m_sgd"), group)
    arguments = problem, SETTINGS, dataset, group, state.step, state.params
    answers = iter([False, False, True])
    assert evaluate(*arguments, stop=lambda: next(answers)) is None
    answers = iter([False, False, False])
    assert evaluate(*arguments, stop=lambda: next(answers)) is not None


def test_evaluation_in_pieces_is_the_same(problem, dataset, monkeypatch):
    # 1 297 and 500 are no multiples of 32.
    group = members([0.01, 0.01], [1, 2])
    state = initialise(problem, get_method("m_sgd"), group)
    whole = evaluate(problem, SETTINGS, dataset, group, state.step, state.params)
    # 32 of each of the two members, whose images have 64 entries.
    monkeypatch.setattr("experiments.evaluation._ENTRIES_EVALUATED_AT_ONCE", 64 * 64)
    other = dataclasses.replace(SETTINGS, steps=40)  # Another compilation.
    pieces = evaluate(problem, other, dataset, group, state.step, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), whole, pieces)


# The one with the most arithmetic, and the one that rounding can upset most.
@pytest.mark.parametrize("method_name", ["m_svag", "m_ssd"])
def test_group_equals_its_members_alone(problem, dataset, method_name):
    rates, seeds = [0.001, 0.003], [0, 5]
    together = trained(problem, method_name, dataset, members(rates, seeds))
    for index, (rate, seed) in enumerate(zip(rates, seeds, strict=True)):
        alone = trained(problem, method_name, dataset, members([rate], [seed]))
        jax.tree.map(
            lambda group, single, i=index: np.testing.assert_allclose(
                group[i], single[0], rtol=1e-4, atol=2e-5
            ),
            together.params,
            alone.params,
        )


def test_diverged_member_does_not_touch_the_others(problem, dataset):
    healthy = trained(problem, "m_sgd", dataset, members([0.01, 0.01], [1, 2]))
    beside = trained(problem, "m_sgd", dataset, members([1e30, 0.01], [1, 2]))
    leaf, reference = (jax.tree.leaves(s.params)[-1] for s in (beside, healthy))
    assert not np.isfinite(leaf[0]).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[1], b[1]),
        beside.params,
        healthy.params,
    )
    assert np.isfinite(reference).all()


def test_steps_in_two_halves_are_the_same_steps(problem, dataset):
    group, method = members([0.01, 0.01], [1, 2]), get_method("m_sgd")
    whole = trained(problem, "m_sgd", dataset, group)
    state = initialise(problem, method, group)
    for _ in range(2):
        state = advance(problem, method, SETTINGS, 10, dataset, group, state)
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_seed_decides_parameters_and_step_size_does_not(problem):
    method = get_method("m_sgd")
    one, other = (
        layers(initialise(problem, method, members(*group)).params)[0][0]
        for group in (([0.1, 0.1], [4, 4]), ([0.2, 0.2], [4, 4]))
    )
    np.testing.assert_array_equal(one, other)
    third = layers(initialise(problem, method, members([0.1, 0.1], [5, 4])).params)
    assert not np.array_equal(one, third[0][0])


def test_penalty_is_half_lambda_times_squared_weights():
    params = {"layer": {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([9.0])}}
    assert float(l2_penalty(params, 0.1)) == pytest.approx(0.25)


def test_interval_must_divide_the_steps():
    with pytest.raises(ValueError, match=r"must divide `steps`.*got 30 and 100"):
        Settings(steps=100, batch_size=8, l2=0.0, evaluation_interval=30)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_is_well_formed(name):
    problem = get_problem(name)
    assert problem.name == name
    assert problem.smoke.steps <= 100


def test_accuracy_is_the_nearest_number_to_the_share(problem):
    images = jnp.zeros((10_000, 64), jnp.uint8)
    group = members([0.01], [0])
    state = initialise(problem, get_method("m_sgd"), group)
    logits = forward(layers(state.params), np.zeros((1, 64)))[-1]
    # Every image is the same to the network, and 974 labels agree with it.
    guess = int(logits.argmax())
    labels = jnp.where(jnp.arange(10_000) < 974, guess, (guess + 1) % 10)
    half = Examples(images, labels)
    found = evaluate(
        problem, SETTINGS, Dataset(half, half), group, state.step, state.params
    )
    assert found.test_accuracy[0] == np.float32(0.0974)
