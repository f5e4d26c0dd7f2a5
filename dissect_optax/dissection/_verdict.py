"""The verdict: sentences in plain language, each backed by a cell of a table.

A sentence has its number, interval and n, and claims nothing beyond the steps and the
batch size that were run. Measurements are about the next step only; nothing here
recommends a batch size or a method.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dissect_optax.dissection._effects import (
    SMALLEST_EFFECT,
    Comparison,
    Crossover,
    Effect,
    Effects,
    share_interval,
)
from dissect_optax.dissection._forecast import Forecast, ForecastScore
from dissect_optax.dissection._rows import (
    CELLS,
    MeasurementRow,
    Run,
    Setup,
    is_interval,
    number,
)

# What the number in a column is the effect of.
SUBJECTS = {
    "sign": "the sign",
    "variance_adaptation": "variance adaptation",
    "interaction": "an interaction of the sign with variance adaptation",
}


_MOST_DECIMALS = 6


@dataclasses.dataclass(frozen=True)
class Reading:
    """One sentence of the verdict.

    Attributes:
      text: The sentence.
      evidence: The table cell behind it: "table", the cell's keys, and its numbers.
    """

    text: str
    evidence: Mapping[str, Any]

    def __str__(self) -> str:
        return self.text


# ---- Numbers as text --------------------------------------------------------------


def with_decimals(value: float, decimals: int) -> str:
    """A number with so many decimals, its sign and a true minus.

    Examples:
      >>> with_decimals(-0.5, 2), with_decimals(0.25, 3), with_decimals(-math.inf, 2)
      ('−0.50', '+0.250', '−∞')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "−∞" if value < 0 else "+∞"
    if not round(value, decimals):
        return f"{0.0:.{decimals}f}"
    return f"{value:+.{decimals}f}".replace("-", "−")


def decimals_for(size: float) -> int:
    """Decimals that show two digits of a size; at least two, at most six.

    Examples:
      >>> decimals_for(0.3), decimals_for(0.0123), decimals_for(0.0), decimals_for(12.0)
      (2, 3, 2, 2)
    """
    if not (math.isfinite(size) and size > 0):
        return 2
    return min(max(1 - math.floor(math.log10(size)), 2), _MOST_DECIMALS)


def effect_numbers(effect: Effect) -> tuple[str, str, str]:
    """Estimate and ends of the interval, with as many decimals as the interval bears.

    Examples:
      >>> effect_numbers(Effect(-0.4937, -0.5081, -0.4793, 5))
      ('−0.494', '−0.508', '−0.479')
    """
    size = effect.half_width
    # Without an interval, as many as the estimate needs.
    if not (math.isfinite(size) and size > 0):
        size = abs(effect.estimate)
    decimals = decimals_for(size)
    values = (effect.estimate, effect.low, effect.high)
    if effect.excludes_zero:
        # An end close to zero must not read as zero.
        while decimals < _MOST_DECIMALS and not round(min(map(abs, values)), decimals):
            decimals += 1
    first, second, third = (with_decimals(value, decimals) for value in values)
    return first, second, third


def plain(value: float) -> str:
    """A number to three digits.

    Examples:
      >>> plain(1234.5), plain(0.01234), plain(-2.0)
      ('1.23e+03', '0.0123', '−2')
    """
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    return f"{value:.3g}".replace("-", "−")


def interval_text(effect: Effect) -> str:
    """Interval and number of pairs.

    Examples:
      >>> interval_text(Effect(-0.5, -0.6, -0.4, 5))
      '95 % interval −0.60 to −0.40, n = 5'
      >>> interval_text(Effect(-0.5, -math.inf, math.inf, 1))
      '95 % interval unbounded, n = 1'
    """
    if not math.isfinite(effect.half_width):
        return f"95 % interval unbounded, n = {effect.pairs}"
    _, low, high = effect_numbers(effect)
    return f"95 % interval {low} to {high}, n = {effect.pairs}"


