"""The command line: `python -m experiments`, see `--help`."""

import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from dissect_optax.dissection import UserError, recorded, unknown_name
from experiments.commands import (
    calibrate,
    convergence,
    curves,
    dissect,
    eigenbases,
    family,
    figure,
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
INTERRUPTED = 130  # The exit status that shells expect after Ctrl-C.


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
    "quadratic": quadratic,
    "starts": starts,
    "eigenbases": eigenbases,
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
        aliases = {problem: f"reproduce {problem}" for problem in PROBLEMS}
        raise UserError(unknown_name("command", arguments[0], COMMANDS, aliases))
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
        with recorded():
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
        return INTERRUPTED
    return 0
