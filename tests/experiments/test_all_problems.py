"""MNIST and the CIFARs at smoke size through every command, on small data sets."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from dissect_optax.dissection import (
    FOUR_METHODS,
    METHODS,
    Data,
    Protocol,
    Replica,
    Store,
    advance,
    evaluate,
    first_examples,
    initialise,
    read_checked,
    record_to_json,
)
from experiments.command_line import main
from experiments.problems import PROBLEMS, get_problem
from experiments.problems.image_problem import l2_penalty

# Compiling a step of a CIFAR network takes most of the time of a test: four methods are
# trained on MNIST, and one of the others' own.
METHODS_OF = {
    "mnist": FOUR_METHODS,
    "cifar10": ("m_ssd",),
    "cifar100": ("adam",),
}


def without_seconds(lines):
    """Evaluations as the same run would repeat them."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def contents(runs):
    """Every record below a directory, less the seconds."""
    return {
        path.name: without_seconds(read_checked(path)["evaluations"])
        for path in runs.glob("*/*/rate*.json")
    }


@pytest.mark.parametrize("name", METHODS_OF)
def test_every_command(name, small_data_dir, tmp_path, monkeypatch, capsys):
    methods = METHODS_OF[name]
    options = ["--smoke", "--runs-dir", str(tmp_path), "--data-dir"]
    options.append(str(small_data_dir))
    chosen = ["--optimizers", *methods, *options]
    problem = get_problem(name)

    # Tune, replicate, table, figure, summary.
    assert main(["reproduce", name, *chosen]) == 0
    printed = capsys.readouterr().out
    for method in methods:
        assert f"| {METHODS[method].label} " in printed
        assert problem.published[method] in printed
    summary = json.loads((tmp_path / name / "summary_smoke.json").read_text())
    assert list(summary["methods"]) == list(methods)
    for method, found in summary["methods"].items():
        assert found["seeds"] == [1, 2]
        records = Store(tmp_path).records(name, method, problem.smoke)
        final = {
            record.config.seed: record.evaluations[-1]["test_accuracy"]
            for record in records
            if record.config.learning_rate == found["step_size"]
        }
        assert found["test_accuracies"] == [final[1], final[2]]
        for record in records:
            if not record.diverged:
                assert [line.step for line in record.evaluations] == [0, 2, 4]
    (figure,) = (tmp_path / "figures").glob(f"*_{name}_smoke.png")
    assert imread(figure).std() > 0.05

    # Nothing is trained again.
    figure.unlink()
    with monkeypatch.context() as patch:
        running = "dissect_optax.dissection._running"
        patch.setattr(f"{running}._run_group", pytest.fail)
        assert main(["reproduce", name, *chosen]) == 0
        assert main(["tune", name, *chosen]) == 0
        # From records alone.
        patch.setattr(f"{running}._whole_data", pytest.fail)
        assert main(["table", name, *chosen]) == 0
        assert main(["curves", name, *options]) == 0
        if methods == FOUR_METHODS:
            figure.unlink()
            assert main(["figure", "3", "--problems", name, *options]) == 0
    assert figure.exists()
    collected = {}
    for run in json.loads((tmp_path / name / "curves_smoke.json").read_text()):
        config = run["config"]
        (path,) = [
            Store(tmp_path).path(record.config)
            for record in Store(tmp_path).records(
                name, config["optimizer"], problem.smoke
            )
            if record_to_json(record)["config"] == config
        ]
        collected[path.name] = without_seconds(run["evaluations"])
    assert collected == contents(tmp_path)


def test_figures_of_the_variants(tmp_path, capsys):
    options = ["--smoke", "--runs-dir", str(tmp_path)]

    def figures_of(number, *methods):
        assert main(["figure", number, "--problems", "digits", *options]) == 2
        assert "no complete record of" in capsys.readouterr().err
        command = ["reproduce", "digits", "--seeds", "1", *options]
        assert main([*command, "--optimizers", *methods]) == 0
        assert main(["figure", number, "--problems", "digits", *options]) == 0
        return [
            tmp_path / "figures" / f"{name}_digits_smoke.png"
            for name in ("_".join(methods), f"figure_{number}")
        ]

    figures = figures_of("7", "m_svag", "m_svag_mb")
    figures += figures_of("6", "adam", "adam_star", "adam_star_mb")
    assert all(imread(path).std() > 0.05 for path in figures)
    # The later command did not undo the earlier one's.
    summary = json.loads((tmp_path / "digits" / "summary_smoke.json").read_text())
    methods = {"m_svag", "m_svag_mb", "adam", "adam_star", "adam_star_mb"}
    assert set(summary["methods"]) == methods


def test_figures_of_the_variants_show_the_cifars_unless_told_otherwise(
    tmp_path, capsys
):
    for number, methods in (("6", "ADAM, ADAM*, ADAM*-mb"), ("7", "M-SVAG, M-SVAG-mb")):
        assert main(["figure", number, "--runs-dir", str(tmp_path)]) == 2
        message = " ".join(capsys.readouterr().err.split())
        assert f"no complete record of {methods} on cifar10." in message


