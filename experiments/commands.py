"""The commands: each is a function whose parameters are its options."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import Positional

from dissect_optax.dissection import (
    FOUR_METHODS,
    METHODS,
    Job,
    Method,
    MethodResult,
    Monitor,
    Protocol,
    Record,
    Settings,
    SilentMonitor,
    Store,
    UserError,
    check_batch,
    complete,
    digest,
    dissect_problem,
    find_result,
    get_method,
    is_primary,
    make_mesh,
    makes_optimizers,
    parse_mesh,
    record_to_json,
    replicate,
    start_if,
    to_text,
    tune,
    unknown_name,
    write_atomically,
)
from dissect_optax.family import MEMBERS
from experiments import reporting
from experiments.figures import (
    adaptation_factors,
    step_sizes,
    training_curves,
    variance_adaptation_sketch,
    wrong_sign_mass,
)
from experiments.figures import calibration as calibration_figure
from experiments.figures import family_map as family_figure
from experiments.listing import as_csv, table_of_runs
from experiments.paths import expand_home
from experiments.problems import PROBLEMS, ExperimentProblem, get_problem
from experiments.studies import catalogue, family_map, illustrations

_SINGLE = np.finfo(np.float32)
_LARGEST_SEED = 2**32 - 1
_WIDTH = 120
_WIDE = 260
_LONGEST_NAME = 100
_MOST_LINES = 12
# Share of the training set that `--select-on validation` holds out.
_HELD_OUT = 0.1


_KNOWN_METHODS = (
    f"{', '.join(METHODS)}, the path of an Optax optimizer such as optax.adamw, or"
    " my_module:my_optimizer"
)
_MethodName = Annotated[
    str, tyro.conf.arg(metavar="METHOD", help=f"One of {_KNOWN_METHODS}.")
]
_MethodNames = Annotated[
    tuple[str, ...],
    tyro.conf.arg(metavar="[METHOD ...]", help=f"Some of {_KNOWN_METHODS}."),
]
_MethodNamesOrAll = Annotated[
    tuple[str, ...] | None,
    tyro.conf.arg(
        metavar="[METHOD ...]",
        help="The methods; all that have records if not given.",
        help_behavior_hint="(optional)",
    ),
]
# Their help says what happens without them; "(default: None)" would not.
_Number = Annotated[
    int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(optional)")
]
_Numbers = Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT [FLOAT ...]")]
_Seeds = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]


@dataclasses.dataclass(frozen=True)
class Options:
    """What every command understands."""

    runs_dir: Path = Path("runs")
    """Directory of the records; a finished run is found there and not run again."""
    smoke: bool = False
    """A few steps, two seeds. Checks the code only; the numbers are meaningless."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs_dir", expand_home(self.runs_dir))


@dataclasses.dataclass(frozen=True)
class TrainingOptions(Options):
    """What every command understands that has to do with training."""

    data_dir: Annotated[
        Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(optional)")
    ] = None
    """The TFDS data sets; by default in $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints."""
    steps: _Number = None
    """Steps of every run, for a look that is shorter than what was published."""
    evaluation_interval: _Number = None
    """Steps between two evaluations; divides the steps."""
    examples: _Number = None
    """Examples that the training and the test set are cut to."""
    replicas: _Number = None
    """Runs that are trained at a time; as many as fill the devices if not given."""
    mesh: Annotated[
        str | None,
        tyro.conf.arg(metavar="AXIS=N[,AXIS=N]", help_behavior_hint="(optional)"),
    ] = None
    """Devices, such as data=8 or replica=4,data=2: mini-batches are divided over data,
    step sizes and seeds over replica. All devices if not given: on replica for several
    runs, on data for one."""
    distributed: bool = False
    """Train with other processes: those of a cluster that JAX detects, or those of the
    next three options. Each process runs the same command."""
    coordinator: Annotated[
        str | None, tyro.conf.arg(metavar="HOST:PORT", help_behavior_hint="(optional)")
    ] = None
    """Where process 0 listens."""
    processes: _Number = None
    """Number of processes."""
    process_id: _Number = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class TuningOptions(TrainingOptions):
    """What every command understands that has to do with the choice of a step size."""

    tuning_steps: _Number = None
    """Steps of the runs that find the step size, if not the same."""
    select_on: Literal["test", "validation"] = "test"
    """Images that select a step size; validation holds out a tenth of training's."""


