"""How a command ends: its exit status, and a sentence for what went wrong."""

import os
import sys
from collections.abc import Callable

import jax

from dissect_optax.dissection._errors import UserError, first_line
from dissect_optax.dissection._interrupts import recorded

MISTAKE = 2
INTERRUPTED = 130  # The exit status that shells expect after Ctrl-C.


def exit_status(
    program: str,
    action: Callable[[], object],
    *,
    goes_on: Callable[[], str],
    advice: str = "",
) -> int:
    """Runs a command and answers what goes wrong in a sentence.

    Args:
      program: The program's name, which begins every sentence.
      action: The command.
      goes_on: What to say after an interruption.
      advice: What to say after an error of the file system.

    Returns:
      The exit status: zero, `MISTAKE` or `INTERRUPTED`.
    """
    try:
        with recorded():
            action()
            # What is printed may be kept until here, and its disk be full.
            sys.stdout.flush()
    except UserError as error:
        return _mistake(program, str(error))
    except KeyboardInterrupt:
        print(f"\nInterrupted. {goes_on()}", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.filename is None and not _can_print():
            return _mistake(
                program,
                f"What is printed could not be written: {error.strerror or error}. All"
                " that was finished is kept.",
            )
        place = f": {error.filename}" if error.filename else ""
        # What is kept, say.
        notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
        return _mistake(program, f"{error.strerror or error}{place}.{notes}{advice}")
    except Exception:
        if trouble := _trouble_of_jax():
            return _mistake(program, trouble)
        raise
    return 0


def _mistake(program: str, sentence: str) -> int:
    """Prints the sentence."""
    print(f"{program}: {sentence}", file=sys.stderr)
    return MISTAKE


def _can_print() -> bool:
    """Whether standard output takes what is printed; if not, it is given up."""
    try:
        # What failed once is not tried again by a flush alone.
        print()
        sys.stdout.flush()
    except OSError:
        # Python would try once more at its end, and complain.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return False
    return True


def _trouble_of_jax() -> str | None:
    """Why JAX cannot start, as a sentence; None if it can."""
    try:
        jax.devices()
    except Exception as error:  # JAX raises an AssertionError, too.
        wanted = os.environ.get("JAX_PLATFORMS", "")
        return (
            f"JAX cannot start with JAX_PLATFORMS='{wanted}': {first_line(error)} Unset"
            " it to run on what there is, or install JAX for that device."
        )
    return None
