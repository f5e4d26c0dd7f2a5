"""`python -m experiments`; Ctrl-C is answered while modules are imported, too."""

import sys


def main() -> int:
    """Runs the command line; returns the exit status."""
    try:
        from experiments import command_line
    except KeyboardInterrupt:
        print("\nInterrupted before anything began.", file=sys.stderr)
        return 130
    return command_line.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
