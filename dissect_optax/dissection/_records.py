"""Records: one file per finished run, written once and read by everything else.

    runs/digits/m_svag/rate0.3_seed1_1f0c2a9b.json

It holds what determines the run (`config`), the device, versions and data that it ran
on (`environment`), one line per evaluation, and a digest of it all. The file appears
under its name when it is complete, never before, so a file that exists is a finished
run and is not run again. The name ends with a digest of the configuration: other
settings are another record. Null stands for a number that is not finite.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dissect_optax.dissection import _processes as processes
from dissect_optax.dissection._errors import UserError
from dissect_optax.dissection._locks import only_process
from dissect_optax.dissection._problem import Settings

_LARGEST_SEED = 2**32 - 1
# A record of a thousand evaluations has some hundred kilobytes.
_LARGEST_FILE = 100_000_000
# Whatever may be wrong with a file that somebody else wrote.
DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)


def numerics() -> dict[str, Any]:
    """Settings of JAX that change the numbers of a run."""
    config: Any = jax.config
    return {
        "x64": bool(config.jax_enable_x64),
        "matmul_precision": config.jax_default_matmul_precision,
    }


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run.

    Attributes:
      problem: Name of the problem.
      optimizer: Name of the method.
      learning_rate: The tuned step size.
      seed: Seed of initial parameters, mini-batches and noise.
      settings: Steps, batch size, evaluations.
      description: What else makes the problem this one, such as its network; kept as
        JSON says it, with lists for tuples.
      numerics: Settings of JAX that change numbers.

    Raises:
      ValueError: A name cannot be part of a path, or a number is out of range.
      TypeError: An entry has another type.
    """

    problem: str
    optimizer: str
    learning_rate: float
    seed: int
    settings: Settings
    description: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    numerics: Mapping[str, Any] = dataclasses.field(
        default_factory=numerics, hash=False
    )

    def __post_init__(self) -> None:
        for field, name in (("problem", self.problem), ("optimizer", self.optimizer)):
            if not re.fullmatch(r"\w[\w.:\-]{0,150}", name):
                raise ValueError(
                    f"The name of the {field} must consist of letters, digits, '_',"
                    f" '-', ':' and '.', got {name!r}."
                )
        if not isinstance(self.learning_rate, float) or type(self.seed) is not int:
            raise TypeError(
                "Expected a number as `learning_rate` and an integer as `seed`, got"
                f" {self.learning_rate!r} and {self.seed!r}."
            )
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(
                f"`learning_rate` must be positive, got {self.learning_rate}."
            )
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise ValueError(
                f"`seed` must lie in [0, {_LARGEST_SEED}], got {self.seed}."
            )
        for field in ("description", "numerics"):
            # A run that is read from a file must equal the one that was written.
            object.__setattr__(self, field, json_object(field, getattr(self, field)))


def json_object(name: str, content: Any) -> dict[str, Any]:
    """The content as a file would give it back.

    Args:
      name: What it is, for the error.
      content: A mapping.

    Returns:
      The same as a JSON object: keys are text, tuples are lists, and None stands for a
      number that is not finite.

    Raises:
      TypeError: It is not a mapping, or holds what JSON does not have.
    """
    if not isinstance(content, Mapping):
        raise TypeError(f"`{name}` must be a mapping, got {content!r}.")
    try:
        return json.loads(json.dumps(_finite(dict(content)), allow_nan=False))
    except TypeError as error:
        raise TypeError(f"`{name}` must be JSON: {error}.") from error


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
        return hash((type(self), str(_with_equal_nan(self))))


