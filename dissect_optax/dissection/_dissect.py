"""`dissect`: Table 1 on a user's problem, from races to a result."""

import dataclasses
import math
import operator
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from dissect_optax import diagnostics
from dissect_optax.dissection import _processes as processes
from dissect_optax.dissection._data import number_of_examples
from dissect_optax.dissection._effects import clip_losses
from dissect_optax.dissection._environment import environment
from dissect_optax.dissection._errors import UserError, first_line
from dissect_optax.dissection._meshes import check_batch, make_mesh
from dissect_optax.dissection._methods import (
    FOUR_METHODS,
    Method,
    get_method,
    method_from,
)
from dissect_optax.dissection._problem import Problem, Settings
from dissect_optax.dissection._progress import Monitor, SilentMonitor
from dissect_optax.dissection._racing import (
    Raced,
    race,
    race_settings,
    tune_by_race,
)
from dissect_optax.dissection._records import Record, Store
from dissect_optax.dissection._result import Dissection
from dissect_optax.dissection._rows import (
    Budget,
    MeasurementRow,
    Role,
    Run,
    Setup,
    Tuning,
    When,
)
from dissect_optax.dissection._running import Diagnosis, Job, diagnosed_steps
from dissect_optax.dissection._tuning import (
    FIRST_REPLICATION_SEED,
    NoStableStepSize,
    Protocol,
    Tuned,
    replicate,
    step_size,
    steps_taken,
    tuning_records,
)
from dissect_optax.dissection._user_problem import user_problem
from dissect_optax.dissection._warnings import DissectionWarning

PyTree = Any
Level = Literal["cheap", "normal", "full"]

# Far from the seeds of the replications, which count from 1.
_FIRST_TUNING_SEED = 1_000_000
_FEWEST_TUNING_SEEDS = 3
# Wanted evaluations of a run, and how many there may be at most.
_EVALUATIONS, _MOST_EVALUATIONS = 20, 50
# Neither in the loss that is measured nor learned: values that are kept in records
# without a progress bar of their own.
_DECAYS = {"momentum": 0.9, "b1": 0.9, "b2": 0.999}


