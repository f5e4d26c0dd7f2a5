"""The studies of the theory: their numbers, their records, their figures."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread

from dissect_optax import theory
from dissect_optax.dissection import UserError
from experiments.command_line import main
from experiments.studies import (
    catalogue,
    convergence,
    eigenbases,
    illustrations,
    quadratics,
    readings,
    sign_map,
    starts,
)
from experiments.studies.study import StudyRecord, complete


def record_of(results, config=None):
    return StudyRecord(path=None, config=config, environment={}, results=results)


# ---- Commands ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "figure"),
    [
        ("quadratic", "figure_2"),
        ("starts", "starts"),
        ("eigenbases", "eigenbases"),
        ("map", "sign_map"),
        ("convergence", "theorem_1"),
    ],
)
def test_a_study_leaves_record_summary_and_figure_and_runs_once(
    command, figure, tmp_path, monkeypatch, capsys
):
    options = ["--smoke", "--runs-dir", str(tmp_path)]
    assert main([command, *options]) == 0
    summary = json.loads(
        (tmp_path / "studies" / f"{command}_smoke_summary.json").read_text()
    )
    assert summary["environment"]["jax"] == jax.__version__
    study = catalogue.STUDIES[command].smoke
    assert summary["settings"] == json.loads(json.dumps(dataclasses.asdict(study)))
    (path,) = set((tmp_path / "studies").glob(f"{command}_*.json")) - {
        tmp_path / "studies" / f"{command}_smoke_summary.json"
    }
    record = json.loads(path.read_text())
    assert record["config"] == summary["settings"]
    assert len(record["results"]) == study.count
    assert imread(tmp_path / "figures" / f"{figure}_smoke.png").std() > 0.05

    printed = capsys.readouterr().out
    monkeypatch.setattr(type(study), "run", pytest.fail)
    assert main([command, *options]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("number", [1, 4, 5])
def test_the_figures_of_the_theory_render(number, tmp_path, capsys):
    assert main(["figure", str(number), "--runs-dir", str(tmp_path)]) == 0
    path = tmp_path / "figures" / f"figure_{number}.png"
    assert str(path) in capsys.readouterr().out
    assert imread(path).std() > 0.05


def test_figure_4_shades_the_probability_that_it_prints():
    for panel in illustrations.wrong_signs():
        x, density = panel["x"], panel["density"]
        # What lies left of the axis is less than half a percent.
        shaded = np.trapezoid(density[x <= 0], x[x <= 0])
        assert panel["wrong_sign"] == pytest.approx(shaded, abs=0.005)


def test_figure_5_draws_factors_of_the_relative_variance():
    eta, factors = illustrations.adaptation_factors()
    np.testing.assert_allclose(factors["inverse"], 1 / (1 + eta**2), rtol=1e-5)
    np.testing.assert_allclose(factors["inverse_sqrt"], (1 + eta**2) ** -0.5, 1e-5)
    assert factors["gaussian_sign"][eta == 1] == pytest.approx(0.6826895, rel=1e-5)


@dataclasses.dataclass(frozen=True)
class CountingStudy:
    """A study that counts to a number."""

    last: int
    name: str = "counting"
    count: int = 3

    def run(self):
        return ({"number": number} for number in range(self.last))


def test_another_setting_is_another_record(tmp_path):
    first, second = (complete(CountingStudy(last), tmp_path) for last in (2, 3))
    assert first.path != second.path
    assert first.config["last"] == 2
    assert first.results == [{"number": 0}, {"number": 1}]
    assert second.select(number=2) == [{"number": 2}]
    assert complete(CountingStudy(2), tmp_path) == first


@pytest.mark.parametrize(
    ("old", "new"), [('"number": 1', '"number": 2'), ('"last": 2', '"last": 3')]
)
def test_an_edited_record_of_a_study_is_named(old, new, tmp_path):
    path = complete(CountingStudy(2), tmp_path).path
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"{path} cannot be read.*digest.*Remove it"):
        complete(CountingStudy(2), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", "{" * 2000, "[" * 100_000, '{"digest": 1e999}']
)
def test_anything_else_in_place_of_a_study_is_named(text, tmp_path):
    path = complete(CountingStudy(2), tmp_path).path
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        complete(CountingStudy(2), tmp_path)


# ---- Figure 2 ---------------------------------------------------------------------


def test_the_spectra_are_those_of_the_paper():
    key = jax.random.key(0)
    mild = np.asarray(quadratics.draw_well_conditioned(key, 1000))
    assert 0.1 <= mild.min() < 0.11
    assert 1.09 < mild.max() <= 1.1
    ill = np.sort(quadratics.draw_ill_conditioned(key, 1000))
    assert ill[899] <= 1
    assert ill[900] >= 30
    assert 59 < ill[-1] <= 60


@pytest.mark.parametrize("method", ["sgd", "ssd"])
def test_noise_free_runs_are_the_descent_they_are_in_numpy(method, x64):
    basis = theory.random_rotation(jax.random.key(1), 6)
    problem = theory.quadratic_problem(jnp.linspace(0.2, 2.0, 6), basis)
    key = jax.random.key(2)
    losses = quadratics.descend(method, 5, problem, jnp.asarray(5.0), key)
    theta = 5 * np.asarray(jax.random.normal(jax.random.split(key)[0], (6,)))
    hessian = np.asarray(problem.hessian)
    expected = [theta @ hessian @ theta / 2]
    for _ in range(5):
        gradient = hessian @ theta
        z = gradient if method == "sgd" else np.sign(gradient)
        theta = theta - (gradient @ z) / (z @ hessian @ z) * z
        expected.append(theta @ hessian @ theta / 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-10)


def test_the_reading_of_figure_2_counts_seeds_and_compares_medians():
    place = {"spectrum": "ill-conditioned", "orientation": "rotated", "noise": 0.1}
    common = {**place, "diagonal_dominance": [0.1, 0.3]}
    sgd = {**common, "method": "sgd", "losses": [[9.0, 4.0], [9.0, 8.0], [9.0, 6.0]]}
    ssd = {**common, "method": "ssd", "losses": [[9.0, 2.0], [9.0, 16.0], [9.0, 0.0]]}
    (panel,) = readings.read_quadratics(record_of([sgd, ssd]))
    assert (panel["sgd_wins"], panel["ssd_wins"]) == (1, 2)
    assert panel["sgd_over_ssd"] == pytest.approx(2.0)
    assert panel["sgd_loss"] == 6.0
    assert panel["paper"] == "roughly even"


# ---- The start, and the eigenbasis -----------------------------------------------


def test_only_the_start_over_the_noise_matters(x64):
    drawn = quadratics.QuadraticStudy(dimensions=6, steps=4, seeds=3)
    problems_of, keys = quadratics.draw_problems(drawn), quadratics.run_keys(drawn)
    small, large = (
        quadratics.descend_all(
            "ssd",
            4,
            problems_of("ill-conditioned", "rotated", scale),
            jnp.asarray(2.0 * scale),
            keys,
        )
        for scale in (1.0, 7.0)
    )
    np.testing.assert_allclose(large, 49 * small, rtol=1e-6)


def test_the_study_of_starts_has_a_row_of_figure_2():
    study = starts.StartStudy(dimensions=6, steps=3, seeds=2, ratios=(1.25,))
    first = next(iter(study.run()))
    figure_2 = quadratics.QuadraticStudy(6, 3, 2, noise_levels=(4.0,))
    sgd, ssd = list(figure_2.run())[:2]
    for name, panel in (("sgd", sgd), ("ssd", ssd)):
        losses = np.array(panel["losses"])
        expected = losses[:, -1] / losses[:, 0]
        np.testing.assert_allclose(first["relative_loss"][name], expected, rtol=1e-3)


def test_eigenvectors_on_the_axes_have_norm_one_and_random_ones_nearly_root_d():
    study = eigenbases.EigenbasisStudy(dimensions=(200,), fractions=(0.0, 1.0), draws=1)
    aligned, rotated = (result["ill-conditioned"] for result in study.run())
    assert aligned["mean_norm"] == pytest.approx(1.0, rel=1e-5)
    assert aligned["diagonal_dominance"] == pytest.approx(1.0, rel=1e-4)
    # A coordinate of a random unit vector is nearly N(0, 1/d): E|v| = √(2/(πd)).
    expected = np.sqrt(2 * 200 / np.pi)
    assert rotated["mean_norm"] == pytest.approx(expected, rel=0.02)
    assert rotated["largest_norm"] < np.sqrt(200)
    assert 1 < rotated["mass_over_trace"] < rotated["bound_over_trace"]
    assert rotated["diagonal_dominance"] == pytest.approx(
        1 / rotated["mass_over_trace"], rel=1e-3
    )


# ---- The map ----------------------------------------------------------------------


def test_an_entry_of_the_map_is_the_ratio_of_improvements(x64):
    basis = theory.random_rotation(jax.random.key(3), 4)
    eigenvalues, normal = jnp.array([0.1, 0.4, 0.7, 1.0]), jnp.arange(1.0, 5.0)
    log_ratio, dominance = sign_map.compare(
        eigenvalues, basis, jnp.asarray(0.0), normal, 0.5
    )
    # Without noise, in NumPy: the loss is spread as the squares of the normal numbers.
    hessian = np.asarray(basis) @ np.diag(eigenvalues) @ np.asarray(basis).T
    theta = np.asarray(basis) @ (np.asarray(normal) / np.sqrt(eigenvalues))
    g = hessian @ theta
    s = np.sign(g)
    of_sign = (g @ s) ** 2 / (s @ hessian @ s)
    of_gradient = (g @ g) ** 2 / (g @ hessian @ g)
    assert float(log_ratio) == pytest.approx(np.log10(of_sign / of_gradient))
    expected = np.trace(hessian) / np.sum(np.abs(hessian))
    assert float(dominance) == pytest.approx(expected)


def test_the_map_starts_axis_aligned_and_round():
    study = sign_map.MapStudy(
        dimensions=5, draws=2, noise_levels=(0.5,), conditions=3, fractions=2
    )
    aligned, rotated = [line for line in study.run() if line["points"] == "even"]
    np.testing.assert_allclose(aligned["diagonal_dominance"], 1.0, rtol=1e-5)
    # A round bowl has no orientation,
    assert rotated["diagonal_dominance"][0] == pytest.approx(1.0, abs=1e-4)
    # any other has.
    assert rotated["diagonal_dominance"][-1] < 0.9


def test_the_reading_of_the_map_finds_the_border():
    config = {"points": ["even"], "noise_levels": [1.0]}
    common = {"points": "even", "noise": 1.0, "conditions": [1.0, 10.0, 100.0]}
    results = [
        {
            **common,
            "fraction": fraction,
            "log10_ratio": ratios,
            "diagonal_dominance": [1.0, 0.5, 0.5 - fraction / 4],
        }
        for fraction, ratios in [
            (0.0, [-0.2, 0.1, 1.0]),
            (0.5, [-0.2, -0.1, 0.1]),
            (1.0, [-0.2, -0.1, -0.1]),
        ]
    ]
    (reading,) = readings.read_map(record_of(results, config))
    assert reading["share_won_by_sign"] == pytest.approx(3 / 9)
    assert reading["largest_ratio"] == pytest.approx(10.0)
    assert reading["aligned_from_condition"] == 10.0
    assert reading["up_to_fraction"] == 0.5
    assert reading["dominance_there"] == pytest.approx(0.375)


# ---- Theorem 1 --------------------------------------------------------------------


def test_the_fitted_slope_is_that_of_a_power():
    steps = convergence.recorded_steps(convergence.ConvergenceStudy(steps=1000))
    assert steps[0] == 0
    assert steps[-1] == 1000
    errors = 5.0 / (1 + steps) ** 1.0
    assert convergence.fitted_slope(steps, errors) == pytest.approx(-1, abs=0.01)
    assert convergence.fitted_slope(steps, np.ones(steps.size)) == pytest.approx(0)


def test_svag_converges_below_the_bound_and_sgd_stalls():
    study = convergence.ConvergenceStudy(
        dimensions=4, steps=3000, seeds=100, conditions=(1.0, 4.0)
    )
    record = record_of(list(study.run()))
    for svag in record.select(method="svag"):
        bound, error, spread = (
            np.array(svag[key]) for key in ("bound", "error", "standard_error")
        )
        # The start is where the bound starts, up to its rounding.
        assert np.all(error[1:] + 3 * spread[1:] < bound[1:])
        assert svag["slope"] == pytest.approx(-1.0, abs=0.1)
    for sgd in record.select(method="sgd"):
        assert sgd["slope"] == pytest.approx(0.0, abs=0.1)
        (svag,) = record.select(method="svag", condition=sgd["condition"])
        assert sgd["error"][-1] > 100 * svag["error"][-1]


def test_one_step_of_svag_takes_the_exact_factors():
    problem = theory.quadratic_problem(jnp.array([0.5, 1.0]), noise=0.3)
    theta, key = jnp.array([1.0, -0.2]), jax.random.key(5)
    step = functools.partial(convergence.step, problem=problem, params=theta, key=key)
    factors = 1 / (1 + np.square(0.3 / np.array([1.0, -0.2])))
    by_sgd = np.asarray(step("sgd")) - np.asarray(theta)
    by_svag = np.asarray(step("svag")) - np.asarray(theta)
    np.testing.assert_allclose(by_svag, factors * by_sgd, rtol=1e-5)
