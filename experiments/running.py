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

from experiments import checkpoints, interrupts
from experiments.checkpoints import Group, GroupProgress
from experiments.data import Dataset, fingerprint, first_images, hold_out
from experiments.environment import environment
from experiments.evaluation import Evaluation, evaluate
from experiments.group_size import group_size
from experiments.methods import Method
from experiments.problems.problem import Problem, Settings
from experiments.progress import Monitor
from experiments.records import Measurement, Record, RunConfig, Store
from experiments.training import Member, advance, initialise

# Between two calls are progress, checkpoints and Ctrl-C.
_LONGEST_CALL = 5.0  # Seconds.


@dataclasses.dataclass(frozen=True)
class Job:
    """What all runs of one command share.

    Attributes:
      problem: The test problem.
      settings: Its published settings, its smoke settings, or other steps.
      tuning_settings: The settings of runs that find the step size.
      store: Where the records are.
      monitor: Where progress is shown.
      data_dir: Where the data are, None for the usual place.
      checkpoint_seconds: Least time between two checkpoints of a group.
    """

    problem: Problem
    settings: Settings
    tuning_settings: Settings
    store: Store
    monitor: Monitor
    data_dir: Path | None = None
    checkpoint_seconds: float = 30.0

    @property
    def dataset(self) -> Dataset:
        """The data, on the device."""
        return _dataset(
            self.problem,
            self.data_dir,
            self.settings.validation_fraction,
            self.settings.images,
        )

    @property
    def fingerprint(self) -> str:
        """What tells the data from others."""
        return _fingerprint(self.problem, self.data_dir)

    def check_data(self) -> None:
        """Loads the data now, so that what is wrong with them is said before work."""
        self.store.check_data(self.problem.name, self.fingerprint)

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


@functools.cache
def _whole_dataset(problem: Problem, data_dir: Path | None) -> Dataset:
    """The data, on the device, loaded once per process."""
    return problem.load_data(data_dir)


@functools.cache
def _fingerprint(problem: Problem, data_dir: Path | None) -> str:
    """What tells the data from others, computed once per process."""
    return fingerprint(_whole_dataset(problem, data_dir))


@functools.cache
def _dataset(
    problem: Problem,
    data_dir: Path | None,
    validation_fraction: float,
    images: int | None,
) -> Dataset:
    """The part of the data that the settings ask for."""
    whole = _whole_dataset(problem, data_dir)
    halves = (first_images(half, images) for half in (whole.training, whole.test))
    return hold_out(Dataset(*halves), validation_fraction)


def _float(value: np.float32) -> float:
    """The shortest decimal number that is this float32, which keeps records short."""
    return float(str(value))


def _measurement(
    evaluation: Evaluation, index: int, step: int, seconds: float
) -> Measurement:
    """One member's line."""
    values = {
        name: _float(column[index]) for name, column in evaluation._asdict().items()
    }
    return Measurement(step=step, **values, seconds=round(seconds, 3))


def _members(group: Group) -> Member:
    """Step sizes and seeds of a group, on the device.

    Empty places are filled by copies of the last run: a group of another size would be
    another program, and compiling takes longer than the copies do.
    """
    empty = group.size - len(group.configs)
    padded = [*group.configs, *[group.configs[-1]] * empty]
    return Member(
        learning_rate=jnp.array([c.learning_rate for c in padded], jnp.float32),
        seed=jnp.array([c.seed for c in padded], jnp.uint32),
    )


def _range_of(group: Group) -> str:
    """Which step sizes and seeds a group has, in a few words."""
    rates = [config.learning_rate for config in group.configs]
    seeds = [config.seed for config in group.configs]
    sizes = f"step size {rates[0]:g}"
    if min(rates) < max(rates):
        sizes = f"step sizes {min(rates):g} to {max(rates):g}"
    if min(seeds) < max(seeds):
        return f"{sizes}, seeds {min(seeds)} to {max(seeds)}"
    return f"{sizes}, seed {seeds[0]}"


def _alive(progress: GroupProgress) -> list[int]:
    """The members that have not diverged."""
    return [
        index
        for index, lines in enumerate(progress.evaluations)
        if not lines or math.isfinite(lines[-1].training_loss)
    ]


def _newest(progress: GroupProgress) -> list[Measurement]:
    """The last measurement of every run."""
    return [lines[-1] for lines in progress.evaluations]


def _is_evaluated(progress: GroupProgress) -> bool:
    """Whether there are measurements of where the group is."""
    return any(
        lines and lines[-1].step == progress.step for lines in progress.evaluations
    )