def dissect(
    loss: Callable[..., Any],
    init: Callable[[jax.Array], PyTree] | PyTree,
    data: PyTree,
    test: PyTree = None,
    batch_size: int | Sequence[int] = 32,
    steps: int = 1000,
    seeds: int = 5,
    methods: Sequence[str] = FOUR_METHODS,
    extra: Mapping[str, Any] | None = None,
    metrics: Callable[[PyTree, PyTree], Mapping[str, Any]] | None = None,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
    batched: bool = False,
    directory: str | Path | None = None,
    *,
    schedule: Callable[[Any], optax.ScalarOrSchedule] | None = None,
    budget: Budget = "full",
    evaluation_interval: int | None = None,
    level: Level | None = "cheap",
    title: str = "",
    progress: bool = True,
    mesh: Mapping[str, int] | Mesh | None = None,
) -> Dissection:
    """Trains a problem with the four methods of Table 1, and compares what matters.

    Adam steps along the sign of a momentum and scales each element by an estimate of
    its relative variance. The four methods M-SGD, M-SSD, M-SVAG and ADAM have both
    aspects, one of them, or none. Each gets its step size by the same protocol: a race
    of a tenth of the steps, at least ten, over the grid 1, 3, 6 · 10^m, from the
    largest stable step size down over at least two decades (§A.2), then full runs
    around the best of it.
    Replications with equal seeds share initial parameters and mini-batches; from their
    differences follow the effect of the sign, of the variance adaptation, and their
    interaction, in units of the log loss, with 95 % intervals.

    Nothing is claimed beyond the given steps, batch sizes and schedule.

    Args:
      loss: `loss(params, example)` or `loss(params, example, key)`, the loss of one
        example; for a language model, the example is the sequence. `batched=True` for
        a mean over a batch. Outcomes are logarithms of its mean: add a constant to a
        loss that may be negative.
      init: From a random key to parameters, any tree of floating-point arrays; or the
        parameters, and then seeds differ in their mini-batches only.
      data: Training examples, a tree of arrays `[examples, ...]`.
      test: Test examples of the same kind, for the metrics and the test loss.
      batch_size: One or several batch sizes.
      steps: Optimizer steps of a full run.
      seeds: Replications of every method at its step size.
      methods: Some of the four, or other methods by name (`adam_star_mb`).
      extra: Further methods to compare with ADAM: a function from a learning rate to
        an optimizer by name, `{"muon": optax.contrib.muon}`.
      metrics: `metrics(params, example)`, a dictionary of scalars, averaged over the
        training and the test examples.
      regularizer: Function of the parameters that is added to the mean loss. It moves
        gradients, not their variance.
      batched: Whether `loss` and `metrics` take a batch `[batch, ...]` and return means
        over it.
      directory: Where runs are kept, so that the same call goes on after it was
        stopped. Runs are found again only while loss, data, initialisation and
        settings are the same. Without one, they are kept in memory.
      schedule: From a step size to an Optax schedule over `steps`, such as `lambda
        size: optax.cosine_decay_schedule(size, 1000)`. None for a constant one.
      budget: "race" trains the race only, and forecasts the rest.
      evaluation_interval: Steps between two evaluations; must divide `steps`. None
        for about twenty evaluations.
      level: What `diagnostics.measure` measures at the start, the middle and the end
        of one replication of ADAM; None for nothing. Nothing is measured at batch size
        1, or above the number of examples.
      title: Title of the report.
      progress: Whether to show progress on standard error.
      mesh: Devices to train on: sizes of the axes `replica`, over which the runs of a
        group are divided, and `data`, over which the examples of a mini-batch are,
        such as `{"replica": 4, "data": 2}`; or a `jax.sharding.Mesh` with these axes.
        None for all devices, on `replica` for a group and on `data` for one run.
        Results are those of one device to rounding.

    Returns:
      The result: effects, verdict, warnings, runs and reports.

    Raises:
      UserError: An argument is not what it should be, a `ValueError`.
      OSError: The directory cannot be written; finished runs are intact.

    Edge cases:
      - A method diverges at every step size: it is left out, and a warning says so.
      - One seed: intervals are unbounded, and nothing is decided.
      - Two processes on one directory: one waits for the other, method by method.

    Examples:
      >>> import jax, jax.numpy as jnp, dissect_optax as do
      >>> def loss(w, example):
      ...     x, y = example
      ...     return jnp.square(x @ w - y)
      >>> x = jax.random.normal(jax.random.key(0), (64, 4))
      >>> y = x @ jnp.array([1.0, -1.0, 2.0, 0.5])
      >>> init = lambda key: jax.random.normal(key, (4,))
      >>> result = do.dissect(
      ...     loss, init, (x, y), batch_size=8, steps=20, seeds=2,
      ...     methods=("m_sgd", "adam"), level=None, progress=False,
      ... )
      >>> result.comparisons[8]["adam − m_sgd"].effect.pairs
      2

    References:
      Balles & Hennig, Dissecting Adam, Table 1, §4 and §A.2.
    """
    batch_sizes = _checked_batch_sizes(batch_size)
    steps, seeds = _count("steps", steps), _count("seeds", seeds)
    if budget not in ("full", "race"):
        raise UserError(f"`budget` must be 'full' or 'race', got {budget!r}.")
    if level not in ("cheap", "normal", "full", None):
        raise UserError(
            f"`level` must be 'cheap', 'normal', 'full' or None, got {level!r}."
        )
    chosen = _checked_methods(methods, extra)
    if evaluation_interval is None:
        evaluation_interval = evaluation_interval_of(steps)
    interval = _count("evaluation_interval", evaluation_interval)
    try:
        settings = Settings(steps, batch_sizes[0], interval)
    except ValueError as error:
        raise UserError(str(error)) from error
    processes.from_primary(lambda: _check_directory(directory))
    devices = None if mesh is None else make_mesh(mesh)
    if devices is not None:
        for size in batch_sizes:
            check_batch(devices, size)
    problem, warnings = user_problem(
        loss,
        init,
        data,
        test,
        settings,
        metrics=metrics,
        regularizer=regularizer,
        schedule=schedule,
        batched=batched,
        title=title,
    )
    for method in chosen:
        _check_updates(problem, method)
    return dissect_problem(
        problem,
        chosen,
        batch_sizes,
        seeds=seeds,
        budget=budget,
        level=level,
        directory=directory,
        schedule="constant" if schedule is None else "given by `schedule`",
        monitor=Monitor() if progress and processes.is_primary() else SilentMonitor(),
        warnings=warnings,
        mesh=devices,
    )