_ProblemName = Positional[
    Annotated[
        str, tyro.conf.arg(metavar="PROBLEM", help=f"One of {', '.join(PROBLEMS)}.")
    ]
]
_Options = Annotated[Options, tyro.conf.arg(name="")]
_TrainingOptions = Annotated[TrainingOptions, tyro.conf.arg(name="")]
_TuningOptions = Annotated[TuningOptions, tyro.conf.arg(name="")]
_STUDY_DEFAULTS = Options()
_TRAINING_DEFAULTS = TrainingOptions()
_TUNING_DEFAULTS = TuningOptions()


def _with_steps(
    settings: Settings, steps: int | None, interval: int | None, flag: str
) -> Settings:
    """The settings with other numbers of steps, where they are given."""
    steps = settings.steps if steps is None else steps
    interval = settings.evaluation_interval if interval is None else interval
    for name, value in ((flag, steps), ("--evaluation-interval", interval)):
        if value < 1:
            raise UserError(f"`{name}` must be at least 1, got {value}.")
    if steps % interval:
        raise UserError(
            f"`{flag}` must be a multiple of the evaluation interval, got {steps} and"
            f" {interval}. Choose an interval that divides it by"
            " `--evaluation-interval`."
        )
    return dataclasses.replace(settings, steps=steps, evaluation_interval=interval)


_Value = TypeVar("_Value")


def _distinct(flag: str, values: Sequence[_Value]) -> Sequence[_Value]:
    """The values, of which there must be one, and none twice."""
    if not values or len(set(values)) < len(values):
        given = " ".join(map(str, values)) or "nothing"
        raise UserError(f"`{flag}` must be given different values, got {given}.")
    return values


def _method(problem: ExperimentProblem, name: str) -> Method:
    """The method of this name, if it can be trained on this problem."""
    method = get_method(name)
    learning_rate = problem.schedule(method.first_guess)
    # This library's optimizers all do.
    if name not in METHODS and not makes_optimizers(method.factory, learning_rate):
        raise UserError(
            f"'{name}' takes no schedule of the learning rate, and {problem.name} has"
            " one. Expected an optimizer that does, such as 'optax.adamw'."
        )
    return method


@dataclasses.dataclass(frozen=True)
class _Task:
    """What the options ask for."""

    problem: ExperimentProblem
    job: Job
    protocol: Protocol


def _task(problem_name: str, options: TrainingOptions) -> _Task:
    """Problem, settings, store and monitor that the options ask for."""
    problem = get_problem(problem_name)
    if not options.checkpoint_seconds >= 0:
        raise UserError(
            "`--checkpoint-seconds` must not be negative, got"
            f" {options.checkpoint_seconds:g}. Use 0 for as many as possible."
        )
    if options.replicas is not None and options.replicas < 1:
        raise UserError(f"`--replicas` must be at least 1, got {options.replicas}.")
    settings = _with_steps(
        problem.smoke if options.smoke else problem.settings,
        options.steps,
        options.evaluation_interval,
        "--steps",
    )
    if options.examples is not None:
        if options.examples < 1:
            raise UserError(f"`--examples` must be at least 1, got {options.examples}.")
        settings = dataclasses.replace(settings, examples=options.examples)
    tuned_by = settings
    if isinstance(options, TuningOptions):
        tuned_by = dataclasses.replace(
            _with_steps(
                settings,
                options.tuning_steps,
                options.evaluation_interval,
                "--tuning-steps",
            ),
            validation_fraction=_HELD_OUT if options.select_on == "validation" else 0.0,
        )
    job = Job(
        problem=problem,
        settings=settings,
        store=Store(options.runs_dir),
        monitor=Monitor(),
        data_dir=options.data_dir,
        checkpoint_seconds=options.checkpoint_seconds,
        replicas=options.replicas,
    )
    # In so few steps no loss need fall by a tenth.
    protocol = Protocol(tuned_by, stable_below=1.0 if options.smoke else 0.9)
    return _Task(problem, job, protocol)


