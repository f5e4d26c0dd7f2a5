"""The command line: `python -m experiments`, see `--help`."""

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from tyro.conf import Positional

from experiments import interrupts, reporting
from experiments.errors import UserError, unknown_name
from experiments.figures import (
    adaptation_factors,
    training_curves,
    variance_adaptation_sketch,
    wrong_sign_mass,
)
from experiments.methods import FOUR_METHODS, get_method
from experiments.problems import PROBLEMS, get_problem
from experiments.progress import Monitor
from experiments.records import Record, Store, to_text, write_atomically
from experiments.running import Job, complete
from experiments.studies import catalogue, illustrations
from experiments.tuning import Outcome, outcome, replicate, tune

_SINGLE = np.finfo(np.float32)
_LARGEST_SEED = 2**32 - 1
_PROGRAM = "python -m experiments"
_MAIN_JOB = ("reproduce", "digits")


@dataclasses.dataclass(frozen=True)
class Options:
    """What every command understands."""

    runs_dir: Path = Path("runs")
    """Directory of the records; a finished run is found there and not run again."""
    data_dir: Path | None = None
    """Directory of the data sets; digits needs none."""
    checkpoint_seconds: float = 30.0
    """Least time between two checkpoints; what a killed run loses at most."""
    smoke: bool = False
    """A few steps, two seeds: within a minute, nearly all of it compilation. Tests the
    code, not Adam."""


_ProblemName = Positional[Annotated[str, tyro.conf.arg(metavar="PROBLEM")]]
_Options = Annotated[Options, tyro.conf.arg(name="")]
_DEFAULTS = Options()


def _job(problem_name: str, options: Options) -> Job:
    """Problem, settings, store and monitor that the options ask for."""
    problem = get_problem(problem_name)
    return Job(
        problem=problem,
        settings=problem.smoke if options.smoke else problem.settings,
        store=Store(options.runs_dir),
        monitor=Monitor(),
        data_dir=options.data_dir,
        checkpoint_seconds=options.checkpoint_seconds,
    )


def _outcomes(job: Job, optimizers: Sequence[str]) -> dict[str, Outcome]:
    """What the records say about these methods."""
    return {name: outcome(job, get_method(name)) for name in optimizers}


def _replications(outcomes: dict[str, Outcome]) -> dict[str, Sequence[Record]]:
    """What Figure 3 shows of them, by the method's label."""
    return {found.method.label: found.replications for found in outcomes.values()}


def _print_results(console: Console, title: str, outcomes: dict[str, Outcome]) -> None:
    """The accuracy table, and the two effects with what they mean."""
    console.print(reporting.accuracy_table(title, outcomes))
    for aspect, comparisons in (
        ("the sign", reporting.SIGN_COMPARISONS),
        ("variance adaptation", reporting.ADAPTATION_COMPARISONS),
    ):
        if found := reporting.effects(outcomes, comparisons):
            console.print(reporting.effect_table(aspect, found))
    console.print(
        "Test accuracy after the last step, mean ± one standard deviation over seeds.\n"
        "Effects on it: mean difference between equal seeds ± half the 95 % confidence"
        "\ninterval, over seeds only: the tuning, by one seed, is not in it.",
        highlight=False,
    )


# ---- Commands ---------------------------------------------------------------------


def train(
    problem: _ProblemName,
    *,
    optimizer: str,
    learning_rate: float,
    seed: int = 0,
    options: _Options = _DEFAULTS,
) -> None:
    """Train one network, and say where its record is.

    Args:
      problem: The test problem.
      optimizer: A method such as m_svag, or the path of an Optax optimizer.
      learning_rate: The step size; a problem with a schedule starts with it.
      seed: Seed of initial parameters, mini-batches and noise.
      options: What every command understands.
    """
    job = _job(problem, options)
    method = get_method(optimizer)
    # Runs compute in single precision, where other numbers are zero or infinite.
    if not float(_SINGLE.tiny) <= learning_rate <= float(_SINGLE.max):
        raise UserError(
            "`--learning-rate` must be a positive number of single precision, got"
            f" {learning_rate:g}."
        )
    if not 0 <= seed <= _LARGEST_SEED:
        raise UserError(f"`--seed` must lie in [0, {_LARGEST_SEED}], got {seed}.")
    config = job.config(method, learning_rate, seed)
    title = f"{method.label}, step size {learning_rate:g}, seed {seed}"
    (record,) = complete(job, method, title, [config])
    last = record.evaluations[-1]
    if record.diverged:
        outcome_text = f"diverged before step {last.step}"
    else:
        outcome_text = (
            f"training loss {last.training_loss:.4g}, test loss {last.test_loss:.4g},"
            f" test accuracy {last.test_accuracy:.1%}"
        )
    print(f"{title}: {outcome_text}")
    print(f"Record: {job.store.directory(config)}")