def dissect_problem(
    problem: Problem,
    methods: Sequence[Method],
    batch_sizes: Sequence[int],
    *,
    seeds: int = 5,
    budget: Budget = "full",
    level: Level | None = "cheap",
    directory: str | Path | None = None,
    data_dir: Path | None = None,
    schedule: str = "constant",
    monitor: Monitor | None = None,
    warnings: Sequence[DissectionWarning] = (),
    mesh: Mesh | None = None,
) -> Dissection:
    """`dissect` for a `Problem`, with the length of its settings.

    Args:
      problem: The problem.
      methods: The methods.
      batch_sizes: Batch sizes that replace the one of its settings.
      seeds: Replications of every method at its step size.
      budget: "full" or "race".
      level: What to measure during training; None for nothing.
      directory: Where runs are kept; None to keep them in memory.
      data_dir: Directory of the problem's data; None for the usual place.
      schedule: Schedule of the step size in words.
      monitor: Where progress is shown.
      warnings: Warnings about the problem, for the result.
      mesh: Devices of the runs, see `Job`.

    Returns:
      The result.
    """
    started = time.perf_counter()
    store = Store(None if directory is None else Path(directory).expanduser())
    monitor = monitor or Monitor()
    for warning in warnings:
        monitor.say(str(warning))
    found = _Rows()
    try:
        for size in batch_sizes:
            settings = dataclasses.replace(problem.settings, batch_size=size)
            job = Job(problem, settings, store, monitor, data_dir, mesh=mesh)
            for method in methods:
                _dissect_method(job, method, seeds, budget, level, found)
    except OSError as error:
        if directory is not None:
            error.add_note(
                f"The runs that are finished are kept in {directory}; the same call"
                " goes on from them once files can be written there again."
            )
        raise
    data = job.data
    params = jax.eval_shape(problem.init, jax.random.key(0))
    short = race_settings(problem.settings)
    setup = Setup(
        title=problem.title,
        steps=problem.settings.steps,
        batch_sizes=tuple(batch_sizes),
        seeds=seeds,
        methods={method.name: method.label for method in methods},
        decays=_DECAYS,
        schedule=schedule,
        regularizer=problem.regularizer is not None,
        examples=number_of_examples(data.training),
        parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        data=job.fingerprint,
        environment=environment(),
        seconds=time.perf_counter() - started,
        budget=budget,
        race_steps=short.steps,
    )
    return Dissection(setup, found.runs, found.tunings, found.measurements, warnings)


# ---- One method at one batch size -------------------------------------------------


@dataclasses.dataclass
class _Rows:
    """The rows that are collected."""

    runs: list[Run] = dataclasses.field(default_factory=list)
    tunings: list[Tuning] = dataclasses.field(default_factory=list)
    measurements: list[MeasurementRow] = dataclasses.field(default_factory=list)


def mean_log_loss(record: Record) -> float:
    """Mean over all evaluations of the log training loss, clipped."""
    return float(np.mean(np.log(clip_losses(record.curve("training_loss"))[0])))


