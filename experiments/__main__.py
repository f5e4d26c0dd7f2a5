"""`python -m experiments`, with `launch` as several processes."""

import os
import sys

# Of the standard library alone, so that Ctrl-C is answered from here on.
from experiments import launch


def main() -> int:
    """Runs the command line; returns the exit status."""
    # Figures are files: a display that does not exist is no reason to stop.
    os.environ["MPLBACKEND"] = "agg"
    try:
        if sys.argv[1:2] == ["launch"]:
            # It trains nothing itself, and imports little.
            return launch.main(sys.argv[2:])
        from dissect_optax.dissection import run_command
        from experiments import command_line

        status = run_command(lambda: command_line.main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nInterrupted before anything began.", file=sys.stderr)
        return launch.INTERRUPTED
    if status == launch.INTERRUPTED:
        # The ordinary way out would wait for what the device still computes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
