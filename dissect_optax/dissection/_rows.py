"""Plain rows that training leaves behind, and everything else is computed from.

They hold numbers, strings and tuples of them only: no arrays, no functions.
"""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeGuard, TypeVar

Role = Literal["tuning", "replicate", "race"]
When = Literal["start", "middle", "end"]
Budget = Literal["full", "race"]

# The cells of Table 1 with momentum: {magnitude, sign} × {not adapted, adapted}.
CELLS = ("m_sgd", "m_ssd", "m_svag", "adam")


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished training run.

    Attributes:
      method: Name of the method.
      batch_size: Examples per mini-batch.
      seed: Seed of initial parameters, mini-batches and noise. Runs of two methods
        with the same seed and batch size share all three.
      learning_rate: Step size.
      role: "tuning", "replicate" at the tuned step size, or "race": fewer steps.
      steps: Steps at which the run was evaluated, in ascending order.
      training_loss: Mean loss plus regularizer at each of them.
      metrics: Further quantities by name, "test_loss" for example, one value per
        evaluation.
      diverged: Whether the run ended because its loss was no longer finite.
      seconds: Time the run took, or its share of the time of its group.

    Raises:
      ValueError: There is no evaluation, or not one value per evaluation.
    """

    method: str
    batch_size: int
    seed: int
    learning_rate: float
    role: Role
    steps: tuple[int, ...]
    training_loss: tuple[float, ...]
    metrics: Mapping[str, tuple[float, ...]]
    diverged: bool
    seconds: float

    def __post_init__(self) -> None:
        columns = {"training_loss": self.training_loss, **self.metrics}
        lengths = {name: len(values) for name, values in columns.items()}
        if not self.steps or set(lengths.values()) != {len(self.steps)}:
            raise ValueError(
                "A run needs at least one evaluation and one value per evaluation;"
                f" got {len(self.steps)} steps and {lengths}."
            )

    def to_records(self) -> list[dict[str, Any]]:
        """One flat dictionary per evaluation, for a table."""
        fixed = {
            name: getattr(self, name)
            for name in ("method", "batch_size", "seed", "learning_rate", "role")
        }
        return [
            fixed
            | {"diverged": self.diverged, "step": step}
            | {"training_loss": self.training_loss[index]}
            | {name: values[index] for name, values in self.metrics.items()}
            for index, step in enumerate(self.steps)
        ]


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Choice of the step size of one method at one batch size.

    Attributes:
      method: Name of the method.
      batch_size: Examples per mini-batch.
      learning_rate: Step size that won; NaN where none was stable.
      largest_stable: Largest stable step size; NaN where none was stable.
      candidates: Step size, mean outcome over the tuning seeds and whether it is
        stable, by ascending step size.
      picks: Step size that each tuning seed would pick alone.
      at_edge: Whether the winner is the smallest or the largest candidate.
      race_cost: Training spent on the race, in units of one full training run.
      full_cost: Training spent on the full runs that followed it, in the same units;
        zero where there was a race alone.
      limit_seen: Whether a step size above `largest_stable` was tried that is not
        stable.
    """

    method: str
    batch_size: int
    learning_rate: float
    largest_stable: float
    candidates: tuple[tuple[float, float, bool], ...]
    picks: tuple[float, ...]
    at_edge: bool
    race_cost: float
    full_cost: float
    limit_seen: bool = True

    @property
    def cost(self) -> float:
        """Training spent on the choice, in units of one full training run."""
        return self.race_cost + self.full_cost

    def to_records(self) -> list[dict[str, Any]]:
        """One flat dictionary per candidate, for a table."""
        return [
            {
                "method": self.method,
                "batch_size": self.batch_size,
                "learning_rate": rate,
                "outcome": outcome,
                "stable": stable,
                "picked": rate == self.learning_rate,
                "picked_by": self.picks.count(rate),
            }
            for rate, outcome, stable in self.candidates
        ]


@dataclasses.dataclass(frozen=True)
class MeasurementRow:
    """Diagnostics at one point of one training run.

    Attributes:
      method: Name of the method whose parameters were measured.
      batch_size: Examples per mini-batch.
      when: "start", "middle" or "end" of training.
      step: Number of steps before the measurement.
      diagnostics: `Diagnostics.to_dict()`: nested plain numbers; an interval is a
        dictionary with "value", "low" and "high". "warnings", if there, is a list of
        dictionaries with "name" and "text".
    """

    method: str
    batch_size: int
    when: When
    step: int
    diagnostics: Mapping[str, Any]

    def to_records(self) -> list[dict[str, Any]]:
        """One flat dictionary, for a table; nested names are joined by dots."""
        fixed = {
            name: getattr(self, name)
            for name in ("method", "batch_size", "when", "step")
        }
        return [fixed | dict(_flat(self.diagnostics))]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of nested dictionaries with their dotted names."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            # Diagnostics write numbers that are not finite as text, for JSON.
            text = isinstance(value, str) and value in ("inf", "-inf", "nan")
            found.append((f"{prefix}{name}", float(value) if text else value))
    return found


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that was the same for all runs.

    Attributes:
      title: Title of the problem.
      steps: Steps of a full training run.
      batch_sizes: Batch sizes, in ascending order.
      seeds: Number of replicates per method and batch size.
      methods: Label by name. `m_sgd`, `m_ssd`, `m_svag` and `adam` are the cells of
        Table 1; all others are compared against `adam`.
      decays: Decay rates by name.
      schedule: Schedule of the step size in words.
      regularizer: Whether the training loss includes a regularizer.
      examples: Number of training examples.
      parameters: Number of parameters.
      data: Fingerprint of the data.
      environment: Versions and devices.
      seconds: Time everything took together.
      budget: "full", or "race" where only the race was run.
      race_steps: Steps of the race; None where there was no race.
    """

    title: str
    steps: int
    batch_sizes: tuple[int, ...]
    seeds: int
    methods: Mapping[str, str]
    decays: Mapping[str, Any]
    schedule: str
    regularizer: bool
    examples: int
    parameters: int
    data: str
    environment: Mapping[str, Any]
    seconds: float
    budget: Budget = "full"
    race_steps: int | None = None


class _Row(Protocol):
    def to_records(self) -> list[dict[str, Any]]: ...


RowT = TypeVar("RowT", bound=_Row)


class Rows(tuple[RowT, ...]):
    """A tuple of rows that becomes a pandas table on request.

    Examples:
      >>> tuning = Tuning(
      ...     "adam", 8, 0.1, 0.3, ((0.1, -1.0, True),), (0.1,), True, 1.0, 2.0
      ... )
      >>> rows = Rows([tuning])
      >>> rows[0].method, len(rows)
      ('adam', 1)
    """

    __slots__ = ()

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`: one line per evaluation or candidate.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            # By name, since pandas is optional and nothing here is typed by it.
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError(
                "to_pandas() needs pandas, which is not installed. Run `pip install"
                " pandas`, or use the rows themselves: they are plain dataclasses."
            ) from error
        return pandas.DataFrame([line for row in self for line in row.to_records()])


def is_interval(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether an entry of the diagnostics is an interval.

    Examples:
      >>> is_interval({"value": 1.0, "low": 0.5, "high": 2.0}), is_interval(1.0)
      (True, False)
    """
    return isinstance(value, Mapping) and {"value", "low", "high"} <= value.keys()


def number(value: float | str | None) -> float:
    """The number that JSON holds: null or text where it was not finite.

    Examples:
      >>> number(0.5), number("-inf"), number(None)
      (0.5, -inf, nan)
    """
    return math.nan if value is None else float(value)