def _merit(record: Record) -> tuple[float, ...]:
    """The smaller the area under the log loss, the better."""
    return (-mean_log_loss(record),)


def _dissect_method(
    job: Job,
    method: Method,
    seeds: int,
    budget: Budget,
    level: Level | None,
    found: _Rows,
) -> None:
    """Races, tunes and replicates one method; adds its rows."""
    count = max(_FEWEST_TUNING_SEEDS, seeds if budget == "race" else 0)
    tuning_seeds = tuple(range(_FIRST_TUNING_SEED, _FIRST_TUNING_SEED + count))
    # The loss that counts is the one that is minimised. A network that died has a bad
    # one, and needs no other criterion.
    protocol = Protocol(
        job.settings,
        _merit,
        tuning_seeds,
        stable_below=1.0,
        stable_loss="training_loss",
        bounded_by_best=True,
    )
    try:
        if budget == "race":
            raced = race(job, protocol, method)
            found.runs += _rows_of_runs(raced.runs, "race")
            found.tunings.append(_tuning_of_race(job, protocol, method, raced))
            return
        tuned = tune_by_race(job, protocol, method)
    except NoStableStepSize:
        found.tunings.append(_tuning_of_nothing(job, protocol, method))
        return
    # One step is no race.
    if race_settings(job.settings) != job.settings:
        found.runs += _rows_of_runs(tuned.race, "race")
    for records in tuned.full.values():
        found.runs += _rows_of_runs(records, "tuning")
    found.tunings.append(_tuning_of(job, protocol, method, tuned))
    examples = number_of_examples(job.data.training)
    # One example has no variance, and mini-batches to measure on are disjoint.
    measurable = 2 <= job.settings.batch_size <= examples
    if level is not None and method.name == "adam" and measurable:
        job = dataclasses.replace(job, diagnosis=_diagnosis(job, level))
    records = replicate(job, method, tuned.learning_rate, seeds)
    found.runs += _rows_of_runs(records, "replicate")
    found.measurements += _rows_of_measurements(job, method, records)


def _diagnosis(job: Job, level: Level) -> Diagnosis:
    """Diagnostics of the first replication."""

    def loss(params: PyTree, example: PyTree, key: jax.Array) -> jax.Array:
        shown = example
        if job.problem.augment is not None:
            key, augmentation_key = jax.random.split(key)
            shown = job.problem.augment(example, augmentation_key)
        return job.problem.loss(params, shown, key)

    def measure(params: PyTree) -> Mapping[str, Any]:
        return diagnostics.measure(
            loss,
            params,
            job.data.training,
            batch_size=job.settings.batch_size,
            level=level,
            regularizer=job.problem.regularizer,
        ).to_dict()

    return Diagnosis(FIRST_REPLICATION_SEED, measure)


# ---- Rows -------------------------------------------------------------------------


def _rows_of_runs(records: Iterable[Record], role: Role) -> list[Run]:
    """Plain rows of some records."""
    return [_row_of_run(record, role) for record in records]


def _row_of_run(record: Record, role: Role) -> Run:
    """The plain row of a record."""
    names = record.evaluations[0].values.keys() - {"training_loss", "learning_rate"}
    return Run(
        method=record.config.optimizer,
        batch_size=record.config.settings.batch_size,
        seed=record.config.seed,
        learning_rate=record.config.learning_rate,
        role=role,
        steps=tuple(line.step for line in record.evaluations),
        training_loss=tuple(record.curve("training_loss")),
        metrics={name: tuple(record.curve(name)) for name in sorted(names)},
        diverged=record.diverged,
        seconds=record.evaluations[-1].seconds,
    )


def _picks(
    protocol: Protocol, by_rate: Mapping[float, Sequence[Record]]
) -> tuple[float, ...]:
    """The step size that each tuning seed would pick alone."""
    picks = []
    for index in range(len(protocol.seeds)):
        outcomes = {
            rate: mean_log_loss(records[index])
            for rate, records in by_rate.items()
            if all(map(protocol.is_stable, records))
        }
        if outcomes:
            picks.append(min(outcomes, key=lambda rate: outcomes[rate]))
    return tuple(picks)