def tune_step_sizes(
    problem: _ProblemName,
    *,
    optimizers: tuple[str, ...] = FOUR_METHODS,
    options: _Options = _DEFAULTS,
) -> None:
    """Find the step size of every method, as §A.2 of the paper does.

    Args:
      problem: The test problem.
      optimizers: The methods.
      options: What every command understands.
    """
    job = _job(problem, options)
    for name in optimizers:
        method = get_method(name)
        tuned = tune(job, method)
        print(
            f"{method.label}: step size {tuned.learning_rate:g}, best of"
            f" {len(tuned.candidates)}; largest stable {tuned.largest_stable:g}"
        )


def reproduce(
    problem: _ProblemName,
    *,
    optimizers: tuple[str, ...] = FOUR_METHODS,
    seeds: int | None = None,
    options: _Options = _DEFAULTS,
) -> None:
    """Tune and replicate every method, then print the table and draw Figure 3.

    Args:
      problem: The test problem.
      optimizers: The methods.
      seeds: Replications of each method; ten, or two with --smoke.
      options: What every command understands.
    """
    if seeds is not None and seeds < 1:
        raise UserError(f"`--seeds` must be at least 1, got {seeds}.")
    job = _job(problem, options)
    methods = [get_method(name) for name in optimizers]
    for method in methods:
        tuned = tune(job, method)
        replicate(
            job,
            method,
            tuned.learning_rate,
            seeds or (2 if options.smoke else 10),
        )
    outcomes = _outcomes(job, optimizers)
    _print_results(Console(), job.problem.title, outcomes)
    summary = options.runs_dir / problem / f"summary{_suffix(options)}.json"
    write_atomically(summary, to_text(reporting.summary(outcomes)))
    path = training_curves.draw(
        {job.problem.title: _replications(outcomes)}, _curves_path((problem,), options)
    )
    print(f"Summary: {summary}")
    print(f"Figure:  {path}")


def table(
    problem: _ProblemName = "digits",
    *,
    optimizers: tuple[str, ...] = FOUR_METHODS,
    options: _Options = _DEFAULTS,
) -> None:
    """Print the accuracy table and the effects, from records.

    Args:
      problem: The test problem.
      optimizers: The methods.
      options: What every command understands.
    """
    job = _job(problem, options)
    outcomes = _outcomes(job, optimizers)
    _print_results(Console(), job.problem.title, outcomes)


def figure(
    number: Positional[int],
    *,
    problems: tuple[str, ...] = ("digits",),
    options: _Options = _DEFAULTS,
) -> None:
    """Draw a figure of the paper, from records where it shows runs.

    Args:
      number: The figure's number in the paper.
      problems: The columns of a figure that shows test problems.
      options: What every command understands.
    """
    if number not in FIGURES:
        known = ", ".join(str(number) for number in FIGURES)
        raise UserError(f"There is no command for Figure {number}. Known: {known}.")
    print(f"Figure:  {FIGURES[number](problems, options)}")


# ---- Studies of the theory --------------------------------------------------------


def quadratic(*, options: _Options = _DEFAULTS) -> None:
    """Compare SGD and SSD on stochastic quadratic problems, and draw Figure 2.

    Args:
      options: What every command understands.
    """
    _study("quadratic", "figure_2", options)


def sign_map(*, options: _Options = _DEFAULTS) -> None:
    """Map where the sign is better: noise, conditioning and rotation of the basis.

    Args:
      options: What every command understands.
    """
    _study("map", "sign_map", options)