def effect_text(effect: Effect) -> str:
    """Estimate, interval and number of pairs.

    Examples:
      >>> effect_text(Effect(-0.5, -0.6, -0.4, 5))
      '−0.50 (95 % interval −0.60 to −0.40, n = 5)'
    """
    return f"{effect_numbers(effect)[0]} ({interval_text(effect)})"


def _size_text(effect: Effect) -> str:
    """Estimate without its sign, interval and number of pairs."""
    return effect_text(effect).removeprefix("−").removeprefix("+")


def effect_evidence(effect: Effect, **cell: Any) -> dict[str, Any]:
    """The cell of an effect, with its numbers."""
    return cell | {
        "estimate": effect.estimate,
        "low": effect.low,
        "high": effect.high,
        "pairs": effect.pairs,
    }


_CELL_KEYS = ("table", "quantity", "batch_size", "method", "when", "column")


def anchor(evidence: Mapping[str, Any]) -> str:
    """Name of the cell, for links within a page.

    Examples:
      >>> anchor({"table": "effects", "batch_size": 8, "column": "adam − m_sgd"})
      'effects-8-adam-m_sgd'
    """
    text = "-".join(str(evidence[key]) for key in _CELL_KEYS if key in evidence)
    words = "".join(c if c.isalnum() or c in "_-" else " " for c in text)
    return "-".join(part for part in words.replace("-", " ").split())


# ---- Effects ----------------------------------------------------------------------


def _too_few(effect: Effect, where: str, subject: str) -> str | None:
    """The sentence for an effect with fewer than two pairs of runs."""
    if effect.pairs == 0:
        reason = (
            f"a run diverged at each of {effect.diverged} seeds"
            if effect.diverged
            else "no seed has a run of every method"
        )
        return (
            f"{where}, nothing can be said about {subject}: {reason}"
            f" ({interval_text(effect)})."
        )
    if effect.pairs == 1:
        return (
            f"{where}, nothing can be decided about {subject}: the difference was"
            f" {effect_text(effect)}, and an interval from one seed is unbounded."
        )
    return None


def _no_difference(effect: Effect, where: str, subject: str) -> str:
    """The sentence for an effect that is not decided."""
    numbers = effect_text(effect)
    if effect.excludes_zero:
        return (
            f"{where}, no difference that counts is seen from {subject}: {numbers} is"
            f" less than {effect.smallest:g}."
        )
    return f"{where}, no difference is seen from {subject}: {numbers}."


def _sentence(effect: Effect, where: str, subject: str, decided: str) -> str:
    """The sentence about an effect; `decided` is for one that is decided."""
    if text := _too_few(effect, where, subject):
        return text
    return decided if effect.decided else _no_difference(effect, where, subject)


def _lowers(effect: Effect, where: str, subject: str, what: str) -> str:
    """The sentence about what lowers or raises the logarithm of a loss."""
    lower = effect.estimate < 0
    decided = (
        f"{where}, {subject} {'lowers' if lower else 'raises'} {what} by"
        f" {_size_text(effect)}, which is a loss"
        f" {'lower' if lower else 'higher'} by a factor of"
        f" {plain(_exponential(abs(effect.estimate)))}."
    )
    return _sentence(effect, where, subject, decided)


def _exponential(value: float) -> float:
    """The exponential; inf where it overflows."""
    return math.exp(value) if value < 700 else math.inf


def _effect_sentence(column: str, effect: Effect, where: str) -> str:
    """The sentence about one of the three effects on the log training loss."""
    if column != "interaction":
        what = "the mean log training loss"
        return _lowers(effect, where, SUBJECTS[column], what)
    side = "lower" if effect.estimate < 0 else "higher"
    decided = (
        f"{where}, the sign and variance adaptation interact: together they make the"
        f" mean log training loss {side} than the sum of what each does alone, by"
        f" {_size_text(effect)}."
    )
    return _sentence(effect, where, SUBJECTS[column], decided)


def _comparison_sentence(
    comparison: Comparison, where: str, labels: Mapping[str, str]
) -> str:
    """The sentence about one method against another."""
    effect = comparison.effect
    one, other = (
        labels.get(name, name) for name in (comparison.method, comparison.reference)
    )
    subject = f"{one} instead of {other}"
    return _lowers(effect, where, subject, "the mean log training loss")


