"""Tuning by §A.2: the largest stable step size, then two decades below it.

The grid is 6, 3, 1 · 10^m. Of the largest stable step size and those up to a hundred
times smaller, the best by the protocol's merit wins. If the winner is the smallest of
them, the search goes on downwards until it is not. Where every step size is stable, the
search upwards ends at 10^6. Tuning runs have seeds of their own, so that the
replications are not the runs that won.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dissect_optax.dissection._errors import UserError
from dissect_optax.dissection._methods import Method
from dissect_optax.dissection._problem import Settings
from dissect_optax.dissection._records import Record
from dissect_optax.dissection._running import Job, complete

# The ten replications of the paper have the seeds 1 to 10.
FIRST_REPLICATION_SEED = 1

# A grid point is an integer: 3m, 3m + 1, 3m + 2 are 1, 3, 6 · 10^m.
_DIGITS = (1, 3, 6)
_POINTS_PER_DECADE = len(_DIGITS)
# No search leaves these. Data that a model separates are stable at any step size.
_SMALLEST, LARGEST_POINT = -10 * _POINTS_PER_DECADE, 6 * _POINTS_PER_DECADE
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


class NoStableStepSize(UserError):
    """A method is not stable at any step size of the grid."""


# ---- The protocol -----------------------------------------------------------------


def best_accuracy(record: Record) -> tuple[float, ...]:
    """The paper's merit: the best test accuracy of a run.

    Among equals the lowest loss decides. Where a part of the training set is held out,
    its accuracy and loss count instead.

    Raises:
      UserError: Accuracies were not measured.
    """
    split = "validation" if record.config.settings.validation_fraction else "test"
    measured = record.evaluations[0].values
    if f"{split}_accuracy" not in measured:
        raise UserError(
            f"Step sizes are compared by {split}_accuracy, and runs on"
            f" {record.config.problem} measure {', '.join(measured)} only. Choose a"
            " merit that is among them, such as a loss."
        )
    return max(record.curve(f"{split}_accuracy")), -min(record.curve(f"{split}_loss"))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How step sizes are compared.

    Attributes:
      settings: Length, batch size and evaluations of the tuning runs.
      merit: From a run to numbers to compare, the larger the better; means over the
        seeds are compared in their order.
      seeds: Seeds of the tuning runs at every step size.
      stable_below: A step size is stable if the training loss stays finite and ends
        below this fraction of its first value.
      stable_loss: Which loss: without the regularizer, or with it (`training_loss`).
      bounded_by_best: Whether the search upwards also ends two decades above the best
        step size. A network that has died, and guesses, may have a loss below its
        first one at any step size.
    """

    settings: Settings
    merit: Callable[[Record], tuple[float, ...]] = best_accuracy
    seeds: tuple[int, ...] = (0,)
    stable_below: float = 0.9
    stable_loss: str = "training_data_loss"
    bounded_by_best: bool = False

    def is_stable(self, record: Record) -> bool:
        """Whether the training loss stayed finite and went down."""
        losses = record.curve(self.stable_loss)
        margin = (1.0 - self.stable_below) * abs(losses[0])
        return (
            not record.diverged
            and all(map(math.isfinite, losses))
            and losses[-1] < losses[0] - margin
        )


class Trial(NamedTuple):
    """What the runs at one step size say."""

    stable: bool
    merit: tuple[float, ...] = ()


def trial(protocol: Protocol, records: Sequence[Record]) -> Trial:
    """The trial of one step size, from its runs; NaN counts as the worst merit."""
    if not all(map(protocol.is_stable, records)):
        return Trial(False)
    merits = np.array([protocol.merit(record) for record in records], np.float64)
    means = np.nan_to_num(merits.mean(axis=0), nan=-np.inf)
    return Trial(True, tuple(means.tolist()))


def best_point(trials: Mapping[int, Trial]) -> int | None:
    """The best stable point, among equals the first; None without a stable one."""
    stable = [point for point, found in trials.items() if found.stable]
    return max(stable, key=lambda point: trials[point].merit, default=None)


def _largest_wanted(trials: Mapping[int, Trial], *, bounded_by_best: bool) -> int:
    """The largest stable point, or two decades above the best one if that is less."""
    largest = max(point for point, found in trials.items() if found.stable)
    # Among equals the smallest.
    best = best_point(dict(sorted(trials.items())))
    if not bounded_by_best or best is None:
        return largest
    return min(largest, best + 2 * _POINTS_PER_DECADE)


def limit_seen(trials: Mapping[int, Trial], largest: int) -> bool:
    """Whether a larger point was tried that is not stable."""
    return any(point > largest and not found.stable for point, found in trials.items())


