"""Named warnings: what may spoil a result, as data with the numbers behind it.

They are part of the result, not Python warnings: a report shows them, a program can
ask for them by class.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dissect_optax.dissection._effects import outcome_of
from dissect_optax.dissection._rows import (
    MeasurementRow,
    Run,
    Setup,
    Tuning,
    is_interval,
    number,
)

_ENOUGH_SEEDS = 5
_ENOUGH_TUNING_SEEDS = 3


@dataclasses.dataclass(frozen=True)
class DissectionWarning:
    """Something that may spoil a result; its fields are plain numbers and strings."""

    kinds: ClassVar[dict[str, type["DissectionWarning"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        DissectionWarning.kinds[cls.__name__] = cls

    @property
    def name(self) -> str:
        """Name of the class."""
        return type(self).__name__

    @property
    def sentence(self) -> str:
        """The warning in plain language, with its numbers."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Name and fields."""
        return {"name": self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return f"{self.name}: {self.sentence}"


def warning_from_dict(fields: Mapping[str, Any]) -> DissectionWarning:
    """The inverse of `DissectionWarning.to_dict`.

    Raises:
      ValueError: There is no warning of this name.

    Examples:
      >>> warning = TooFewSeeds(seeds=2)
      >>> warning_from_dict(warning.to_dict()) == warning
      True
    """
    kind = DissectionWarning.kinds.get(fields["name"])
    if kind is None:
        raise ValueError(
            f"There is no warning named {fields['name']!r}; expected one of"
            f" {', '.join(sorted(DissectionWarning.kinds))}."
        )
    return kind(
        **{
            name: math.nan if value is None else value
            for name, value in fields.items()
            if name != "name"
        }
    )


def _number(value: float) -> str:
    """Three digits; a dash where the number is not finite."""
    return f"{value:.3g}" if math.isfinite(value) else "–"


@dataclasses.dataclass(frozen=True)
class StepSizeAtGridEdge(DissectionWarning):
    """The best step size is the smallest or largest that was tried."""

    method: str
    batch_size: int
    learning_rate: float
    smallest: float
    largest: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        edge = "smallest" if self.learning_rate <= self.smallest else "largest"
        return (
            f"{self.method} at batch size {self.batch_size} did best at"
            f" {self.learning_rate:g}, the {edge} of the stable step sizes that were"
            f" tried ({self.smallest:g} to {self.largest:g}). A better one may lie"
            " beyond, and the method may do better than its effects say."
        )


@dataclasses.dataclass(frozen=True)
class NoLargestStepSize(DissectionWarning):
    """A method is stable up to the largest step size that was tried."""

    method: str
    batch_size: int
    learning_rate: float
    largest: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"{self.method} at batch size {self.batch_size} was stable up to the"
            f" largest step size tried, {self.largest:g}; the best of those tried,"
            f" {self.learning_rate:g}, is compared. If a model separates the data, the"
            " loss has no minimum and any step size is stable: add a regularizer."
        )


@dataclasses.dataclass(frozen=True)
class NothingStable(DissectionWarning):
    """A method diverged, or ended above where it began, at every step size."""

    method: str
    batch_size: int
    smallest: float
    largest: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"{self.method} at batch size {self.batch_size} was stable at no step size"
            f" from {self.smallest:g} to {self.largest:g}, so nothing is said about it."
            " Check the gradient and the scale of the data."
        )


@dataclasses.dataclass(frozen=True)
class TooFewSeeds(DissectionWarning):
    """There are fewer than five replicates."""

    seeds: int

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        if self.seeds < 2:
            return (
                f"An interval from {self.seeds} seed is unbounded: with fewer than two"
                " pairs no effect can be decided. Use at least five seeds."
            )
        return (
            f"The intervals rest on {self.seeds} seeds, so they are wide and depend on"
            " the normality of the differences. Use at least five seeds."
        )


@dataclasses.dataclass(frozen=True)
class TooFewTuningSeeds(DissectionWarning):
    """Step sizes were chosen on fewer than three seeds."""

    method: str
    batch_size: int
    seeds: int

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"The step size of {self.method} at batch size {self.batch_size} was chosen"
            f" on {self.seeds} seed{'' if self.seeds == 1 else 's'}; the spread of"
            " retuning, which the intervals include, needs at least three."
        )