def _candidates(
    protocol: Protocol, by_rate: Mapping[float, Sequence[Record]]
) -> tuple[tuple[float, float, bool], ...]:
    """Step size, mean outcome and stability, by ascending step size."""
    return tuple(
        (
            rate,
            float(np.mean([mean_log_loss(record) for record in records])),
            all(map(protocol.is_stable, records)),
        )
        for rate, records in sorted(by_rate.items())
    )


def _tuning_of(job: Job, protocol: Protocol, method: Method, tuned: Raced) -> Tuning:
    """The row of a tuning by races and full runs."""
    by_rate = {step_size(point): records for point, records in tuned.full.items()}
    return Tuning(
        method=method.name,
        batch_size=job.settings.batch_size,
        learning_rate=tuned.learning_rate,
        largest_stable=tuned.largest_stable,
        candidates=_candidates(protocol, by_rate),
        picks=_picks(protocol, by_rate),
        at_edge=tuned.at_edge,
        race_cost=tuned.race_cost,
        full_cost=tuned.full_cost,
        limit_seen=tuned.limit_seen,
    )


def _tuning_of_race(
    job: Job, protocol: Protocol, method: Method, raced: Tuned
) -> Tuning:
    """The row of a race alone."""
    by_rate: dict[float, list[Record]] = {}
    for record in raced.runs:
        by_rate.setdefault(record.config.learning_rate, []).append(record)
    candidates = [record.config.learning_rate for record in raced.candidates]
    return Tuning(
        method=method.name,
        batch_size=job.settings.batch_size,
        learning_rate=raced.learning_rate,
        largest_stable=raced.largest_stable,
        candidates=_candidates(protocol, by_rate),
        picks=_picks(protocol, by_rate),
        # Where no larger step size is unstable, the largest is an edge, too.
        at_edge=raced.learning_rate == min(candidates)
        or (not raced.limit_seen and raced.learning_rate == max(candidates)),
        race_cost=raced.cost * race_settings(job.settings).steps / job.settings.steps,
        full_cost=0.0,
        limit_seen=raced.limit_seen,
    )


def _tuning_of_nothing(job: Job, protocol: Protocol, method: Method) -> Tuning:
    """The row of a method without a stable step size: everything that was tried."""
    tried: dict[float, Sequence[Record]] = {}
    costs = []
    # A step size that was stable in the race was not in full runs.
    for settings in (race_settings(job.settings), job.settings):
        records = tuning_records(
            job, dataclasses.replace(protocol, settings=settings), method
        )
        tried |= {step_size(point): runs for point, runs in records.items()}
        steps = sum(steps_taken(run) for runs in records.values() for run in runs)
        costs.append(steps / job.settings.steps)
    candidates = _candidates(protocol, tried)
    return Tuning(
        method=method.name,
        batch_size=job.settings.batch_size,
        learning_rate=math.nan,
        largest_stable=math.nan,
        candidates=tuple((rate, outcome, False) for rate, outcome, _ in candidates),
        picks=(),
        at_edge=False,
        race_cost=costs[0],
        full_cost=costs[1],
    )


def _rows_of_measurements(
    job: Job, method: Method, records: Iterable[Record]
) -> list[MeasurementRow]:
    """The rows of all diagnostics in these records."""
    names: tuple[When, ...] = ("start", "middle", "end")
    return [
        MeasurementRow(
            method.name,
            job.settings.batch_size,
            when,
            step,
            record.diagnostics[step],
        )
        for record in records
        for when, step in zip(names, diagnosed_steps(job.settings), strict=True)
        if step in record.diagnostics
    ]


# ---- Checks of arguments ----------------------------------------------------------


