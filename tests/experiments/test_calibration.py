"""The calibration: its settings, and what it says of made-up forecasts."""

import math

import jax
import numpy as np
import pytest

from dissect_optax.dissection import number_of_examples
from experiments.command_line import main
from experiments.studies import calibration
from experiments.studies.calibration_settings import (
    BLOCK_SPECTRA,
    SETTINGS,
    block_quadratic,
    rotated_digits,
)


def row(effect, race, trained, one_step=math.nan, *, sure=True, decided=True):
    return {
        "effect": effect,
        "race": {"estimate": race},
        "race_decided": sure,
        "trained": {"estimate": trained},
        "trained_decided": decided,
        "one_step": one_step,
    }


def test_scores_count_agreements_where_training_decides():
    rows = [
        row("sign", -0.2, -0.5, one_step=0.1),
        row("sign", 0.2, -0.5, one_step=-0.1),
        row("sign", -0.2, -0.5, sure=False),
        row("sign", 0.9, -0.9, decided=False),
        row("variance_adaptation", 0.3, 0.4, one_step=0.2),
    ]
    found = calibration.scores(rows)
    sign = found["sign"]
    assert sign["decidable"] == 3
    counts = {
        name: (cell["right"], cell["of"])
        for name, cell in sign.items()
        if name != "decidable"
    }
    assert counts == {
        "race, where decided": (1, 2),
        "race, by its estimate": (2, 3),
        "one step": (1, 2),
        "always better": (3, 3),
    }
    assert found["both"]["always better"]["right"] == 3
    assert found["both"]["decidable"] == 4
    low, high = (found["both"]["one step"][end] for end in ("low", "high"))
    assert 0 < low < 2 / 3 < high < 1


def test_one_step_without_a_positive_improvement_forecasts_nothing():
    values = {"gradient": 1.0, "sign": "nan", "adapted_gradient": 1.0}
    nested = {name: {"value": value} for name, value in values.items()}
    nested["adapted_sign"] = {"value": 2.0}
    assert math.isnan(calibration.one_step_effect(nested, "sign"))


def test_there_are_enough_settings_of_two_batch_sizes():
    assert sum(len(setting.batch_sizes) for setting in SETTINGS.values()) >= 30
    assert all(len(set(setting.batch_sizes)) == 2 for setting in SETTINGS.values())


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "mnist"])
def test_setting_has_a_finite_loss_at_its_start(name):
    problem = SETTINGS[name].make()
    assert problem.settings.steps <= 500
    params = jax.jit(problem.init)(jax.random.key(0))
    training = problem.load_data(None).training
    assert number_of_examples(training) >= 9
    example = jax.tree.map(lambda array: array[0], training)
    loss, _ = jax.jit(problem.evaluate)(params, example)
    assert 0 <= float(loss) < math.inf


@pytest.mark.parametrize("kind", BLOCK_SPECTRA)
def test_examples_of_a_block_quadratic_have_its_curvature(kind):
    problem = block_quadratic(kind)
    rows = np.float64(problem.load_data(None).training)
    hessian = rows.T @ rows / len(rows)
    for index, eigenvalues in enumerate(BLOCK_SPECTRA[kind]):
        block = hessian[3 * index : 3 * index + 3, 3 * index : 3 * index + 3]
        np.testing.assert_allclose(
            np.linalg.eigvalsh(block), eigenvalues, rtol=1e-3, atol=2e-2
        )
        assert np.abs(block - np.diag(np.diag(block))).max() > 0.1
    outside = hessian.copy()
    for index in range(3):
        outside[3 * index : 3 * index + 3, 3 * index : 3 * index + 3] = 0
    assert np.abs(outside).max() < 1e-2


def test_rotation_changes_coordinates_only():
    plain, rotated = rotated_digits(8, rotated=False), rotated_digits(8)
    key = jax.random.key(0)
    example = jax.tree.map(lambda array: array[0], plain.load_data(None).training)
    losses = [p.evaluate(p.init(key), example)[0] for p in (plain, rotated)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert not np.allclose(plain.init(key), rotated.init(key))


def test_command_keeps_failures_and_goes_on(tmp_path, monkeypatch, capsys):
    def dissect(setting, batch_size, *_):
        failed = setting.name == "iris_raw"
        return {
            "failure": "It cannot be tuned." if failed else None,
            "rows": []
            if failed
            else [
                {"setting": setting.name, "batch_size": batch_size}
                | row(effect, -0.3, -0.4, -0.1)
                for effect in calibration.EFFECTS
            ],
        }

    monkeypatch.setattr(calibration, "_dissect", dissect)
    arguments = ["calibrate", "--settings", "iris_raw", "wine_raw"]
    assert main([*arguments, "--runs-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 (16 to 100 %)" in printed
    assert "Failed: iris_raw, 8: It cannot be tuned." in printed
    assert (tmp_path / "figures" / "calibration.png").stat().st_size > 1000

    # What is finished is not dissected again.
    monkeypatch.setattr(calibration, "_dissect", pytest.fail)
    assert main([*arguments, "--runs-dir", str(tmp_path)]) == 0


def test_unknown_setting_is_named(tmp_path, capsys):
    assert main(["calibrate", "--settings", "irisraw", "--runs-dir", str(tmp_path)])
    assert "Did you mean 'iris_raw'?" in capsys.readouterr().err