@dataclasses.dataclass(frozen=True)
class Diverged(DissectionWarning):
    """Replicates diverged; no effect counts them."""

    method: str
    batch_size: int
    learning_rate: float
    diverged: int
    seeds: int

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"{self.diverged} of {self.seeds} replicates of {self.method} at batch size"
            f" {self.batch_size} diverged at the step size {self.learning_rate:g}. The"
            " effects leave these seeds out, which flatters the method."
        )


@dataclasses.dataclass(frozen=True)
class LossClipped(DissectionWarning):
    """Training losses left the range that counts."""

    method: str
    batch_size: int
    clipped: int
    runs: int
    lowest: float
    highest: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        advice = ""
        if self.lowest < 0:
            advice = (
                " A loss that falls below zero has no logarithm: add a constant that"
                " bounds it from below."
            )
        return (
            f"Training losses of {self.clipped} of {self.runs} replicates of"
            f" {self.method} at batch size {self.batch_size} were clipped to [1e-6, 10]"
            f" times the first loss; they lie between {self.lowest:.3g} and"
            f" {self.highest:.3g} times it.{advice}"
        )


@dataclasses.dataclass(frozen=True)
class LossLooksBatched(DissectionWarning):
    """The loss of one example seems to be a mean over a batch."""

    one: float
    batch_of_one: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"`loss` is {self.one:.6g} for an example and {self.batch_of_one:.6g} for a"
            " batch of it alone, and it averages over such batches. If it is written"
            " for a batch, pass `batched=True`: without, it is called with one example"
            " that has no batch axis."
        )


@dataclasses.dataclass(frozen=True)
class SameInitialLoss(DissectionWarning):
    """All seeds start at the same loss."""

    seeds: int
    loss: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"All {self.seeds} seeds start at the training loss {self.loss:.6g}. If"
            " `init` is meant to be random, it ignores its key; the intervals hold the"
            " spread of the mini-batches only."
        )


@dataclasses.dataclass(frozen=True)
class EstimatorsDisagree(DissectionWarning):
    """Two independent estimates of the same quantity exclude each other."""

    quantity: str
    method: str
    batch_size: int
    when: str
    first: float
    first_low: float
    first_high: float
    second: float
    second_low: float
    second_high: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        first, second = (
            f"{_number(value)} ({_number(low)} to {_number(high)})"
            for value, low, high in (
                (self.first, self.first_low, self.first_high),
                (self.second, self.second_low, self.second_high),
            )
        )
        return (
            f"Two estimates of {self.quantity} at the {self.when} of training with"
            f" {self.method} at batch size {self.batch_size} disagree: {first} and"
            f" {second}."
            " Rely on neither."
        )


@dataclasses.dataclass(frozen=True)
class MeasurementWarning(DissectionWarning):
    """A warning of the diagnostics about one measurement.

    Attributes:
      about: Its name there, "SignsNotResolved" for example.
      text: Its sentence, with its numbers.
      method: Label of the method whose parameters were measured.
      batch_size: Examples per mini-batch.
      when: "start", "middle" or "end" of training.
    """

    about: str
    text: str
    method: str
    batch_size: int
    when: str

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            f"{self.about} at the {self.when} of training with {self.method} at batch"
            f" size {self.batch_size}. {self.text}"
        )


@dataclasses.dataclass(frozen=True)
class CorrelatedExamples(DissectionWarning):
    """Gradients of examples that follow one another are correlated.

    Measured before the first step, with the data in the order in which they were given.
    """

    correlation: float
    low: float
    high: float

    @property
    def sentence(self) -> str:
        """The warning in plain language."""
        return (
            "Gradients of neighbouring examples are correlated by"
            f" {self.correlation:.2f} ({self.low:.2f} to {self.high:.2f}). If they are"
            " parts of one thing, such as tokens of a sequence, there are fewer"
            " independent examples than it seems, and variances are understated: let"
            " the example be what was drawn independently. If the data are only sorted,"
            " by class for example, ignore this: mini-batches are drawn at random."
        )


# ---- From the rows ----------------------------------------------------------------


