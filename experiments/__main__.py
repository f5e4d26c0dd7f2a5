"""`python -m experiments`, with `launch` as several processes."""

import os
import sys

_INTERRUPTED = 130  # The exit status that shells expect after Ctrl-C.


def main() -> int:
    """Runs the command line; returns the exit status."""
    # Figures are files: a display that does not exist is no reason to stop.
    os.environ["MPLBACKEND"] = "agg"
    try:
        if sys.argv[1:2] == ["launch"]:
            # It trains nothing itself, and imports little.
            from experiments import launch

            return launch.main(sys.argv[2:])
        from dissect_optax.dissection import run_command
        from experiments import command_line

        status = run_command(lambda: command_line.main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\nInterrupted before anything began.", file=sys.stderr)
        return _INTERRUPTED
    if status == _INTERRUPTED:
        # The ordinary way out would wait for what the device still computes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