def _training_task(
    problem_name: str, options: TrainingOptions, batch_sizes: Sequence[int] = ()
) -> _Task:
    """The same for a command that trains, with other processes and on its devices."""
    sizes = None if options.mesh is None else parse_mesh(options.mesh)
    # Before anything is computed.
    start_if(
        options.distributed,
        options.coordinator,
        options.processes,
        options.process_id,
    )
    task = _task(problem_name, options)
    mesh = None if sizes is None else make_mesh(sizes)
    if mesh is not None:
        for size in batch_sizes or (task.job.settings.batch_size,):
            check_batch(mesh, size)
    monitor = task.job.monitor if is_primary() else SilentMonitor()
    return dataclasses.replace(
        task, job=dataclasses.replace(task.job, mesh=mesh, monitor=monitor)
    )


def _results(task: _Task, optimizers: Sequence[str]) -> dict[str, MethodResult]:
    """The results of these methods from records, by name.

    Raises:
      UserError: Tuning or replications of one of them are missing.
    """
    names = _distinct("--optimizers", optimizers)
    methods = [_method(task.problem, name) for name in names]
    found = {m.name: find_result(task.job, task.protocol, m) for m in methods}
    if missing := [method for method in methods if found[method.name] is None]:
        problem = task.problem.name
        raise UserError(
            f"{task.job.store.root} holds no complete record of"
            f" {', '.join(method.label for method in missing)} on {problem}. Run"
            f" `python -m experiments reproduce {problem} --optimizers"
            f" {' '.join(method.name for method in missing)}` with the same options"
            " first."
        )
    return {name: result for name, result in found.items() if result is not None}


def _recorded_methods(job: Job) -> list[Method]:
    """Methods that have records, this library's first, in the order of its list."""
    found = job.store.optimizers(job.problem.name)
    others = []
    for name in found:
        if name not in METHODS:
            # It may come from another version of Optax, say.
            with _reported_only(job):
                others.append(get_method(name))
    return [METHODS[name] for name in METHODS if name in found] + others


def _complete_results(task: _Task) -> dict[str, MethodResult]:
    """Of every method that is complete, so that one command does not undo another's."""
    complete_results = {}
    for method in _recorded_methods(task.job):
        # One that cannot be tuned is no obstacle to the others.
        with _reported_only(task.job):
            if result := find_result(task.job, task.protocol, method):
                complete_results[method.name] = result
    return complete_results


@contextlib.contextmanager
def _reported_only(job: Job) -> Iterator[None]:
    """Reports errors in optional results and continues."""
    try:
        yield
    except UserError as error:
        job.monitor.say(f"Left out: {error}")


def _joined(names: Sequence[str]) -> str:
    """Joins names; hashes them if too long for a file name."""
    joined = "_".join(names)
    if len(joined) <= _LONGEST_NAME:
        return joined
    return f"{len(names)}_methods_{digest(list(names))}"


def _replications(results: dict[str, MethodResult]) -> dict[str, Sequence[Record]]:
    """The runs that Figure 3 shows, by the method's label."""
    return {found.method.label: found.replications for found in results.values()}


