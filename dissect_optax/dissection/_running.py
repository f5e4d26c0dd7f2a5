"""From wanted runs to records: missing runs are trained, group by group."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dissect_optax.dissection import _checkpoints as checkpoints
from dissect_optax.dissection import _interrupts as interrupts
from dissect_optax.dissection import _processes as processes
from dissect_optax.dissection._checkpoints import Group, GroupProgress
from dissect_optax.dissection._data import Data, fingerprint, first_examples, hold_out
from dissect_optax.dissection._environment import environment
from dissect_optax.dissection._errors import UserError
from dissect_optax.dissection._evaluation import evaluate
from dissect_optax.dissection._meshes import (
    REPLICA,
    check_batch,
    everywhere,
    over_replicas,
    place,
    usual_mesh,
    whole_replicas,
)
from dissect_optax.dissection._methods import Method
from dissect_optax.dissection._problem import Problem, Settings
from dissect_optax.dissection._progress import GroupReport, Monitor
from dissect_optax.dissection._records import (
    Measurement,
    Record,
    RunConfig,
    Store,
    json_object,
)
from dissect_optax.dissection._replicas import replicas_per_program
from dissect_optax.dissection._training import Replica, advance, initialise

# Between two calls are progress, checkpoints and signals.
_LONGEST_CALL = 5.0  # Seconds.


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Measurements on the parameters of one run while it is trained.

    Attributes:
      seed: The run's seed.
      measure: From parameters to a JSON object.
    """

    seed: int
    measure: Callable[[Any], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Job:
    """What the runs of one command share.

    Attributes:
      problem: The problem.
      settings: Length, batch size and evaluations of its runs.
      store: Where the records are.
      monitor: Where progress is shown.
      data_dir: Directory of the data, None for the usual place.
      checkpoint_seconds: Least time between two checkpoints of a group.
      replicas: Runs that are trained at a time, rounded up to as many for each device
        of the axis `replica`; None to fill the devices.
      diagnosis: Measurements at the first, the middle and the last evaluation.
      mesh: Devices of the runs, with the axes `replica` and `data`; None for all of
        them, on `replica` for a group and on `data` for one run.
    """

    problem: Problem
    settings: Settings
    store: Store
    monitor: Monitor
    data_dir: Path | None = None
    checkpoint_seconds: float = 30.0
    replicas: int | None = None
    diagnosis: Diagnosis | None = None
    mesh: Mesh | None = None

    @property
    def data(self) -> Data:
        """The data, on the first device of this process."""
        return _data(
            self.problem,
            self.data_dir,
            self.settings.validation_fraction,
            self.settings.examples,
        )

    def data_on(self, mesh: Mesh) -> Data:
        """The data, on each device of a mesh."""
        return _data_on(
            mesh,
            self.problem,
            self.data_dir,
            self.settings.validation_fraction,
            self.settings.examples,
        )

    def mesh_of(self, size: int) -> Mesh:
        """The devices of a group of so many runs, which divide its mini-batches."""
        batch_size = self.settings.batch_size
        mesh = self.mesh or usual_mesh(size, batch_size)
        check_batch(mesh, batch_size)
        return mesh

    @property
    def fingerprint(self) -> str:
        """Sizes and digest of the data."""
        return _fingerprint(self.problem, self.data_dir)

    def check_data(self) -> None:
        """Loads the data, so that errors in them are reported before any work."""
        if not self.store.in_memory:
            self.store.check_data(self.problem.name, self.fingerprint)

    def description(self, method: Method) -> dict[str, Any]:
        """Everything that makes a run of this method this one, beside its settings."""
        identity = {"method": method.identity} if method.identity else {}
        return {**self.problem.description, **identity}

    def config(self, method: Method, learning_rate: float, seed: int) -> RunConfig:
        """The configuration of one run."""
        return RunConfig(
            problem=self.problem.name,
            optimizer=method.name,
            learning_rate=learning_rate,
            seed=seed,
            settings=self.settings,
            description=self.description(method),
        )


@functools.cache
def _whole_data(problem: Problem, data_dir: Path | None) -> Data:
    """The data, on the first device, loaded once per process."""
    return processes.on_every_process(
        lambda: jax.tree.map(jnp.asarray, problem.load_data(data_dir))
    )


@functools.cache
def _fingerprint(problem: Problem, data_dir: Path | None) -> str:
    """The fingerprint of the data, computed once per process."""
    found = fingerprint(_whole_data(problem, data_dir))
    expected = processes.from_primary(lambda: found)

    def check() -> None:
        if found != expected:
            raise UserError(
                f"The data of {problem.name} ({found}) are not those of process 0"
                f" ({expected}). Give every host the same data."
            )

    processes.on_every_process(check)
    return found


@functools.cache
def _data(
    problem: Problem,
    data_dir: Path | None,
    validation_fraction: float,
    examples: int | None,
) -> Data:
    """The part of the data that the settings ask for."""
    whole = _whole_data(problem, data_dir)
    parts = (first_examples(part, examples) for part in (whole.training, whole.test))
    return hold_out(Data(*parts), validation_fraction)


@functools.cache
def _data_on(mesh: Mesh, *part: Any) -> Data:
    """The same on each device of a mesh."""
    return place(_data(*part), everywhere(mesh))


def _measurement(
    evaluation: dict[str, np.ndarray], index: int, step: int, seconds: float
) -> Measurement:
    """The evaluation of one run."""
    # The shortest decimal number that is this float32 keeps records short.
    values = {name: float(str(column[index])) for name, column in evaluation.items()}
    return Measurement(step, round(seconds, 3), values)


def _replicas(group: Group, mesh: Mesh) -> Replica:
    """Step sizes and seeds of a group, each on the devices of its run.

    Empty places are filled by copies of the last run: a group of another size would be
    another program, and compiling takes longer than the copies do.
    """
    empty = group.size - len(group.configs)
    padded = [*group.configs, *[group.configs[-1]] * empty]
    replicas = Replica(
        learning_rate=jnp.array([c.learning_rate for c in padded], jnp.float32),
        seed=jnp.array([c.seed for c in padded], jnp.uint32),
    )
    return place(replicas, over_replicas(mesh))


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
    """The runs that have not diverged."""
    return [
        index
        for index, lines in enumerate(progress.evaluations)
        if not lines or math.isfinite(lines[-1]["training_loss"])
    ]


def _newest(progress: GroupProgress) -> list[Measurement]:
    """The last measurement of every run."""
    return [lines[-1] for lines in progress.evaluations]


def _is_evaluated(progress: GroupProgress) -> bool:
    """Whether the group has been evaluated at its current step."""
    return any(
        lines and lines[-1].step == progress.step for lines in progress.evaluations
    )


def _add_evaluation(
    job: Job,
    group: Group,
    mesh: Mesh,
    replicas: Replica,
    progress: GroupProgress,
    started: float,
) -> None:
    """Measures every run that has not diverged, unless a signal arrives."""
    evaluation = evaluate(
        job.problem,
        job.settings,
        job.data_on(mesh),
        replicas,
        progress.state.step,
        progress.state.params,
        stop=processes.interrupted,
        mesh=mesh,
    )
    if evaluation is None:
        return
    measured = evaluation
    # Sums of other devices may differ in their last digits, and decisions must not.
    evaluation = processes.from_primary(lambda: measured)
    progress.seconds = time.perf_counter() - started
    for index in _alive(progress):
        progress.evaluations[index].append(
            _measurement(evaluation, index, progress.step, progress.seconds)
        )
    _add_diagnosis(job, group, mesh, progress)


def diagnosed_steps(settings: Settings) -> tuple[int, int, int]:
    """The first evaluated step, the one at or just below the middle, and the last.

    Examples:
      >>> diagnosed_steps(Settings(steps=100, batch_size=8, evaluation_interval=20))
      (0, 40, 100)
    """
    interval = settings.evaluation_interval
    return 0, settings.steps // 2 // interval * interval, settings.steps


def _add_diagnosis(job: Job, group: Group, mesh: Mesh, progress: GroupProgress) -> None:
    """Measures the run that is to be diagnosed, if it is time and it is there."""
    is_due = progress.step in diagnosed_steps(job.settings)
    if job.diagnosis is None or not is_due:
        return
    for index in _alive(progress):
        if group.configs[index].seed == job.diagnosis.seed:
            params = _params_of_run(mesh, progress.state.params, index)
            # Each process measures for itself, where it has the data.
            (device,) = jax.tree.leaves(job.data.training)[0].devices()
            found = job.diagnosis.measure(_local_copy(params, device))
            progress.diagnostics[index][progress.step] = processes.from_primary(
                functools.partial(json_object, "diagnosis", found)
            )


def _local_copy(tree: Any, device: jax.Device) -> Any:
    """Arrays that every device holds, on this one alone."""
    return jax.tree.map(
        lambda leaf: jax.device_put(leaf.addressable_data(0), device), tree
    )


@functools.partial(jax.jit, static_argnames=("mesh",))
def _params_of_run(mesh: Mesh, params: Any, index: jax.typing.ArrayLike) -> Any:
    """Parameters of one run of a group, on each device."""
    return jax.lax.with_sharding_constraint(
        jax.tree.map(lambda leaf: leaf[index], params), everywhere(mesh)
    )


def _begin(
    job: Job, method: Method, group: Group, mesh: Mesh, replicas: Replica
) -> GroupProgress:
    """The group at its last checkpoint, or before its first step; evaluated there."""
    started = time.perf_counter()
    state = initialise(job.problem, method, replicas, mesh)
    progress = None
    if not job.store.in_memory:
        progress = checkpoints.restore(job.store, group, template=state)
    if progress is None:
        runs = len(group.configs)
        progress = GroupProgress(
            state, 0, 0.0, [[] for _ in range(runs)], [{} for _ in range(runs)]
        )
    started -= progress.seconds
    is_due = progress.step % job.settings.evaluation_interval == 0
    if is_due and not _is_evaluated(progress):
        _add_evaluation(job, group, mesh, replicas, progress, started)
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


def _train(
    job: Job,
    method: Method,
    group: Group,
    mesh: Mesh,
    replicas: Replica,
    progress: GroupProgress,
    report: GroupReport,
) -> None:
    """Takes a group to its last step; saves it now and then, and before a signal."""
    settings, interval = job.settings, job.settings.evaluation_interval
    last_save = time.perf_counter()
    started = last_save - progress.seconds
    at_a_time = 1
    while progress.step < settings.steps and _alive(progress):
        called = time.perf_counter()
        steps = min(at_a_time, interval - progress.step % interval)
        progress.state = advance(
            job.problem,
            method,
            settings,
            steps,
            job.data_on(mesh),
            replicas,
            progress.state,
            mesh,
        )
        progress.step += steps
        jax.block_until_ready(progress.state)
        processes.beat(progress.step)
        (seconds,) = processes.largest(time.perf_counter() - called)
        seconds *= at_a_time / steps
        at_a_time = min(steps_of_next_call(at_a_time, seconds), interval)
        progress.seconds = time.perf_counter() - started
        if progress.step % interval == 0:
            _add_evaluation(job, group, mesh, replicas, progress, started)
        report(progress.step, _newest(progress))
        is_due = time.perf_counter() - last_save >= job.checkpoint_seconds
        due, stops = processes.largest(is_due, processes.stops())
        if not job.store.in_memory and (due or stops):
            checkpoints.save(job.store, group, progress)
            last_save = time.perf_counter()
        if stops:
            raise KeyboardInterrupt


def _run_group(job: Job, method: Method, title: str, group: Group) -> None:
    """Trains a group, from where an earlier process left it, to its records."""
    mesh = job.mesh_of(group.size)
    # One that is resumed may have been begun on other devices.
    rounded = dataclasses.replace(group, size=whole_replicas(mesh, group.size))
    replicas = _replicas(rounded, mesh)
    with (
        job.monitor.group(title, job.settings.steps) as report,
        interrupts.deferred(),
    ):
        progress = _begin(job, method, group, mesh, replicas)
        # Nothing is lost yet.
        processes.check_interrupt()
        report.begin(progress.step, _newest(progress))
        _train(job, method, group, mesh, replicas, progress, report)
        ran_on = environment() | {"mesh": dict(mesh.shape), "data": group.data}
        for config, lines, found in zip(
            group.configs, progress.evaluations, progress.diagnostics, strict=True
        ):
            job.store.write(Record(config, tuple(lines), ran_on, found))
        if not job.store.in_memory:
            checkpoints.remove(job.store, group)
    # One that came after the last steps.
    processes.check_interrupt()


def _unfinished(job: Job, method: Method, missing: Sequence[RunConfig]) -> list[Group]:
    """The groups of an earlier process that hold some of the missing runs."""
    groups = []
    for group in checkpoints.unfinished_groups(
        job.store, job.problem.name, method.name
    ):
        if set(group.configs) & set(missing):
            groups.append(group)
        elif all(job.store.find_all(group.configs)):
            # The process died after its last record.
            checkpoints.remove(job.store, group)
    return groups


def _size_of_groups(job: Job, method: Method, wanted: int) -> int:
    """Number of runs that are trained at a time, as many for each device."""
    if job.mesh is not None:
        devices = job.mesh.shape[REPLICA]
    else:
        devices = 1 if 1 in (wanted, job.replicas) else jax.device_count()
    if job.replicas is not None:
        return -(-job.replicas // devices) * devices
    return devices * processes.from_primary(
        lambda: replicas_per_program(
            job.problem, method, job.settings, job.data, -(-wanted // devices)
        )
    )


def _groups(job: Job, method: Method, missing: Sequence[RunConfig]) -> list[Group]:
    """The missing runs in groups; those that have a checkpoint come first."""
    groups = [] if job.store.in_memory else _unfinished(job, method, missing)
    resumed = {config for group in groups for config in group.configs}
    fresh = [config for config in missing if config not in resumed]
    if not fresh:
        return groups
    size = _size_of_groups(job, method, len(fresh))
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
      title: Purpose of the runs, shown with their progress.
      configs: The runs.

    Returns:
      Their records, in the order of `configs`.

    Raises:
      KeyboardInterrupt: There was a signal; the same call goes on from checkpoints.
      UserError: A record or a checkpoint is damaged, or is one of other data.
    """
    store = job.store
    with (
        interrupts.recorded(),
        store.lock(job.problem.name, method.name, job.monitor.say),
    ):
        job.check_data()
        found = store.find_all(configs)
        missing = [c for c, record in zip(configs, found, strict=True) if not record]
        for group in _groups(job, method, missing):
            _run_group(job, method, f"{title}, {_range_of(group)}", group)
    return [record for record in store.find_all(configs) if record is not None]
