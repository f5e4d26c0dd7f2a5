"""What the gradient's variance costs on losses that are hard for it, with limits.

For every case of `benchmarks.variance_models`: the time of the jitted
`value_grad_and_variance` over that of the jitted `value_and_grad` of the mean loss,
called in turn in one process; temporary memory and compile time of both programs; what
`explain_variance` says; and, on a small version, the largest relative error against
float64 gradients of all examples.

    python -m benchmarks.gradient_variance_cases --label after
    python -m benchmarks.gradient_variance_cases --cases lora_merged,cbow
    python -m benchmarks.gradient_variance_cases --table    (what has been measured)
    python -m benchmarks.gradient_variance_cases --page     (the table of the docs)

Every case runs in a process of its own, and is stopped at a time limit; what it had
measured until then is kept. Some 15 minutes on two cores.
"""

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dissect_optax
from benchmarks.environment import enable_x64, environment
from benchmarks.variance_models import CASES, Case, Problem

RESULTS = Path(__file__).parent / "results" / "gradient_variance_cases.json"
SAMPLE_SECONDS = 0.01  # Shorter calls are repeated within a sample.


# ---- One case ----------------------------------------------------------------------


def _mean_loss(problem: Problem, params: Any, batch: Any, *shared: Any) -> jax.Array:
    """Mean loss over a batch."""
    axes = (None, 0, *(None for _ in shared))
    return jax.vmap(problem.loss, axes)(params, batch, *shared).mean()


def _programs(problem: Problem) -> dict[str, Callable[..., Any]]:
    """The plain gradient and ours."""
    return {
        "plain": jax.value_and_grad(functools.partial(_mean_loss, problem)),
        "ours": dissect_optax.value_grad_and_variance(problem.loss),
    }


def _arguments(problem: Problem) -> tuple[Any, ...]:
    """Arguments of both programs."""
    return problem.params, problem.batch, *problem.shared


def small_errors(case: Case, *, wide: bool) -> dict[str, float]:
    """Largest errors on the small case, relative to the largest entry of a leaf.

    In float64 if `wide`, else in float32; the reference is in float64 either way.
    """
    problem = case.make(**case.small)
    axes = (None, 0, *(None for _ in problem.shared))
    with enable_x64(True):
        upcast = jax.tree.map(_in_float64, _arguments(problem))
        each = jax.jit(jax.vmap(jax.grad(problem.loss), axes))(*upcast)
    with enable_x64(wide):
        arguments = upcast if wide else _arguments(problem)
        _, grad, variance = jax.jit(_programs(problem)["ours"])(*arguments)
    name = "float64" if wide else "float32"
    return {
        f"{name}_gradient_error": _error(grad, each, _mean),
        f"{name}_variance_error": _error(variance, each, _variance_of_mean),
    }


def _in_float64(leaf: jax.Array) -> jax.Array:
    """A floating-point array in float64."""
    wide = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(jnp.float64) if wide else leaf


def _mean(each: np.ndarray) -> np.ndarray:
    """Mean over examples."""
    return each.mean(0)


def _variance_of_mean(each: np.ndarray) -> np.ndarray:
    """Eq. (44)."""
    return each.var(0, ddof=1) / each.shape[0]


def _error(tree: Any, each: Any, statistic: Callable[..., Any]) -> float:
    """Largest error over the leaves of a tree."""
    errors = []
    for leaf, gradients in zip(
        jax.tree.leaves(tree), jax.tree.leaves(each), strict=True
    ):
        wanted = statistic(np.asarray(gradients))
        scale = np.abs(wanted).max() or 1.0
        errors.append(float(np.abs(np.asarray(leaf) - wanted).max() / scale))
    return _digits(max(errors)) if np.isfinite(errors).all() else math.inf


def explained(problem: Problem) -> dict[str, Any]:
    """What `explain_variance` says, and the megabytes of its largest parameter."""
    report = dissect_optax.explain_variance(problem.loss)(*_arguments(problem))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(problem.params)]
    expected = [
        row.numbers * dtype.itemsize for row, dtype in zip(report, dtypes, strict=True)
    ]
    return {
        "routes": {row.parameter or "params": list(row.routes) for row in report},
        "explained_megabytes": _megabytes(max(expected)),
        "explained_operations": float(sum(row.operations for row in report)),
    }


def _megabytes(count: float) -> float:
    """Bytes in megabytes."""
    return round(count / 1e6, 3)