def _print_results(
    task: _Task, results: dict[str, MethodResult], options: TuningOptions
) -> None:
    """The accuracy table, and the two effects with what they mean."""
    # A row of Markdown must not be broken, however narrow the terminal.
    console = Console(width=_WIDTH)
    if options.smoke:
        console.print(
            "Checks the code only; after so few steps the numbers are meaningless."
        )
    console.print(reporting.accuracy_table(task.problem, results))
    for aspect, comparisons in (
        ("the sign", reporting.SIGN_COMPARISONS),
        ("variance adaptation", reporting.ADAPTATION_COMPARISONS),
    ):
        if found := reporting.effects(results, comparisons):
            console.print(reporting.effect_table(aspect, found))
    if lower := [r.method.label for r in results.values() if r.tuned.searched_below]:
        console.print(
            f"{', '.join(lower)}: the best of the two decades below the largest stable"
            " step size was the\nsmallest, so smaller ones were tried."
        )
    tuning_settings = task.protocol.settings
    held_out = tuning_settings.validation_fraction
    chosen_on = "held-out training images" if held_out else "the test set"
    length = f"{task.job.settings.steps} steps"
    published = task.problem.settings.steps
    if task.problem.published and task.job.settings.steps != published:
        length += f" (the paper's: after {published})"
    console.print(
        f"Test accuracy after {length}, mean ± one standard deviation over seeds;\n"
        f"step sizes chosen on {chosen_on} by runs of {tuning_settings.steps}"
        " steps.\n"
        "Effects on it: mean difference between equal seeds ± half the 95 % confidence"
        "\ninterval, over seeds only: the tuning, by one seed, is not in it.",
        highlight=False,
    )


# ---- Commands ---------------------------------------------------------------------


def train(
    problem: _ProblemName,
    *,
    optimizer: _MethodName,
    learning_rate: _Numbers,
    seed: _Seeds = (0,),
    options: _TrainingOptions = _TRAINING_DEFAULTS,
) -> None:
    """Train a network at each step size with each seed; print where the records are.

    Args:
      problem: The test problem.
      optimizer: A method such as m_svag, the path of an Optax optimizer, or
        my_module:my_optimizer.
      learning_rate: The step sizes; a problem with a schedule starts with them.
      seed: Seeds of initial parameters, mini-batches and noise.
      options: What every command understands.
    """
    task = _training_task(problem, options)
    job, method = task.job, _method(task.problem, optimizer)
    for rate in _distinct("--learning-rate", learning_rate):
        # Runs compute in single precision, where other numbers are zero or infinite.
        if not float(_SINGLE.tiny) <= rate <= float(_SINGLE.max):
            raise UserError(
                "`--learning-rate` must be a positive number of single precision, got"
                f" {rate:g}."
            )
    for number in _distinct("--seed", seed):
        if not 0 <= number <= _LARGEST_SEED:
            raise UserError(f"`--seed` must lie in [0, {_LARGEST_SEED}], got {number}.")
    configs = [
        job.config(method, rate, number) for rate in learning_rate for number in seed
    ]
    records = complete(job, method, method.label, configs)
    if not is_primary():
        return
    for record in records:
        config, last = record.config, record.evaluations[-1]
        title = f"{method.label}, step size {config.learning_rate:g}"
        if record.diverged:
            outcome_text = f"diverged before step {last.step}"
        else:
            outcome_text = (
                f"training loss {last['training_loss']:.4g},"
                f" test loss {last['test_loss']:.4g},"
                f" test accuracy {last['test_accuracy']:.1%}"
            )
        print(f"{title}, seed {config.seed}: {outcome_text}")
        print(f"Record: {job.store.path(config)}")


def list_runs(*, options: _Options = _STUDY_DEFAULTS) -> None:
    """List finished and unfinished runs.

    Args:
      options: What every command understands.
    """
    Console().print(table_of_runs(options.runs_dir))


def export(*, output: Path, options: _Options = _STUDY_DEFAULTS) -> None:
    """Write every evaluation of every finished run as one CSV file.

    Args:
      output: The file.
      options: What every command understands.
    """
    path = expand_home(output)
    write_atomically(path, as_csv(options.runs_dir))
    print(f"Table: {path}")


def tune_step_sizes(
    problem: _ProblemName,
    *,
    optimizers: _MethodNames = FOUR_METHODS,
    options: _TuningOptions = _TUNING_DEFAULTS,
) -> None:
    """Find the step size of every method, as §A.2 of the paper does.

    Args:
      problem: The test problem.
      optimizers: The methods.
      options: What every command understands.
    """
    task = _training_task(problem, options)
    names = _distinct("--optimizers", optimizers)
    for method in [_method(task.problem, name) for name in names]:
        tuned = tune(task.job, task.protocol, method)
        if is_primary():
            largest = reporting.largest_stable(tuned)
            print(
                f"{method.label}: step size {tuned.learning_rate:g}, best of"
                f" {len(tuned.candidates)}; largest stable {largest}"
            )


