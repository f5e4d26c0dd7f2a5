"""Tuning by races: short runs on the whole grid, full runs where they did best.

A race is the search of §A.2 with a tenth of the steps. Full runs are trained at the
best step sizes of the race and, while the best full run lies at the end of those that
were tried, at the next one beyond it.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from dissect_optax.dissection._methods import Method
from dissect_optax.dissection._problem import Settings
from dissect_optax.dissection._records import Record
from dissect_optax.dissection._running import Job
from dissect_optax.dissection._tuning import (
    LARGEST_POINT,
    NoStableStepSize,
    Protocol,
    Trial,
    Tuned,
    best_point,
    grid_point,
    limit_seen,
    run_points,
    step_size,
    steps_taken,
    trial,
    tune,
)

# Fraction of the steps that a race has, and how many at least.
RACE_FRACTION, _FEWEST_STEPS = 0.1, 10
# Full runs are trained at so many neighbouring step sizes at first.
_FINALISTS = 3


def race_settings(settings: Settings) -> Settings:
    """Settings with about a tenth of the steps and as many evaluations.

    A race has ten steps at least, or half of the steps if these are fewer. It is never
    longer for being evaluated in every step.

    Examples:
      >>> race_settings(Settings(steps=1000, batch_size=8, evaluation_interval=50))
      Settings(steps=100, batch_size=8, evaluation_interval=5, ...)
      >>> race_settings(Settings(steps=1000, batch_size=8, evaluation_interval=1))
      Settings(steps=100, batch_size=8, evaluation_interval=1, ...)
      >>> race_settings(Settings(steps=20, batch_size=8, evaluation_interval=1))
      Settings(steps=10, batch_size=8, evaluation_interval=1, ...)
    """
    fewest = min(_FEWEST_STEPS, -(-settings.steps // 2))
    steps = max(RACE_FRACTION * settings.steps, fewest)
    interval = max(1, round(RACE_FRACTION * settings.evaluation_interval))
    evaluations = max(1, round(steps / interval))
    return dataclasses.replace(
        settings, steps=evaluations * interval, evaluation_interval=interval
    )


@dataclasses.dataclass(frozen=True)
class Raced:
    """A step size that was chosen by a race and full runs.

    Attributes:
      learning_rate: The step size with the best full runs.
      largest_stable: The largest stable step size of the race.
      race: All runs of the race.
      full: The full tuning runs by grid point.
      trials: What they say.
      at_edge: Whether the winner is the smallest or the largest that was tried.
      limit_seen: Whether a step size above the largest stable one was tried that is
        not stable, in the race or in full runs.
      race_cost: Steps of the race, in units of a full run.
      full_cost: Steps of the full tuning runs, in the same units.
    """

    learning_rate: float
    largest_stable: float
    race: tuple[Record, ...]
    full: dict[int, Sequence[Record]]
    trials: dict[int, Trial]
    at_edge: bool
    limit_seen: bool
    race_cost: float
    full_cost: float


def race(job: Job, protocol: Protocol, method: Method) -> Tuned:
    """The search of §A.2 with the settings of a race."""
    short = dataclasses.replace(protocol, settings=race_settings(protocol.settings))
    return tune(job, short, method)


def tune_by_race(job: Job, protocol: Protocol, method: Method) -> Raced:
    """Chooses a step size by a race and full runs.

    Args:
      job: Problem, store and monitor.
      protocol: How step sizes are compared; its settings are those of a full run.
      method: The method to tune.

    Returns:
      The step size, and the runs that it was chosen from.

    Raises:
      NoStableStepSize: No step size is stable in the race, or in full runs.
    """
    raced = race(job, protocol, method)
    full_job = dataclasses.replace(job, settings=protocol.settings, diagnosis=None)
    best, top = grid_point(raced.learning_rate), grid_point(raced.largest_stable)
    # The best step size of longer runs is the same or smaller, so one is above it.
    end = min(top + 1, LARGEST_POINT)
    wanted = [p for p in range(best - _FINALISTS + 2, best + 2) if p <= end]
    full: dict[int, Sequence[Record]] = {}
    trials: dict[int, Trial] = {}
    while wanted:
        full |= run_points(full_job, protocol, method, wanted)
        trials |= {point: trial(protocol, full[point]) for point in wanted}
        wanted = _next_points(trials, end)
    winner = best_point(trials)
    if winner is None:
        raise NoStableStepSize(
            f"{method.label} cannot be tuned. Step sizes that were stable in the race"
            " are not in full runs."
        )
    race_steps = sum(map(steps_taken, raced.runs))
    full_steps = sum(map(steps_taken, itertools.chain.from_iterable(full.values())))
    return Raced(
        learning_rate=step_size(winner),
        largest_stable=raced.largest_stable,
        race=raced.runs,
        full=dict(sorted(full.items())),
        trials=dict(sorted(trials.items())),
        at_edge=winner in (min(trials), max(trials)),
        limit_seen=raced.limit_seen or limit_seen(trials, winner),
        race_cost=race_steps / protocol.settings.steps,
        full_cost=full_steps / protocol.settings.steps,
    )


def _next_points(trials: dict[int, Trial], end: int) -> list[int]:
    """The neighbour of the winner that was not tried yet, none above the end."""
    winner = best_point(trials)
    lowest = min(trials)
    if winner is None:  # All unstable: smaller ones.
        return [lowest - 1] if lowest > end - 31 else []
    neighbours = [point for point in (winner - 1, winner + 1) if point <= end]
    return [point for point in neighbours if point not in trials][:1]
