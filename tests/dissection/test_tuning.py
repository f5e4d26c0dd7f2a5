"""The protocol of §A.2 on records that were made up."""

import dataclasses
import math

import jax
import pytest

from dissect_optax.dissection import (
    FOUR_METHODS,
    Measurement,
    Protocol,
    Record,
    RunConfig,
    Settings,
    complete,
    find_result,
    find_tuned,
    get_method,
    grid_point,
    missing_points,
    point_on_grid,
    replicate,
    select,
    step_size,
    tune,
)
from dissect_optax.dissection._tuning import (
    LARGEST_POINT,
    NoStableStepSize,
    Trial,
    limit_seen,
)
from tests.dissection import toys

SETTINGS = Settings(steps=20, batch_size=8, evaluation_interval=10)
PROTOCOL = Protocol(SETTINGS)


def made_up_record(
    learning_rate, losses, accuracies, test_losses=None, seed=0, settings=SETTINGS
):
    """A run; its regularizer grows by one per evaluation, which has no influence."""
    test_losses = losses if test_losses is None else test_losses
    lines = [
        Measurement(
            10 * i,
            0.0,
            {
                "training_loss": loss + i,
                "training_data_loss": loss,
                "test_loss": test_loss,
                "test_accuracy": accuracy,
            },
        )
        for i, (loss, test_loss, accuracy) in enumerate(
            zip(losses, test_losses, accuracies, strict=True)
        )
    ]
    config = RunConfig("digits", "m_sgd", learning_rate, seed, settings)
    return Record(config, tuple(lines), {})


def by_point(records):
    runs = {}
    for record in records:
        runs.setdefault(point_on_grid(record.config.learning_rate), []).append(record)
    return runs


def search(is_stable_at, first_guess, merit_at=float):
    """The points that tuning runs, when stability and merit are known."""
    trials: dict[int, Trial] = {}
    while points := missing_points(trials, first_guess):
        assert not trials.keys() & set(points), "a finished run would be run again"
        trials |= {
            point: Trial(is_stable_at(point), (merit_at(point),)) for point in points
        }
    return trials


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
        ([2.0, 5.0, 1.75], True),
        ([2.0, 1.0, 1.81], False),  # It went down by less than a tenth.
        ([2.0, 1.0, 1.79], True),
        ([2.0, 1.0, 2.0], False),
        ([2.0, 1.0, 2.1], False),
        ([2.0, math.nan], False),
        ([2.0, math.inf, 1.0], False),
        ([math.inf], False),
        # A log-likelihood may be negative: a tenth of its size counts.
        ([-2.0, -1.0, -2.1], False),
        ([-2.0, -1.0, -2.3], True),
    ],
)
def test_stable_means_finite_and_well_below_the_beginning(losses, stable):
    record = made_up_record(0.1, losses, [0.5] * len(losses))
    assert PROTOCOL.is_stable(record) == stable


def test_how_far_below_is_up_to_the_protocol():
    record = made_up_record(0.1, [2.0, 1.5], [0.5, 0.5])
    assert not Protocol(SETTINGS, stable_below=0.7).is_stable(record)
    assert Protocol(SETTINGS, stable_below=0.8).is_stable(record)


@pytest.mark.parametrize("first_guess", [-12, -3, 0, 5, 14])
@pytest.mark.parametrize("largest_stable", [-14, -2, 0, 6])
def test_search_ends_at_the_largest_stable_step_size(first_guess, largest_stable):
    trials = search(lambda point: point <= largest_stable, first_guess)
    assert max(point for point in trials if trials[point].stable) == largest_stable
    assert largest_stable + 1 in trials
    assert set(range(largest_stable - 6, largest_stable + 1)) <= trials.keys()


@pytest.mark.parametrize("first_guess", [-12, 0, 14])
@pytest.mark.parametrize("best", [-20, -8, -7, -6, -5, 0])
def test_search_goes_on_downwards_until_the_winner_is_not_the_smallest(
    best, first_guess
):
    trials = search(lambda point: point <= 0, first_guess, lambda p: -abs(p - best))
    records = {
        point: [made_up_record(step_size(point), [2.0, 1.0], [0.0, 1 / (1 + distance)])]
        if trials[point].stable
        else [made_up_record(step_size(point), [2.0, 3.0], [0.0, 0.0])]
        for point in trials
        for distance in [abs(point - best)]
    }
    tuned = select(PROTOCOL, records)
    assert tuned.learning_rate == step_size(best)
    assert tuned.largest_stable == step_size(0)
    assert tuned.searched_below == (best <= -6)
    # Two decades, and one more each time that the smallest of them wins.
    smallest = min(grid_point(run.config.learning_rate) for run in tuned.candidates)
    expected = -6
    while best <= expected:
        expected -= 3
    assert smallest == expected
    # Beyond that only what the first groups hold.
    assert min(trials) >= min(expected, first_guess - 9, -9)