# CIFAR-10 with its augmentation, by the variance of a mini-batch, and CIFAR-100 with
# its dropout as well: all of it follows from seed and step.
@pytest.mark.parametrize(
    ("name", "method"),
    [("mnist", "adam"), ("cifar10", "m_svag_mb"), ("cifar100", "adam")],
)
def test_interrupted_run_ends_with_the_same_record(
    name, method, small_data_dir, tmp_path, interrupt_at_first_report
):
    command = ["train", name, "--optimizer", method, "--learning-rate", "0.001"]
    command += ["--smoke", "--data-dir", str(small_data_dir), "--runs-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    interrupt_at_first_report([*command, str(tmp_path / "halves")])
    assert not contents(tmp_path / "halves")
    assert main([*command, str(tmp_path / "halves")]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == 1
    assert contents(tmp_path / "halves") == whole


@pytest.mark.parametrize("name", METHODS_OF)
def test_group_equals_its_replicas_alone(name, small_data_dir):
    def curve(rates, seeds):
        group = Replica(jnp.array(rates, jnp.float32), jnp.array(seeds, jnp.uint32))
        state = initialise(problem, method, group)
        state = advance(problem, method, problem.smoke, 2, data, group, state)
        return evaluate(problem, problem.smoke, data, group, state.step, state.params)

    problem, method = get_problem(name), METHODS["adam"]
    whole = problem.load_data(small_data_dir)
    data = Data(*(first_examples(part, 8) for part in whole))
    rates, seeds = [0.001, 0.003], [3, 5]
    together = curve(rates, seeds)
    for index, replica in enumerate(zip(rates, seeds, strict=True)):
        alone = curve(*([value] for value in replica))
        for quantity in ("training_loss", "test_data_loss"):
            np.testing.assert_allclose(
                together[quantity][index], alone[quantity][0], rtol=1e-4
            )


@pytest.mark.parametrize("name", PROBLEMS)
def test_problem_is_well_formed(name):
    problem = get_problem(name)
    assert problem.name == name
    assert problem.smoke.steps <= 100
    # Two of another network or penalty are other runs.
    assert problem.description["network"]
    if problem.regularizer is not None:
        assert problem.description["l2"] > 0


def test_split_of_the_digits_is_the_one_in_the_header():
    data = get_problem("digits").load_data(None)
    assert data.training.image.shape == (1297, 64)
    assert data.test.image.shape == (500, 64)
    assert data.test.image.dtype == jnp.uint8
    assert int(data.test.image.max()) == 16
    assert np.bincount(data.test.label).tolist() == [
        50, 51, 49, 51, 50, 51, 50, 50, 48, 50,
    ]  # fmt: skip
    assert data.test.label[:10].tolist() == [4, 8, 8, 3, 9, 0, 6, 3, 9, 8]


def test_penalty_is_half_lambda_times_squared_weights():
    params = {"layer": {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([9.0])}}
    assert float(l2_penalty(params, 0.1)) == pytest.approx(0.25)


def test_loss_and_penalty_of_the_digits_against_numpy():
    problem = get_problem("digits")
    params = problem.init(jax.random.key(0))
    leaves = {
        jax.tree_util.keystr(path): np.float64(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    layers = [
        tuple(
            next(v for k, v in leaves.items() if layer in k and kind in k)
            for kind in ("kernel", "bias")
        )
        for layer in ("hidden1", "hidden2", "output")
    ]
    examples = first_examples(problem.load_data(None).test, 8)
    activations, labels = np.float64(examples.image) / 16, np.asarray(examples.label)
    for kernel, bias in layers[:2]:
        activations = np.maximum(activations @ kernel + bias, 0)
    logits = activations @ layers[2][0] + layers[2][1]
    each = np.log(np.exp(logits).sum(1)) - logits[np.arange(8), labels]

    key = jax.random.key(1)
    shown = jax.vmap(problem.augment)(examples, jax.random.split(key, 8))
    assert problem.batch_loss(params, shown, key) == pytest.approx(each.mean(), 1e-5)
    for index in range(8):
        one = jax.tree.map(lambda array, i=index: array[i], shown)
        assert problem.loss(params, one, key) == pytest.approx(each[index], 1e-5)
        stored = jax.tree.map(lambda array, i=index: array[i], examples)
        loss, metrics = problem.evaluate(params, stored)
        assert loss == pytest.approx(each[index], 1e-5)
        assert metrics["accuracy"] == (logits[index].argmax() == labels[index])
    squares = sum((kernel**2).sum() for kernel, _ in layers)
    assert problem.regularizer(params) == pytest.approx(
        0.5 * problem.l2 * squares, 1e-5
    )


def test_selection_on_held_out_images(small_data_dir, tmp_path):
    options = ["--optimizers", "m_sgd", "--smoke", "--select-on", "validation"]
    options += ["--runs-dir", str(tmp_path), "--data-dir", str(small_data_dir)]
    assert main(["reproduce", "mnist", *options]) == 0
    (path,) = (tmp_path / "mnist").glob("summary*.json")
    assert path.name == "summary_smoke_selected_on_validation.json"
    summary = json.loads(path.read_text())
    assert summary["tuning_settings"]["validation_fraction"] == 0.1
    assert summary["settings"]["validation_fraction"] == 0.0
    step_size = summary["methods"]["m_sgd"]["step_size"]

    smoke = get_problem("mnist").smoke
    store = Store(tmp_path)
    held_out = dataclasses.replace(smoke, validation_fraction=0.1)
    best_accuracies = {
        record.config.learning_rate: max(
            line["validation_accuracy"] for line in record.evaluations
        )
        for record in store.records("mnist", "m_sgd", held_out)
        if Protocol(held_out, stable_below=1.0).is_stable(record)
    }
    assert best_accuracies[step_size] == max(best_accuracies.values())
    # Replications are shown the whole training set.
    replications = store.records("mnist", "m_sgd", smoke)
    assert [record.config.seed for record in replications] == [1, 2]
    for record in replications:
        for line in record.evaluations:
            assert "validation_loss" not in line.values
