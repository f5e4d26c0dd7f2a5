"""Records: one directory per finished run, written once and read by everything else.

    runs/digits/m_svag/rate0.3_seed1_1f0c2a9b/
        config.json         what was asked for
        environment.json    device, versions and data it ran on, when, by which command
        evaluations.jsonl   one line per evaluation; null is a number that is not finite

A record appears under its name when it is complete, never before, so a directory that
exists is a finished run and is not run again. The name ends with a digest of
`config.json`: other settings are another record.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.locks import only_process
from experiments.problems.problem import Settings

DRAFT_PREFIX = ".draft-"  # So begin the names of records that are being written.


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What determines a run.

    Attributes:
      problem: Name of the test problem.
      network: Its network in a few words.
      optimizer: Name of the method.
      learning_rate: The tuned step size.
      seed: Seed of initial parameters, mini-batches and noise.
      settings: Steps, batch size, L2, evaluations.
    """

    problem: str
    network: str
    optimizer: str
    learning_rate: float
    seed: int
    settings: Settings


class EqualWithNan:
    """Equality and hash of a dataclass by its fields, with NaN equal to NaN.

    The `==` that dataclasses generate depends on the version of Python: before 3.13 it
    compares tuples, where NaN equals the same NaN object. For dataclasses with
    `eq=False`.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return _with_equal_nan(self) == _with_equal_nan(other)

    def __hash__(self) -> int:
        return hash((type(self), _with_equal_nan(self)))


def _with_equal_nan(instance: Any) -> tuple[Any, ...]:
    """The fields of a dataclass with a string for NaN, which equals itself."""
    values = (getattr(instance, field.name) for field in dataclasses.fields(instance))
    return tuple(
        "NaN" if isinstance(value, float) and math.isnan(value) else value
        for value in values
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement(EqualWithNan):
    """One line of `evaluations.jsonl`.

    A loss includes the L2 penalty, a cross-entropy does not. A value that was not
    finite, or of a validation set that there is not, is NaN here and null in the file.
    Seconds count from the group's beginning and hold for the whole group, compilation
    and evaluations included. Two measurements with NaN in the same places are equal.
    """

    step: int
    training_loss: float
    training_cross_entropy: float
    test_loss: float
    test_cross_entropy: float
    test_accuracy: float
    learning_rate: float
    seconds: float
    validation_loss: float = math.nan
    validation_accuracy: float = math.nan


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run."""

    config: RunConfig
    evaluations: tuple[Measurement, ...]
    environment: dict[str, Any]

    @property
    def diverged(self) -> bool:
        """Whether the run stopped because its loss was no longer finite."""
        return not math.isfinite(self.evaluations[-1].training_loss)


@dataclasses.dataclass(frozen=True)
class StudyRecord:
    """A finished study of the theory.

    Attributes:
      directory: Where it is.
      config: The settings.
      environment: What it ran on.
      results: The lines of `evaluations.jsonl`.
    """

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]]

    def select(self, **wanted: Any) -> list[dict[str, Any]]:
        """The results whose entries have these values, in their order."""
        return [
            result
            for result in self.results
            if all(result[key] == value for key, value in wanted.items())
        ]


# ---- To and from text -------------------------------------------------------------


def _finite(content: Any) -> Any:
    """The content with null for numbers that are not finite, which JSON lacks."""
    match content:
        case dict():
            return {key: _finite(value) for key, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
        case float() if not math.isfinite(content):
            return None
    return content


def measurement_to_json(measurement: Measurement) -> dict[str, float | None]:
    """The measurement as a JSON object."""
    return _finite(dataclasses.asdict(measurement))


def measurement_from_json(fields: dict[str, Any]) -> Measurement:
    """The inverse of `measurement_to_json`."""
    values: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in fields.items()
    }
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or null, got {value!r}")
    return Measurement(**values)


def config_to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as a JSON object."""
    return dataclasses.asdict(config)


def config_from_json(fields: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_json`."""
    return RunConfig(**{**fields, "settings": Settings(**fields["settings"])})


def record_to_json(record: Record) -> dict[str, Any]:
    """The record as one JSON object."""
    return {
        "config": config_to_json(record.config),
        "environment": record.environment,
        "evaluations": [measurement_to_json(line) for line in record.evaluations],
    }


def to_text(content: Any) -> str:
    """JSON that is pleasant to read; null is a number that is not finite."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def digest(content: Any) -> str:
    """Eight hexadecimal digits that change with what JSON makes of the content."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# ---- The directory of records -----------------------------------------------------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an error of the file system name the path, which a full disk does not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """A file with this text, whole or not at all, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        naming(path),
        tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file,
    ):
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def _write_whole(path: Path, text: str) -> None:
    """A file with this text, on the disk before this returns."""
    with naming(path), path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@dataclasses.dataclass(frozen=True)