def test_search_where_ever_smaller_is_better_ends_with_the_grid():
    trials = search(lambda point: point <= 0, 0, lambda point: -point)
    assert min(trials) == -30


def test_unstable_step_size_among_stable_ones_cannot_win():
    trials = search(lambda point: point <= 0 and point != -3, 0, lambda p: -abs(p + 3))
    assert set(range(-6, 2)) <= trials.keys()
    assert not trials[-3].stable


def test_search_that_finds_nothing_stable_is_an_error():
    with pytest.raises(NoStableStepSize, match="No step size is stable"):
        search(lambda _: False, first_guess=0)


@pytest.mark.parametrize("first_guess", [-12, 0, 14])
@pytest.mark.parametrize("best", [LARGEST_POINT + 9, LARGEST_POINT, 5, -9])
def test_search_where_everything_is_stable_ends_at_the_largest(first_guess, best):
    trials = search(lambda _: True, first_guess, lambda p: -abs(p - best))
    assert max(trials) == LARGEST_POINT
    records = {
        point: [
            made_up_record(step_size(point), [2.0, 1.0], [0.0, trials[point].merit])
        ]
        for point in trials
    }
    by_accuracy = Protocol(SETTINGS, lambda run: run.evaluations[-1]["test_accuracy"])
    tuned = select(by_accuracy, records)
    assert tuned.learning_rate == step_size(min(best, LARGEST_POINT))
    assert tuned.largest_stable == step_size(LARGEST_POINT) == 1e6
    assert not tuned.limit_seen


