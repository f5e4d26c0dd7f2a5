"""The result of a dissection: rows of runs, and everything that follows from them.

Only rows are stored. Effects, verdict, forecasts and reports are computed from them,
so they cannot contradict each other, and a result read from JSON says what it said
before.
"""

import dataclasses
import functools
import io
import json
import math
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

from dissect_optax.dissection._effects import (
    SMALLEST_EFFECT,
    Comparison,
    Crossover,
    Effect,
    Effects,
    crossovers,
    effects_between,
    full_races,
    mean_and_std,
    outcome_of,
    race_finalists,
    select_runs,
)
from dissect_optax.dissection._forecast import Forecast, ForecastScore
from dissect_optax.dissection._rows import (
    CELLS,
    MeasurementRow,
    Role,
    Rows,
    Run,
    Setup,
    Tuning,
    number,
)
from dissect_optax.dissection._verdict import (
    Reading,
    column_effect,
    decimals_for,
    effect_numbers,
    plain,
    readings,
    scope,
)
from dissect_optax.dissection._warnings import (
    DissectionWarning,
    find_warnings,
    warning_from_dict,
)

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

__all__ = [
    "CELLS",
    "Dissection",
    "MeasurementRow",
    "MethodSummary",
    "Role",
    "Rows",
    "Run",
    "Setup",
    "Tuning",
]

_FORMAT = 1
_TERMINAL_WIDTH = 80
_FORECAST_COLUMNS = ("sign", "variance_adaptation", "interaction", "adam − m_sgd")
# Tables whose readings a terminal shows; the others are in the HTML report.
_TERMINAL_TABLES = ("effects", "comparisons", "crossovers", "methods", "forecasts")


class EffectTable(dict[str, Effect]):
    """Effects by name; the error for a missing one says why it is missing."""

    def __missing__(self, name: str) -> Effect:
        raise KeyError(
            f"There is no effect {name!r} here; there is {sorted(self) or 'none'}."
            ' "sign", "variance_adaptation" and "interaction" need replicates of all'
            f" four methods: {', '.join(CELLS)}. After a race alone, ask for"
            " `result.forecast`."
        )


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """One method at one batch size, over the runs that are compared.

    Attributes:
      method: Name of the method.
      label: Its label.
      batch_size: Examples per mini-batch.
      learning_rate: Step size of the runs; NaN where there is none.
      largest_stable: Largest stable step size of its tuning; NaN without one.
      values: Mean and standard deviation of "log_loss", "log_final_loss" and each
        metric over the runs that did not diverge.
      runs: Number of runs.
      diverged: Number of those that diverged.
      race_cost: Training spent on the race, in units of one full training run; NaN
        where it is not known.
      full_cost: Training spent on the full tuning runs, in the same units.
      limit_seen: Whether a step size above the largest stable one was not stable.
    """

    method: str
    label: str
    batch_size: int
    learning_rate: float
    largest_stable: float
    values: Mapping[str, tuple[float, float]]
    runs: int
    diverged: int
    race_cost: float
    full_cost: float
    limit_seen: bool

    @property
    def largest_stable_text(self) -> str:
        """The largest stable step size, "at least" where no larger one is unstable."""
        return f"{'' if self.limit_seen else '≥ '}{plain(self.largest_stable)}"


class Cost(NamedTuple):
    """Training of all methods at one batch size, in units of one full run.

    Attributes:
      race: The races.
      tuning: The full runs at the best step sizes of the races.
      replications: The runs that are compared.
    """

    race: float
    tuning: float
    replications: float