def _add_evaluation(
    job: Job, members: Member, progress: GroupProgress, started: float
) -> None:
    """Measures every member that has not diverged, unless a Ctrl-C arrives."""
    evaluation = evaluate(
        job.problem,
        job.settings,
        job.dataset,
        members,
        progress.state.step,
        progress.state.params,
        stop=interrupts.arrived,
    )
    if evaluation is None:
        return
    progress.seconds = time.perf_counter() - started
    for index in _alive(progress):
        progress.evaluations[index].append(
            _measurement(evaluation, index, progress.step, progress.seconds)
        )


def _begin(job: Job, method: Method, group: Group, members: Member) -> GroupProgress:
    """The group at its last checkpoint, or before its first step; evaluated there."""
    started = time.perf_counter()
    state = initialise(job.problem, method, members)
    progress = checkpoints.restore(job.store, group, template=state)
    if progress is None:
        progress = GroupProgress(state, 0, 0.0, [[] for _ in group.configs])
    started -= progress.seconds
    is_due = progress.step % job.settings.evaluation_interval == 0
    if is_due and not _is_evaluated(progress):
        _add_evaluation(job, members, progress, started)
    return progress


def steps_of_next_call(steps: int, seconds: float) -> int:
    """How many steps to take in one call, from what they took in the last one.

    Examples:
      The first call is slow, since it compiles.

      >>> steps_of_next_call(1, 30.0), steps_of_next_call(1, 0.01)
      (1, 2)
      >>> steps_of_next_call(64, 2.0), steps_of_next_call(64, 30.0)
      (64, 32)
    """
    if seconds > _LONGEST_CALL:
        return max(steps // 2, 1)
    return 2 * steps if seconds < _LONGEST_CALL / 4 else steps


def _run_group(job: Job, method: Method, title: str, group: Group) -> None:
    """Trains a group, from where an earlier process left it, to its records."""
    settings = job.settings
    interval = settings.evaluation_interval
    at_a_time = 1
    members = _members(group)
    with (
        job.monitor.group(title, settings.steps) as report,
        interrupts.deferred(),
    ):
        progress = _begin(job, method, group, members)
        last_save = time.perf_counter()
        started = last_save - progress.seconds
        # Nothing is lost yet.
        interrupts.check()
        report.begin(progress.step, _newest(progress))
        while progress.step < settings.steps and _alive(progress):
            called = time.perf_counter()
            steps = min(at_a_time, interval - progress.step % interval)
            progress.state = advance(
                job.problem,
                method,
                settings,
                steps,
                job.dataset,
                members,
                progress.state,
            )
            progress.step += steps
            jax.block_until_ready(progress.state)
            seconds = (time.perf_counter() - called) * at_a_time / steps
            at_a_time = min(steps_of_next_call(at_a_time, seconds), interval)
            progress.seconds = time.perf_counter() - started
            if progress.step % interval == 0:
                _add_evaluation(job, members, progress, started)
            report(progress.step, _newest(progress))
            due = time.perf_counter() - last_save >= job.checkpoint_seconds
            if due or interrupts.arrived():
                checkpoints.save(job.store, group, progress)
                last_save = time.perf_counter()
            interrupts.check()
        for config, lines in zip(group.configs, progress.evaluations, strict=True):
            ran_on = environment() | {"data": job.fingerprint}
            job.store.write(Record(config, tuple(lines), ran_on))
        checkpoints.remove(job.store, group)
    # One that came after the last steps.
    interrupts.check()


def _groups(job: Job, method: Method, missing: Sequence[RunConfig]) -> list[Group]:
    """The missing runs in groups; those that have a checkpoint come first."""
    left = checkpoints.unfinished_groups(job.store, job.problem.name, method.name)
    groups = []
    for group in left:
        if set(group.configs) & set(missing):
            groups.append(group)
        elif all(job.store.find(config) for config in group.configs):
            # The process died after its last record.
            checkpoints.remove(job.store, group)
    resumed = {config for group in groups for config in group.configs}
    fresh = [config for config in missing if config not in resumed]
    if not fresh:
        return groups
    size = group_size(job.problem, method, job.settings, job.dataset, len(fresh))
    for first in range(0, len(fresh), size):
        configs = tuple(fresh[first : first + size])
        groups.append(Group(configs, size, job.fingerprint))
    return groups


def complete(
    job: Job, method: Method, title: str, configs: Sequence[RunConfig]
) -> list[Record]:
    """The records of these runs; those that are not finished are trained first.

    Args:
      job: Problem, settings, store and monitor.
      method: The method of all these runs.
      title: What the runs are for, shown with their progress.
      configs: The runs.

    Returns:
      Their records, in the order of `configs`.
    """
    store = job.store
    with store.lock(job.problem.name, method.name, job.monitor.say):
        missing = [config for config in configs if store.find(config) is None]
        if missing:
            job.check_data()
        for group in _groups(job, method, missing):
            _run_group(job, method, f"{title}, {_range_of(group)}", group)
    found = [store.find(config) for config in configs]
    return [record for record in found if record is not None]
