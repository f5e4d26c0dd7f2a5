"""MNIST and the CIFARs at smoke size through every command, on small data sets."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.command_line import main
from experiments.data import Dataset, first_images
from experiments.evaluation import evaluate
from experiments.methods import FOUR_METHODS, METHODS
from experiments.problems import get_problem
from experiments.records import Store, config_from_json
from experiments.training import Member, advance, initialise
from experiments.tuning import is_stable

DOWNLOADED = ("mnist", "cifar10", "cifar100")


def without_seconds(lines):
    """Evaluations as the same run would repeat them."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def contents(runs):
    """Every record below a directory, less the seconds."""
    return {
        str(path.parent.relative_to(runs)): without_seconds(
            map(json.loads, path.read_text().splitlines())
        )
        for path in runs.glob("*/*/rate*/evaluations.jsonl")
    }


@pytest.mark.parametrize("name", DOWNLOADED)
def test_every_command(name, small_data_dir, tmp_path, monkeypatch, capsys):
    options = ["--smoke", "--runs-dir", str(tmp_path), "--data-dir"]
    options.append(str(small_data_dir))
    problem = get_problem(name)

    # Tune, replicate, table, figure, summary.
    assert main(["reproduce", name, *options]) == 0
    printed = capsys.readouterr().out
    for method in FOUR_METHODS:
        assert f"| {METHODS[method].label} " in printed
        assert problem.published[method] in printed
    summary = json.loads((tmp_path / name / "summary_smoke.json").read_text())
    assert list(summary["methods"]) == list(FOUR_METHODS)
    for method, found in summary["methods"].items():
        assert found["seeds"] == [1, 2]
        records = Store(tmp_path).records(name, method, problem.smoke)
        final = {
            record.config.seed: record.evaluations[-1].test_accuracy
            for record in records
            if record.config.learning_rate == found["step_size"]
        }
        assert found["test_accuracies"] == [final[1], final[2]]
        for record in records:
            if not record.diverged:
                assert [line.step for line in record.evaluations] == [0, 2, 4]
    figure = tmp_path / "figures" / f"figure_3_{name}_smoke.png"
    assert imread(figure).std() > 0.05

    # From records alone.
    figure.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("experiments.running._run_group", pytest.fail)
        patch.setattr("experiments.running._dataset", pytest.fail)
        assert main(["reproduce", name, *options]) == 0
        assert main(["tune", name, *options]) == 0
        assert main(["table", name, *options]) == 0
        assert main(["curves", name, *options]) == 0
        assert main(["figure", "3", "--problems", name, *options]) == 0
    assert figure.exists()
    store, collected = Store(tmp_path), {}
    for run in json.loads((tmp_path / name / "curves_smoke.json").read_text()):
        directory = store.directory(config_from_json(run["config"]))
        lines = without_seconds(run["evaluations"])
        collected[str(directory.relative_to(tmp_path))] = lines
    assert collected == contents(tmp_path)


def test_figures_of_the_variants(small_data_dir, tmp_path, capsys):
    options = ["--smoke", "--runs-dir", str(tmp_path), "--data-dir"]
    options.append(str(small_data_dir))

    def figures_of(number, *methods):
        assert main(["figure", number, "--problems", "cifar10", *options]) == 2
        assert "no complete record of" in capsys.readouterr().err
        command = ["reproduce", "cifar10", "--seeds", "1", *options]
        assert main([*command, "--optimizers", *methods]) == 0
        assert main(["figure", number, "--problems", "cifar10", *options]) == 0
        return [
            tmp_path / "figures" / f"{name}_cifar10_smoke.png"
            for name in ("_".join(methods), f"figure_{number}")
        ]

    figures = figures_of("7", "m_svag", "m_svag_mb")
    figures += figures_of("6", "adam", "adam_star", "adam_star_mb")
    assert all(imread(path).std() > 0.05 for path in figures)
    # The later command did not undo the earlier one's.
    summary = json.loads((tmp_path / "cifar10" / "summary_smoke.json").read_text())
    methods = {"m_svag", "m_svag_mb", "adam", "adam_star", "adam_star_mb"}
    assert set(summary["methods"]) == methods


@pytest.mark.parametrize("name", DOWNLOADED)
def test_interrupted_run_ends_with_the_same_record(
    name, small_data_dir, tmp_path, interrupt_at_first_news
):
    # Augmentation and dropout included: all of it follows from seed and step.
    command = ["train", name, "--optimizer", "adam", "--learning-rate", "0.001"]
    command += ["--smoke", "--data-dir", str(small_data_dir), "--runs-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    interrupt_at_first_news([*command, str(tmp_path / "halves")])
    assert not contents(tmp_path / "halves")
    assert main([*command, str(tmp_path / "halves")]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) == 1
    assert contents(tmp_path / "halves") == whole


@pytest.mark.parametrize("name", DOWNLOADED)
def test_group_equals_its_members_alone(name, small_data_dir):
    def curve(rates, seeds):
        members = Member(jnp.array(rates, jnp.float32), jnp.array(seeds, jnp.uint32))
        state = initialise(problem, method, members)
        state = advance(problem, method, problem.smoke, 2, dataset, members, state)
        return evaluate(
            problem, problem.smoke, dataset, members, state.step, state.params
        )

    problem, method = get_problem(name), METHODS["adam"]
    whole = problem.load_data(small_data_dir)
    dataset = Dataset(*(first_images(half, 8) for half in whole[:2]))
    rates, seeds = [0.001, 0.003], [3, 5]
    together = curve(rates, seeds)
    for index, member in enumerate(zip(rates, seeds, strict=True)):
        alone = curve(*([value] for value in member))
        for quantity in ("training_loss", "test_cross_entropy"):
            grouped, single = (getattr(e, quantity) for e in (together, alone))
            np.testing.assert_allclose(grouped[index], single[0], rtol=1e-4)


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
            line.validation_accuracy for line in record.evaluations
        )
        for record in store.records("mnist", "m_sgd", held_out)
        if is_stable(record)
    }
    assert best_accuracies[step_size] == max(best_accuracies.values())
    # Replications are shown the whole training set.
    replications = store.records("mnist", "m_sgd", smoke)
    assert [record.config.seed for record in replications] == [1, 2]
    for record in replications:
        assert all(math.isnan(line.validation_loss) for line in record.evaluations)