def test_best_maximal_accuracy_within_two_decades_wins():
    records = [
        # Better than all, but more than two decades below the largest stable one.
        made_up_record(0.003, [2.0, 1.0, 1.0], [0.1, 0.99, 0.99]),
        made_up_record(0.006, [2.0, 1.0, 1.0], [0.1, 0.3, 0.3]),
        made_up_record(0.03, [2.0, 1.0, 1.0], [0.1, 0.7, 0.8]),
        # Its best accuracy is not its last.
        made_up_record(0.1, [2.0, 1.0, 1.0], [0.1, 0.9, 0.5]),
        made_up_record(0.3, [2.0, 1.0, 1.0], [0.1, 0.8, 0.8]),
        made_up_record(0.6, [2.0, 1.0, 1.0], [0.1, 0.2, 0.2]),
        # Better, but not stable.
        made_up_record(1.0, [2.0, 1.0, 3.0], [0.1, 0.95, 0.1]),
    ]
    tuned = select(PROTOCOL, by_point(records))
    assert tuned.learning_rate == 0.1
    assert tuned.largest_stable == 0.6
    assert [run.config.learning_rate for run in tuned.candidates] == [
        0.006,
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
    assert select(PROTOCOL, by_point(records)).learning_rate == 0.3


def test_held_out_examples_count_where_there_are_some():
    settings = dataclasses.replace(SETTINGS, validation_fraction=0.1)

    def record(learning_rate, validation_accuracy, test_accuracy):
        run = made_up_record(
            learning_rate, [2.0, 1.0], [0.1, test_accuracy], settings=settings
        )
        lines = [
            dataclasses.replace(
                line,
                values=dict(line.values)
                | {"validation_accuracy": validation_accuracy, "validation_loss": 1.0},
            )
            for line in run.evaluations
        ]
        return dataclasses.replace(run, evaluations=tuple(lines))

    records = [record(0.1, 0.5, 0.5), record(0.3, 0.7, 0.5), record(0.6, 0.5, 0.9)]
    records.append(made_up_record(1.0, [2.0, 3.0], [0.1, 0.1], settings=settings))
    tuned = select(Protocol(settings), by_point(records))
    assert tuned.learning_rate == 0.3


def test_mean_over_the_seeds_decides_and_all_must_be_stable():
    def runs(learning_rate, *accuracies, last_loss=1.0):
        return [
            made_up_record(
                learning_rate,
                [2.0, last_loss if seed else 1.0],
                [0.0, accuracy],
                seed=seed,
            )
            for seed, accuracy in enumerate(accuracies)
        ]

    records = [
        *runs(0.1, 0.5, 0.5),
        *runs(0.3, 0.9, 0.4),
        *runs(0.6, 0.7, 0.5),
        *runs(1.0, 1.0, 1.0, last_loss=3.0),
    ]
    tuned = select(Protocol(SETTINGS, seeds=(0, 1)), by_point(records))
    assert tuned.learning_rate == 0.3
    assert tuned.largest_stable == 0.6
    assert len(tuned.candidates) == 6


def test_merit_is_up_to_the_protocol_and_nan_is_the_worst():
    records = [
        made_up_record(0.1, [2.0, 1.0], [0.1, 0.9]),
        made_up_record(0.3, [2.0, 0.5], [0.1, 0.1]),
        made_up_record(0.6, [2.0, 1.0], [0.1, math.nan]),
        made_up_record(1.0, [2.0, 3.0], [0.1, 0.1]),
    ]
    by_loss = Protocol(SETTINGS, merit=lambda run: (-run.evaluations[-1]["test_loss"],))
    assert select(by_loss, by_point(records)).learning_rate == 0.3
    by_last = Protocol(SETTINGS, merit=lambda run: (run.curve("test_accuracy")[-1],))
    assert select(by_last, by_point(records)).learning_rate == 0.1


def test_cost_is_counted_in_runs():
    records = [
        made_up_record(0.1, [2.0, 1.0, 1.0], [0.1, 0.9, 0.9]),
        made_up_record(0.3, [2.0, 1.0, 3.0], [0.1, 0.5, 0.5]),
        # It diverged half-way.
        made_up_record(0.6, [2.0, math.nan], [0.1, 0.1]),
    ]
    assert select(PROTOCOL, by_point(records)).cost == 2.5


# ---- On runs ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_job(tmp_path_factory):
    """Tuning and replications of the small problem by one method."""
    job = toys.job(tmp_path_factory.mktemp("runs"), replicas=10)
    with jax.numpy_rank_promotion("raise"):
        tuned = tune(job, PROTOCOL, get_method("m_sgd"))
        replicate(job, get_method("m_sgd"), tuned.learning_rate, seeds=2)
    return job, tuned


def test_tuning_compares_runs_with_the_seed_of_the_protocol(tuned_job):
    job, tuned = tuned_job
    assert {run.config.seed for run in tuned.candidates} == {0}
    accuracies = {
        run.config.learning_rate: max(run.curve("test_accuracy"))
        for run in tuned.candidates
    }
    assert accuracies[tuned.learning_rate] == max(accuracies.values())
    assert max(accuracies) == tuned.largest_stable
    above = job.config(
        get_method("m_sgd"), step_size(grid_point(tuned.largest_stable) + 1), 0
    )
    assert not PROTOCOL.is_stable(job.store.find(above))


def test_result_is_found_from_records_alone(tuned_job, monkeypatch):
    job, tuned = tuned_job
    monkeypatch.setattr("dissect_optax.dissection._running._run_group", pytest.fail)
    monkeypatch.setattr("dissect_optax.dissection._running._whole_data", pytest.fail)
    assert find_tuned(job, PROTOCOL, get_method("m_sgd")) == tuned
    result = find_result(job, PROTOCOL, get_method("m_sgd"))
    assert result.tuned == tuned
    assert [run.config.seed for run in result.replications] == [1, 2]
    assert {run.config.learning_rate for run in result.replications} == {
        tuned.learning_rate
    }
    others = [name for name in FOUR_METHODS if name != "m_sgd"]
    for name in others:
        assert find_tuned(job, PROTOCOL, get_method(name)) is None
        assert find_result(job, PROTOCOL, get_method(name)) is None


def test_tuning_without_replications_is_no_result_yet(tuned_job):
    job, _ = tuned_job
    # With another seed of tuning there are no runs at all.
    protocol = Protocol(SETTINGS, seeds=(7,))
    assert find_tuned(job, protocol, get_method("m_sgd")) is None


def test_run_by_hand_does_not_lead_the_search(tuned_job, monkeypatch):
    job, tuned = tuned_job
    # With the seed of tuning, far from where it looks, and a seed between replications.
    for rate, seed in ((1e6, 0), (tuned.learning_rate, 42)):
        method = get_method("m_sgd")
        complete(job, method, "by hand", [job.config(method, rate, seed)])
    monkeypatch.setattr("dissect_optax.dissection._running._run_group", pytest.fail)
    assert tune(job, PROTOCOL, get_method("m_sgd")) == tuned
    result = find_result(job, PROTOCOL, get_method("m_sgd"))
    assert [run.config.seed for run in result.replications] == [1, 2]


def test_best_step_size_ends_the_search_where_everything_is_stable():
    trials: dict[int, Trial] = {}
    while points := missing_points(trials, 0, bounded_by_best=True):
        assert not trials.keys() & set(points)
        trials |= {point: Trial(True, (-abs(point + 2.0),)) for point in points}
    assert max(trials) < 10
    assert {-8, -2, 4} <= trials.keys()
    assert not limit_seen(trials, max(trials))
