"""`python -m experiments launch`: a command as several processes on this machine.

    python -m experiments launch --processes 4 -- reproduce digits

The parent trains nothing. It starts the processes, keeps a log of each, passes signals
on, and watches: a process that dies, or that shows no pulse for longer than a deadline,
ends the others, and one line says who it was, at which step, and which command goes on.
JAX alone would leave them waiting: a process whose peer has died notices after many
seconds and then aborts, and one whose peer hangs never does.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

PROGRAM = "python -m experiments"
INTERRUPTED = 130  # The exit status that shells expect after Ctrl-C.
FAILED = 1
# The process reads this, see `dissect_optax.dissection`.
_PULSE_VARIABLE = "DISSECT_OPTAX_PULSE"
_SECONDS_BETWEEN_LOOKS = 0.1
# What dies first may not be what is seen first: its peers abort within this time.
_SECONDS_TO_FIND_THE_FIRST = 0.5
# A process that waits for a dead one ignores SIGTERM, which Python handles later.
_SECONDS_TO_END = 5.0


@dataclasses.dataclass
class Rank:
    """One of the processes.

    Attributes:
      index: Its number.
      process: The process.
      pulse: The file in which it counts what it does.
      beat: Its last count and its last step.
      seen: When the count last changed.
    """

    index: int
    process: subprocess.Popen[bytes]
    pulse: Path
    beat: tuple[int, int] = (0, 0)
    seen: float = 0.0

    def look(self) -> None:
        """Reads the pulse."""
        with contextlib.suppress(OSError, ValueError):
            count, step = map(int, self.pulse.read_text().split())
            if (count, step) != self.beat:
                self.beat, self.seen = (count, step), time.monotonic()

    @property
    def step(self) -> int:
        """The last step that it has shown."""
        return self.beat[1]

    @property
    def died(self) -> bool:
        """Whether it ended, neither well nor because of a signal."""
        return self.process.poll() not in (None, 0, INTERRUPTED)

    def blame(self) -> tuple[int, int]:
        """Ranks the dead: who was killed comes before who aborted or failed for it."""
        status = self.process.returncode
        if status in (-signal.SIGABRT, FAILED):
            return 1, self.beat[0]
        return 0, self.beat[0]

    def fate(self) -> str:
        """What became of it, in a few words."""
        status = self.process.returncode
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with status {status}"


def arguments_parser() -> argparse.ArgumentParser:
    """The options before `--`."""
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} launch",
        description=(
            "Runs a command of the experiments as several processes on this machine,"
            " which train together. Ends all of them when one dies or hangs."
        ),
        usage=f"{PROGRAM} launch [options] -- COMMAND ...",
    )
    parser.add_argument(
        "--processes", type=int, default=2, metavar="INT", help="how many (2)"
    )
    parser.add_argument(
        "--devices-per-process",
        type=int,
        default=1,
        metavar="INT",
        help="virtual devices of each process on a CPU (1)",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("runs/logs"),
        metavar="PATH",
        help="directory of the logs, one for each process (runs/logs)",
    )
    parser.add_argument(
        "--step-deadline",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="a process that shows no pulse for so long, compilation included, hangs"
        " (600)",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="after Ctrl-C or SIGTERM, time to write a checkpoint (60)",
    )
    parser.add_argument("command", nargs="+", help="such as: reproduce digits")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs a command as several processes.

    Args:
      arguments: The options, `--`, and the command after the program's name.

    Returns:
      The exit status.
    """
    options = arguments_parser().parse_args(arguments)
    for name in ("processes", "devices_per_process"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            print(f"{PROGRAM} launch: `--{flag}` must be at least 1", file=sys.stderr)
            return 2
    if not options.step_deadline > 0 or not options.grace >= 0:
        print(
            f"{PROGRAM} launch: `--step-deadline` must be positive, and `--grace` must"
            " not be negative",
            file=sys.stderr,
        )
        return 2
    return launch(
        [sys.executable, "-m", "experiments", *options.command],
        processes=options.processes,
        devices=options.devices_per_process,
        logs=options.logs.expanduser(),
        step_deadline=options.step_deadline,
        grace=options.grace,
        resume=f"{PROGRAM} launch {shlex.join(arguments)}",
    )


def launch(
    command: Sequence[str],
    *,
    processes: int,
    devices: int,
    logs: Path,
    step_deadline: float,
    grace: float,
    resume: str,
) -> int:
    """Runs a command as several processes, and watches them.

    Args:
      command: The command; each process gets `--distributed` with its arguments.
      processes: Number of processes.
      devices: Virtual devices of each process, on a CPU.
      logs: Directory of `process0.log` and so on.
      step_deadline: Seconds without a pulse after which a process hangs.
      grace: Seconds that the processes have after a signal.
      resume: The command that goes on, for the messages.

    Returns:
      The exit status: that of the processes, 1 if one died or hung, 130 after a signal.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with _signals() as arrived, contextlib.ExitStack() as stack:
        ranks = _start(command, processes, devices, logs, stack)
        shown = stack.enter_context((logs / "process0.log").open("rb"))
        try:
            return _watch(ranks, arrived, shown, step_deadline, grace, resume, logs)
        finally:
            _end(ranks)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals, instead of dying of them."""
    arrived: list[int] = []
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP.
    before = {
        number: signal.signal(number, lambda number, _: arrived.append(number))
        for number in (getattr(signal, name) for name in names if hasattr(signal, name))
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(
    command: Sequence[str],
    processes: int,
    devices: int,
    logs: Path,
    stack: contextlib.ExitStack,
) -> list[Rank]:
    """Starts all processes, each with a log."""
    coordinator = f"127.0.0.1:{_free_port()}"
    ranks: list[Rank] = []
    for index in range(processes):
        pulse = (logs / f"process{index}.pulse").absolute()
        pulse.unlink(missing_ok=True)
        log = stack.enter_context((logs / f"process{index}.log").open("wb"))
        joins = ["--distributed", "--coordinator", coordinator]
        joins += ["--processes", str(processes), "--process-id", str(index)]
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {
            _PULSE_VARIABLE: str(pulse),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
            "PYTHONUNBUFFERED": "1",
        }
        # Every process would take all accelerators of the machine.
        environment.setdefault("JAX_PLATFORMS", "cpu")
        process = subprocess.Popen(
            [*command, *joins],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in a terminal goes to this process alone, which passes it on.
            start_new_session=True,
        )
        ranks.append(Rank(index, process, pulse, seen=time.monotonic()))
    return ranks


def _free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _watch(
    ranks: Sequence[Rank],
    arrived: list[int],
    shown: IO[bytes],
    step_deadline: float,
    grace: float,
    resume: str,
    logs: Path,
) -> int:
    """Waits for all processes; returns the exit status."""
    passed_on = 0
    last_call = float("inf")
    while any(rank.process.poll() is None for rank in ranks):
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        for rank in ranks:
            rank.look()
        if any(rank.died for rank in ranks) and not arrived:
            # What process 0 says now of its peer's death is in its log.
            break
        _show(shown)
        while passed_on < len(arrived):
            # Once is a request for a checkpoint, twice an end.
            _send(ranks, arrived[passed_on])
            passed_on += 1
            last_call = min(last_call, time.monotonic() + grace)
        if time.monotonic() > last_call:
            break
        if arrived:
            continue
        if hung := _hung(ranks, step_deadline):
            _say(
                f"{hung} showed no pulse for {step_deadline:g} seconds, after step"
                f" {min(rank.step for rank in ranks)}; all processes were ended",
                resume,
                logs,
            )
            return FAILED
    statuses = {rank.process.poll() for rank in ranks}
    if statuses == {0}:  # Perhaps just before a signal.
        _show(shown)
        return 0
    if arrived or statuses <= {0, INTERRUPTED}:
        _end(ranks)
        _show(shown)
        print(
            "Interrupted. The same command goes on from finished runs and the last"
            f" checkpoint: {resume}",
            file=sys.stderr,
        )
        return INTERRUPTED
    return _report_death(ranks, shown, resume, logs)


def _report_death(
    ranks: Sequence[Rank], shown: IO[bytes], resume: str, logs: Path
) -> int:
    """Ends the others of a process that died, and says who it was."""
    time.sleep(_SECONDS_TO_FIND_THE_FIRST)
    for rank in ranks:
        rank.look()
    dead = [rank for rank in ranks if rank.died]
    if {rank.process.returncode for rank in dead} == {2}:
        # A mistake in the command, which every process has explained.
        _end(ranks)
        _show(shown)
        return 2
    first = min(dead, key=Rank.blame)
    survivors = [rank.index for rank in ranks if rank not in dead]
    _end(ranks)
    if first.index == 0:
        _show(shown)
    others = "the others were ended" if survivors else "the others failed with it"
    if len(ranks) == 1:
        others = "it was the only one"
    _say(
        f"process {first.index} {first.fate()} at step {first.step}; {others}",
        resume,
        logs,
    )
    return FAILED


def _say(what: str, resume: str, logs: Path) -> None:
    """One line: what happened, and how to go on."""
    print(
        f"{PROGRAM} launch: {what} (logs in {logs}). Go on from the last checkpoint"
        f" with: {resume}",
        file=sys.stderr,
    )


def _hung(ranks: Sequence[Rank], deadline: float) -> str | None:
    """Who hangs, in words; None if nobody does."""
    running = [rank for rank in ranks if rank.process.poll() is None]
    if not any(time.monotonic() - rank.seen > deadline for rank in running):
        return None
    # Its peers have counted further before they began to wait for it.
    slowest = min(rank.beat[0] for rank in running)
    indices = [str(rank.index) for rank in running if rank.beat[0] == slowest]
    if len(indices) == 1:
        return f"process {indices[0]}"
    return f"processes {', '.join(indices)}"


def _send(ranks: Sequence[Rank], number: int) -> None:
    """Sends a signal to those that still run."""
    for rank in ranks:
        if rank.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                rank.process.send_signal(number)


def _end(ranks: Sequence[Rank]) -> None:
    """Ends those that still run, by SIGTERM and then by SIGKILL."""
    if all(rank.process.poll() is not None for rank in ranks):
        return
    _send(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_END
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(deadline - time.monotonic(), 0))
    _send(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def _show(log: IO[bytes]) -> None:
    """Prints what process 0 has written since the last time."""
    sys.stdout.write(log.read().decode(errors="replace"))
    sys.stdout.flush()