def convergence(*, options: _Options = _DEFAULTS) -> None:
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
    """Keeps what a smoke test writes apart from results."""
    return "_smoke" if options.smoke else ""


def _figure_path(name: str, options: Options) -> Path:
    """Where a figure goes."""
    return options.runs_dir / "figures" / f"{name}{_suffix(options)}.png"


def _curves_path(problems: Sequence[str], options: Options) -> Path:
    """Where Figure 3 goes."""
    name = f"figure_3_{'_'.join(problems)}{_suffix(options)}.png"
    return options.runs_dir / "figures" / name


def draw_training_curves(problems: Sequence[str], options: Options) -> Path:
    """Figure 3 from the records of the four methods; returns its path."""
    jobs = [_job(name, options) for name in problems]
    columns = {
        job.problem.title: _replications(_outcomes(job, FOUR_METHODS)) for job in jobs
    }
    return training_curves.draw(columns, _curves_path(problems, options))


def draw_sketch(problems: Sequence[str], options: Options) -> Path:
    """Figure 1; returns its path."""
    del problems
    path = _figure_path("figure_1", options)
    return variance_adaptation_sketch.draw(
        **illustrations.adapted_gradients(), path=path
    )


def draw_quadratics(problems: Sequence[str], options: Options) -> Path:
    """Figure 2 from the record of its study; returns its path."""
    del problems
    path = _figure_path("figure_2", options)
    return catalogue.draw("quadratic", options.runs_dir, path, smoke=options.smoke)


def draw_wrong_sign_mass(problems: Sequence[str], options: Options) -> Path:
    """Figure 4; returns its path."""
    del problems
    path = _figure_path("figure_4", options)
    return wrong_sign_mass.draw(illustrations.wrong_signs(), path)


def draw_factors(problems: Sequence[str], options: Options) -> Path:
    """Figure 5; returns its path."""
    del problems
    path = _figure_path("figure_5", options)
    return adaptation_factors.draw(*illustrations.adaptation_factors(), path)


# A study adds its figure, and its command, by a row.
FIGURES: dict[int, Callable[[Sequence[str], Options], Path]] = {
    1: draw_sketch,
    2: draw_quadratics,
    3: draw_training_curves,
    4: draw_wrong_sign_mass,
    5: draw_factors,
}
COMMANDS: dict[str, Callable[..., Any]] = {
    "reproduce": reproduce,
    "train": train,
    "tune": tune_step_sizes,
    "table": table,
    "figure": figure,
    "quadratic": quadratic,
    "map": sign_map,
    "convergence": convergence,
}


def _run(arguments: Sequence[str]) -> None:
    """Runs the command that begins these arguments."""
    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        if arguments[0] in PROBLEMS:
            raise UserError(
                f"'{arguments[0]}' is a problem, not a command. Did you mean"
                f" `{_PROGRAM} reproduce {arguments[0]}`?"
            )
        raise UserError(unknown_name("command", arguments[0], COMMANDS))
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog=_PROGRAM,
        description=(
            "Takes Adam apart by experiment. Without a command:"
            f" `{' '.join(_MAIN_JOB)}`. Problems: {', '.join(PROBLEMS)}."
        ),
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def main(arguments: Sequence[str]) -> int:
    """Runs a command.

    Args:
      arguments: The command line after the program's name. Without a command, the
        main job runs: `reproduce digits`.

    Returns:
      The exit status.
    """
    arguments = list(arguments)
    if not arguments or (
        arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")
    ):
        arguments = [*_MAIN_JOB, *arguments]
    # Orbax tells there about its housekeeping.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with interrupts.noted():
            _run(arguments)
    except UserError as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk, say, or a file where a directory should be.
        print(
            f"{_PROGRAM}: {error.strerror or error}"
            + (f": {error.filename}" if error.filename else "")
            + ". Are --runs-dir and --data-dir directories that you may write to, on a"
            " disk with room?",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(
            "\nInterrupted. The same command goes on from finished runs and the last"
            f" checkpoint: {_PROGRAM} {shlex.join(arguments)}",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
