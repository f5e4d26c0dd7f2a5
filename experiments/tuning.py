"""Tuning by §A.2: the largest stable step size, then two decades below it.

The grid is 6, 3, 1 · 10^m. A step size is stable when the training loss of its run
stays finite and ends below where it began. Of the largest stable one and those up to
a hundred times smaller, the one with the best maximal test accuracy wins, as in the
paper: the choice sees the test set. Where a part of the training set is held out, its
accuracy counts instead. Tuning runs have a seed of their own, so that the
replications are not the runs that won.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments.errors import UserError
from experiments.methods import Method
from experiments.records import Record
from experiments.running import Job, complete

TUNING_SEED = 0
# The ten replications have the seeds 1 to 10.
FIRST_REPLICATION_SEED = 1

# A grid point is an integer: 3m, 3m + 1, 3m + 2 are 1, 3, 6 · 10^m.
_DIGITS = (1, 3, 6)
_POINTS_PER_DECADE = len(_DIGITS)
_SMALLEST, _LARGEST = -10 * _POINTS_PER_DECADE, 6 * _POINTS_PER_DECADE
# The first group spans three decades; it usually holds all that tuning needs.
_FIRST_GROUP = 3 * _POINTS_PER_DECADE + 1


def step_size(point: int) -> float:
    """The step size at a grid point.

    Examples:
      >>> [step_size(point) for point in (-2, -1, 0, 1, 2, 3)]
      [0.3, 0.6, 1.0, 3.0, 6.0, 10.0]
    """
    decade, digit = divmod(point, _POINTS_PER_DECADE)
    # By way of text, since 3 · 0.1 is not 0.3.
    return float(f"{_DIGITS[digit]}e{decade}")


def grid_point(size: float) -> int:
    """The grid point nearest to a step size on a logarithmic scale.

    Examples:
      >>> grid_point(0.3)
      -2
      >>> grid_point(5.0) == grid_point(6.0)
      True
    """
    guess = math.floor(_POINTS_PER_DECADE * math.log10(size))
    return min(
        range(guess - 2, guess + 4),
        key=lambda point: abs(math.log(step_size(point) / size)),
    )


def point_on_grid(size: float) -> int | None:
    """The grid point with exactly this step size; None for any other number.

    Examples:
      >>> point_on_grid(0.3)
      -2
      >>> [point_on_grid(size) for size in (0.35, 0.0, -1.0, float("nan"))]
      [None, None, None, None]
    """
    text = f"{size:.0e}"
    digit, _, decade = text.partition("e")
    if digit not in map(str, _DIGITS) or float(text) != size:
        return None
    return int(decade) * _POINTS_PER_DECADE + _DIGITS.index(int(digit))


def is_stable(record: Record) -> bool:
    """Whether the training loss stayed finite and ended below where it began."""
    losses = [line.training_loss for line in record.evaluations]
    return all(map(math.isfinite, losses)) and losses[-1] < losses[0]


def missing_points(stable: Mapping[int, bool], first_guess: int) -> list[int]:
    """The grid points to run next.

    Args:
      stable: For every point that was run, whether it is stable.
      first_guess: The largest point of the first group.

    Returns:
      Points to run, in ascending order; none when tuning is complete.

    Raises:
      UserError: Everything, or nothing, is stable as far as the grid goes.

    Examples:
      >>> missing_points({}, first_guess=2)
      [-7, -6, -5, -4, -3, -2, -1, 0, 1, 2]
      >>> missing_points({point: point < 1 for point in range(-7, 3)}, 2)
      []
    """
    if not stable:
        return list(range(first_guess - _FIRST_GROUP + 1, first_guess + 1))
    if not any(stable.values()):
        lowest = min(stable)
        if lowest <= _SMALLEST:
            raise UserError(
                "No step size is stable: at every one down to"
                f" {step_size(lowest):g} the loss diverged or ended above where it"
                " began. Is the gradient right, and are the data what they should be?"
            )
        return list(range(lowest - _FIRST_GROUP, lowest))
    largest = max(point for point, is_ok in stable.items() if is_ok)
    if largest >= _LARGEST:
        raise UserError(
            f"Every step size up to {step_size(largest):g} is stable, so none is the"
            " largest. Does the optimizer use its learning rate?"
        )
    if largest + 1 not in stable:
        return list(range(largest + 1, largest + 1 + _POINTS_PER_DECADE))
    return [point for point in _two_decades(largest) if point not in stable]


def _two_decades(largest: int) -> range:
    """The points from a hundredth of the largest stable step size up to it."""
    return range(largest - 2 * _POINTS_PER_DECADE, largest + 1)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome of tuning one method.

    Attributes:
      learning_rate: The step size that won.
      largest_stable: The largest stable step size.
      candidates: The runs that the choice was made from, by ascending step size.
    """

    learning_rate: float
    largest_stable: float
    candidates: tuple[Record, ...]


def _merit(record: Record) -> tuple[float, float]:
    """Best accuracy in the course of a run; among equals the lowest loss decides."""
    lines = record.evaluations
    if record.config.settings.validation_fraction:
        return (
            max(line.validation_accuracy for line in lines),
            -min(line.validation_loss for line in lines),
        )
    return (
        max(line.test_accuracy for line in lines),
        -min(line.test_loss for line in lines),
    )