def _digits(number: float) -> float:
    """A number to four significant digits."""
    return float(f"{number:.4g}")


def compiled_programs(problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both compiled programs, with how long they took to build and what they need."""
    programs, record = {}, {}
    for name, function in _programs(problem).items():
        start = time.perf_counter()
        lowered = jax.jit(function).lower(*_arguments(problem))
        traced = time.perf_counter()
        programs[name] = lowered.compile()
        done = time.perf_counter()
        analysis = programs[name].memory_analysis()
        assert analysis is not None
        record[f"{name}_trace_seconds"] = round(traced - start, 2)
        record[f"{name}_compile_seconds"] = round(done - traced, 2)
        record[f"{name}_bytes"] = analysis.temp_size_in_bytes
    copy = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.copy))
    plain, ours = record.pop("plain_bytes"), record.pop("ours_bytes")
    record |= {
        "plain_megabytes": _megabytes(plain),
        "ours_megabytes": _megabytes(ours),
        "copy_megabytes": _megabytes(copy),
        "copies_beyond": _digits(max(0.0, ours - 1.5 * plain) / copy),
    }
    return programs, record


def timed(
    programs: dict[str, Any], arguments: tuple[Any, ...], rounds: int, seconds: float
) -> dict[str, float]:
    """Median milliseconds of both programs, called in turn, and their ratio.

    A sample of a short program is the mean over several calls. After `seconds` no new
    round is begun, if there have been three.
    """
    repeats = {}
    for name, program in programs.items():
        jax.block_until_ready(program(*arguments))
        once = _seconds(program, arguments, 1)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
    samples: dict[str, list[float]] = {name: [] for name in programs}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - start > seconds:
            break
        for name, program in programs.items():
            samples[name].append(_seconds(program, arguments, repeats[name]))
    plain, ours = (statistics.median(samples[name]) for name in ("plain", "ours"))
    within = [b / a for a, b in zip(samples["plain"], samples["ours"], strict=True)]
    return {
        "plain_milliseconds": _digits(1e3 * plain),
        "ours_milliseconds": _digits(1e3 * ours),
        "time_ratio": _digits(ours / plain),
        "smallest_time_ratio": _digits(min(within)),
        "largest_time_ratio": _digits(max(within)),
        "rounds": len(within),
    }


def _seconds(program: Any, arguments: tuple[Any, ...], repeats: int) -> float:
    """Mean seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(program(*arguments))
    return (time.perf_counter() - start) / repeats


def measure(name: str, rounds: int, seconds: float) -> None:
    """Print what is found out about a case, one JSON object after the other."""
    case = CASES[name]
    problem = case.make()
    _say(**explained(problem))
    programs, record = compiled_programs(problem)
    _say(**record)
    _say(**timed(programs, _arguments(problem), rounds, seconds))
    # After the times: whether the small case is right does not depend on them.
    for wide in (False, True):
        _say(**small_errors(case, wide=wide))


def _say(**record: Any) -> None:
    """Print a part of a record."""
    print(json.dumps(record), flush=True)


# ---- All cases ---------------------------------------------------------------------


def run_case(name: str, rounds: int, seconds: float, time_limit: float) -> dict:
    """The record of one case, measured in a process of its own."""
    case = CASES[name]
    record: dict[str, Any] = {
        "case": name,
        "group": case.group,
        "time_limit": case.time_limit,
        "copy_limit": case.copy_limit,
        "load_average": round(os.getloadavg()[0], 2),
    }
    command = [sys.executable, "-m", __spec__.name, "--measure", name]
    command += ["--rounds", str(rounds), "--seconds", str(seconds)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=time_limit
        )
        written = done.stdout
        if done.returncode:
            record["failure"] = (done.stderr.strip().splitlines() or ["killed"])[-1]
    except subprocess.TimeoutExpired as stopped:
        output = stopped.stdout or b""
        written = output.decode() if isinstance(output, bytes) else output
        record["failure"] = f"stopped after {time_limit:g} s"
    for line in written.splitlines():
        if line.startswith("{"):
            record |= json.loads(line)
    return record


COLUMNS = (
    "case",
    "time ratio (limit)",
    "plain → ours, ms",
    "plain → ours, MB",
    "copies beyond (limit)",
    "MB more: found, explained",
    "compile s, plain → ours",
    "error in float32, float64",
)


def table_row(record: dict[str, Any]) -> str:
    """A record as a row of a Markdown table; what is over its limit is bold."""
    if "time_ratio" not in record and "copies_beyond" not in record:
        cells = [record["case"], record.get("failure", ""), *[""] * (len(COLUMNS) - 2)]
        return f"| {' | '.join(cells)} |"
    ratio, copies = record.get("time_ratio"), record["copies_beyond"]
    found = record["ours_megabytes"] - record["plain_megabytes"]
    cells = [
        record["case"],
        record.get("failure", "")
        if ratio is None
        else _limited(ratio, record["time_limit"]),
        _arrow(record, "milliseconds", ".3g"),
        _arrow(record, "megabytes", ".1f"),
        _limited(copies, record["copy_limit"]),
        f"{found:.1f}, {record['explained_megabytes']:.1f}",
        _arrow(record, "compile_seconds", ".1f"),
        f"{record.get('float32_variance_error', math.nan):.0e}, "
        f"{record.get('float64_variance_error', math.nan):.0e}",
    ]
    return f"| {' | '.join(cells)} |"


def _arrow(record: dict[str, Any], quantity: str, form: str) -> str:
    """Of the plain gradient and of ours."""
    plain, ours = (
        record.get(f"{name}_{quantity}", math.nan) for name in ("plain", "ours")
    )
    return f"{plain:{form}} → {ours:{form}}"


def _limited(number: float, limit: float) -> str:
    """A number with its limit, bold where it is larger."""
    text = f"{number:.2f} ({limit:g})"
    return f"**{text}**" if number > limit else text


def header() -> str:
    """The head of the table."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


# ---- The table of docs/gradient_variance.md ----------------------------------------


def page_table(results: dict[str, Any]) -> str:
    """The hard losses, before and after, as docs/gradient_variance.md shows them.

    The networks have a table of their own there.
    """
    runs = [
        {record["case"]: record for record in results[label]["records"]}
        for label in ("before", "after")
        if label in results
    ]
    labels = "before → now" if len(runs) > 1 else "before"
    rows = [
        f"| loss | time ratio, {labels} | MB beyond the plain gradient's, {labels} |",
        "|---|---|---|",
    ]
    for name, case in CASES.items():
        if case.group == "networks" or not any(name in run for run in runs):
            continue
        records = [run.get(name, {}) for run in runs]
        ratios = " → ".join(map(_page_ratio, records))
        megabytes = " → ".join(map(_page_megabytes, records))
        rows.append(f"| {_description(case)} (`{name}`) | {ratios} | {megabytes} |")
    return "\n".join(rows)


def _description(case: Case) -> str:
    """The first sentence on a case, without its full stop."""
    make = case.make
    function = make.func if isinstance(make, functools.partial) else make
    assert function.__doc__ is not None
    return function.__doc__.splitlines()[0].removesuffix(".")


def _page_ratio(record: dict[str, Any]) -> str:
    """A time ratio to two or three digits, or why there is none."""
    ratio = record.get("time_ratio")
    if ratio is None:
        return record.get("failure", "not measured")
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _page_megabytes(record: dict[str, Any]) -> str:
    """Temporary memory beyond that of the plain gradient."""
    if "ours_megabytes" not in record:
        return "not measured"
    megabytes = max(0.0, record["ours_megabytes"] - record["plain_megabytes"])
    return f"{megabytes:.0f}" if megabytes >= 10 else f"{megabytes:.1f}"


def main() -> None:
    """Measure cases, print a table as they end, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--label", default="now", help="name of this set of results")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20, help="of timing, per case")
    parser.add_argument("--time-limit", type=float, default=240, help="per case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="tabulate only")
    parser.add_argument("--page", action="store_true", help="the table of the docs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.rounds, arguments.seconds)
        return
    results: dict[str, Any] = {}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    if arguments.table:
        for label, run in results.items():
            print(f"{label}\n\n{header()}")
            print("\n".join(map(table_row, run["records"])), end="\n\n")
        return
    if arguments.page:
        print(page_table(results))
        return
    names = arguments.cases.split(",")
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"unknown cases {unknown}; there are {', '.join(CASES)}")
    print(header(), flush=True)
    run = results.setdefault(arguments.label, {"records": []})
    run["environment"] = environment()
    for name in names:
        record = run_case(
            name, arguments.rounds, arguments.seconds, arguments.time_limit
        )
        print(table_row(record), flush=True)
        kept = {r["case"]: r for r in [*run["records"], record]}
        run["records"] = [kept[name] for name in CASES if name in kept]
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
