"""Several processes that run one program, and what they must agree on.

All processes run the same Python code, and a step of training waits for each of them.
What one process alone knows, such as a signal, a clock or a file, is agreed on before
anything is decided by it: a process that took another branch would leave the others
waiting. With one process every function here is what it wraps.
"""

import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dissect_optax.dissection import _interrupts as interrupts
from dissect_optax.dissection._data import numbers_of, without_keys
from dissect_optax.dissection._errors import UserError, first_line

T = TypeVar("T")

# What most messages fit into, so that they are one program.
_SMALL = 8192
# A process that ends waits so long for the others: process 0 may draw figures, but
# after a signal or an error some may not come at all.
_SECONDS_TO_END, _SECONDS_TO_STOP = 300.0, 10.0
# The name of a file in which a process counts what it does, for who watches it.
PULSE_VARIABLE = "DISSECT_OPTAX_PULSE"


def start_if(
    distributed: bool,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """`start` with the options of a command line.

    Raises:
      UserError: There are arguments, and `--distributed` was forgotten.
    """
    if distributed:
        start(coordinator, processes, process_id)
    elif (coordinator, processes, process_id) != (None, None, None):
        raise UserError(
            "`--coordinator`, `--processes` and `--process-id` are for `--distributed`;"
            " give it, too."
        )


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Joins the other processes; must come before any computation.

    Args:
      coordinator: `host:port` on which process 0 listens, the same in each process.
      processes: Number of processes.
      process_id: Number of this process, from 0.
        Without all three, JAX asks the cluster that it runs on (Slurm, Open MPI, a
        Cloud TPU, Kubernetes).

    Raises:
      UserError: JAX detects no cluster, or the others do not come.
    """
    given = (coordinator, processes, process_id)
    if None in given and given != (None, None, None):
        raise UserError(
            "Expected coordinator, number of processes and process id together, or none"
            " of them where JAX detects the cluster, got"
            f" {', '.join(map(repr, given))}."
        )
    # A cluster that is there, too, is not asked for the rest.
    method = None if coordinator is None else "deactivate"
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, cluster_detection_method=method
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "The processes could not be connected. Expected a cluster that JAX detects,"
            " or the same coordinator `host:port`, the number of processes and the id"
            f" of each. JAX says: {first_line(error)}"
        ) from error
    # JAX may have taken SIGTERM for a protocol of its own, which waits for minutes.
    for number in (signal.SIGTERM, signal.SIGINT):
        if (handler := signal.getsignal(number)) is not None:
            signal.signal(number, handler)


def run_command(command: Callable[[], int]) -> int:
    """Runs a command that may call `start`, and leaves the other processes.

    Args:
      command: The command; it returns its exit status.

    Returns:
      The exit status. With other processes, an error ends this process here and now,
      since they do not know of it and would be waited for.
    """
    try:
        status = command()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        _exit(1)
    if jax.distributed.is_initialized():
        # It waits for all processes, one of which may never come.
        thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        thread.start()
        thread.join(_SECONDS_TO_STOP if status else _SECONDS_TO_END)
        if thread.is_alive():
            _exit(status)
    return status


def _exit(status: int) -> NoReturn:
    """Ends this process without waiting for any other."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def count() -> int:
    """Number of processes."""
    return jax.process_count()


def is_primary() -> bool:
    """Whether this process writes files and shows progress."""
    return jax.process_index() == 0


def from_primary(function: Callable[[], T]) -> T:
    """What the function returns in process 0, in every process.

    Args:
      function: Called in process 0 alone; what it returns or raises can be pickled.

    Returns:
      What it returned there.

    Raises:
      Exception: What it raised there.
    """
    if count() == 1:
        return function()
    content = b""
    if is_primary():
        try:
            content = pickle.dumps((function(), None))
        except (Exception, KeyboardInterrupt) as error:
            content = _pickled_error(error)
    found, raised = pickle.loads(_broadcast(content))
    if raised is not None:
        raise raised
    return found


def _pickled_error(error: BaseException) -> bytes:
    """An error as the outcome of a function; those of libraries may not be pickled."""
    try:
        content = pickle.dumps((None, error))
        pickle.loads(content)
    except Exception:
        content = pickle.dumps((None, RuntimeError(first_line(error))))
    return content


def _broadcast(content: bytes) -> bytes:
    """The bytes of process 0."""
    size = len(content).to_bytes(8, "little")
    first = _broadcast_array(size + content[: _SMALL - 8], _SMALL)
    length = int.from_bytes(first[:8], "little")
    if length <= _SMALL - 8:
        return first[8 : 8 + length]
    # Lengths are powers of two: every other one would be a program of its own.
    rest = _broadcast_array(content[_SMALL - 8 :], 1 << length.bit_length())
    return (first[8:] + rest)[:length]


def _broadcast_array(content: bytes, size: int) -> bytes:
    """So many bytes of process 0, filled up with zeros."""
    array = np.zeros(size, np.uint8)
    array[: len(content)] = np.frombuffer(content, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(array)).tobytes()


def on_every_process(function: Callable[[], T]) -> T:
    """Calls a function in every process; an error in one is an error in all.

    Args:
      function: What to call, such as a reader of data that each process has.

    Returns:
      What it returned here.

    Raises:
      UserError: It raised in another process.
      Exception: What it raised here.
    """
    if count() == 1:
        return function()
    result, error = None, None
    try:
        result = function()
    except Exception as raised:
        error = raised
    text = "" if error is None else first_line(error)
    line = np.zeros(1024, np.uint8)
    encoded = np.frombuffer(text.encode(), np.uint8)[: len(line)]
    line[: len(encoded)] = encoded
    lines = np.asarray(multihost_utils.process_allgather(line))
    if error is not None:
        raise error
    for index, found in enumerate(lines):
        if message := found.tobytes().rstrip(b"\0").decode(errors="replace"):
            raise UserError(f"Process {index}: {message}")
    return result  # type: ignore[return-value]


def largest(*values: float) -> list[float]:
    """The largest value that any process has, for each of these.

    Examples:
      >>> largest(1.0, 2.0)
      [1.0, 2.0]
    """
    if count() == 1:
        return list(values)
    gathered = multihost_utils.process_allgather(np.array(values, np.float32))
    return [float(value) for value in np.max(np.asarray(gathered), axis=0)]


def gathered(array: Any) -> np.ndarray:
    """The numbers of an array, whole; all processes ask for it together."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return numbers_of(array)
    numbers = without_keys(array)
    return np.asarray(multihost_utils.process_allgather(numbers, tiled=True))


def stops() -> bool:
    """Whether this process should stop: there was a signal, or its watcher died."""
    return interrupts.arrived() or _pulse.is_orphan()


def interrupted() -> bool:
    """Whether one of the processes should stop; asked by all of them together."""
    beat()
    return bool(largest(stops())[0])


def check_interrupt() -> None:
    """Raises in every process if one of them should stop.

    Raises:
      KeyboardInterrupt: One should.
    """
    if interrupted():
        raise KeyboardInterrupt


class _Pulse:
    """A file that shows whoever watches this process that it works."""

    def __init__(self) -> None:
        self.path = os.environ.get(PULSE_VARIABLE)
        self.watcher = os.getppid()
        self.beats = self.step = 0

    def beat(self, step: int | None = None) -> None:
        """Writes the next beat."""
        if self.path is None:
            return
        self.beats += 1
        self.step = self.step if step is None else step
        # The watcher must not see half a line.
        draft = Path(f"{self.path}.draft")
        draft.write_text(f"{self.beats} {self.step}\n")
        draft.replace(self.path)

    def is_orphan(self) -> bool:
        """Whether the watcher has died."""
        return self.path is not None and os.getppid() != self.watcher


_pulse = _Pulse()


def beat(step: int | None = None) -> None:
    """Shows that this process works, where somebody watches it.

    Args:
      step: Steps that its group has taken; None leaves the last number.
    """
    _pulse.beat(step)