def _where(setup: Setup, batch_size: int) -> str:
    return f"At batch size {batch_size:,}, over {setup.steps:,} steps"


def _about_effects(
    setup: Setup, by_batch_size: Mapping[int, Effects]
) -> Iterator[Reading]:
    """Readings of the headline."""
    for batch_size, found in by_batch_size.items():
        where = _where(setup, batch_size)
        for column, effect in found.effects.items():
            evidence = effect_evidence(
                effect, table="effects", batch_size=batch_size, column=column
            )
            yield Reading(_effect_sentence(column, effect, where), evidence)
        for name, comparison in found.comparisons.items():
            # The other comparisons of the four methods make up the effects.
            if name == "adam − m_sgd" or comparison.method not in CELLS:
                evidence = effect_evidence(
                    comparison.effect,
                    table="comparisons",
                    batch_size=batch_size,
                    column=name,
                )
                text = _comparison_sentence(comparison, where, setup.methods)
                yield Reading(text, evidence)


def _about_crossovers(
    setup: Setup,
    by_batch_size: Mapping[int, Effects],
    crossovers: Iterable[Crossover],
) -> Iterator[Reading]:
    """Readings of batch sizes between which an effect changes its sign."""
    for crossover in crossovers:
        numbers = []
        for batch_size in (crossover.low, crossover.high):
            found = by_batch_size[batch_size]
            effect = column_effect(found, crossover.column)
            numbers.append(f"at {batch_size:,} it is {effect_text(effect)}")
        subject = SUBJECTS.get(crossover.column)
        subject = subject or _label_of_column(crossover.column, setup.methods)
        yield Reading(
            f"The effect of {subject} on the mean log training loss over"
            f" {setup.steps:,} steps changes its sign between batch sizes"
            f" {crossover.low:,} and {crossover.high:,}: {numbers[0]}, {numbers[1]}.",
            {
                "table": "crossovers",
                "when": crossover.low,
                **dataclasses.asdict(crossover),
            },
        )


def _label_of_column(column: str, labels: Mapping[str, str]) -> str:
    """The comparison in words: ADAM instead of M-SGD for "adam − m_sgd"."""
    return " instead of ".join(labels.get(name, name) for name in column.split(" − "))


def column_effect(found: Effects, column: str) -> Effect:
    """The effect of a column, be it an effect or a comparison."""
    if column in found.effects:
        return found.effects[column]
    return found.comparisons[column].effect


def _about_secondary(
    setup: Setup, secondary: Mapping[str, Mapping[int, Effects]]
) -> Iterator[Reading]:
    """Readings of the final loss and the metrics."""
    for quantity, by_batch_size in secondary.items():
        for batch_size, found in by_batch_size.items():
            where = (
                f"At batch size {batch_size:,}, in the last tenth of"
                f" {setup.steps:,} steps"
            )
            for column in ("sign", "variance_adaptation"):
                if column not in found.effects:
                    continue
                effect, subject = found.effects[column], SUBJECTS[column]
                if quantity == "log_final_loss":
                    what = "the log of the mean training loss"
                    text = _lowers(effect, where, subject, what)
                else:
                    decided = (
                        f"{where}, {subject} changes {quantity} by"
                        f" {effect_text(effect)}."
                    )
                    of_metric = f"{subject} in {quantity}"
                    text = _sentence(effect, where, of_metric, decided)
                evidence = effect_evidence(
                    effect,
                    table="secondary",
                    quantity=quantity,
                    batch_size=batch_size,
                    column=column,
                )
                yield Reading(text, evidence)