def find_warnings(
    setup: Setup,
    runs: Sequence[Run],
    tunings: Sequence[Tuning],
    measurements: Sequence[MeasurementRow],
) -> list[DissectionWarning]:
    """The warnings that follow from the rows of a result.

    Args:
      setup: Everything that was the same for all runs.
      runs: All runs.
      tunings: All choices of step sizes.
      measurements: All measurements.

    Returns:
      The warnings.
    """
    found = _about_tuning(setup, runs, tunings)
    role = "race" if setup.budget == "race" else "replicate"
    compared = [run for run in runs if run.role == role]
    seeds = {run.seed for run in compared}
    if compared and len(seeds) < _ENOUGH_SEEDS:
        found.append(TooFewSeeds(len(seeds)))
    starts = {run.seed: run.training_loss[0] for run in compared}
    if len(starts) > 1 and len(set(starts.values())) == 1:
        found.append(SameInitialLoss(len(starts), next(iter(starts.values()))))
    for batch_size in setup.batch_sizes:
        for method, label in setup.methods.items():
            chosen = [
                run
                for run in runs
                if (run.method, run.batch_size) == (method, batch_size)
                and run.role == "replicate"
            ]
            found += _about_replicates(label, batch_size, chosen)
    for row in measurements:
        label = setup.methods.get(row.method, row.method)
        found += _about_measurement(label, row)
    return found


def _about_tuning(
    setup: Setup, runs: Sequence[Run], tunings: Sequence[Tuning]
) -> list[DissectionWarning]:
    """Warnings about the choice of step sizes."""
    found: list[DissectionWarning] = []
    for tuning in tunings:
        label = setup.methods.get(tuning.method, tuning.method)
        rates = [rate for rate, _, _ in tuning.candidates]
        stable = [rate for rate, _, is_stable in tuning.candidates if is_stable]
        if not stable:
            ends = (min(rates), max(rates)) if rates else (math.nan, math.nan)
            found.append(NothingStable(label, tuning.batch_size, *ends))
            continue
        if not tuning.limit_seen:
            tried = [
                run.learning_rate
                for run in runs
                if run.role in ("race", "tuning")
                and (run.method, run.batch_size) == (tuning.method, tuning.batch_size)
            ]
            found.append(
                NoLargestStepSize(
                    label,
                    tuning.batch_size,
                    tuning.learning_rate,
                    max([tuning.largest_stable, *tried]),
                )
            )
        if tuning.at_edge:
            found.append(
                StepSizeAtGridEdge(
                    label,
                    tuning.batch_size,
                    tuning.learning_rate,
                    min(stable),
                    max(stable),
                )
            )
        if setup.budget == "full":
            seeds = {
                run.seed
                for run in runs
                if run.role == "tuning"
                and (run.method, run.batch_size) == (tuning.method, tuning.batch_size)
            }
            if len(seeds) < _ENOUGH_TUNING_SEEDS:
                found.append(TooFewTuningSeeds(label, tuning.batch_size, len(seeds)))
    return found


def _about_replicates(
    label: str, batch_size: int, runs: Sequence[Run]
) -> list[DissectionWarning]:
    """Warnings about the replicates of one method at one batch size."""
    found: list[DissectionWarning] = []
    if diverged := sum(run.diverged for run in runs):
        rate = runs[0].learning_rate
        found.append(Diverged(label, batch_size, rate, diverged, len(runs)))
    clipped = [run for run in runs if outcome_of(run).clipped]
    if clipped:
        ratios = [
            loss / run.training_loss[0] for run in clipped for loss in run.training_loss
        ]
        found.append(
            LossClipped(
                label, batch_size, len(clipped), len(runs), min(ratios), max(ratios)
            )
        )
    return found


def _about_measurement(label: str, row: MeasurementRow) -> list[DissectionWarning]:
    """Warnings that the diagnostics gave about one measurement."""
    found: list[DissectionWarning] = []
    diagnostics = row.diagnostics
    for warning in diagnostics.get("warnings") or ():
        first = diagnostics.get("dominance")
        second = diagnostics.get("dominance_by_cauchy")
        if (
            warning["name"] == "EstimatorsDisagree"
            and is_interval(first)
            and is_interval(second)
        ):
            numbers = [
                number(entry[name])
                for entry in (first, second)
                for name in ("value", "low", "high")
            ]
            found.append(
                EstimatorsDisagree(
                    "the diagonal dominance", label, row.batch_size, row.when, *numbers
                )
            )
        else:
            name, text = str(warning["name"]), str(warning["text"])
            found.append(
                MeasurementWarning(name, text, label, row.batch_size, row.when)
            )
    return found