def reproduce(
    problem: _ProblemName,
    *,
    optimizers: _MethodNames = FOUR_METHODS,
    seeds: _Number = None,
    options: _TuningOptions = _TUNING_DEFAULTS,
) -> None:
    """Tune and replicate every method, then print the table and draw Figure 3.

    Args:
      problem: The test problem.
      optimizers: The methods.
      seeds: Replications of each method, ten, or two with --smoke; if there are more
        of them already, all count.
      options: What every command understands.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"`--seeds` must be at least 1, got {seeds}.")
    task = _training_task(problem, options)
    names = _distinct("--optimizers", optimizers)
    for method in [_method(task.problem, name) for name in names]:
        tuned = tune(task.job, task.protocol, method)
        replicate(
            task.job,
            method,
            tuned.learning_rate,
            seeds or (2 if options.smoke else 10),
        )
    found = _results(task, optimizers)
    all_found = reporting.summary(task.job, task.protocol, _complete_results(task))
    if not is_primary():
        return
    _print_results(task, found, options)
    summary = options.runs_dir / problem / f"summary{_suffix(options)}.json"
    write_atomically(summary, to_text(all_found))
    name = "figure_3" if tuple(optimizers) == FOUR_METHODS else _joined(optimizers)
    path = training_curves.draw(
        {task.problem.title: _replications(found)},
        _figure_path(f"{name}_{problem}", options),
    )
    print(f"Summary: {summary}")
    print(f"Figure:  {path}")


def table(
    problems: Positional[
        Annotated[tuple[str, ...], tyro.conf.arg(metavar="[PROBLEM ...]")]
    ] = ("digits",),
    *,
    optimizers: _MethodNames = FOUR_METHODS,
    options: _TuningOptions = _TUNING_DEFAULTS,
) -> None:
    """Print the accuracy table and the effects, from records.

    Args:
      problems: The test problems.
      optimizers: The methods.
      options: What every command understands.
    """
    for problem in _distinct("PROBLEM", problems):
        task = _task(problem, options)
        _print_results(task, _results(task, optimizers), options)


def curves(
    problem: _ProblemName,
    *,
    optimizers: _MethodNamesOrAll = None,
    options: _TrainingOptions = _TRAINING_DEFAULTS,
) -> None:
    """Draw and collect the losses of every record with these settings, tuned or not.

    With more than a dozen step sizes, the figure shows where each of them ends.

    Args:
      problem: The test problem.
      optimizers: The methods; all that have records unless told otherwise.
      options: What every command understands.
    """
    job = _task(problem, options).job
    records: dict[str, list[Record]] = {}
    by_method: dict[str, list[Record]] = {}
    file_name = "curves"
    if optimizers is None:
        methods = _recorded_methods(job)
    else:
        methods = [get_method(name) for name in _distinct("--optimizers", optimizers)]
        file_name = f"curves_{_joined(optimizers)}"
    for method in methods:
        for record in job.store.records(problem, method.name, job.settings):
            label = f"{method.label}, {record.config.learning_rate:g}"
            records.setdefault(label, []).append(record)
            by_method.setdefault(method.label, []).append(record)
    if not records:
        raise UserError(
            f"{job.store.root} holds no record of"
            f" {', '.join(method.label for method in methods) or 'any method'} on"
            f" {problem} with {job.settings.steps} steps. Run, say, `python -m"
            f" experiments train {problem} --optimizer m_svag --learning-rate 0.3`"
            " with the same options first."
        )
    summary = options.runs_dir / problem / f"{file_name}{_suffix(options)}.json"
    runs = [record_to_json(run) for line in records.values() for run in line]
    write_atomically(summary, to_text(runs))
    path = _figure_path(f"{file_name}_{problem}", options)
    # So many lines cannot be told apart; where each ends can.
    if len(records) > _MOST_LINES:
        step_sizes.draw(by_method, job.problem.title, path)
    else:
        training_curves.draw({job.problem.title: records}, path)
    print(f"Summary: {summary}")
    print(f"Figure:  {path}")


def figure(
    number: Positional[
        Annotated[
            int,
            tyro.conf.arg(
                metavar="NUMBER", help="The figure's number in the paper, 1 to 7."
            ),
        ]
    ],
    *,
    problems: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(metavar="[PROBLEM ...]", help_behavior_hint="(optional)"),
    ] = None,
    options: _TuningOptions = _TUNING_DEFAULTS,
) -> None:
    """Draw a figure of the paper, from records where it shows runs.

    Args:
      number: The figure's number in the paper.
      problems: The columns of a figure that shows test problems; by default digits
        in Figure 3, and cifar10 and cifar100 in Figures 6 and 7.
      options: What every command understands.
    """
    if number in FIGURES_OF_RUNS:
        optimizers, usual_problems = FIGURES_OF_RUNS[number]
        names = usual_problems if problems is None else problems
        path = _draw_runs(number, optimizers, _distinct("--problems", names), options)
    elif number not in FIGURES_OF_THEORY:
        known = sorted([*FIGURES_OF_RUNS, *FIGURES_OF_THEORY])
        raise UserError(
            f"There is no command for Figure {number}. Known:"
            f" {', '.join(map(str, known))}."
        )
    elif problems is not None or options != TuningOptions(
        runs_dir=options.runs_dir, smoke=options.smoke
    ):
        shown = ", ".join(map(str, FIGURES_OF_RUNS))
        raise UserError(
            f"Figure {number} shows no test problem: only `--runs-dir` and `--smoke`"
            f" mean something to it. The other options are for the Figures {shown}."
        )
    else:
        path = FIGURES_OF_THEORY[number](options)
    print(f"Figure:  {path}")


def dissect(
    problem: _ProblemName,
    *,
    optimizers: _MethodNames = FOUR_METHODS,
    batch_sizes: tuple[int, ...] = (),
    seeds: int = 5,
    budget: Literal["full", "race"] = "full",
    options: _TrainingOptions = _TRAINING_DEFAULTS,
) -> None:
    """Find out what the sign and the variance adaptation change, and report it.

    Args:
      problem: The test problem.
      optimizers: The methods.
      batch_sizes: Batch sizes; that of the problem if not given.
      seeds: Replications of each method.
      budget: With "race", a tenth of the steps and a forecast.
      options: What every command understands.
    """
    task = _training_task(problem, options, batch_sizes)
    names = _distinct("--optimizers", optimizers)
    sizes = sorted(set(batch_sizes)) or [task.job.settings.batch_size]
    if seeds < 1 or sizes[0] < 1:
        raise UserError("`--seeds` and `--batch-sizes` must be at least 1.")
    scheduled = callable(task.problem.schedule(1.0))
    result = dissect_problem(
        dataclasses.replace(task.problem, settings=task.job.settings),
        [_method(task.problem, name) for name in names],
        sizes,
        seeds=seeds,
        budget=budget,
        directory=options.runs_dir / "dissections",
        data_dir=options.data_dir,
        schedule="that of the problem" if scheduled else "constant",
        monitor=task.job.monitor,
        mesh=task.job.mesh,
    )
    if not is_primary():
        return
    stem = f"dissection_{problem}{_suffix(options)}"
    html = options.runs_dir / problem / f"{stem}.html"
    html.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(html.with_suffix(".json"), result.to_json())
    summary = html.with_name(f"{stem}_summary.json")
    write_atomically(summary, to_text(reporting.dissection_summary(result)))
    result.to_html(html)
    print(result)
    print(f"Result:  {html.with_suffix('.json')}")
    print(f"Summary: {summary}")
    print(f"Report:  {html}")


def family(
    problem: _ProblemName,
    *,
    members: tuple[str, ...] = (),
    batch_size: _Number = None,
    seeds: int = 5,
    options: _TrainingOptions = _TRAINING_DEFAULTS,
) -> None:
    """Train members and empty cells of the family with equal budgets, beside ADAM.

    Args:
      problem: The test problem.
      members: Members of `dissect_optax.family`; all of them if not given.
      batch_size: Batch size; that of the problem if not given.
      seeds: Replications of each member.
      options: What every command understands.
    """
    task = _training_task(problem, options, [batch_size] if batch_size else ())
    chosen = family_map.methods_of(
        _distinct("--members", members) if members else tuple(MEMBERS)
    )
    result = dissect_problem(
        dataclasses.replace(task.problem, settings=task.job.settings),
        chosen,
        [batch_size or task.job.settings.batch_size],
        seeds=seeds,
        level=None,
        directory=options.runs_dir / "dissections",
        data_dir=options.data_dir,
        monitor=task.job.monitor,
        mesh=task.job.mesh,
    )
    if not is_primary():
        return
    rows, changes = family_map.rows_of(result), family_map.changes_of(result)
    reading = family_map.reading_of(rows)
    setup = dataclasses.asdict(result.setup)
    summary = options.runs_dir / problem / f"family{_suffix(options)}.json"
    write_atomically(
        summary,
        to_text({"setup": setup, "rows": rows, "changes": changes, "reading": reading}),
    )
    title = f"{task.problem.title}, {setup['steps']} steps"
    path = _figure_path(f"family_{problem}", options)
    family_figure.draw(rows, title, path)
    axes_path = _figure_path(f"family_{problem}_axes", options)
    family_figure.draw_changes(changes, title, axes_path)
    # One line per member, as Markdown wants it.
    console = Console(width=_WIDE)
    for table in (family_map.table_of(rows), family_map.changes_table(changes)):
        console.print(table, soft_wrap=True)
    print(*reading, sep="\n")
    print(f"Summary: {summary}")
    print(f"Figures: {path}, {axes_path}")


def calibrate(
    *,
    settings: tuple[str, ...] = (),
    seeds: int = 5,
    options: _Options = _STUDY_DEFAULTS,
) -> None:
    """Hold forecasts of a short race, and of one step, against trained effects.

    Args:
      settings: Some of the settings; all of them if not given.
      seeds: Replications of each method.
      options: What every command understands.
    """
    # They need scikit-learn's tables and all problems.
    from experiments.studies.calibration import calibrate as run
    from experiments.studies.calibration import score_table
    from experiments.studies.calibration_settings import SETTINGS

    if unknown := [name for name in settings if name not in SETTINGS]:
        raise UserError(unknown_name("setting", unknown[0], SETTINGS))
    names = settings or tuple(SETTINGS)
    if options.smoke and not settings:
        names = ("block_quadratic_heterogeneous",)
    directory = options.runs_dir / f"calibration{_suffix(options)}"
    found = run(names, directory, 2 if options.smoke else seeds, Monitor())
    summary = directory / "summary.json"
    write_atomically(summary, to_text(found))
    path = calibration_figure.draw(found["rows"], _figure_path("calibration", options))
    console = Console(width=_WIDTH)
    console.print(score_table(found["scores"]))
    for name, sentence in found["failures"].items():
        console.print(f"Failed: {name}: {sentence}", highlight=False)
    print(f"Summary: {summary}")
    print(f"Figure:  {path}")


# ---- Studies of the theory --------------------------------------------------------


def quadratic(*, options: _Options = _STUDY_DEFAULTS) -> None:
    """Compare SGD and SSD on stochastic quadratic problems, and draw Figure 2.

    Args:
      options: What every command understands.
    """
    _study("quadratic", "figure_2", options)


def starts(*, options: _Options = _STUDY_DEFAULTS) -> None:
    """See how the comparison of Figure 2 turns with the start, which it leaves open.

    Args:
      options: What every command understands.
    """
    _study("starts", "starts", options)


def eigenbases(*, options: _Options = _STUDY_DEFAULTS) -> None:
    """See §2.1's argument on eigenvectors in numbers: 1-norms, diagonal dominance.

    Args:
      options: What every command understands.
    """
    _study("eigenbases", "eigenbases", options)


def sign_map(*, options: _Options = _STUDY_DEFAULTS) -> None:
    """Map where the sign is better: noise, conditioning and rotation of the basis.

    Args:
      options: What every command understands.
    """
    _study("map", "sign_map", options)


def convergence(*, options: _Options = _STUDY_DEFAULTS) -> None:
    """See Theorem 1: idealised SVAG converges at a constant step size, SGD does not.

    Args:
      options: What every command understands.
    """
    _study("convergence", "theorem_1", options)


def _study(name: str, figure_name: str, options: Options) -> None:
    """Runs a study, prints its reading and draws it."""
    summary = catalogue.report(name, options.runs_dir, smoke=options.smoke)
    path = catalogue.draw(
        name,
        options.runs_dir,
        _figure_path(figure_name, options),
        smoke=options.smoke,
    )
    print(f"Summary: {summary}")
    print(f"Figure:  {path}")


# ---- Figures ----------------------------------------------------------------------


def _suffix(options: Options) -> str:
    """Keeps what other settings lead to apart from the results."""
    parts = ["_smoke"] if options.smoke else []
    if isinstance(options, TrainingOptions):
        if options.steps is not None:
            parts.append(f"_{options.steps}_steps")
        if options.evaluation_interval is not None:
            parts.append(f"_every_{options.evaluation_interval}")
        if options.examples is not None:
            parts.append(f"_of_{options.examples}_examples")
    if isinstance(options, TuningOptions):
        if options.tuning_steps is not None:
            parts.append(f"_tuned_by_{options.tuning_steps}_steps")
        if options.select_on == "validation":
            parts.append("_selected_on_validation")
    return "".join(parts)


def _figure_path(name: str, options: Options) -> Path:
    """Where a figure goes."""
    return options.runs_dir / "figures" / f"{name}{_suffix(options)}.png"


def _draw_runs(
    number: int,
    optimizers: Sequence[str],
    problems: Sequence[str],
    options: TuningOptions,
) -> Path:
    """A figure of training curves from the records of these methods."""
    tasks = [_task(name, options) for name in problems]
    columns = {
        task.problem.title: _replications(_results(task, optimizers)) for task in tasks
    }
    path = _figure_path(f"figure_{number}_{'_'.join(problems)}", options)
    return training_curves.draw(columns, path)


def draw_sketch(options: Options) -> Path:
    """Figure 1; returns its path."""
    path = _figure_path("figure_1", options)
    return variance_adaptation_sketch.draw(
        **illustrations.adapted_gradients(), path=path
    )


def draw_quadratics(options: Options) -> Path:
    """Figure 2 from the record of its study; returns its path."""
    path = _figure_path("figure_2", options)
    return catalogue.draw("quadratic", options.runs_dir, path, smoke=options.smoke)


def draw_wrong_sign_mass(options: Options) -> Path:
    """Figure 4; returns its path."""
    path = _figure_path("figure_4", options)
    return wrong_sign_mass.draw(illustrations.wrong_signs(), path)


def draw_factors(options: Options) -> Path:
    """Figure 5; returns its path."""
    path = _figure_path("figure_5", options)
    return adaptation_factors.draw(*illustrations.adaptation_factors(), path)


# A study adds its figure by a row.
FIGURES_OF_THEORY: dict[int, Callable[[Options], Path]] = {
    1: draw_sketch,
    2: draw_quadratics,
    4: draw_wrong_sign_mass,
    5: draw_factors,
}
# The methods whose replications they show, and the problems unless told otherwise.
FIGURES_OF_RUNS: dict[int, tuple[Sequence[str], Sequence[str]]] = {
    3: (FOUR_METHODS, ("digits",)),
    6: (("adam", "adam_star", "adam_star_mb"), ("cifar10", "cifar100")),
    7: (("m_svag", "m_svag_mb"), ("cifar10", "cifar100")),
}