def evaluation_interval_of(steps: int) -> int:
    """The interval that divides the steps into about twenty.

    Examples:
      >>> evaluation_interval_of(1000), evaluation_interval_of(20)
      (50, 1)
      >>> evaluation_interval_of(997)
      Traceback (most recent call last):
      dissect_optax.dissection._errors.UserError: `steps` must be a multiple of ...
    """
    counts = [n for n in range(1, min(steps, _MOST_EVALUATIONS) + 1) if steps % n == 0]
    best = min(counts, key=lambda count: abs(math.log(count / _EVALUATIONS)))
    if best < min(steps, 10):
        raise UserError(
            f"`steps` must be a multiple of a number from 10 to {_MOST_EVALUATIONS}, so"
            f" that runs are evaluated so often, got {steps}. Use"
            f" {round(steps, -1)}, or pass an `evaluation_interval` that divides it."
        )
    return steps // best


def _count(name: str, value: Any) -> int:
    """The positive integer, also from one of NumPy."""
    try:
        count = operator.index(value)
    except TypeError:
        count = 0
    if isinstance(value, bool) or count < 1:
        raise UserError(f"`{name}` must be a positive integer, got {value!r}.")
    return count


def _checked_batch_sizes(batch_size: int | Sequence[int]) -> tuple[int, ...]:
    """The batch sizes in ascending order."""
    several = np.ndim(batch_size) > 0 or isinstance(batch_size, set)
    sizes = tuple(batch_size) if several else (batch_size,)  # type: ignore[arg-type]
    given = tuple(_count("batch_size", size) for size in sizes)
    if not given or len(set(given)) < len(given):
        raise UserError(
            f"`batch_size` must be one or several different numbers, got {given}."
        )
    return tuple(sorted(given))


def _checked_methods(
    methods: Sequence[str], extra: Mapping[str, Any] | None
) -> list[Method]:
    """The methods by name, and the extra ones."""
    if isinstance(methods, str) or not all(isinstance(name, str) for name in methods):
        raise UserError(
            f"`methods` must be a list of names, got {methods!r}. An optimizer of your"
            " own goes into `extra`, by name."
        )
    if not isinstance(extra or {}, Mapping):
        raise UserError(
            "`extra` must be a dictionary of functions from a learning rate to an"
            f" optimizer, got {extra!r}."
        )
    chosen = [get_method(name) for name in methods]
    chosen += [method_from(name, made) for name, made in (extra or {}).items()]
    names = [method.name for method in chosen]
    if not names or len(set(names)) < len(names):
        raise UserError(
            "`methods` and `extra` must name different methods, got"
            f" {', '.join(names) or 'none'}."
        )
    return chosen


def _check_directory(directory: str | Path | None) -> None:
    """Raises unless files can be written there, before anything is trained."""
    if directory is None:
        return
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"`directory` must be a directory, got the file {path}.")
    path.mkdir(parents=True, exist_ok=True)


def _check_updates(problem: Problem, method: Method) -> None:
    """Raises unless the method updates these parameters on this schedule."""

    def updated(learning_rate: jax.Array) -> PyTree:
        optimizer = optax.with_extra_args_support(
            method.factory(problem.schedule(learning_rate))
        )
        params = problem.init(jax.random.key(0))
        state = optimizer.init(params)
        extra_args = {"grad_variance": params} if method.needs_variance else {}
        updates, new_state = optimizer.update(params, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, new_state

    try:
        _, before, after = jax.eval_shape(updated, jax.ShapeDtypeStruct((), np.float32))
    except Exception as error:
        raise UserError(
            f"The optimizer {method.label} cannot update these parameters, or does not"
            f" take this schedule: {first_line(error)}"
        ) from error
    kinds = [
        (jax.tree.structure(state), [leaf.shape for leaf in jax.tree.leaves(state)])
        for state in (before, after)
    ]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"The optimizer {method.label} changes the structure of its state, which"
            " cannot be compiled in a loop."
        )