class Dissection:
    """Table 1 on one problem: effects, verdict, warnings, rows and reports.

    Args:
      setup: Everything that was the same for all runs.
      runs: All runs: of tuning, of a race, and replicates at the tuned step sizes.
      tunings: Choices of step sizes.
      measurements: Diagnostics at the start, the middle and the end of training.
      warnings: Warnings that do not follow from these rows, about the data for example.
        All others are found here.

    Attributes:
      setup: As given.
      runs: As given; `runs.to_pandas()` is a table with a line per evaluation.
      tunings: As given; `tunings.to_pandas()` has a line per candidate.
      measurements: As given; `measurements.to_pandas()` has a line per measurement.

    Edge cases:
      - Methods are missing: the effects that need them are, too.
      - Fewer than two pairs of seeds: the interval is unbounded, nothing is decided.
      - A replicate diverged: its seed is left out, counted, and in the warnings.
    """

    def __init__(
        self,
        setup: Setup,
        runs: Iterable[Run],
        tunings: Iterable[Tuning] = (),
        measurements: Iterable[MeasurementRow] = (),
        warnings: Iterable[DissectionWarning] = (),
    ):
        self.setup = setup
        self.runs = Rows(runs)
        self.tunings = Rows(tunings)
        self.measurements = Rows(measurements)
        self._given_warnings = tuple(warnings)

    # ---- What follows from the rows -----------------------------------------------

    def _effects_of(
        self, quantity: str, smallest: float = SMALLEST_EFFECT
    ) -> dict[int, Effects]:
        """Effects on a quantity between replicates, by batch size."""
        return {
            batch_size: effects_between(
                select_runs(self.runs, batch_size, "replicate"),
                select_runs(self.runs, batch_size, "tuning"),
                quantity,
                smallest,
            )
            for batch_size in self.setup.batch_sizes
        }

    @functools.cached_property
    def headline_effects(self) -> dict[int, Effects]:
        """Effects and comparisons on the mean log training loss, by batch size."""
        return self._effects_of("log_loss")

    @property
    def effects(self) -> dict[int, EffectTable]:
        """Effects on the mean log training loss by batch size; negative is better.

        `effects[32]["sign"]`, "variance_adaptation" and "interaction".
        """
        return {
            size: EffectTable(row.effects)
            for size, row in self.headline_effects.items()
        }

    @property
    def comparisons(self) -> dict[int, dict[str, Comparison]]:
        """Two methods against each other, by batch size and "adam − m_svag", say."""
        return {
            size: dict(row.comparisons) for size, row in self.headline_effects.items()
        }

    def compare(
        self,
        method: str,
        reference: str,
        batch_size: int | None = None,
        quantity: str = "log_loss",
    ) -> Effect:
        """The outcome of any method minus that of any other, over equal seeds.

        Args:
          method: Name of the one.
          reference: Name of the other.
          batch_size: At which batch size; None if there is one only.
          quantity: "log_loss", "log_final_loss" or the name of a metric.

        Returns:
          The difference; its interval holds the spread of retuning.

        Raises:
          ValueError: A method has no replicates at this batch size, or there are
            several batch sizes and none is given.
        """
        sizes = self.setup.batch_sizes
        if batch_size is None and len(sizes) == 1:
            (batch_size,) = sizes
        if batch_size not in sizes:
            raise ValueError(
                f"`batch_size` must be one of {list(sizes)}, got {batch_size}."
            )
        replicates = select_runs(self.runs, batch_size, "replicate")
        trained = list(dict.fromkeys(run.method for run in replicates))
        for name in (method, reference):
            if name not in trained:
                raise ValueError(
                    f"{name!r} has no replicates at batch size {batch_size}; these"
                    f" have: {', '.join(trained) or 'none'}."
                )
        tuning = select_runs(self.runs, batch_size, "tuning")
        pair = (method, reference)
        # Those of other methods have no say, and take most of the time.
        found = effects_between(
            [run for run in replicates if run.method in pair],
            [run for run in tuning if run.method in pair],
            quantity,
            pairs=[pair],
        )
        (comparison,) = found.comparisons.values()
        return comparison.effect

    @functools.cached_property
    def secondary(self) -> dict[str, dict[int, Effects]]:
        """Effects on "log_final_loss" and on each metric, by batch size.

        Effects on a metric have no smallest size that counts, since its unit is not
        known here.
        """
        names = dict.fromkeys(
            name for run in self.runs if run.role == "replicate" for name in run.metrics
        )
        return {"log_final_loss": self._effects_of("log_final_loss")} | {
            name: self._effects_of(name, smallest=0.0) for name in names
        }

    @functools.cached_property
    def crossovers(self) -> list[Crossover]:
        """Batch sizes between which an effect was seen to change its sign."""
        return crossovers(self.headline_effects)

    @functools.cached_property
    def race_effects(self) -> dict[int, Effects]:
        """Effects over the steps of the race; empty where there was no race."""
        found = {}
        for batch_size in self.setup.batch_sizes:
            race = select_runs(self.runs, batch_size, "race")
            if finalists := race_finalists(race, self.setup.race_steps):
                candidates = full_races(race, self.setup.race_steps)
                found[batch_size] = effects_between(finalists, candidates)
        return found

    @functools.cached_property
    def forecast(self) -> dict[int, dict[str, Forecast]]:
        """What the race forecasts, by batch size and effect; empty without a race."""
        found: dict[int, dict[str, Forecast]] = {}
        for batch_size, row in self.race_effects.items():
            race = select_runs(self.runs, batch_size, "race")
            length = self.setup.race_steps or max(run.steps[-1] for run in race)
            found[batch_size] = {
                column: Forecast(
                    batch_size,
                    column,
                    column_effect(row, column),
                    length,
                    self.setup.steps,
                )
                for column in _FORECAST_COLUMNS
                if column in row.effects or column in row.comparisons
            }
        return found

    @functools.cached_property
    def forecast_score(self) -> dict[int, dict[str, ForecastScore]]:
        """The forecasts beside the effects of full training, where there are both."""
        scores = {}
        for batch_size, forecasts in self.forecast.items():
            trained = self.headline_effects[batch_size]
            found = {
                column: ForecastScore(forecast, column_effect(trained, column))
                for column, forecast in forecasts.items()
                if column in trained.effects or column in trained.comparisons
            }
            if found:
                scores[batch_size] = found
        return scores

    @functools.cached_property
    def verdict(self) -> list[Reading]:
        """Sentences in plain language with the table cells behind them."""
        return readings(
            self.setup,
            self.runs,
            self.measurements,
            self.headline_effects,
            self.secondary if any(r.role == "replicate" for r in self.runs) else {},
            self.crossovers,
            [entry for row in self.forecast.values() for entry in row.values()],
            [entry for row in self.forecast_score.values() for entry in row.values()],
        )

    @property
    def scope(self) -> str:
        """The limits of everything that the verdict says."""
        return scope(self.setup)

    @functools.cached_property
    def warnings(self) -> list[DissectionWarning]:
        """What may spoil the result."""
        found = find_warnings(self.setup, self.runs, self.tunings, self.measurements)
        return [*self._given_warnings, *found]

    @functools.cached_property
    def summaries(self) -> list[MethodSummary]:
        """Every method at every batch size, over the runs that are compared."""
        found = []
        for batch_size in self.setup.batch_sizes:
            compared = select_runs(self.runs, batch_size, "replicate")
            if self.setup.budget == "race":
                race = select_runs(self.runs, batch_size, "race")
                compared = race_finalists(race, self.setup.race_steps)
            for method, label in self.setup.methods.items():
                runs = [run for run in compared if run.method == method]
                found.append(self._summary(method, label, batch_size, runs))
        return found

    def _summary(
        self, method: str, label: str, batch_size: int, runs: list[Run]
    ) -> MethodSummary:
        """One method at one batch size."""
        outcomes = [outcome_of(run) for run in runs if not run.diverged]
        names = ["log_loss", "log_final_loss"]
        names += dict.fromkeys(name for run in runs for name in run.metrics)
        values = {
            name: mean_and_std([outcome.value(name) for outcome in outcomes])
            for name in names
            if outcomes
        }
        tuning = self.tuning(method, batch_size)
        rate = tuning.learning_rate if tuning else math.nan
        return MethodSummary(
            method=method,
            label=label,
            batch_size=batch_size,
            learning_rate=runs[0].learning_rate if runs else rate,
            largest_stable=tuning.largest_stable if tuning else math.nan,
            values=values,
            runs=len(runs),
            diverged=sum(run.diverged for run in runs),
            race_cost=tuning.race_cost if tuning else math.nan,
            full_cost=tuning.full_cost if tuning else math.nan,
            limit_seen=tuning.limit_seen if tuning else True,
        )

    @functools.cached_property
    def costs(self) -> dict[int, Cost]:
        """Training of all methods, by batch size, in units of one full run."""
        found = {}
        for batch_size in self.setup.batch_sizes:
            tunings = [t for t in self.tunings if t.batch_size == batch_size]
            replicates = select_runs(self.runs, batch_size, "replicate")
            found[batch_size] = Cost(
                race=sum(tuning.race_cost for tuning in tunings),
                tuning=sum(tuning.full_cost for tuning in tunings),
                replications=sum(run.steps[-1] for run in replicates)
                / self.setup.steps,
            )
        return found

    def tuning(self, method: str, batch_size: int) -> Tuning | None:
        """The choice of the step size of a method; None where there was none."""
        for tuning in self.tunings:
            if (tuning.method, tuning.batch_size) == (method, batch_size):
                return tuning
        return None

    # ---- In a terminal and a notebook ---------------------------------------------

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(
            file=io.StringIO(),
            width=_TERMINAL_WIDTH,
            color_system=None,
            force_terminal=False,
            # In a notebook, rich would display what is printed and write nothing.
            force_jupyter=False,
        )
        console.print(self.__rich__(), highlight=False)
        lines = cast(io.StringIO, console.file).getvalue().splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def __repr__(self) -> str:
        return (
            f"<Dissection of {self.setup.title!r}: {len(self.runs)} runs,"
            f" {len(self.warnings)} warnings>"
        )

    def __rich__(self) -> "Group":
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [Text(self.title_line, style="bold"), Text()]
        race = self.setup.budget == "race"
        shown = self.race_effects if race else self.headline_effects
        if any(row.effects for row in shown.values()):
            parts.append(_effects_as_table(shown, race))
        parts += [self._methods_as_table(), self._costs_as_table()]
        parts.append(Text("Verdict", style="bold"))
        said = [
            reading.text
            for reading in self.verdict
            if reading.evidence["table"] in _TERMINAL_TABLES
        ]
        parts.append(_bullets(said or ["There is nothing to compare."]))
        if self.warnings:
            parts += [Text(), Text("Warnings", style="bold")]
            parts.append(_bullets(map(str, self.warnings)))
        return Group(*parts, Text(), Text(self.scope))

    @property
    def title_line(self) -> str:
        """Title and size of the problem in one line."""
        setup = self.setup
        return (
            f"{setup.title}: {setup.steps:,} steps, {setup.seeds} seeds,"
            f" {setup.examples:,} examples, {setup.parameters:,} parameters"
        )

    def _methods_as_table(self) -> "Table":
        """Step sizes and outcomes, for a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("batch", no_wrap=True)
        table.add_column("method")
        for column in ("step size", "log loss", "final log loss", "diverged"):
            table.add_column(column, justify="right", no_wrap=True)
        for summary in self.summaries:
            table.add_row(
                f"{summary.batch_size:,}",
                # A string would be read as markup.
                Text(summary.label),
                plain(summary.learning_rate),
                mean_with_std(summary.values.get("log_loss")),
                mean_with_std(summary.values.get("log_final_loss")),
                f"{summary.diverged} of {summary.runs}",
            )
        return table

    def _costs_as_table(self) -> "Table":
        """Training that the dissection took, for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            title="Training, in full runs",
            title_justify="left",
        )
        for column in ("batch", "race", "full tuning", "replications"):
            table.add_column(column, justify="right", no_wrap=True)
        for batch_size, cost in self.costs.items():
            table.add_row(f"{batch_size:,}", *map(plain, cost))
        return table

    def _repr_html_(self) -> str:
        from dissect_optax.dissection._html import render

        return render(self, fragment=True)

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Writes the report: one file that opens without network.

        Args:
          path: Where to; missing directories are made.

        Returns:
          The path.
        """
        from dissect_optax.dissection._html import render

        target = Path(path)
        text = render(self, fragment=False)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        return target

    # ---- JSON ---------------------------------------------------------------------

    def to_json(self) -> str:
        """The result as JSON; null is a number that is not finite.

        `from_json` reads the rows; effects, verdict and the warnings that follow from
        rows are there for other programs.
        """
        content = {
            "format": _FORMAT,
            "setup": dataclasses.asdict(self.setup),
            "effects": {
                str(size): {
                    name: dataclasses.asdict(effect) | {"decided": effect.decided}
                    for name, effect in row.items()
                }
                for size, row in self.effects.items()
            },
            "costs": {str(size): cost._asdict() for size, cost in self.costs.items()},
            "verdict": [dataclasses.asdict(reading) for reading in self.verdict],
            "warnings": [warning.to_dict() for warning in self.warnings],
            "given_warnings": [warning.to_dict() for warning in self._given_warnings],
            "runs": [dataclasses.asdict(run) for run in self.runs],
            "tunings": [dataclasses.asdict(tuning) for tuning in self.tunings],
            "measurements": [dataclasses.asdict(row) for row in self.measurements],
        }
        return json.dumps(_plain(content), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`.

        Args:
          text: JSON of a result.

        Returns:
          The result; a number that was not finite is NaN.

        Raises:
          ValueError: The text is not the JSON of a result.
        """
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {_FORMAT}")
            return cls(
                setup=_setup_from(content["setup"]),
                runs=[_run_from(fields) for fields in content["runs"]],
                tunings=[_tuning_from(fields) for fields in content["tunings"]],
                measurements=[MeasurementRow(**row) for row in content["measurements"]],
                warnings=[warning_from_dict(row) for row in content["given_warnings"]],
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                "Expected the JSON that Dissection.to_json() returns; got something"
                f" that cannot be read ({type(error).__name__}: {error})."
            ) from error

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same rows; numbers that are not finite are equal."""
        if not isinstance(other, Dissection):
            return NotImplemented
        return self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]


def mean_with_std(value: tuple[float, float] | None) -> str:
    """Mean and standard deviation as text.

    Examples:
      >>> mean_with_std((-1.25, 0.1)), mean_with_std((-1.25, math.nan))
      ('−1.25 ± 0.10', '−1.25')
      >>> mean_with_std(None)
      '–'
    """
    if value is None or not math.isfinite(value[0]):
        return "–"
    mean, std = value
    decimals = decimals_for(std)
    deviation = "" if math.isnan(std) else f" ± {std:.{decimals}f}"
    return f"{mean:.{decimals}f}{deviation}".replace("-", "−")


def _bullets(sentences: Iterable[str]) -> "Table":
    """Sentences with a hanging indent, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    for sentence in sentences:
        grid.add_row("•", Text(sentence))
    return grid


