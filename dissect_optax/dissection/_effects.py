"""Outcomes of runs and the effects between them, with intervals.

The outcome of a run is the mean over its evaluations of the log training loss, the
area under the log loss. An effect is a weighted sum of the methods' outcomes at one
seed, averaged over seeds: runs of two methods with the same seed share initial
parameters and mini-batches, so what they share cancels. Its interval adds two
variances, that of the mean over seeds and that of the step sizes, which other tuning
seeds would have picked differently.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy.special import betaincinv, stdtrit

from dissect_optax.dissection._errors import UserError
from dissect_optax.dissection._rows import CELLS, Run

CONFIDENCE = 0.95
# Effects on the log loss that are smaller are not worth a decision: 5 % of a loss.
SMALLEST_EFFECT = 0.05

# Losses are clipped to these multiples of the first one.
_SMALLEST_LOSS, _LARGEST_LOSS = 1e-6, 10.0
_RESAMPLES = 2000

# Weights of the methods' outcomes at one seed; negative is better.
EFFECTS: dict[str, dict[str, float]] = {
    "sign": {"m_sgd": -0.5, "m_ssd": 0.5, "m_svag": -0.5, "adam": 0.5},
    "variance_adaptation": {"m_sgd": -0.5, "m_ssd": -0.5, "m_svag": 0.5, "adam": 0.5},
    # How much the sign changes with variance adaptation beyond what it does without.
    "interaction": {"m_sgd": 1.0, "m_ssd": -1.0, "m_svag": -1.0, "adam": 1.0},
}
# First minus second.
CELL_COMPARISONS = (
    ("m_ssd", "m_sgd"),
    ("adam", "m_svag"),
    ("m_svag", "m_sgd"),
    ("adam", "m_ssd"),
    ("adam", "m_sgd"),
)


# ---- Statistics -------------------------------------------------------------------


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (ddof = 1; NaN for a single value).

    Examples:
      >>> mean_and_std([1.0, 3.0])
      (2.0, 1.4142135623730951)
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), std


def student_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t.

    Examples:
      >>> round(student_quantile(4), 3)
      2.776
    """
    return float(stdtrit(degrees, (1 + confidence) / 2))