def _with_equal_nan(content: Any) -> Any:
    """The content with a string for NaN, which equals itself."""
    if dataclasses.is_dataclass(content):
        return [
            _with_equal_nan(getattr(content, field.name))
            for field in dataclasses.fields(content)
        ]
    if isinstance(content, Mapping):
        return {key: _with_equal_nan(value) for key, value in content.items()}
    return "NaN" if isinstance(content, float) and math.isnan(content) else content


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement(EqualWithNan):
    """One evaluation of a run. Two with NaN in the same places are equal.

    Attributes:
      step: Number of steps taken.
      seconds: Time since the group began, compilation and evaluations included.
      values: By name (`training_loss`, `test_data_loss`, `test_accuracy`), see
        `evaluate`; NaN for a value that was not finite.
    """

    step: int
    seconds: float
    values: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        return self.values[name]


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
      config: What determines it.
      evaluations: Its measurements, by ascending step.
      environment: Device, versions, data, date and command.
      diagnostics: Measurements of its gradients, by step, where they were asked for.
    """

    config: RunConfig
    evaluations: tuple[Measurement, ...]
    environment: dict[str, Any]
    diagnostics: Mapping[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether the run stopped because its loss was no longer finite."""
        return not math.isfinite(self.evaluations[-1]["training_loss"])

    def curve(self, name: str) -> list[float]:
        """The values of this name, by evaluation."""
        return [line[name] for line in self.evaluations]


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
    content = {
        "step": measurement.step,
        **measurement.values,
        "seconds": measurement.seconds,
    }
    return _finite(content)


def measurement_from_json(content: dict[str, Any]) -> Measurement:
    """The inverse of `measurement_to_json`."""
    values: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in content.items()
    }
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number or null, got {value!r}")
    step, seconds = values.pop("step"), float(values.pop("seconds"))
    if not isinstance(step, int):
        raise TypeError(f"step must be an integer, got {step!r}")
    return Measurement(step, seconds, {name: float(values[name]) for name in values})


def config_to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as a JSON object."""
    return dataclasses.asdict(config)


def config_from_json(content: dict[str, Any]) -> RunConfig:
    """The inverse of `config_to_json`."""
    return RunConfig(**{**content, "settings": Settings(**content["settings"])})


def record_to_json(record: Record) -> dict[str, Any]:
    """The record as one JSON object."""
    return _finite(
        {
            "config": config_to_json(record.config),
            "environment": record.environment,
            "evaluations": [measurement_to_json(line) for line in record.evaluations],
            "diagnostics": {
                str(step): values for step, values in record.diagnostics.items()
            },
        }
    )


def record_from_json(content: dict[str, Any]) -> Record:
    """The inverse of `record_to_json`."""
    return Record(
        config=config_from_json(content["config"]),
        evaluations=tuple(map(measurement_from_json, content["evaluations"])),
        environment=dict(content["environment"]),
        diagnostics={
            int(step): values for step, values in content["diagnostics"].items()
        },
    )


def to_text(content: Any) -> str:
    """JSON that is pleasant to read; null is a number that is not finite."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def digest(content: Any) -> str:
    """Eight hexadecimal digits that change with the content's JSON."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_checked(path: Path) -> Any:
    """The content of a file that `write_checked` wrote.

    Raises:
      OSError: It cannot be read.
      ValueError: It is not the file that was written.
    """
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError("it is too large")
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
        expected = content.pop("digest", None)
        if digest(content) != expected:
            raise ValueError("its content does not match its digest")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def write_checked(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object with a digest of it, whole or not at all."""
    content = _finite(content)
    write_atomically(path, _one_line_per_entry(content | {"digest": digest(content)}))


def _one_line_per_entry(content: Mapping[str, Any]) -> str:
    """JSON with a line per entry, and per element of a list."""
    entries = []
    for name, value in content.items():
        text = json.dumps(value, allow_nan=False)
        if isinstance(value, list):
            lines = ",\n  ".join(json.dumps(item, allow_nan=False) for item in value)
            text = f"[\n  {lines}\n ]"
        entries.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


