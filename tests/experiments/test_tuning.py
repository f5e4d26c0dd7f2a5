"""The protocol of §A.2 on records that were made up."""

import math

import pytest

from experiments.errors import UserError
from experiments.problems import Settings
from experiments.records import Measurement, Record, RunConfig
from experiments.tuning import (
    grid_point,
    is_stable,
    missing_points,
    point_on_grid,
    select,
    step_size,
)

SETTINGS = Settings(steps=20, batch_size=8, l2=0.1, evaluation_interval=10)


def made_up_record(learning_rate, losses, accuracies, test_losses=None):
    test_losses = losses if test_losses is None else test_losses
    lines = [
        Measurement(10 * i, loss, loss, test_loss, test_loss, accuracy, 0.1, 0.0)
        for i, (loss, test_loss, accuracy) in enumerate(
            zip(losses, test_losses, accuracies, strict=True)
        )
    ]
    config = RunConfig("digits", "none", "m_sgd", learning_rate, 0, SETTINGS)
    return Record(config, tuple(lines), {})


def search(is_stable_at, first_guess):
    """The points that tuning runs, when stability is known."""
    stable: dict[int, bool] = {}
    while points := missing_points(stable, first_guess):
        assert not stable.keys() & set(points), "a finished run would be run again"
        stable |= {point: is_stable_at(point) for point in points}
    return stable


def test_grid_is_6_3_1_times_powers_of_ten():
    sizes = [step_size(point) for point in range(-9, 7)]
    expected = [float(f"{digit}e{m}") for m in range(-3, 3) for digit in (1, 3, 6)][:16]
    assert sizes == expected
    assert [grid_point(size) for size in sizes] == list(range(-9, 7))


def test_only_grid_points_are_on_the_grid():
    points = list(range(-60, 60))
    assert [point_on_grid(step_size(point)) for point in points] == points
    for size in (0.0, -0.0, -3.0, 2.0, 0.31, 1e-60 / 3, math.inf, -math.inf, math.nan):
        assert point_on_grid(size) is None


@pytest.mark.parametrize(
    ("losses", "stable"),
    [
        ([2.0, 5.0, 1.9], True),
        ([2.0, 1.0, 2.0], False),
        ([2.0, 1.0, 2.1], False),
        ([2.0, math.nan], False),
        ([math.inf], False),
    ],
)
def test_stable_means_finite_and_below_the_beginning(losses, stable):
    record = made_up_record(0.1, losses, [0.5] * len(losses))
    assert is_stable(record) == stable


@pytest.mark.parametrize("first_guess", [-12, -3, 0, 5, 14])
@pytest.mark.parametrize("largest_stable", [-14, -2, 0, 6])
def test_search_ends_at_the_largest_stable_step_size(first_guess, largest_stable):
    stable = search(lambda point: point <= largest_stable, first_guess)
    assert max(point for point in stable if stable[point]) == largest_stable
    assert largest_stable + 1 in stable
    assert set(range(largest_stable - 6, largest_stable + 1)) <= stable.keys()


@pytest.mark.parametrize(
    ("stable_everywhere", "message"),
    [(True, "none is the largest"), (False, "No step size is stable")],
)
def test_search_that_finds_no_boundary_is_an_error(stable_everywhere, message):
    with pytest.raises(UserError, match=message):
        search(lambda _: stable_everywhere, first_guess=0)


def test_best_maximal_accuracy_within_two_decades_wins():
    records = [
        # Better than all, but more than two decades below the largest stable one.
        made_up_record(0.003, [2.0, 1.0, 1.0], [0.1, 0.99, 0.99]),
        made_up_record(0.03, [2.0, 1.0, 1.0], [0.1, 0.7, 0.8]),
        # Its best accuracy is not its last.
        made_up_record(0.1, [2.0, 1.0, 1.0], [0.1, 0.9, 0.5]),
        made_up_record(0.3, [2.0, 1.0, 1.0], [0.1, 0.8, 0.8]),
        made_up_record(0.6, [2.0, 1.0, 1.0], [0.1, 0.2, 0.2]),
        # Better, but not stable.
        made_up_record(1.0, [2.0, 1.0, 3.0], [0.1, 0.95, 0.1]),
    ]
    tuned = select(records)
    assert tuned.learning_rate == 0.1
    assert tuned.largest_stable == 0.6
    assert [run.config.learning_rate for run in tuned.candidates] == [
        0.03,
        0.1,
        0.3,
        0.6,
    ]


def test_test_loss_decides_between_equal_accuracies():
    records = [
        made_up_record(0.1, [2.0, 1.0], [0.1, 0.9], [2.0, 0.8]),
        made_up_record(0.3, [2.0, 1.0], [0.1, 0.9], [2.0, 0.7]),
        made_up_record(0.6, [2.0, 1.0], [0.1, 0.9], [2.0, 0.9]),
        made_up_record(1.0, [2.0, 3.0], [0.1, 0.1]),
    ]
    assert select(records).learning_rate == 0.3