def share_interval(
    count: int, total: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Clopper–Pearson interval of a share, exact for independent draws.

    Args:
      count: How many have the property.
      total: Out of how many; at least one.
      confidence: Probability that the interval holds the share, at least.

    Returns:
      Its two ends.

    Examples:
      >>> low, high = share_interval(0, 5)
      >>> low, round(high, 3)
      (0.0, 0.522)
    """
    tail = (1 - confidence) / 2
    low = betaincinv(count, total - count + 1, tail) if count else 0.0
    high = betaincinv(count + 1, total - count, 1 - tail) if count < total else 1.0
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Effect:
    """Difference between methods with everything else equal.

    Attributes:
      estimate: Mean over the pairs; NaN where there is none.
      low: Lower end of the 95 % interval; −inf with fewer than two pairs.
      high: Upper end; inf with fewer than two pairs.
      pairs: Number of seeds at which every method of the comparison has a run that
        did not diverge.
      diverged: Number of seeds left out because a run of theirs diverged.
      retuning: Standard deviation that the choice of the step sizes adds.
      smallest: An effect below it is not decided.
    """

    estimate: float
    low: float
    high: float
    pairs: int
    diverged: int = 0
    retuning: float = 0.0
    smallest: float = SMALLEST_EFFECT

    @property
    def half_width(self) -> float:
        """Half the interval; inf with fewer than two pairs."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero and the effect is not too small."""
        return self.excludes_zero and abs(self.estimate) >= self.smallest


def weighted_effect(
    outcomes: Mapping[str, Mapping[int, float]],
    weights: Mapping[str, float],
    *,
    retuning_variances: Mapping[str, float] | None = None,
    smallest: float = SMALLEST_EFFECT,
) -> Effect:
    """Mean over seeds of a weighted sum of the methods' outcomes.

    With d_s = Σ_m w_m·y_ms over n seeds s, the interval is
    mean(d) ± t_{n−1}·sqrt(var(d)/n + Σ_m w_m²·V_m), V_m the variance that retuning
    method m adds.

    Args:
      outcomes: By method and seed; NaN where the run diverged.
      weights: Weight by method; they sum to zero.
      retuning_variances: V_m by method; methods that are missing have zero.
      smallest: An effect below it is not decided.

    Returns:
      The effect over the seeds that all methods have.

    Examples:
      >>> outcomes = {"a": {1: 0.0, 2: 1.0}, "b": {1: 1.0, 2: 2.2}}
      >>> effect = weighted_effect(outcomes, {"b": 1.0, "a": -1.0})
      >>> round(effect.estimate, 6), effect.pairs, effect.excludes_zero
      (1.1, 2, False)
    """
    names = list(weights)
    seeds = sorted(set.intersection(*(set(outcomes[name]) for name in names)))
    sums = [
        sum(weights[name] * outcomes[name][seed] for name in names) for seed in seeds
    ]
    kept = [value for value in sums if math.isfinite(value)]
    retuning_variance = sum(
        weights[name] ** 2 * (retuning_variances or {}).get(name, 0.0) for name in names
    )
    mean, std = mean_and_std(kept) if kept else (math.nan, math.nan)
    half_width = math.inf
    if len(kept) > 1:
        error = math.sqrt(std**2 / len(kept) + retuning_variance)
        half_width = student_quantile(len(kept) - 1) * error
    return Effect(
        estimate=mean,
        low=mean - half_width if kept else -math.inf,
        high=mean + half_width if kept else math.inf,
        pairs=len(kept),
        diverged=len(sums) - len(kept),
        retuning=math.sqrt(retuning_variance),
        smallest=smallest,
    )


def paired_effect(
    before: Mapping[int, float],
    after: Mapping[int, float],
    *,
    retuning_variance: float = 0.0,
    smallest: float = SMALLEST_EFFECT,
) -> Effect:
    """Mean difference between two methods over the seeds that both have.

    Args:
      before: Outcome by seed of one method; NaN where the run diverged.
      after: Outcome by seed of the other.
      retuning_variance: Variance that the choice of both step sizes adds.
      smallest: An effect below it is not decided.

    Returns:
      The effect, after minus before.

    Examples:
      >>> effect = paired_effect({1: 0.90, 2: 0.92}, {1: 0.80, 2: 0.82})
      >>> round(effect.estimate, 6), effect.pairs, effect.decided
      (-0.1, 2, True)

      One pair has no interval.

      >>> paired_effect({1: 0.90}, {1: 0.80}).half_width
      inf
    """
    return weighted_effect(
        {"before": before, "after": after},
        {"after": 1.0, "before": -1.0},
        retuning_variances={"after": retuning_variance},
        smallest=smallest,
    )


# ---- Outcomes of runs -------------------------------------------------------------


def clip_losses(losses: Sequence[float]) -> tuple[np.ndarray, bool]:
    """Losses within [1e-6, 10] times the first one, and whether that changed any.

    A loss that is not finite counts as the upper limit.

    Args:
      losses: Training losses in order; the first one is positive and finite.

    Returns:
      The clipped losses and whether the limits bind.

    Raises:
      UserError: The first loss is not positive and finite.

    Examples:
      >>> clip_losses([2.0, 1.0, 50.0])
      (array([ 2.,  1., 20.]), True)
    """
    first = losses[0]
    if not (math.isfinite(first) and first > 0):
        raise UserError(
            "Outcomes are logarithms of the training loss, so the loss before the first"
            f" step must be positive and finite; got {first:g}. For a loss that may be"
            " negative, add a constant that bounds it from below."
        )
    values = np.asarray(losses, float)
    filled = np.where(np.isfinite(values), values, math.inf)
    clipped = np.clip(filled, _SMALLEST_LOSS * first, _LARGEST_LOSS * first)
    return clipped, bool(np.any(clipped != values))


def last_tenth(steps: Sequence[int]) -> np.ndarray:
    """Mask of the evaluations in the last tenth of the steps; at least the last one.

    Examples:
      >>> last_tenth([0, 50, 90, 95, 100])
      array([False, False, False,  True,  True])
    """
    mask = np.asarray(steps) > 0.9 * steps[-1]
    mask[-1] = True
    return mask


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The numbers by which runs are compared; NaN for a run that diverged.

    Attributes:
      log_loss: Mean over all evaluations of the log training loss: the headline.
      log_final_loss: Log of the mean training loss over the last tenth of the steps.
      metrics: Mean of each metric over the last tenth of the steps.
      clipped: Whether a loss was outside [1e-6, 10] times the first one.
    """

    log_loss: float
    log_final_loss: float
    metrics: Mapping[str, float]
    clipped: bool

    def value(self, quantity: str) -> float:
        """One of the numbers: "log_loss", "log_final_loss" or a metric's name."""
        if quantity in ("log_loss", "log_final_loss"):
            return float(getattr(self, quantity))
        return self.metrics.get(quantity, math.nan)


def outcome_of(run: Run) -> Outcome:
    """Outcome of a run.

    Args:
      run: A finished run.

    Returns:
      Its outcome.

    Raises:
      UserError: The run did not diverge and its first loss is not positive.

    Examples:
      >>> run = Run("adam", 8, 1, 0.1, "replicate", (0, 1), (1.0, math.e), {}, False, 0)
      >>> outcome_of(run).log_loss
      0.5
    """
    if run.diverged:
        metrics = dict.fromkeys(run.metrics, math.nan)
        return Outcome(math.nan, math.nan, metrics, False)
    losses, clipped = clip_losses(run.training_loss)
    last = last_tenth(run.steps)
    return Outcome(
        log_loss=float(np.mean(np.log(losses))),
        log_final_loss=float(np.log(np.mean(losses[last]))),
        metrics={
            name: float(np.mean(np.asarray(values, float)[last]))
            for name, values in run.metrics.items()
        },
        clipped=clipped,
    )


# ---- Step sizes -------------------------------------------------------------------


def outcomes_by_rate(
    runs: Iterable[Run], quantity: str = "log_loss"
) -> dict[float, dict[int, float]]:
    """Outcomes of runs of one method at one batch size.

    Args:
      runs: The runs.
      quantity: Which number of `Outcome`.

    Returns:
      By step size, in ascending order, and by seed; NaN where the run diverged.
    """
    found: dict[float, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: run.learning_rate):
        value = outcome_of(run).value(quantity)
        found.setdefault(run.learning_rate, {})[run.seed] = value
    return found


def _shared_seeds(outcomes: Mapping[float, Mapping[int, float]]) -> list[int]:
    """The seeds that every step size was run with."""
    return sorted(set.intersection(*map(set, outcomes.values()))) if outcomes else []


def pick_step_size(outcomes: Mapping[float, Mapping[int, float]]) -> float:
    """The step size with the lowest mean outcome among those that never diverged.

    Args:
      outcomes: By step size and seed; NaN where the run diverged.

    Returns:
      The step size; NaN where every one diverged at some seed.

    Examples:
      >>> pick_step_size({0.1: {0: -1.0, 1: -1.2}, 0.3: {0: -2.0, 1: math.nan}})
      0.1
    """
    means = {
        rate: float(np.mean(list(by_seed.values())))
        for rate, by_seed in outcomes.items()
        if all(map(math.isfinite, by_seed.values()))
    }
    return min(means, key=lambda rate: means[rate]) if means else math.nan


def retuning_variance(
    outcomes: Mapping[float, Mapping[int, float]],
    values: Mapping[float, Mapping[int, float]] | None = None,
) -> float:
    """Variance that the choice of the step size adds to a method's mean outcome.

    A bootstrap over the tuning seeds: resampled seeds pick a step size, and the mean
    outcome there (over all tuning seeds) differs from the one at the step size that
    won. Returned is the mean square of the difference, not its variance about its own
    mean, since the regret of a bad pick is one-sided, times n/(n − 1), since resampled
    means of n seeds vary by that much less than means of n new seeds.

    Args:
      outcomes: Outcomes that the choice is made from, by step size and tuning seed;
        NaN where the run diverged.
      values: Another quantity of the same runs whose variance is wanted; by default
        the outcomes themselves.

    Returns:
      The variance; zero with fewer than two tuning seeds or step sizes, where nothing
      is known about it.

    Examples:
      A step size that wins at every seed wins at any others.

      >>> retuning_variance({0.1: {0: -2.0, 1: -2.1}, 0.3: {0: -1.0, 1: -1.1}})
      0.0
      >>> retuning_variance({0.1: {0: -2.0, 1: -1.0}, 0.3: {0: -1.0, 1: -1.8}}) > 0
      True
    """
    seeds = _shared_seeds(outcomes)
    winner = pick_step_size(outcomes)
    if len(seeds) < 2 or len(outcomes) < 2 or math.isnan(winner):
        return 0.0
    rates = list(outcomes)
    table = np.array([[outcomes[rate][seed] for rate in rates] for seed in seeds])
    other = values or outcomes
    changes = np.array([_mean_of_finite(other[rate].values()) for rate in rates])
    changes -= changes[rates.index(winner)]
    # Fixed, so that a result reads the same each time it is computed.
    generator = np.random.default_rng(0)
    count = len(seeds)
    draws = generator.multinomial(count, [1 / count] * count, _RESAMPLES)
    diverged = ~np.isfinite(table)
    means = draws @ np.where(diverged, 0.0, table) / count
    means[draws @ diverged > 0] = math.inf
    # Resamples in which every step size diverged pick none.
    picked = changes[means.argmin(axis=1)][np.isfinite(means.min(axis=1))]
    picked = picked[np.isfinite(picked)]
    return float(np.mean(picked**2) * count / (count - 1)) if picked.size else 0.0


def _mean_of_finite(values: Iterable[float]) -> float:
    """Mean of the finite values; NaN where there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


# ---- Effects of a dissection ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two methods against each other.

    Attributes:
      method: Name of the one.
      reference: Name of the other.
      effect: Outcome of the method minus that of the reference.
    """

    method: str
    reference: str
    effect: Effect


@dataclasses.dataclass(frozen=True)
class Crossover:
    """Two batch sizes at which an effect is decided with opposite signs.

    Attributes:
      column: "sign", "variance_adaptation", "interaction", or "adam − m_sgd".
      low: The smaller batch size.
      high: The larger one; nothing between them is decided.
      estimate: Where the line through both effects over the logarithm of the batch
        size is zero.
    """

    column: str
    low: int
    high: int
    estimate: float


@dataclasses.dataclass(frozen=True)
class Effects:
    """The effects and comparisons of one quantity at one batch size.

    Attributes:
      effects: "sign", "variance_adaptation" and "interaction", where all four methods
        are there.
      comparisons: By "adam − m_svag", say; pairs of the four methods, and every other
        method against ADAM.
    """

    effects: dict[str, Effect]
    comparisons: dict[str, Comparison]


def select_runs(runs: Iterable[Run], batch_size: int, role: str) -> list[Run]:
    """The runs at one batch size with one role."""
    return [run for run in runs if run.batch_size == batch_size and run.role == role]


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs by method."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.method, []).append(run)
    return found


def effects_between(
    replicates: Iterable[Run],
    tuning: Iterable[Run],
    quantity: str = "log_loss",
    smallest: float = SMALLEST_EFFECT,
    pairs: Iterable[tuple[str, str]] | None = None,
) -> Effects:
    """Effects and comparisons between runs at one batch size.

    Args:
      replicates: Runs to compare, one step size per method.
      tuning: Runs that the step sizes were chosen from.
      quantity: Which number of `Outcome` to compare.
      smallest: An effect below it is not decided.
      pairs: Methods to compare, first minus second; None for those of Table 1 and
        every other method against ADAM.

    Returns:
      Those effects and comparisons whose methods all have runs.
    """
    outcomes = {
        method: {run.seed: outcome_of(run).value(quantity) for run in runs}
        for method, runs in _by_method(replicates).items()
    }
    variances = {
        method: retuning_variance(
            outcomes_by_rate(runs), outcomes_by_rate(runs, quantity)
        )
        for method, runs in _by_method(tuning).items()
    }

    def effect(weights: Mapping[str, float]) -> Effect:
        return weighted_effect(
            outcomes, weights, retuning_variances=variances, smallest=smallest
        )

    if pairs is None:
        others = [(method, "adam") for method in outcomes if method not in CELLS]
        pairs = [*CELL_COMPARISONS, *others]
    return Effects(
        effects={
            name: effect(weights)
            for name, weights in EFFECTS.items()
            if weights.keys() <= outcomes.keys()
        },
        comparisons={
            f"{method} − {reference}": Comparison(
                method, reference, effect({method: 1.0, reference: -1.0})
            )
            for method, reference in pairs
            if {method, reference} <= outcomes.keys()
        },
    )


def full_races(runs: Iterable[Run], steps: int | None = None) -> list[Run]:
    """The race's runs at step sizes that were not pruned, at one batch size.

    Args:
      runs: Runs of the race at one batch size.
      steps: Steps of the race; None for those of the longest run.

    Returns:
      All runs, diverged ones included, at the step sizes of each method at which some
      run has so many steps.
    """
    everything = list(runs)
    if not everything:
        return []
    length = steps or max(run.steps[-1] for run in everything)
    reached = {
        (run.method, run.learning_rate) for run in everything if run.steps[-1] >= length
    }
    return [run for run in everything if (run.method, run.learning_rate) in reached]


def race_finalists(runs: Iterable[Run], steps: int | None = None) -> list[Run]:
    """The race's runs at the best step size of each method, at one batch size.

    Args:
      runs: Runs of the race at one batch size.
      steps: Steps of the race; None for those of the longest run.

    Returns:
      For each method, the runs at the step size with the lowest mean outcome.
    """
    finalists = []
    for candidates in _by_method(full_races(runs, steps)).values():
        best = pick_step_size(outcomes_by_rate(candidates))
        finalists += [run for run in candidates if run.learning_rate == best]
    return finalists


def crossovers(by_batch_size: Mapping[int, Effects]) -> list[Crossover]:
    """Neighbouring decided batch sizes between which an effect changes its sign.

    Args:
      by_batch_size: Effects by batch size.

    Returns:
      The crossovers that were seen, none where every decided effect has one sign.
    """
    columns: dict[str, dict[int, Effect]] = {}
    for batch_size in sorted(by_batch_size):
        found = dict(by_batch_size[batch_size].effects)
        if total := by_batch_size[batch_size].comparisons.get("adam − m_sgd"):
            found["adam − m_sgd"] = total.effect
        for name, effect in found.items():
            if effect.decided:
                columns.setdefault(name, {})[batch_size] = effect
    seen = []
    for name, decided in columns.items():
        sizes = list(decided)
        for low, high in itertools.pairwise(sizes):
            before, after = decided[low].estimate, decided[high].estimate
            if before * after < 0:
                share = before / (before - after)
                estimate = low * (high / low) ** share
                seen.append(Crossover(name, low, high, estimate))
    return seen
