"""Seconds that `import dissect_optax` adds to `import optax`.

    python -m benchmarks.import_time

Each round is a fresh interpreter that imports Optax first; about half a minute.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import environment

PROGRAM = """
import time
start = time.perf_counter()
import optax
middle = time.perf_counter()
import dissect_optax
print(middle - start, time.perf_counter() - middle)
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/import_time.json")
    )
    args = parser.parse_args()
    command = [sys.executable, "-c", PROGRAM]
    rounds = []
    for _ in range(args.rounds + 1):
        output = subprocess.run(command, capture_output=True, check=True, text=True)
        rounds.append([float(number) for number in output.stdout.split()])
    # The first round warms the file system's cache.
    optax_seconds, added_seconds = map(statistics.median, zip(*rounds[1:], strict=True))
    print(
        f"import optax: {optax_seconds:.3f} s; dissect_optax adds {added_seconds:.3f} s"
    )
    report = {
        "environment": environment(),
        "import_optax_seconds": optax_seconds,
        "added_seconds": added_seconds,
        "rounds": args.rounds,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Written to {args.output}")


if __name__ == "__main__":
    main()
