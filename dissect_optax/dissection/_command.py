"""The command `dissect-optax`: a dissection from the shell.

    dissect-optax mymodule:problem --directory runs/mine --html report.html

`problem` is a function without arguments that returns the arguments of `dissect` as a
dictionary.
"""

import argparse
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dissect_optax
from dissect_optax.dissection import _processes as processes
from dissect_optax.dissection._dissect import dissect
from dissect_optax.dissection._errors import UserError, unknown_name
from dissect_optax.dissection._exit_status import exit_status
from dissect_optax.dissection._meshes import parse_mesh
from dissect_optax.dissection._modules import import_module
from dissect_optax.dissection._result import Dissection


def arguments_parser() -> argparse.ArgumentParser:
    """The options, each of which replaces an argument of `dissect`."""
    parser = argparse.ArgumentParser(
        prog="dissect-optax",
        description=(
            "Trains your model with the four methods of Table 1 and reports what the"
            " sign and the variance adaptation change."
        ),
        epilog=(
            "PROBLEM is MODULE:FUNCTION, a function without arguments that returns the"
            " arguments of `dissect_optax.dissect` as a dictionary with `loss`, `init`"
            " and `data`."
        ),
    )
    parser.add_argument("problem", metavar="PROBLEM", help="such as mymodule:problem")
    parser.add_argument(
        "--directory", type=Path, help="where runs are kept, to go on after a stop"
    )
    parser.add_argument("--html", type=Path, help="write the report to this file")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", metavar="INT", help="batch sizes"
    )
    parser.add_argument("--steps", type=int, metavar="INT", help="steps of a full run")
    parser.add_argument("--seeds", type=int, metavar="INT", help="replications")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="methods")
    parser.add_argument(
        "--budget",
        choices=("full", "race"),
        help="race: a tenth of the steps, and a forecast",
    )
    parser.add_argument(
        "--mesh", metavar="AXIS=N", help="devices, such as data=8 or replica=4,data=2"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="train with other processes, of a cluster that JAX detects or as follows",
    )
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens"
    )
    parser.add_argument(
        "--processes", type=int, metavar="INT", help="number of processes"
    )
    parser.add_argument(
        "--process-id", type=int, metavar="INT", help="number of this one, from 0"
    )
    parser.add_argument(
        "--version", action="version", version=dissect_optax.__version__
    )
    return parser


def load_function(path: str) -> Callable[[], Any]:
    """The function at `module:function`, also from the current directory.

    Raises:
      UserError: There is none.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise UserError(
            f"PROBLEM must be MODULE:FUNCTION, such as mymodule:problem, got '{path}'."
        )
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise
        raise UserError(
            f"There is no module '{module_name}' in {os.getcwd()} or on the path of"
            " Python."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"The module '{module_name}' has no function '{name}'.")
    return function


def arguments_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `dissect` that the problem and the options give.

    Raises:
      UserError: They are not arguments of `dissect`.
    """
    arguments = load_function(options.problem)()
    if not isinstance(arguments, dict) or not {"loss", "init", "data"} <= set(
        arguments
    ):
        raise UserError(
            f"{options.problem} must return a dictionary with `loss`, `init` and"
            " `data`, the arguments of `dissect_optax.dissect`."
        )
    known = inspect.signature(dissect).parameters
    if unknown := [name for name in arguments if name not in known]:
        raise UserError(
            f"{options.problem}: {unknown_name('argument', str(unknown[0]), known)}"
        )
    arguments = dict(arguments)
    for name in ("directory", "batch_size", "steps", "seeds", "methods", "budget"):
        if (value := getattr(options, name)) is not None:
            arguments[name] = value
    if options.mesh is not None:
        arguments["mesh"] = parse_mesh(options.mesh)
    return arguments


def run(options: argparse.Namespace, arguments: dict[str, Any]) -> Dissection:
    """The dissection with these arguments, printed and written."""
    for path in (options.html, options.json):
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"The directory of {path} does not exist.")
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a directory, expected the name of a file.")
    result = dissect(**arguments)
    if not processes.is_primary():
        return result
    print(result)
    if options.json is not None:
        options.json.write_text(result.to_json())
    if options.html is not None:
        result.to_html(options.html)
        print(f"Report: {options.html}")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: The command line after the program's name; None for the process's.

    Returns:
      The exit status.
    """
    options = arguments_parser().parse_args(arguments)
    # Reports are files: a display that does not exist is no reason to stop.
    os.environ["MPLBACKEND"] = "agg"
    directory = options.directory

    def action() -> None:
        nonlocal directory
        processes.start_if(
            options.distributed,
            options.coordinator,
            options.processes,
            options.process_id,
        )
        given = arguments_of(options)
        directory = given.get("directory")
        run(options, given)

    def goes_on() -> str:
        kept = "the last checkpoint" if directory else "the beginning"
        return f"The same command goes on from {kept}."

    return processes.run_command(
        lambda: exit_status("dissect-optax", action, goes_on=goes_on)
    )
