"""Tables, effects and figures from records that were made up."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from experiments.figures import training_curves
from experiments.methods import get_method
from experiments.problems import Settings, get_problem
from experiments.records import Measurement, Record, RunConfig
from experiments.reporting import accuracy_table, mean_and_std, paired_effect
from experiments.tuning import Outcome, Tuned

SETTINGS = Settings(steps=20, batch_size=8, l2=0.1, evaluation_interval=10)


def made_up_record(losses, seed=1, learning_rate=0.1, accuracy=0.5):
    lines = [
        Measurement(10 * i, loss, loss, loss, loss, accuracy, learning_rate, 0.0)
        for i, loss in enumerate(losses)
    ]
    config = RunConfig("mnist", "none", "m_sgd", learning_rate, seed, SETTINGS)
    return Record(config, tuple(lines), {})


FINISHED = [made_up_record((3.0, 2.0, 1.0), seed=1, accuracy=0.8)]
FINISHED += [made_up_record((3.0, 2.0, 2.0), seed=2, accuracy=0.6)]
DIVERGED = made_up_record((3.0, math.nan), seed=3)


def drawn_lines(monkeypatch, tmp_path, lines):
    """What a figure of one problem draws: label, values and opacity."""
    drawn = []
    plot = Axes.plot

    def noted(axes, steps, values, **style):
        drawn.append((style["label"], list(values), style["alpha"]))
        return plot(axes, steps, values, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    path = training_curves.draw({"MNIST": lines}, tmp_path / "figure.png")
    assert imread(path).std() > 0.02
    return drawn[: len(lines)]  # The same again for the test loss.


def row_of(replications):
    """The cells of the accuracy table's only row."""
    tuned = Tuned(0.1, 1.0, ())
    outcome = Outcome(get_method("m_sgd"), tuned, tuple(replications))
    table = accuracy_table(get_problem("mnist"), {"m_sgd": outcome})
    return [next(iter(column.cells)) for column in table.columns]


def test_diverged_replication_leaves_the_others_in_the_figure(tmp_path, monkeypatch):
    lines = {"M-SGD": [*FINISHED, DIVERGED]}
    ((label, values, _),) = drawn_lines(monkeypatch, tmp_path, lines)
    assert label == "M-SGD (1 of 3 diverged)"
    assert values == [3.0, 2.0, 1.5]


def test_figure_of_runs_that_all_diverged_ends_where_they_did(tmp_path, monkeypatch):
    ((label, values, _),) = drawn_lines(monkeypatch, tmp_path, {"M-SGD": [DIVERGED]})
    assert label == "M-SGD (1 of 1 diverged)"
    assert values[0] == 3.0
    assert math.isnan(values[1])


def test_step_sizes_of_a_method_can_be_told_apart(tmp_path, monkeypatch):
    lines = {f"M-SGD, {rate}": [made_up_record((3.0, 2.0), 1, rate)] for rate in (1, 2)}
    drawn = drawn_lines(monkeypatch, tmp_path, lines)
    assert [opacity for *_, opacity in drawn] == [0.5, 1.0]


def test_diverged_replication_is_counted_apart_in_the_table():
    assert row_of(FINISHED)[1::4] == ["70.0 ± 14.1 %", "2"]
    assert row_of([*FINISHED, DIVERGED])[1::4] == ["70.0 ± 14.1 %", "3, 1 diverged"]
    assert row_of([DIVERGED])[1::4] == ["nan ± nan %", "1, 1 diverged"]


def test_pair_with_a_diverged_run_is_left_out_of_an_effect():
    before = {1: 0.5, 2: 0.6, 3: math.nan}
    after = {1: 0.6, 2: 0.8, 3: 0.7}
    effect = paired_effect("b − a", before, after)
    assert effect.seeds == 2
    assert effect.mean == pytest.approx(15.0)
    nothing = paired_effect("b − a", {1: math.nan}, {1: 0.5})
    assert nothing.seeds == 0
    assert nothing.within_noise


def test_deviation_has_n_minus_one_below():
    mean, std = mean_and_std([1.0, 2.0, 6.0])
    assert (mean, std) == (3.0, pytest.approx(math.sqrt(14 / 2)))
    assert math.isnan(mean_and_std([1.0])[1])


def test_interval_of_paired_effects_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    true_effect, seeds, repetitions = 0.01, 6, 2000
    covered = 0
    for _ in range(repetitions):
        shared = generator.normal(0.9, 0.05, seeds)
        before = dict(enumerate(shared + generator.normal(0, 0.01, seeds)))
        after = dict(enumerate(shared + true_effect + generator.normal(0, 0.01, seeds)))
        effect = paired_effect("after − before", before, after)
        covered += abs(effect.mean - 100 * true_effect) <= effect.half_width
    # Three standard deviations of a share of 95 % among 2 000; a normal quantile in
    # the place of Student's would cover 89 %.
    assert abs(covered / repetitions - 0.95) < 0.015


def test_effect_uses_the_seeds_that_both_have():
    effect = paired_effect(
        "b − a", {1: 0.5, 2: 0.5, 3: 0.5, 9: 0.0}, {1: 0.6, 2: 0.4, 3: 0.5, 4: 1.0}
    )
    assert effect.seeds == 3
    assert effect.mean == pytest.approx(0.0)
    assert effect.within_noise