def _effects_as_table(by_batch_size: Mapping[int, Effects], race: bool) -> "Table":
    """The three effects, for a terminal."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title="Effects on the mean log training loss"
        + (" over the race" if race else "")
        + "; negative is better, 95 % intervals",
        title_justify="left",
    )
    table.add_column("batch")
    for name in ("sign", "variance adaptation", "interaction", "pairs"):
        table.add_column(name, justify="right")
    for batch_size, row in by_batch_size.items():
        if row.effects:
            pairs = sorted({effect.pairs for effect in row.effects.values()})
            table.add_row(
                f"{batch_size:,}",
                *(_effect_cell(effect) for effect in row.effects.values()),
                ", ".join(map(str, pairs)),
            )
    return table


def _effect_cell(effect: Effect) -> str:
    """An effect in a cell of a table."""
    estimate, low, high = effect_numbers(effect)
    numbers = f"{estimate}\n{low} to {high}"
    return numbers if effect.decided else f"{numbers}\nnot decided"


def _plain(content: Any) -> Any:
    """The content with plain numbers, and null for those that are not finite."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if hasattr(content, "item"):  # A scalar of NumPy.
        content = content.item()
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def _numbers(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(number(value) for value in values)


def _setup_from(fields: dict[str, Any]) -> Setup:
    sizes = tuple(fields["batch_sizes"])
    seconds = number(fields["seconds"])
    return Setup(**(fields | {"batch_sizes": sizes, "seconds": seconds}))


def _run_from(fields: dict[str, Any]) -> Run:
    metrics = {name: _numbers(values) for name, values in fields["metrics"].items()}
    converted = {
        "learning_rate": number(fields["learning_rate"]),
        "steps": tuple(fields["steps"]),
        "training_loss": _numbers(fields["training_loss"]),
        "metrics": metrics,
        "seconds": number(fields["seconds"]),
    }
    return Run(**(fields | converted))


def _tuning_from(fields: dict[str, Any]) -> Tuning:
    converted = {
        "candidates": tuple(
            (number(rate), number(outcome), bool(stable))
            for rate, outcome, stable in fields["candidates"]
        ),
        "picks": _numbers(fields["picks"]),
    } | {
        name: number(fields[name])
        for name in ("learning_rate", "largest_stable", "race_cost", "full_cost")
    }
    return Tuning(**(fields | converted))
