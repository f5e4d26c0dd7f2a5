"""Tables, effects and figures from records that were made up."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.image import imread

from dissect_optax.dissection import (
    FOUR_METHODS,
    Measurement,
    MethodResult,
    Record,
    RunConfig,
    Settings,
    Tuned,
    get_method,
)
from experiments.figures import step_sizes, training_curves
from experiments.figures.style import color, colors, line_style, save
from experiments.problems import get_problem
from experiments.reporting import (
    accuracy_table,
    effect_table,
    mean_and_std,
    paired_effect,
)

SETTINGS = Settings(steps=20, batch_size=8, evaluation_interval=10)


def made_up_record(losses, seed=1, learning_rate=0.1, accuracy=0.5, method="m_sgd"):
    """A run whose test loss is half a unit above its training loss."""
    lines = [
        Measurement(
            10 * i,
            0.0,
            {
                "training_loss": loss,
                "test_loss": loss + 0.5,
                "test_accuracy": accuracy,
            },
        )
        for i, loss in enumerate(losses)
    ]
    config = RunConfig("mnist", method, learning_rate, seed, SETTINGS)
    return Record(config, tuple(lines), {})


FINISHED = [made_up_record((3.0, 2.0, 1.0), seed=1, accuracy=0.8)]
FINISHED += [made_up_record((3.0, 2.0, 2.0), seed=2, accuracy=0.6)]
DIVERGED = made_up_record((3.0, math.nan), seed=3)


def drawn(monkeypatch, tmp_path, columns):
    """The figure that is drawn of these lines."""
    figures = []

    def kept(figure, path):
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr("experiments.figures.training_curves.save", kept)
    path = training_curves.draw(columns, tmp_path / "figure.png")
    assert imread(path).std() > 0.02
    (figure,) = figures
    return figure


def notes_in(axes):
    return [text.get_text() for text in axes.texts]


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def row_of(replications):
    """The cells of the accuracy table's only row."""
    tuned = Tuned(0.1, 1.0, ())
    result = MethodResult(get_method("m_sgd"), tuned, tuple(replications))
    table = accuracy_table(get_problem("mnist"), {"m_sgd": result})
    return [next(iter(column.cells)) for column in table.columns]


def test_figure_shows_mean_and_deviation_of_both_losses(tmp_path, monkeypatch):
    adam = [made_up_record((3.0, 2.5, 2.25), method="adam")]
    lines = {"M-SGD": [*FINISHED, DIVERGED], "ADAM": adam}
    figure = drawn(monkeypatch, tmp_path, {"MNIST": lines})
    *losses, accuracies = figure.axes
    for axes, above in zip(losses, (0.0, 0.5), strict=True):
        by_label = {line.get_label(): line for line in axes.lines}
        mean = np.array([3.0, 2.0, 1.5])
        steps, values = by_label["M-SGD"].get_data()
        np.testing.assert_array_equal(steps, [0, 10, 20])
        np.testing.assert_allclose(values, mean + above)
        np.testing.assert_allclose(
            by_label["ADAM"].get_ydata(), np.array([3.0, 2.5, 2.25]) + above
        )
        assert by_label["M-SGD"].get_color() == color("m_sgd")
        assert by_label["ADAM"].get_color() == color("adam")
        # One run has no deviation; the other's last two are 1 and 2.
        (band,) = axes.collections
        outline = band.get_paths()[0].vertices
        at_end = outline[outline[:, 0] == 20, 1]
        assert at_end.min() == pytest.approx(1.5 + above - math.sqrt(0.5))
        assert at_end.max() == pytest.approx(1.5 + above + math.sqrt(0.5))

    by_label = {line.get_label(): line for line in accuracies.lines}
    np.testing.assert_allclose(by_label["M-SGD"].get_ydata(), 0.7)
    # What is reached after the first fifth of the steps fills the axis.
    assert accuracies.get_ylim() == pytest.approx((0.485, 0.815))


def test_where_each_step_size_ends(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "experiments.figures.step_sizes.save",
        lambda figure, path: figures.append(figure) or save(figure, path),
    )
    runs = [
        made_up_record((3.0, 2.0), 1, 0.1, accuracy=0.5),
        made_up_record((3.0, 1.0), 2, 0.1, accuracy=0.7),
        made_up_record((3.0, math.nan), 1, 1.0),
        made_up_record((3.0, 0.5), 1, 0.01, accuracy=0.9),
    ]
    step_sizes.draw({"M-SGD": runs}, "MNIST", tmp_path / "figure.png")
    losses, accuracies = figures[0].axes
    rates, ends = losses.lines[0].get_data()
    np.testing.assert_allclose(rates, [0.01, 0.1, 1.0])
    np.testing.assert_allclose(ends, [0.5, 1.5, math.nan])
    _, ends = accuracies.lines[0].get_data()
    np.testing.assert_allclose(ends, [0.9, 0.6, math.nan])


