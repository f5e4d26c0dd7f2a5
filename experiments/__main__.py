"""`python -m experiments`; Ctrl-C is answered while modules are imported, too."""

import os
import sys

from experiments import interrupts


def main() -> int:
    """Runs the command line; returns the exit status."""
    try:
        # JAX's own callbacks would lose one that arrives in them.
        with interrupts.noted():
            from experiments import command_line
    except KeyboardInterrupt:
        print("\nInterrupted before anything began.", file=sys.stderr)
        return 130
    status = command_line.main(sys.argv[1:])
    if status == command_line.INTERRUPTED:
        # The ordinary way out would wait for what the device still computes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
