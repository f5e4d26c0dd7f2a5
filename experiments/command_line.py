"""The command line: `python -m experiments`, see `--help`."""

import logging
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro

import dissect_optax
from dissect_optax.dissection import UserError, exit_status, unknown_name
from experiments.commands import (
    calibrate,
    convergence,
    curves,
    dissect,
    eigenbases,
    export,
    family,
    figure,
    list_runs,
    quadratic,
    reproduce,
    sign_map,
    starts,
    table,
    train,
    tune_step_sizes,
)
from experiments.problems import PROBLEMS

_PROGRAM = "python -m experiments"
_MAIN_JOB = ("reproduce", "digits")


# A study adds its command by a row.
COMMANDS: dict[str, Callable[..., Any]] = {
    "reproduce": reproduce,
    "train": train,
    "tune": tune_step_sizes,
    "table": table,
    "curves": curves,
    "dissect": dissect,
    "calibrate": calibrate,
    "family": family,
    "figure": figure,
    "list": list_runs,
    "export": export,
    "quadratic": quadratic,
    "starts": starts,
    "eigenbases": eigenbases,
    "map": sign_map,
    "convergence": convergence,
}


def _run(arguments: Sequence[str]) -> None:
    """Runs the command that begins these arguments."""
    if arguments[0] == "--version":
        print(f"dissect_optax {dissect_optax.__version__}, JAX {jax.__version__}")
        return
    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        if arguments[0] in PROBLEMS:
            raise UserError(
                f"'{arguments[0]}' is a problem, not a command. Did you mean"
                f" `{_PROGRAM} reproduce {arguments[0]}`?"
            )
        aliases = {problem: f"reproduce {problem}" for problem in PROBLEMS}
        raise UserError(unknown_name("command", arguments[0], COMMANDS, aliases))
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog=_PROGRAM,
        description=(
            "Takes Adam apart by experiment. Without a command:"
            f" `{' '.join(_MAIN_JOB)}`. Problems: {', '.join(PROBLEMS)}."
            f" `{_PROGRAM} launch --help`: as several processes on this machine."
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
        arguments[0].startswith("-")
        and arguments[0] not in ("-h", "--help", "--version")
    ):
        arguments = [*_MAIN_JOB, *arguments]
    # Orbax tells there about its housekeeping.
    logging.getLogger("absl").setLevel(logging.ERROR)
    return exit_status(
        _PROGRAM,
        lambda: _run(arguments),
        goes_on=lambda: (
            "The same command goes on from finished runs and the last checkpoint:"
            f" {_PROGRAM} {shlex.join(arguments)}"
        ),
        advice=(
            " Are --runs-dir and --data-dir directories that you may write to, on a"
            " disk with room?"
        ),
    )
