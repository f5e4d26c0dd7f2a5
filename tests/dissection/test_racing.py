"""Races: how long they are, and which full runs follow them; nothing is trained."""

import dataclasses
import math

import pytest

from dissect_optax.dissection import (
    Job,
    Measurement,
    Protocol,
    Record,
    Settings,
    SilentMonitor,
    Store,
    get_method,
    point_on_grid,
    step_size,
)
from dissect_optax.dissection import _tuning as tuning
from dissect_optax.dissection._racing import race_settings, tune_by_race
from dissect_optax.dissection._tuning import LARGEST_POINT, NoStableStepSize
from tests.dissection.toys import PROBLEM

METHOD = get_method("m_ssd")
SETTINGS = Settings(steps=100, batch_size=8, evaluation_interval=50)
PROTOCOL = Protocol(
    SETTINGS,
    lambda record: (-record.evaluations[-1]["training_loss"],),
    seeds=(0, 1),
    stable_below=1.0,
)


@pytest.mark.parametrize(
    ("steps", "interval", "expected"),
    [
        (1000, 50, (100, 5)),
        (400, 20, (40, 2)),
        (200, 10, (20, 1)),
        (500, 25, (50, 2)),
        (1000, 1000, (100, 100)),
        # However often a run is evaluated, its race is no longer.
        (1000, 1, (100, 1)),
        (1000, 4, (100, 1)),
        (1000, 5, (100, 1)),
        # Ten steps at least, or half of them.
        (40, 2, (10, 1)),
        (20, 1, (10, 1)),
        (10, 5, (5, 1)),
        (3, 1, (2, 1)),
        (1, 1, (1, 1)),
    ],
)
def test_a_race_has_a_tenth_of_the_steps(steps, interval, expected):
    settings = Settings(steps, 8, interval, examples=50)
    race = race_settings(settings)
    assert (race.steps, race.evaluation_interval) == expected
    assert (race.batch_size, race.examples) == (8, 50)


@pytest.mark.parametrize("steps", [20, 60, 100, 360, 1000])
@pytest.mark.parametrize("evaluations", [1, 2, 4, 10, 20])
def test_the_length_of_a_race_hardly_depends_on_evaluations(steps, evaluations):
    race = race_settings(Settings(steps, 8, steps // evaluations))
    wanted = max(steps / 10, min(10, steps / 2))
    assert wanted / 2 <= race.steps <= 1.5 * wanted


@pytest.fixture
def trained(monkeypatch):
    """Makes runs up: from the last loss by steps and grid point, 1 at the start."""

    def install(last_loss):
        asked = []

        def complete(job, method, title, configs):
            found = []
            for config in configs:
                settings = config.settings
                point = point_on_grid(config.learning_rate)
                if settings.steps == SETTINGS.steps and config.seed == 0:
                    asked.append(point)
                losses = [1.0, last_loss(settings.steps, point)]
                lines = tuple(
                    Measurement(
                        step, 0.0, {"training_loss": value, "training_data_loss": value}
                    )
                    for step, value in zip((0, settings.steps), losses, strict=True)
                )
                record = Record(config, lines, {})
                job.store.write(record)
                found.append(record)
            return found

        monkeypatch.setattr(tuning, "complete", complete)
        job = Job(PROBLEM, SETTINGS, Store(None), SilentMonitor())
        return job, asked

    return install


def parabola(best, top):
    """Lowest at one point, and no descent above another."""

    def last_loss(steps, point):
        return math.nan if point > top else 0.1 + 0.01 * (point - best) ** 2

    return last_loss


def test_full_runs_are_around_the_winner_of_the_race(trained):
    job, asked = trained(parabola(best=-4, top=0))
    found = tune_by_race(job, PROTOCOL, METHOD)
    assert sorted(asked) == [-5, -4, -3]
    assert found.learning_rate == step_size(-4)
    assert found.largest_stable == step_size(0)
    assert not found.at_edge
    # Two seeds each: full runs, and races of a tenth of the steps.
    race = sum(record.evaluations[-1].step for record in found.race)
    assert found.full_cost == 6
    assert found.race_cost == pytest.approx(race / 100)
    assert race == 10 * len(found.race)


@pytest.mark.parametrize("drift", [-6, -2, 1, 2])
def test_full_runs_follow_the_best_step_size(trained, drift):
    short, full = parabola(-4, 0), parabola(-4 + drift, 0)
    job, asked = trained(lambda steps, p: (short if steps == 10 else full)(steps, p))
    found = tune_by_race(job, PROTOCOL, METHOD)
    assert found.learning_rate == step_size(-4 + drift)
    # Each grid point once, without a hole.
    assert sorted(asked) == list(range(min(asked), max(asked) + 1))
    assert min(asked) <= -5 + drift
    assert max(asked) >= -3 + drift


def test_full_runs_stop_one_point_above_the_largest_stable(trained):
    job, asked = trained(parabola(best=3, top=0))
    found = tune_by_race(job, PROTOCOL, METHOD)
    assert found.learning_rate == step_size(0)
    assert max(asked) == 1
    # The larger one was tried, and is not stable.
    assert not found.trials[1].stable


def test_full_runs_may_need_smaller_steps_than_any_of_the_race(trained):
    short, full = parabola(-4, 0), parabola(-9, -9)
    job, _ = trained(lambda steps, p: (short if steps == 10 else full)(steps, p))
    assert tune_by_race(job, PROTOCOL, METHOD).learning_rate == step_size(-9)


@pytest.mark.parametrize("steps", [10, 100])
def test_stable_nowhere_is_an_error_of_its_own(trained, steps):
    stable = parabola(-4, 0)
    job, _ = trained(lambda s, p: math.nan if s == steps else stable(s, p))
    with pytest.raises(NoStableStepSize, match="M-SSD cannot be tuned"):
        tune_by_race(job, PROTOCOL, METHOD)


@pytest.mark.parametrize("best", [LARGEST_POINT + 3, LARGEST_POINT, 3, -4])
@pytest.mark.parametrize("bounded", [True, False])
def test_stable_everywhere_ends_with_the_best_that_was_tried(trained, best, bounded):
    # Below the first loss, one, everywhere.
    job, asked = trained(lambda _, point: math.atan(abs(point - best)) / 2)
    protocol = dataclasses.replace(PROTOCOL, bounded_by_best=bounded)
    found = tune_by_race(job, protocol, METHOD)
    assert found.learning_rate == step_size(min(best, LARGEST_POINT))
    assert not found.limit_seen
    assert max(asked) <= LARGEST_POINT
    assert found.at_edge == (best >= LARGEST_POINT)


def test_a_limit_that_full_runs_see_counts(trained):
    full = parabola(-4, -4)
    job, _ = trained(lambda steps, p: full(steps, p) if steps > 10 else 0.1 - 0.001 * p)
    assert tune_by_race(job, PROTOCOL, METHOD).limit_seen


def test_the_diagnosis_is_of_replications_alone(trained):
    job, _ = trained(parabola(-4, 0))
    diagnosed = dataclasses.replace(job, diagnosis=pytest.fail)
    assert tune_by_race(diagnosed, PROTOCOL, METHOD).learning_rate == step_size(-4)