class Store:
    """The directory that holds all records.

    Attributes:
      root: The directory; it need not exist yet.
    """

    root: Path

    def folder(self, problem: str, optimizer: str) -> Path:
        """Where everything about one method on one problem is."""
        return self.root / problem / optimizer

    def directory(self, config: RunConfig) -> Path:
        """Where the record of this run is, or would be."""
        return self.folder(config.problem, config.optimizer) / _name(config)

    def optimizers(self, problem: str) -> list[str]:
        """Names of the methods that have a record on this problem."""
        found = (self.root / problem).glob("*/rate*/config.json")
        return sorted({path.parent.parent.name for path in found})

    def check_data(self, problem: str, data: str) -> None:
        """Raises where runs on this problem were trained on other data.

        Args:
          problem: Name of the problem.
          data: What tells the data of today from others.

        Raises:
          UserError: There is such a run, finished or not.
        """
        for path, trained_on in self._trained_on(problem):
            if trained_on != data:
                raise UserError(
                    f"{path} was trained on other data ({trained_on}) than {problem} is"
                    f" now ({data}). Name the directory of its data by `--data-dir`, or"
                    " another directory for these runs by `--runs-dir`."
                )

    def _trained_on(self, problem: str) -> Iterator[tuple[Path, str]]:
        """Where a run is, finished or not, and what tells its data from others."""
        for pattern in ("*/rate*/environment.json", "*/unfinished/*/group.json"):
            for path in sorted((self.root / problem).glob(pattern)):
                # One that is damaged is named by who reads the rest of it.
                try:
                    data = json.loads(path.read_text())["data"]
                except (OSError, ValueError, KeyError, TypeError):
                    continue
                yield path.parent, data

    def find(self, config: RunConfig) -> Record | None:
        """The record of this run, if the run is finished."""
        directory = self.directory(config)
        return _read_record(directory) if directory.is_dir() else None

    def records(self, problem: str, optimizer: str, settings: Settings) -> list[Record]:
        """Every finished run of this method on this problem, in order of names."""
        folder = self.folder(problem, optimizer)
        found = [_read_record(path.parent) for path in folder.glob("rate*/config.json")]
        found.sort(key=lambda record: (record.config.learning_rate, record.config.seed))
        return [record for record in found if record.config.settings == settings]

    def write(self, record: Record) -> None:
        """Adds a finished run; does nothing when it is there already."""
        directory = self.directory(record.config)
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=directory.parent, prefix=DRAFT_PREFIX))
        draft.chmod(0o755)
        lines = [json.dumps(measurement_to_json(line)) for line in record.evaluations]
        _write_whole(draft / "config.json", to_text(config_to_json(record.config)))
        _write_whole(draft / "environment.json", to_text(record.environment))
        _write_whole(draft / "evaluations.jsonl", "\n".join(lines) + "\n")
        try:
            draft.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
            shutil.rmtree(draft)

    @contextlib.contextmanager
    def lock(
        self, problem: str, optimizer: str, say: Callable[[str], None]
    ) -> Iterator[None]:
        """Keeps other processes from running the same method on the same problem.

        Args:
          problem: Name of the problem.
          optimizer: Name of the method.
          say: Told, in a sentence, when another process holds the lock.
        """
        folder = self.folder(problem, optimizer)
        folder.mkdir(parents=True, exist_ok=True)
        news = f"Another process works in {folder}; waiting for it to finish."
        with only_process(folder / ".lock", say, news):
            # Of processes that were killed while they wrote.
            for draft in folder.glob(f"{DRAFT_PREFIX}*"):
                shutil.rmtree(draft, ignore_errors=True)
            yield


def _name(config: RunConfig) -> str:
    """Name of a record's directory."""
    identity = digest(config_to_json(config))
    return f"rate{config.learning_rate:g}_seed{config.seed}_{identity}"


def _read_record(directory: Path) -> Record:
    """The record in a directory."""
    try:
        config = json.loads((directory / "config.json").read_text())
        lines = (directory / "evaluations.jsonl").read_text().splitlines()
        record = Record(
            config=config_from_json(config),
            evaluations=tuple(
                measurement_from_json(json.loads(line)) for line in lines
            ),
            environment=json.loads((directory / "environment.json").read_text()),
        )
        _check_finished(record)
        if _name(record.config) != directory.name:
            raise ValueError("its config.json belongs to another directory")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"The record in {directory} cannot be read ({error}). Expected the three"
            " files of a finished run; remove the directory to run it again."
        ) from error
    return record


def _check_finished(record: Record) -> None:
    """Raises unless the run was evaluated when it should be, up to its end."""
    settings = record.config.settings
    steps = [line.step for line in record.evaluations]
    due = list(range(0, settings.steps + 1, settings.evaluation_interval))
    if not steps or steps != due[: len(steps)]:
        raise ValueError("its evaluations are not those of config.json")
    for line in record.evaluations:
        # A share of images is a number whatever became of the network.
        if not math.isfinite(line.test_accuracy):
            raise ValueError(f"it has no test accuracy after step {line.step}")
    if len(steps) < len(due) and not record.diverged:
        raise ValueError(f"it ends after step {steps[-1]} of {settings.steps}")
