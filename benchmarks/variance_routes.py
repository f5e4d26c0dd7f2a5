"""Which route the variance of every parameter takes, and what changed with a new JAX.

    python -m benchmarks.variance_routes            (writes the committed record)
    python -m benchmarks.variance_routes --check    (prints what differs from it)

A route depends on the form of the program that JAX traces. Where a new version changes
the form, the numbers stay right, and a parameter may fall to a slower route: `--check`
ends with exit code 1 then. Half a minute; nothing is computed.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import dissect_optax
from benchmarks.environment import environment
from benchmarks.variance_models import CASES

RECORD = Path(__file__).parent / "results" / "variance_routes.json"

Routes = dict[str, dict[str, str]]


def routes() -> Routes:
    """The routes of all parameters of all cases."""
    found: Routes = {}
    for name, case in CASES.items():
        problem = case.make()
        explain = dissect_optax.explain_variance(problem.loss)
        with warnings.catch_warnings():
            # That gradients are stored is what the record says.
            warnings.simplefilter("ignore", UserWarning)
            report = explain(problem.params, problem.batch, *problem.shared)
        found[name] = {row.parameter: ", ".join(row.routes) for row in report}
    return found


def changes(before: Routes, now: Routes) -> list[str]:
    """A line for every parameter whose route differs."""
    lines = []
    for case in sorted(before.keys() | now.keys()):
        old, new = before.get(case, {}), now.get(case, {})
        for parameter in sorted(old.keys() | new.keys()):
            one, other = old.get(parameter, "none"), new.get(parameter, "none")
            if one != other:
                lines.append(f"{case} {parameter}: {one} -> {other}")
    return lines


def main() -> int:
    """Write the record, or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the record")
    if not parser.parse_args().check:
        record = {"environment": environment(), "routes": routes()}
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return 0
    before = json.loads(RECORD.read_text())
    lines = changes(before["routes"], routes())
    print(f"{len(lines)} routes differ from those of {before['environment']}.")
    print(*lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