def _about_divergence(setup: Setup, runs: Sequence[Run]) -> Iterator[Reading]:
    """Readings of replicates that diverged."""
    for batch_size in setup.batch_sizes:
        for method, label in setup.methods.items():
            chosen = [
                run
                for run in runs
                if (run.method, run.batch_size) == (method, batch_size)
                and run.role == "replicate"
            ]
            count = sum(run.diverged for run in chosen)
            if not count:
                continue
            low, high = share_interval(count, len(chosen))
            yield Reading(
                f"At batch size {batch_size:,}, {count} of {len(chosen)} replicates of"
                f" {label} diverged within {setup.steps:,} steps (95 % interval of the"
                f" share {low:.2f} to {high:.2f}, n = {len(chosen)}); no effect"
                " counts them.",
                {
                    "table": "methods",
                    "batch_size": batch_size,
                    "method": method,
                    "column": "diverged",
                    "estimate": count / len(chosen),
                    "low": low,
                    "high": high,
                    "pairs": len(chosen),
                },
            )


# ---- Forecasts --------------------------------------------------------------------


def _subject(column: str, labels: Mapping[str, str]) -> str:
    return SUBJECTS.get(column) or _label_of_column(column, labels)


def _direction(direction: int, column: str) -> str:
    """What a forecast says, after the subject."""
    if column == "interaction":
        return "makes the loss " + ("lower" if direction < 0 else "higher")
    return "lowers the loss" if direction < 0 else "raises the loss"


def _about_forecasts(
    setup: Setup,
    forecasts: Iterable[Forecast],
    scores: Iterable[ForecastScore],
) -> Iterator[Reading]:
    """Readings of what a race forecasts, and of what became of it."""
    for forecast in forecasts:
        subject = _subject(forecast.column, setup.methods)
        numbers = effect_text(forecast.race)
        where = f"At batch size {forecast.batch_size:,}"
        race = (
            f"over the {forecast.race_steps:,} steps of the race its effect on the"
            f" mean log training loss is {numbers}"
        )
        if forecast.direction:
            text = (
                f"{where}, the race forecasts that {subject}"
                f" {_direction(forecast.direction, forecast.column)} over"
                f" {forecast.steps:,} steps: {race}. The interval is that of the race;"
                " the rest of training may differ."
            )
        else:
            text = (
                f"{where}, the race forecasts nothing about {subject} over"
                f" {forecast.steps:,} steps: {race}, which is not decided."
            )
        evidence = effect_evidence(
            forecast.race,
            table="forecasts",
            batch_size=forecast.batch_size,
            column=forecast.column,
        )
        yield Reading(text, evidence)
    for score in scores:
        forecast, trained = score.forecast, score.trained
        subject = _subject(forecast.column, setup.methods)
        said = {
            "right": "was right",
            "wrong": "was wrong",
            "no forecast": "is missing, since the race did not decide it",
            "not decidable": "cannot be scored, since training did not decide it",
        }[score.score]
        yield Reading(
            f"At batch size {forecast.batch_size:,}, the forecast about {subject}"
            f" {said}: {effect_text(forecast.race)} over {forecast.race_steps:,} steps,"
            f" {effect_text(trained)} over {forecast.steps:,}.",
            effect_evidence(
                trained,
                table="forecasts",
                batch_size=forecast.batch_size,
                column=f"{forecast.column} score",
            ),
        )


# ---- Measurements -----------------------------------------------------------------

_DIRECTIONS = {
    "gradient": "the gradient",
    "sign": "its sign",
    "adapted_gradient": "the gradient adapted to its variance",
    "adapted_sign": "its sign adapted to the variance",
}


def _measured_text(entry: Mapping[str, Any], row: MeasurementRow, scale: float) -> str:
    """Interval and number of mini-batches of a measured quantity."""
    low, high = number(entry["low"]) * scale, number(entry["high"]) * scale
    count = row.diagnostics.get("batches")
    n = f", n = {count:,} mini-batches" if count else ""
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"95 % interval unbounded{n}"
    return f"95 % interval {plain(low)} to {plain(high)}{n}"


def _about_measurements(
    setup: Setup, rows: Iterable[MeasurementRow]
) -> Iterator[Reading]:
    """Readings of the measurements: about the next step, nothing after it."""
    measured = list(rows)
    methods = {row.method for row in measured}
    reference = "adam" if "adam" in methods else next(iter(sorted(methods)), None)
    for row in measured:
        if row.method != reference:
            continue
        label = setup.methods.get(row.method, row.method)
        where = (
            f"At the {row.when} of training with {label} at batch size"
            f" {row.batch_size:,} (step {row.step:,})"
        )
        cell = {
            "table": "measurements",
            "batch_size": row.batch_size,
            "method": row.method,
            "when": row.when,
        }
        yield from _about_one_measurement(row, where, cell)


