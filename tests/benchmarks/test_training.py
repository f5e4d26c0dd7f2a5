"""The benchmark of training: that it runs, and that it compares equal things."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import training
from benchmarks.training_loops import (
    LEARNING_RATE,
    PlainLoop,
    shuffled_batches,
    without_augmentation,
)
from dissect_optax.dissection import (
    Replica,
    Settings,
    advance,
    get_method,
    initialise,
    sample_batch,
)
from experiments.problems import get_problem

SETTINGS = Settings(steps=4, batch_size=8, evaluation_interval=2)


def test_the_plain_loop_takes_our_step():
    problem, method = get_problem("digits"), get_method("adam")
    dataset = problem.load_data(None)
    group = Replica(jnp.full(1, LEARNING_RATE), jnp.zeros(1, jnp.uint32))
    ours = initialise(problem, method, group)

    plain = PlainLoop(problem, method, SETTINGS, dataset)
    state = plain.state._replace(params=jax.tree.map(lambda leaf: leaf[0], ours.params))
    data_key = jax.random.split(jax.random.key(0), 3)[1]
    for step in range(2):
        batch = sample_batch(
            dataset.training, data_key, jnp.int32(step), SETTINGS.batch_size
        )
        state = plain.step(state, *batch)
    ours = advance(problem, method, SETTINGS, 2, dataset, group, ours)

    for expected, found in zip(
        jax.tree.leaves(ours.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-6)


def test_an_epoch_of_the_plain_loop_holds_every_image_with_its_label():
    images = np.arange(12)
    batches = shuffled_batches(images, 2 * images, batch_size=3)
    first, second = ([next(batches) for _ in range(4)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(np.concatenate([batch[0] for batch in epoch])) == list(images)
        assert all((labels == 2 * images).all() for images, labels in epoch)
    assert not np.array_equal(first, second)


def test_without_augmentation_training_sees_what_a_test_sees():
    problem = get_problem("cifar10")
    bare = without_augmentation(problem)
    test = training.random_dataset(training.CASES["cifar10"]).test
    example, key = jax.tree.map(lambda array: array[0], test), jax.random.key(0)
    seen = bare.augment(example, key)
    assert seen.label == example.label
    np.testing.assert_array_equal(seen.image, problem.test_input(example.image))
    assert not np.array_equal(seen.image, problem.augment(example, key).image)


# Multiply-adds of every layer in one forward pass of one image.
LAYERS = {
    "mnist": [784 * 1000, 1000 * 500, 500 * 100, 100 * 10],
    "cifar10": [
        28**2 * 5**2 * 3 * 64,
        12**2 * 3**2 * 64 * 96,
        6**2 * 3**2 * 96 * 128,
        3**2 * 128 * 512,
        512 * 256,
        256 * 10,
    ],
    "cifar100": [
        32**2 * 3**2 * 3 * 96,
        32**2 * 3**2 * 96 * 96,
        16**2 * 3**2 * 96 * 96,
        16**2 * 3**2 * 96 * 192,
        16**2 * 3**2 * 192 * 192,
        8**2 * 3**2 * 192 * 192,
        6**2 * 3**2 * 192 * 192,
        6**2 * 192 * 192,
        6**2 * 192 * 100,
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_operations_are_those_of_the_layers(name):
    problem = get_problem(name)
    # Backwards every layer multiplies twice more, the first one only once.
    multiply_adds = 3 * sum(LAYERS[name]) - LAYERS[name][0]
    expected = 2 * problem.settings.batch_size * multiply_adds
    # Activations and the loss are counted too; zeros around an image may not be.
    flops = training.gradient_flops(problem, get_method("m_sgd"), problem.settings)
    assert flops == pytest.approx(expected, rel=0.07)


def rows_of(device):
    problem, method = get_problem("mnist"), get_method("m_sgd")
    seconds = {
        training.Way("ours", False): [1.0, 2.0, 4.0],
        training.Way("plain", False): [3.0, 2.0, 2.0],
        training.Way("ours", False, members=10): [5.0, 5.0, 5.0],
    }
    return training.to_rows(problem, method, problem.settings, seconds, device, {}, {})


def test_a_ratio_is_the_median_of_the_ratios_within_rounds():
    ours, plain, group = rows_of("cpu")
    assert [row["time_over_ours"] for row in (ours, plain, group)] == [1.0, 1.0, 2.5]
    assert plain["steps_per_second"] == 0.5
    assert group["milliseconds"] == 5000.0


def test_a_product_of_matrices_has_its_own_operations():
    problem, method = get_problem("mnist"), get_method("m_sgd")
    seconds = {
        training.Way("ours", False): [1.0],
        training.Way(training.PRODUCT, False): [2.0],
    }
    _, row = training.to_rows(problem, method, problem.settings, seconds, "cpu", {}, {})
    assert row["gigaflops_per_second"] == pytest.approx(2048**3 / 1e9)
    assert row["time_over_ours"] is None
    assert training.multiply_matrices(1) > 0


def test_a_row_has_the_environment_of_its_loop():
    problem, method = get_problem("mnist"), get_method("m_sgd")
    ways = training.Way("ours", False), training.Way("torch, channels last", False)
    ours, other = training.to_rows(
        problem,
        method,
        problem.settings,
        {way: [1.0] for way in ways},
        "cpu",
        {"jax": "1"},
        {"torch": "2"},
    )
    assert ours["environment"] == {"jax": "1"}
    assert other["environment"] == {"torch": "2"}


def test_the_peak_of_a_known_accelerator():
    _, plain, group = rows_of("NVIDIA H100 80GB HBM3")
    problem = get_problem("mnist")
    flops = training.gradient_flops(problem, get_method("m_sgd"), problem.settings)
    assert plain["fractions_of_peak"] == pytest.approx(
        {"bfloat16": flops / 2 / 989.4e12, "tf32": flops / 2 / 494.7e12}
    )
    assert group["fractions_of_peak"]["tf32"] == pytest.approx(
        10 * flops / 5 / 494.7e12
    )


def test_the_table_has_a_column_for_the_peak_on_accelerators_only():
    assert "peak" not in training.to_markdown(rows_of("cpu"))
    assert "not known" in training.to_markdown(rows_of("Some GPU"))
    known = training.to_markdown(rows_of("NVIDIA H200")).splitlines()
    assert known[0].endswith("of bf16, tf32 peak |")
    assert known[2].endswith("% |")
    assert len({line.count("|") for line in known}) == 1


def test_a_report_replaces_what_was_measured_before(tmp_path):
    output = tmp_path / "results" / "training.json"
    old = {"device": "cpu", "problem": "mnist", "method": "m_sgd", "loop": "torch"}
    other = old | {"problem": "cifar10"}
    new = old | {"loop": "ours"}
    training.write([old, other], output)
    training.write([new], output)
    assert json.loads(output.read_text()) == [other, new]


def test_smoke(monkeypatch, capsys, tmp_path):
    output = tmp_path / "training.json"
    command = ["training", "--smoke", "--problems", "mnist", "--members", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    training.main()
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split(" | ")[2:5] for row in rows] == [
        ["ours", "no", "1"],
        ["plain", "no", "1"],
        ["product of matrices", "no", "1"],
        ["ours", "no", "2"],
    ]
    assert header.count("|") == rows[0].count("|")
    assert not output.exists()


def test_torch_that_does_not_start_is_named(monkeypatch):
    command = ["training", "--smoke", "--problems", "mnist", "--torch", "false"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(RuntimeError, match="Python that imports torch"):
        training.main()
