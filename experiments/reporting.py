"""The accuracy table of a problem, the two effects on it, and the summary.

The four methods of Table 1 are {magnitude, sign only} × {not adapted, adapted}, so
each aspect shows in two comparisons that differ in nothing else. Replications of two
methods with the same seed share initial parameters and mini-batches, hence an effect
is the mean of differences between equal seeds, with the confidence interval of
Student's t.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from dissect_optax.dissection import (
    Dissection,
    EqualWithNan,
    Job,
    MethodResult,
    Protocol,
    Record,
    Tuned,
    mean_and_std,
    student_quantile,
)
from experiments.problems import ExperimentProblem

# Second minus first; names as on the command line.
SIGN_COMPARISONS = (("m_sgd", "m_ssd"), ("m_svag", "adam"))
ADAPTATION_COMPARISONS = (("m_sgd", "m_svag"), ("m_ssd", "adam"))


def accuracy_of_finished(records: Sequence[Record]) -> tuple[float, float]:
    """Mean and deviation of the final accuracy over the runs that did not diverge."""
    accuracies = [final_accuracy(record) for record in records if not record.diverged]
    return mean_and_std(accuracies) if accuracies else (math.nan, math.nan)


def final_accuracy(record: Record) -> float:
    """Test accuracy after the last step; NaN for a run that diverged."""
    return math.nan if record.diverged else record.evaluations[-1]["test_accuracy"]


@dataclasses.dataclass(frozen=True, eq=False)
class Effect(EqualWithNan):
    """How much accuracy one aspect changes, with everything else equal.

    Attributes:
      comparison: "M-SSD − M-SGD", say.
      mean: Mean difference in test accuracy, in percentage points.
      half_width: Half the 95 % confidence interval, in percentage points.
      seeds: Number of pairs.
    """

    comparison: str
    mean: float
    half_width: float
    seeds: int

    @property
    def within_noise(self) -> bool:
        """Whether the confidence interval holds zero, or there is none."""
        return not abs(self.mean) > self.half_width


def paired_effect(
    comparison: str, before: Mapping[int, float], after: Mapping[int, float]
) -> Effect:
    """The effect between two methods, from the seeds that both have.

    Args:
      comparison: What is compared.
      before: Accuracy by seed without the aspect, NaN where the run diverged.
      after: Accuracy by seed with it.

    Returns:
      The effect, in percentage points, over the pairs in which no run diverged.

    Examples:
      >>> effect = paired_effect("b − a", {1: 0.90, 2: 0.92}, {1: 0.91, 2: 0.93})
      >>> round(effect.mean, 6), effect.seeds, effect.within_noise
      (1.0, 2, False)
    """
    seeds = sorted(before.keys() & after.keys())
    differences = [100 * (after[seed] - before[seed]) for seed in seeds]
    differences = [value for value in differences if not math.isnan(value)]
    if not differences:
        return Effect(comparison, math.nan, math.nan, 0)
    mean, std = mean_and_std(differences)
    quantile = student_quantile(max(len(differences) - 1, 1))
    half_width = quantile * std / math.sqrt(len(differences))
    return Effect(comparison, mean, half_width, len(differences))


def effects(
    results: Mapping[str, MethodResult], comparisons: Sequence[tuple[str, str]]
) -> list[Effect]:
    """The effects of one aspect, for the comparisons whose two methods are there.

    Args:
      results: Results by the method's name.
      comparisons: Pairs of names; the second has the aspect.

    Returns:
      One effect per pair.
    """
    found = []
    for before, after in comparisons:
        if before in results and after in results:
            accuracies = [
                {r.config.seed: final_accuracy(r) for r in results[name].replications}
                for name in (before, after)
            ]
            labels = (results[after].method.label, results[before].method.label)
            found.append(paired_effect(" − ".join(labels), *accuracies))
    return found


# ---- As text ----------------------------------------------------------------------


def percent(mean: float, std: float) -> str:
    """Mean and deviation as the paper prints them.

    Examples:
      >>> percent(0.91987, 0.0021)
      '92.0 ± 0.2 %'

      One run has no deviation, and none no mean.

      >>> percent(0.91987, math.nan), percent(math.nan, math.nan)
      ('92.0 %', '–')
    """
    if math.isnan(mean):
        return "–"
    deviation = "" if math.isnan(std) else f" ± {100 * std:.1f}"
    return f"{100 * mean:.1f}{deviation} %"


def accuracy_table(
    problem: ExperimentProblem, results: Mapping[str, MethodResult]
) -> Table:
    """Test accuracy after the last step beside the paper's, as Markdown.

    Args:
      problem: The test problem.
      results: Results by the method's name.

    Returns:
      A table for a Rich console.
    """
    table = Table(box=box.MARKDOWN)
    table.add_column("method")
    table.add_column(f"test accuracy, {problem.title}", justify="right")
    # The digits are not in the paper.
    if problem.published:
        table.add_column("paper", justify="right")
    for column in ("step size", "largest stable", "seeds"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        diverged = sum(record.diverged for record in result.replications)
        table.add_row(
            result.method.label,
            percent(*accuracy_of_finished(result.replications)),
            *([problem.published.get(name, "–")] if problem.published else []),
            f"{result.tuned.learning_rate:g}",
            largest_stable(result.tuned),
            f"{len(result.replications)}"
            + (f", {diverged} diverged" if diverged else ""),
        )
    return table


def largest_stable(tuned: Tuned) -> str:
    """The largest stable step size as text.

    Examples:
      >>> largest_stable(Tuned(0.1, 1.0, ()))
      '1'
      >>> largest_stable(Tuned(0.1, 1e6, (), limit_seen=False))
      '1e+06, the largest that was tried'
    """
    more = "" if tuned.limit_seen else ", the largest that was tried"
    return f"{tuned.largest_stable:g}{more}"


def effect_table(aspect: str, found: Sequence[Effect]) -> Table:
    """The effects of one aspect, as Markdown.

    Args:
      aspect: "the sign", say.
      found: Its effects.

    Returns:
      A table for a Rich console.
    """
    table = Table(box=box.MARKDOWN)
    table.add_column(f"what {aspect} changes")
    table.add_column("percentage points", justify="right")
    table.add_column("pairs", justify="right")
    table.add_column("")
    for effect in found:
        difference, verdict = f"{effect.mean:+.2f}", ""
        if effect.seeds > 1:
            difference += f" ± {effect.half_width:.2f}"
            verdict = "within noise" if effect.within_noise else "beyond seed noise"
        table.add_row(
            effect.comparison,
            difference if effect.seeds else "–",
            str(effect.seeds),
            verdict,
        )
    return table


def dissection_summary(result: Dissection) -> dict[str, Any]:
    """A dissection without its runs, small enough to be committed.

    Args:
      result: The dissection.

    Returns:
      A tree for `records.to_text`: settings and environment, effects, costs, verdict,
      warnings, choices of step sizes, and measurements without their layers.
    """
    content = json.loads(result.to_json())
    content["measurements"] = [
        row
        | {
            "diagnostics": {
                k: v for k, v in row["diagnostics"].items() if k != "layers"
            }
        }
        for row in content["measurements"]
    ]
    kept = ("setup", "effects", "costs", "verdict", "warnings", "tunings")
    return {name: content[name] for name in (*kept, "measurements")}


def summary(
    job: Job, protocol: Protocol, results: Mapping[str, MethodResult]
) -> dict[str, Any]:
    """The outcome of a problem with its provenance, small enough to be committed.

    Args:
      job: Problem and settings.
      protocol: How step sizes were chosen.
      results: Results by the method's name; not empty.

    Returns:
      A tree for `records.to_text`; the deviation of a single run is NaN, and so is
      the accuracy of a run that diverged, which no mean counts.
    """
    methods = {}
    for name, result in results.items():
        mean, std = accuracy_of_finished(result.replications)
        methods[name] = {
            "test_accuracy_mean": mean,
            "test_accuracy_std": std,
            "test_accuracies": [final_accuracy(r) for r in result.replications],
            "seeds": [r.config.seed for r in result.replications],
            "step_size": result.tuned.learning_rate,
            "largest_stable_step_size": result.tuned.largest_stable,
            **({} if result.tuned.limit_seen else {"stable_at_every_step_size": True}),
            "environment": result.replications[0].environment,
        }
    return {
        "problem": job.problem.name,
        **job.problem.description,
        "settings": dataclasses.asdict(job.settings),
        "tuning_settings": dataclasses.asdict(protocol.settings),
        "methods": methods,
        "effects_of_the_sign": [
            dataclasses.asdict(effect) for effect in effects(results, SIGN_COMPARISONS)
        ],
        "effects_of_variance_adaptation": [
            dataclasses.asdict(effect)
            for effect in effects(results, ADAPTATION_COMPARISONS)
        ],
    }