@pytest.mark.parametrize(
    "methods",
    [("adam", "adam_star", "adam_star_mb"), ("m_svag", "m_svag_mb"), FOUR_METHODS],
)
def test_lines_of_a_figure_differ_in_more_than_colour(methods):
    styles = {(line_style(method), color(method)) for method in methods}
    assert len(styles) == len(methods)
    if methods != FOUR_METHODS:
        assert len({line_style(method) for method in methods}) == len(methods)


def test_diverged_runs_are_named_in_their_column(tmp_path, monkeypatch):
    columns = {
        "MNIST": {"M-SGD": FINISHED},
        "CIFAR-10": {"M-SGD": [*FINISHED, DIVERGED], "SGD": [DIVERGED]},
    }
    figure = drawn(monkeypatch, tmp_path, columns)
    mnist, cifar10 = figure.axes[:2]
    assert notes_in(mnist) == []
    expected = "M-SGD: 1 of 3 diverged\nSGD: 1 of 1 diverged"
    assert notes_in(cifar10) == [expected]
    assert legend_of(figure) == ["M-SGD", "SGD"]


def test_figure_of_runs_that_all_diverged_ends_where_they_did(tmp_path, monkeypatch):
    figure = drawn(monkeypatch, tmp_path, {"MNIST": {"M-SGD": [DIVERGED]}})
    first, second = figure.axes[0].lines[0].get_ydata()
    assert first == 3.0
    assert math.isnan(second)


def test_step_sizes_of_a_method_can_be_told_apart(tmp_path, monkeypatch):
    lines = {
        f"M-SGD, {rate}": [made_up_record((3.0, 2.0), 1, float(rate))]
        for rate in range(1, 12)
    }
    figure = drawn(monkeypatch, tmp_path, {"MNIST": lines})
    opacities = [line.get_alpha() for line in figure.axes[0].lines]
    assert opacities == pytest.approx(np.linspace(0.2, 1, 12)[1:])


def test_methods_of_other_libraries_can_be_told_apart():
    found = colors(["optax.lion", "m_sgd", "optax.adamw", "optax.lion"])
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("astray", [1e2, 1e9, 1e30])
def test_axis_has_ticks_whatever_went_astray(tmp_path, monkeypatch, astray):
    lines = {
        "M-SGD": FINISHED,
        "SGD": [made_up_record((3.0, astray, 1e-5), method="sgd")],
    }
    figure = drawn(monkeypatch, tmp_path, {"MNIST": lines})
    for axes in figure.axes:
        low, high = axes.get_ylim()
        smallest = min(line.get_ydata().min() for line in axes.lines)
        assert 0.5 * smallest < low < smallest
        assert high <= 7.0  # Twice the loss of the untrained network.
        ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
        assert len(ticks) >= 2


def test_diverged_replication_is_counted_apart_in_the_table():
    assert row_of(FINISHED)[1::4] == ["70.0 ± 14.1 %", "2"]
    assert row_of([*FINISHED, DIVERGED])[1::4] == ["70.0 ± 14.1 %", "3, 1 diverged"]
    assert row_of([DIVERGED])[1::4] == ["–", "1, 1 diverged"]
    assert row_of(FINISHED[:1])[1::4] == ["80.0 %", "1"]


def test_pair_with_a_diverged_run_is_left_out_of_an_effect():
    before = {1: 0.5, 2: 0.6, 3: math.nan}
    after = {1: 0.6, 2: 0.8, 3: 0.7}
    effect = paired_effect("b − a", before, after)
    assert effect.seeds == 2
    assert effect.mean == pytest.approx(15.0)
    nothing = paired_effect("b − a", {1: math.nan}, {1: 0.5})
    assert nothing.seeds == 0
    assert nothing == dataclasses.replace(nothing, mean=float("nan"))
    assert nothing != dataclasses.replace(nothing, mean=0.0)
    single = paired_effect("b − a", {1: 0.5}, {1: 0.6})
    cells = [
        list(column.cells)
        for column in effect_table("it", [effect, nothing, single]).columns
    ]
    assert cells[1] == ["+15.00 ± 63.53", "–", "+10.00"]
    assert cells[2] == ["2", "0", "1"]
    assert cells[3] == ["within noise", "", ""]


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