# ---- The directory of records -----------------------------------------------------


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an error of the file system; a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomically(path: Path, text: str) -> None:
    """A file with this text, whole or not at all, also when the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft: Path | None = None
    try:
        with (
            naming(path),
            tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=f".{path.name}.", delete=False
            ) as file,
        ):
            draft = Path(file.name)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.chmod(0o644)
        draft.replace(path)
    except BaseException:
        if draft is not None:
            draft.unlink(missing_ok=True)
        raise


def _name(config: RunConfig) -> str:
    """Name of a record's file."""
    identity = digest(config_to_json(config))
    return f"rate{config.learning_rate:g}_seed{config.seed}_{identity}.json"


def _check_finished(record: Record) -> None:
    """Raises unless the run was evaluated when it should be, up to its end."""
    settings = record.config.settings
    steps = [line.step for line in record.evaluations]
    due = range(0, settings.steps + 1, settings.evaluation_interval)
    if not steps or len(steps) > len(due) or steps != list(due[: len(steps)]):
        raise ValueError("its evaluations are not those of its configuration")
    names = record.evaluations[0].values.keys()
    if "training_loss" not in names or any(
        line.values.keys() != names for line in record.evaluations
    ):
        raise ValueError("its evaluations do not hold the same quantities")
    if len(steps) < len(due) and not record.diverged:
        raise ValueError(f"it ends after step {steps[-1]} of {settings.steps}")


def _read_record(path: Path) -> Record:
    """The record in a file."""
    try:
        record = record_from_json(read_checked(path))
        _check_finished(record)
        if _name(record.config) != path.name:
            raise ValueError("its configuration belongs to another file")
    except DAMAGE as error:
        raise UserError(
            f"The record {path} cannot be read ({error}). Expected the file of a"
            " finished run; remove it to run it again."
        ) from error
    return record


