"""The small problem as a command that `launch` can start as several processes.

Its arguments are the directory of its records, the number of steps and of runs, and
seconds to wait after every call, so that there is time to kill it.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax

from dissect_optax.dissection import (
    Job,
    complete,
    exit_status,
    get_method,
    is_primary,
    make_mesh,
    parse_mesh,
    run_command,
    start_if,
)
from dissect_optax.dissection import _running as running
from tests.dissection.toys import SETTINGS, job


def run(options: argparse.Namespace) -> int:
    """Trains the group; returns the exit status."""

    def action() -> None:
        start_if(
            options.distributed,
            options.coordinator,
            options.processes,
            options.process_id,
        )
        train(options)

    return exit_status("toys", action, goes_on=lambda: "The same goes on.")


def train(options: argparse.Namespace) -> None:
    """Trains the group, and waits after each call."""
    begin = running.GroupReport.begin
    call = running.GroupReport.__call__

    def begun(report, step, newest):
        print(f"begins at {step}", flush=True)
        begin(report, step, newest)

    def called(report, step, newest):
        time.sleep(options.wait)
        call(report, step, newest)

    running.GroupReport.begin = begun
    running.GroupReport.__call__ = called
    mesh = None if options.mesh is None else make_mesh(parse_mesh(options.mesh))
    runs = job(
        options.root,
        settings=dataclasses.replace(SETTINGS, steps=options.steps),
        checkpoint_seconds=0.0,
        replicas=options.count,
        mesh=mesh,
    )
    method = get_method("m_svag")
    with jax.numpy_rank_promotion("raise"):
        complete(runs, method, "toy", configs_of(runs, options.count))
    if is_primary():
        print("finished", flush=True)


def configs_of(runs: Job, count: int) -> list:
    """So many runs, with a step size and a seed each."""
    method = get_method("m_svag")
    return [runs.config(method, 0.1 * (i + 1), i) for i in range(count)]


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--mesh")
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process-id", type=int)
    options = parser.parse_args()
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