def _about_one_measurement(
    row: MeasurementRow, where: str, cell: Mapping[str, Any]
) -> Iterator[Reading]:
    """Readings of one row of measurements."""
    diagnostics = row.diagnostics
    noise = diagnostics.get("noise_scale")
    if is_interval(noise):
        # The trace of the mini-batch gradient's variance over the squared norm.
        ratio = number(noise["value"]) / row.batch_size
        interval = _measured_text(noise, row, 1 / row.batch_size)
        yield Reading(
            f"{where}, the variance of the next step's gradient is {plain(ratio)} times"
            f" the squared norm of its mean ({interval}).",
            {**cell, "column": "noise_scale", **noise},
        )
    success = diagnostics.get("sign_success")
    if is_interval(success):
        yield Reading(
            f"{where}, a share of {plain(number(success['value']))} of the elements of"
            " the next step's gradient has the sign of the full gradient"
            f" ({_measured_text(success, row, 1.0)}).",
            {**cell, "column": "sign_success", **success},
        )
    improvements = diagnostics.get("improvement")
    if isinstance(improvements, Mapping):
        found = {
            name: entry
            for name, entry in improvements.items()
            if is_interval(entry) and math.isfinite(number(entry["value"]))
        }
        if found:
            best = max(found, key=lambda name: number(found[name]["value"]))
            entry = found[best]
            yield Reading(
                f"{where}, the direction with the largest estimated improvement of the"
                f" next step is {_DIRECTIONS.get(best, best)}:"
                f" {plain(number(entry['value']))}"
                f" ({_measured_text(entry, row, 1.0)}). This does not forecast"
                " training.",
                {**cell, "column": f"improvement.{best}", **entry},
            )


# ---- All of it --------------------------------------------------------------------


def scope(setup: Setup) -> str:
    """The limits of everything that is said.

    Args:
      setup: Everything that was the same for all runs.

    Returns:
      A sentence or two.
    """
    *rest, last = (f"{size:,}" for size in setup.batch_sizes)
    sizes = f"{', '.join(rest)} and {last}" if rest else last
    plural = "s" if len(setup.batch_sizes) != 1 else ""
    decays = ", ".join(f"{name} = {value}" for name, value in setup.decays.items())
    return (
        f"Nothing is claimed beyond {setup.steps:,} steps, batch size{plural} {sizes},"
        f" the schedule ({setup.schedule}){' and ' + decays if decays else ''}, and"
        " step sizes tuned for each method. Negative effects are better: a lower log"
        " training loss. An effect is not decided where its interval holds zero or it"
        f" is smaller than {SMALLEST_EFFECT:g}."
    )


def readings(
    setup: Setup,
    runs: Sequence[Run],
    measurements: Sequence[MeasurementRow],
    by_batch_size: Mapping[int, Effects],
    secondary: Mapping[str, Mapping[int, Effects]],
    crossovers: Sequence[Crossover],
    forecasts: Sequence[Forecast],
    scores: Sequence[ForecastScore],
) -> list[Reading]:
    """All sentences of the verdict, the most important ones first.

    Args:
      setup: Everything that was the same for all runs.
      runs: All runs.
      measurements: All measurements.
      by_batch_size: Effects on the mean log training loss.
      secondary: Effects on other quantities, by their name.
      crossovers: Batch sizes between which an effect changes its sign.
      forecasts: Forecasts of the race.
      scores: The forecasts beside the trained effects.

    Returns:
      The sentences with the cells behind them.
    """
    return [
        *_about_effects(setup, by_batch_size),
        *_about_crossovers(setup, by_batch_size, crossovers),
        *_about_divergence(setup, runs),
        *_about_forecasts(setup, () if scores else forecasts, scores),
        *_about_secondary(setup, secondary),
        *_about_measurements(setup, measurements),
    ]