class Store:
    """Finished runs, in a directory or in memory.

    Of several processes that train together, process 0 reads and writes the directory
    for all of them, and every one must call the same methods.

    Args:
      root: The directory; it need not exist yet. With None, records are kept in memory
        and nothing is written.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._in_memory: dict[str, Record] = {}
        # By file, with its size and time of change: what `check_data` has read.
        self._data_of: dict[Path, tuple[int, int, str]] = {}

    @property
    def in_memory(self) -> bool:
        """Whether nothing is written."""
        return self._root is None

    @property
    def root(self) -> Path:
        """The directory."""
        if self._root is None:
            raise ValueError("Records in memory have no directory.")
        return self._root

    def folder(self, problem: str, optimizer: str) -> Path:
        """Directory of everything about one method on one problem."""
        return self.root / problem / optimizer

    def path(self, config: RunConfig) -> Path:
        """File of the record of this run, which need not exist."""
        return self.folder(config.problem, config.optimizer) / _name(config)

    def optimizers(self, problem: str) -> list[str]:
        """Names of the methods that have a record on this problem."""
        if self.in_memory:
            configs = (record.config for record in self._in_memory.values())
            return sorted({c.optimizer for c in configs if c.problem == problem})
        found = processes.from_primary(
            lambda: list((self.root / problem).glob("*/rate*.json"))
        )
        return sorted({path.parent.name for path in found})

    def everything(self) -> Iterator[Record]:
        """Every finished run, by problem, method, step size and seed.

        Raises:
          UserError: A record is damaged.
        """
        if self.in_memory:
            found = list(self._in_memory.values())
        else:
            found = [_read_record(path) for path in self.root.glob("*/*/rate*.json")]
        found.sort(
            key=lambda record: (
                record.config.problem,
                record.config.optimizer,
                record.config.settings.steps,
                record.config.learning_rate,
                record.config.seed,
            )
        )
        yield from found

    def check_data(self, problem: str, data: str) -> None:
        """Raises where runs on this problem were trained on other data.

        Args:
          problem: Name of the problem.
          data: Fingerprint of today's data.

        Raises:
          UserError: There is such a run, finished or not.
        """
        if not self.in_memory:
            processes.from_primary(lambda: self._check_data(problem, data))

    def _check_data(self, problem: str, data: str) -> None:
        """The same, in one process."""
        for path, trained_on in self._trained_on(problem):
            if trained_on != data:
                raise UserError(
                    f"{path} was trained on other data ({trained_on}) than {problem} is"
                    f" now ({data}). Name the directory of its data, or another"
                    " directory for these runs."
                )

    def _trained_on(self, problem: str) -> Iterator[tuple[Path, str]]:
        """Where a run is, finished or not, and the fingerprint of its data."""
        for pattern in ("*/rate*.json", "*/unfinished/*/group.json"):
            for path in sorted((self.root / problem).glob(pattern)):
                # A damaged one is reported by the reader of the rest of it.
                with contextlib.suppress(*DAMAGE):
                    status = path.stat()
                    state = (status.st_size, status.st_mtime_ns)
                    # Each group asks, and there may be thousands of files.
                    if self._data_of.get(path, ())[:2] != state:
                        content = read_checked(path)
                        environment = content.get("environment", content)
                        self._data_of[path] = (*state, environment["data"])
                    yield path, self._data_of[path][2]

    def find(self, config: RunConfig) -> Record | None:
        """The record of this run, if the run is finished."""
        (record,) = self.find_all([config])
        return record

    def find_all(self, configs: Sequence[RunConfig]) -> list[Record | None]:
        """The records of these runs, None for those that are not finished."""
        if self.in_memory:
            return [self._in_memory.get(_name_in_memory(c)) for c in configs]
        paths = [self.path(config) for config in configs]
        return processes.from_primary(
            lambda: [_read_record(path) if path.exists() else None for path in paths]
        )

    def records(
        self,
        problem: str,
        optimizer: str,
        settings: Settings,
        description: Mapping[str, Any] | None = None,
    ) -> list[Record]:
        """Every finished run of this method with these settings and today's numerics.

        Args:
          problem: Name of the problem.
          optimizer: Name of the method.
          settings: Steps, batch size, evaluations.
          description: What else the runs have in common; None for any description.

        Returns:
          The records, by step size and seed.
        """
        if self.in_memory:
            found = list(self._in_memory.values())
        else:
            folder = self.folder(problem, optimizer)
            found = processes.from_primary(
                lambda: [_read_record(path) for path in folder.glob("rate*.json")]
            )
        found.sort(key=lambda record: (record.config.learning_rate, record.config.seed))
        wanted = {
            "problem": problem,
            "optimizer": optimizer,
            "settings": settings,
            "numerics": numerics(),
        }
        if description is not None:
            # As records keep it.
            wanted["description"] = json_object("description", description)
        return [
            record
            for record in found
            if all(getattr(record.config, key) == wanted[key] for key in wanted)
        ]

    def write(self, record: Record) -> None:
        """Adds a finished run; does nothing if it exists."""
        if self.in_memory:
            self._in_memory.setdefault(_name_in_memory(record.config), record)
            return
        path = self.path(record.config)

        def write_once() -> None:
            if not path.exists():
                write_checked(path, record_to_json(record))

        processes.from_primary(write_once)

    @contextlib.contextmanager
    def lock(
        self, problem: str, optimizer: str, say: Callable[[str], None]
    ) -> Iterator[None]:
        """Keeps other processes from running the same method on the same problem.

        Args:
          problem: Name of the problem.
          optimizer: Name of the method.
          say: Called with a sentence if another process holds the lock.
        """
        if self.in_memory:
            yield
            return
        folder = self.folder(problem, optimizer)
        notice = f"Another process works in {folder}; waiting for it to finish."
        with contextlib.ExitStack() as stack:

            def enter() -> None:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(only_process(folder / ".lock", say, notice))
                # Of processes that were killed while they wrote.
                for draft in folder.glob(".rate*.json.*"):
                    draft.unlink(missing_ok=True)

            processes.from_primary(enter)
            yield


def _name_in_memory(config: RunConfig) -> str:
    """Key of a record in memory."""
    return f"{config.problem}/{config.optimizer}/{_name(config)}"
