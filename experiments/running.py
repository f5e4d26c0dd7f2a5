"""From wanted runs to records: what is not there yet is trained, group by group."""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Dataset
from experiments.methods import Method
from experiments.problems.problem import Problem, Settings
from experiments.progress import Monitor
from experiments.records import Measurement, Record, RunConfig, Store, environment
from experiments.training import (
    Evaluation,
    Member,
    TrainState,
    advance,
    evaluate,
    initialise,
)


@dataclasses.dataclass(frozen=True)
class Session:
    """What all runs of one command share.

    Attributes:
        problem: The test problem.
        settings: Its published settings, or its smoke settings.
        store: Where the records are.
        monitor: Where progress is shown.
        data_dir: Where the data are, None for the usual place.
    """

    problem: Problem
    settings: Settings
    store: Store
    monitor: Monitor
    data_dir: Path | None = None

    def config(self, method: Method, learning_rate: float, seed: int) -> RunConfig:
        """The configuration of one run."""
        return RunConfig(
            problem=self.problem.name,
            network=self.problem.network_summary,
            optimizer=method.name,
            learning_rate=learning_rate,
            seed=seed,
            settings=self.settings,
        )


@dataclasses.dataclass
class _GroupProgress:
    """How far a group of runs is: all that is needed to go on with it."""

    state: TrainState
    step: int
    seconds: float
    # One list per member; the list of a diverged member ends where it diverged.
    evaluations: list[list[Measurement]]

    def alive(self) -> list[int]:
        """The members that have not diverged."""
        return [
            index
            for index, lines in enumerate(self.evaluations)
            if not lines or math.isfinite(lines[-1].training_loss)
        ]


@functools.cache
def _dataset(problem: Problem, data_dir: Path | None) -> Dataset:
    """The data, on the device, loaded once per process."""
    return jax.device_put(problem.load_data(data_dir))


def _float(value: np.ndarray) -> float:
    """The shortest decimal number that is this float32, which keeps records short."""
    return float(str(np.float32(value)))


def _measurement(
    evaluation: Evaluation, index: int, step: int, seconds: float
) -> Measurement:
    """One member's line."""
    fields = evaluation._asdict()
    values = {name: _float(column[index]) for name, column in fields.items()}
    return Measurement(step=step, seconds=round(seconds, 3), **values)


def _members(configs: Sequence[RunConfig], group_size: int) -> Member:
    """Step sizes and seeds of a group, on the device.

    Empty places are filled by copies of the last run: a group of another size would be
    another program, and compiling takes longer than the copies do.
    """
    padded = [*configs, *[configs[-1]] * (group_size - len(configs))]
    return Member(
        learning_rate=jnp.array([c.learning_rate for c in padded], jnp.float32),
        seed=jnp.array([c.seed for c in padded], jnp.uint32),
    )


def _evaluate(
    session: Session, members: Member, progress: _GroupProgress, started: float
) -> None:
    """Adds an evaluation to every member that has not diverged."""
    evaluation = jax.device_get(
        evaluate(
            session.problem,
            session.settings,
            _dataset(session.problem, session.data_dir),
            members,
            progress.state.step,
            progress.state.params,
        )
    )
    seconds = progress.seconds + time.perf_counter() - started
    for index in progress.alive():
        line = _measurement(evaluation, index, progress.step, seconds)
        progress.evaluations[index].append(line)


def _run_group(
    session: Session,
    method: Method,
    title: str,
    configs: Sequence[RunConfig],
    group_size: int,
) -> None:
    """Trains a group from its first step to its records."""
    dataset = _dataset(session.problem, session.data_dir)
    settings = session.settings
    members = _members(configs, group_size)
    with session.monitor.group(title, settings.steps) as report:
        started = time.perf_counter()
        state = initialise(session.problem, method, members)
        progress = _GroupProgress(state, 0, 0.0, [[] for _ in configs])
        _evaluate(session, members, progress, started)
        while progress.step < settings.steps and progress.alive():
            progress.state = advance(
                session.problem,
                method,
                settings,
                settings.evaluation_interval,
                dataset,
                members,
                progress.state,
            )
            progress.step += settings.evaluation_interval
            _evaluate(session, members, progress, started)
            newest = [lines[-1] for lines in progress.evaluations]
            report(progress.step, newest)
    for config, lines in zip(configs, progress.evaluations, strict=True):
        session.store.write(Record(config, tuple(lines), environment()))


def _group_size(problem: Problem, wanted: int) -> int:
    """How many runs are trained at a time."""
    on_cpu = jax.default_backend() == "cpu"
    return problem.members_on_cpu if on_cpu else wanted


def complete(
    session: Session, method: Method, title: str, configs: Sequence[RunConfig]
) -> list[Record]:
    """The records of these runs; those that are not finished are trained first.

    Args:
      session: Problem, settings, store and monitor.
      method: The method of all these runs.
      title: What the runs are for, shown with their progress.
      configs: The runs.

    Returns:
      Their records, in the order of `configs`.
    """
    store = session.store
    with store.lock(session.problem.name, method.name, session.monitor.say):
        missing = [config for config in configs if store.find(config) is None]
        size = _group_size(session.problem, max(len(missing), 1))
        for first in range(0, len(missing), size):
            _run_group(session, method, title, missing[first : first + size], size)
    found = [store.find(config) for config in configs]
    return [record for record in found if record is not None]
