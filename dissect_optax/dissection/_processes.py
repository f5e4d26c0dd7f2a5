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
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dissect_optax.dissection import _interrupts as interrupts
from dissect_optax.dissection._errors import UserError, first_line

T = TypeVar("T")

# What most messages fit into, so that they are one program.
_SMALL = 8192
# After this time a process that ends does not wait for the others any longer.
_SECONDS_TO_END = 15.0
# The name of a file in which a process counts what it does, for who watches it.
PULSE_VARIABLE = "DISSECT_OPTAX_PULSE"
_beats = 0


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
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
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


def end(status: int) -> None:
    """Leaves the other processes; does nothing where there are none.

    Args:
      status: The exit status. After an error that the others do not know of, the
        process ends here and now, which ends them, too.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # It waits for all processes, one of which may never come.
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(_SECONDS_TO_END)
    if thread.is_alive():
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
    content, result = b"", None
    if is_primary():
        try:
            result, error = function(), None
        except (Exception, KeyboardInterrupt) as raised:
            result, error = None, raised
        content = _pickled(result, error)
    found, error = pickle.loads(_broadcast(content))
    if error is not None:
        raise error
    # Process 0 goes on with its own.
    return result if is_primary() else found


def _pickled(result: Any, error: BaseException | None) -> bytes:
    """Result and error as bytes; errors of libraries may not be pickled."""
    try:
        content = pickle.dumps((result, error))
        pickle.loads(content)
    except Exception:
        if error is None:
            raise
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


def interrupted() -> bool:
    """Whether there was a signal in any process; asked by all of them together."""
    beat()
    return bool(largest(interrupts.arrived())[0])


def check_interrupt() -> None:
    """Raises in every process if there was a signal in one.

    Raises:
      KeyboardInterrupt: There was one.
    """
    if interrupted():
        raise KeyboardInterrupt


def beat(step: int | None = None) -> None:
    """Shows that this process works, where somebody watches it.

    Args:
      step: Steps that its group has taken; None leaves the last number.
    """
    global _beats, _step
    path = os.environ.get(PULSE_VARIABLE)
    if path is None:
        return
    _beats += 1
    _step = _step if step is None else step
    # The watcher must not see half a line.
    draft = Path(f"{path}.draft")
    draft.write_text(f"{_beats} {_step}\n")
    draft.replace(path)


_step = 0