def select(records: Sequence[Record]) -> Tuned:
    """The winner among complete tuning runs.

    Args:
      records: Tuning runs of one method; `missing_points` has nothing to add.

    Returns:
      The winner, chosen among stable runs.
    """
    by_point = {grid_point(r.config.learning_rate): r for r in records}
    stable = {point for point, record in by_point.items() if is_stable(record)}
    candidates = [
        by_point[point] for point in _two_decades(max(stable)) if point in stable
    ]
    winner = max(candidates, key=_merit)
    return Tuned(winner.config.learning_rate, step_size(max(stable)), tuple(candidates))


# ---- On records and runs ----------------------------------------------------------


def _tuning_records(job: Job, method: Method) -> dict[int, Record]:
    """The finished runs on the grid with the tuning's seed, by grid point."""
    records = job.store.records(job.problem.name, method.name, job.tuning_settings)
    found = {}
    for record in records:
        point = point_on_grid(record.config.learning_rate)
        # Runs off the grid were trained by hand.
        if record.config.seed == TUNING_SEED and point is not None:
            found[point] = record
    return found


def _missing_points(
    method: Method, stable: Mapping[int, bool], first_guess: int
) -> list[int]:
    """The grid points to run next, with the method named where the search ends."""
    try:
        return missing_points(stable, first_guess)
    except UserError as error:
        raise UserError(f"{method.label} cannot be tuned. {error}") from error


def _search(
    method: Method, records: Mapping[int, Record]
) -> tuple[dict[int, Record], list[int]]:
    """The tuning runs among those that are finished, and the grid points still missing.

    The search takes its own way from the first guess: a run that somebody trained by
    hand saves time when the search comes by, and never leads it.
    """
    first_guess = grid_point(method.first_guess)
    stable: dict[int, bool] = {}
    while points := _missing_points(method, stable, first_guess):
        if missing := [point for point in points if point not in records]:
            return {point: records[point] for point in stable}, missing
        stable |= {point: is_stable(records[point]) for point in points}
    return {point: records[point] for point in stable}, []


def tune(job: Job, method: Method) -> Tuned:
    """Runs what tuning needs and is not there yet.

    Args:
      job: Problem, settings, store and monitor.
      method: The method to tune.

    Returns:
      The step size that won, and what it won against.
    """
    tuning_job = dataclasses.replace(job, settings=job.tuning_settings)
    while True:
        records, missing = _search(method, _tuning_records(job, method))
        if not missing:
            return select(list(records.values()))
        configs = [
            tuning_job.config(method, step_size(point), TUNING_SEED)
            for point in missing
        ]
        complete(tuning_job, method, f"{method.label}, tuning", configs)


def replicate(
    job: Job, method: Method, learning_rate: float, seeds: int
) -> list[Record]:
    """The replications at the tuned step size; missing ones are run.

    Args:
      job: Problem, settings, store and monitor.
      method: The method.
      learning_rate: The tuned step size.
      seeds: Number of replications.

    Returns:
      Their records, in order of their seeds.
    """
    configs = [
        job.config(method, learning_rate, FIRST_REPLICATION_SEED + index)
        for index in range(seeds)
    ]
    return complete(job, method, method.label, configs)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that the protocol says about one method.

    Attributes:
      method: The method.
      tuned: Its tuning.
      replications: Runs at the tuned step size that differ in their seed only.
    """

    method: Method
    tuned: Tuned
    replications: tuple[Record, ...]


def find_outcome(job: Job, method: Method) -> Outcome | None:
    """The outcome for one method, from records alone.

    Args:
      job: Problem, settings and store.
      method: The method.

    Returns:
      The outcome with every replication that is finished, or None when tuning is not
      complete or there is no replication.
    """
    records, missing = _search(method, _tuning_records(job, method))
    if missing:
        return None
    tuned = select(list(records.values()))
    by_seed = {
        record.config.seed: record
        for record in job.store.records(job.problem.name, method.name, job.settings)
        if record.config.learning_rate == tuned.learning_rate
    }
    replications: list[Record] = []
    # Replications have one seed after the other; another one was trained by hand.
    while found := by_seed.get(FIRST_REPLICATION_SEED + len(replications)):
        replications.append(found)
    return Outcome(method, tuned, tuple(replications)) if replications else None


def outcomes(job: Job, methods: Sequence[Method]) -> dict[str, Outcome]:
    """The outcomes of some methods, from records alone.

    Args:
      job: Problem, settings and store.
      methods: The methods.

    Returns:
      By the method's name, its outcome with every replication that is finished.

    Raises:
      UserError: Tuning or replications are missing.
    """
    found = {method.name: find_outcome(job, method) for method in methods}
    if missing := [method for method in methods if found[method.name] is None]:
        problem = job.problem.name
        raise UserError(
            f"{job.store.root} holds no complete record of"
            f" {', '.join(method.label for method in missing)} on {problem}. Run"
            f" `python -m experiments reproduce {problem} --optimizers"
            f" {' '.join(method.name for method in missing)}` with the same options"
            " first."
        )
    return {name: outcome for name, outcome in found.items() if outcome is not None}