def _lowest_wanted(trials: Mapping[int, Trial], largest: int) -> int:
    """The smallest grid point that the search wants, given what is known."""
    lowest = largest - 2 * _POINTS_PER_DECADE
    while lowest > _SMALLEST and lowest in trials:
        if _winner(trials, lowest, largest) > lowest:
            break
        lowest -= _POINTS_PER_DECADE
    return lowest


def _winner(trials: Mapping[int, Trial], lowest: int, largest: int) -> int:
    """The best stable point of a range that has one; among equals the smallest."""
    points = range(lowest, largest + 1)
    winner = best_point({point: trials[point] for point in points if point in trials})
    assert winner is not None
    return winner


def missing_points(
    trials: Mapping[int, Trial], first_guess: int, *, bounded_by_best: bool = False
) -> list[int]:
    """The grid points to run next.

    Args:
      trials: The points that were run.
      first_guess: The largest point of the first group.
      bounded_by_best: See `Protocol`.

    Returns:
      Points to run, in ascending order; none when tuning is complete.

    Raises:
      NoStableStepSize: Nothing is stable as far as the grid goes.

    Examples:
      >>> missing_points({}, first_guess=2)
      [-7, -6, -5, -4, -3, -2, -1, 0, 1, 2]
      >>> trials = {point: Trial(point < 1, (point,)) for point in range(-7, 3)}
      >>> missing_points(trials, 2)
      []

      Where the smallest of two decades is the best, smaller ones are tried.

      >>> trials = {point: Trial(point < 1, (-point,)) for point in range(-7, 3)}
      >>> missing_points(trials, 2)
      [-9, -8]

      Where everything is stable, the best may end the search.

      >>> trials = {point: Trial(True, (-abs(point + 5),)) for point in range(-11, 3)}
      >>> missing_points(trials, 2, bounded_by_best=True)
      []

      Otherwise the end of the grid does.

      >>> missing_points({point: Trial(True, (point,)) for point in range(9, 18)}, 17)
      [18]
      >>> missing_points({point: Trial(True, (point,)) for point in range(9, 19)}, 17)
      []
    """
    if not trials:
        return list(range(first_guess - _FIRST_GROUP + 1, first_guess + 1))
    stable = [point for point, found in trials.items() if found.stable]
    if not stable:
        lowest = min(trials)
        if lowest <= _SMALLEST:
            raise NoStableStepSize(
                "No step size is stable: at every one down to"
                f" {step_size(lowest):g} the loss diverged or did not go down. Is the"
                " gradient right, and are the data what they should be?"
            )
        return list(range(lowest - _FIRST_GROUP, lowest))
    largest = _largest_wanted(trials, bounded_by_best=bounded_by_best)
    if largest < LARGEST_POINT and largest + 1 not in trials:
        end = min(largest + _POINTS_PER_DECADE, LARGEST_POINT)
        return list(range(largest + 1, end + 1))
    wanted = range(_lowest_wanted(trials, largest), largest + 1)
    return [point for point in wanted if point not in trials]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The outcome of tuning one method.

    Attributes:
      learning_rate: The step size that won.
      largest_stable: The largest stable step size.
      candidates: The runs that the choice was made from, by ascending step size.
      limit_seen: Whether a larger step size was tried that is not stable.
      searched_below: Whether step sizes below the paper's two decades were candidates.
      runs: All runs of the search.
      cost: Steps of all of them, in units of a run of the protocol's length.
    """

    learning_rate: float
    largest_stable: float
    candidates: tuple[Record, ...]
    limit_seen: bool = True
    searched_below: bool = False
    runs: tuple[Record, ...] = ()
    cost: float = math.nan


def select(protocol: Protocol, records: Mapping[int, Sequence[Record]]) -> Tuned:
    """The winner among complete tuning runs.

    Args:
      protocol: How step sizes are compared.
      records: Tuning runs of one method by grid point; `missing_points` has nothing to
        add.

    Returns:
      The winner, chosen among stable runs.
    """
    trials = {point: trial(protocol, runs) for point, runs in records.items()}
    largest = _largest_wanted(trials, bounded_by_best=protocol.bounded_by_best)
    lowest = _lowest_wanted(trials, largest)
    winner = _winner(trials, lowest, largest)
    candidates = [
        record
        for point in range(lowest, largest + 1)
        if point in trials and trials[point].stable
        for record in records[point]
    ]
    all_runs = tuple(record for runs in records.values() for record in runs)
    return Tuned(
        learning_rate=step_size(winner),
        largest_stable=step_size(largest),
        candidates=tuple(candidates),
        limit_seen=limit_seen(trials, largest),
        searched_below=lowest < largest - 2 * _POINTS_PER_DECADE,
        runs=all_runs,
        cost=sum(map(steps_taken, all_runs)) / protocol.settings.steps,
    )


def steps_taken(record: Record) -> int:
    """Number of steps that a run took, fewer than its settings say if it diverged."""
    return record.evaluations[-1].step


# ---- On records and runs ----------------------------------------------------------


def tuning_records(
    job: Job, protocol: Protocol, method: Method
) -> dict[int, list[Record]]:
    """The finished tuning runs by grid point, where all seeds are finished."""
    found: dict[int, dict[int, Record]] = {}
    for record in job.store.records(
        job.problem.name, method.name, protocol.settings, job.description(method)
    ):
        point = point_on_grid(record.config.learning_rate)
        # Runs off the grid, and with other seeds, serve another purpose.
        if record.config.seed in protocol.seeds and point is not None:
            found.setdefault(point, {})[record.config.seed] = record
    return {
        point: [by_seed[seed] for seed in protocol.seeds]
        for point, by_seed in found.items()
        if len(by_seed) == len(protocol.seeds)
    }


def _search(
    protocol: Protocol, method: Method, records: Mapping[int, Sequence[Record]]
) -> tuple[dict[int, Sequence[Record]], list[int]]:
    """The tuning runs among those that are finished, and the points still missing.

    The path of the search follows from the first guess: a run that somebody trained by
    hand saves time when the search reaches it, and never leads it.
    """
    first_guess = grid_point(method.first_guess)
    trials: dict[int, Trial] = {}
    while True:
        try:
            points = missing_points(
                trials, first_guess, bounded_by_best=protocol.bounded_by_best
            )
        except NoStableStepSize as error:
            raise NoStableStepSize(
                f"{method.label} cannot be tuned. {error}"
            ) from error
        found = {point: records[point] for point in trials}
        if missing := [point for point in points if point not in records]:
            return found, missing
        if not points:
            return found, []
        trials |= {point: trial(protocol, records[point]) for point in points}


def find_tuned(job: Job, protocol: Protocol, method: Method) -> Tuned | None:
    """The outcome of tuning from records alone; None where runs are missing."""
    records, missing = _search(protocol, method, tuning_records(job, protocol, method))
    return None if missing else select(protocol, records)


def tune(job: Job, protocol: Protocol, method: Method) -> Tuned:
    """Runs what tuning still needs.

    Args:
      job: Problem, store and monitor.
      protocol: How step sizes are compared.
      method: The method to tune.

    Returns:
      The step size that won, and the runs that it won against.
    """
    tuning_job = dataclasses.replace(job, settings=protocol.settings, diagnosis=None)
    trained: list[int] = []
    while True:
        finished = tuning_records(job, protocol, method)
        records, missing = _search(protocol, method, finished)
        if not missing:
            return select(protocol, records)
        if missing == trained:
            raise RuntimeError(
                f"The runs of {method.label} that were just trained are not found."
            )
        trained = missing
        run_points(tuning_job, protocol, method, missing)


def run_points(
    tuning_job: Job, protocol: Protocol, method: Method, points: Sequence[int]
) -> dict[int, Sequence[Record]]:
    """The tuning runs by grid point; missing ones are trained."""
    configs = [
        tuning_job.config(method, step_size(point), seed)
        for point in points
        for seed in protocol.seeds
    ]
    records = complete(tuning_job, method, f"{method.label}, tuning", configs)
    count = len(protocol.seeds)
    return {
        point: records[index * count : (index + 1) * count]
        for index, point in enumerate(points)
    }


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
class MethodResult:
    """Tuning and replications of one method.

    Attributes:
      method: The method.
      tuned: Its tuning.
      replications: Runs at the tuned step size that differ in their seed only.
    """

    method: Method
    tuned: Tuned
    replications: tuple[Record, ...]


def find_result(job: Job, protocol: Protocol, method: Method) -> MethodResult | None:
    """The result of one method, from records alone.

    Args:
      job: Problem, settings and store.
      protocol: How step sizes are compared.
      method: The method.

    Returns:
      The result with every replication that is finished, or None if tuning is not
      complete or there is no replication.
    """
    tuned = find_tuned(job, protocol, method)
    if tuned is None:
        return None
    by_seed = {
        record.config.seed: record
        for record in job.store.records(
            job.problem.name, method.name, job.settings, job.description(method)
        )
        if record.config.learning_rate == tuned.learning_rate
    }
    replications: list[Record] = []
    # Replications have one seed after the other; another one was trained by hand.
    while found := by_seed.get(FIRST_REPLICATION_SEED + len(replications)):
        replications.append(found)
    return MethodResult(method, tuned, tuple(replications)) if replications else None
