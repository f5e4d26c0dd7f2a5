"""Time, memory and error of gradient and variance, for every method side by side.

Ratios are to the jitted `value_and_grad` of the mean loss. All methods are called in
turn in one process; a run is the median over its rounds, and what is reported is the
median over the runs.

    python -m benchmarks.gradient_variance
    python -m benchmarks.gradient_variance --cases lstm:32 --methods plain,ours
    python -m benchmarks.gradient_variance --torch /path/to/python   (with backpack)
    python -m benchmarks.gradient_variance --figure        (draws and tabulates only)

Some 20 minutes on two cores, and 4 GB of memory for `vmap` on the largest networks.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dissect_optax
from benchmarks.environment import enable_x64, environment
from benchmarks.networks import NETWORKS, Network

RESULTS = Path(__file__).parent / "results" / "gradient_variance.json"
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "gradient_variance.svg"
TORCH_SCRIPT = Path(__file__).parent / "gradient_variance_torch.py"
CASES = (
    "mnist_mlp:128",
    "cifar10_3c3d:256",
    "cifar100_allcnnc:16",
    "cifar100_allcnnc:32",
    "transformer_block:32",
    "lstm:32",
    "embedding:32",
)
CHUNK = 8
DIFFERENCES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
SLOW = 5.0  # A method that takes so many times the plain gradient is called once a run.


def _plain(network: Network) -> Callable[..., Any]:
    """Value and gradient of the mean loss: what the others are measured against."""
    return jax.value_and_grad(functools.partial(_mean_loss, network.loss))


def _mean_loss(loss: Callable[..., Any], params: Any, batch: Any) -> jax.Array:
    """Mean loss over a batch."""
    return jax.vmap(loss, (None, 0))(params, batch).mean()


def _ours(network: Network) -> Callable[..., Any]:
    """This library."""
    return dissect_optax.value_grad_and_variance(network.loss)


def _ours_two_pass(network: Network) -> Callable[..., Any]:
    """This library, with deviations in a second pass."""
    return dissect_optax.value_grad_and_variance(network.loss, two_pass=True)


def _vmap(network: Network) -> Callable[..., Any]:
    """All per-example gradients, then mean and variance."""
    return functools.partial(_from_all, network.loss)


def _from_all(loss: Callable[..., Any], params: Any, batch: Any) -> Any:
    """Value, gradient and variance from stored per-example gradients."""
    values, each = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)
    size = values.shape[0]
    grads = jax.tree.map(lambda g: g.mean(0), each)
    return values.mean(), grads, jax.tree.map(lambda g: g.var(0, ddof=1) / size, each)


def _chunked(network: Network) -> Callable[..., Any]:
    """Per-example gradients of a few examples at a time, in sums."""
    return functools.partial(_from_chunks, network.loss)


def _from_chunks(loss: Callable[..., Any], params: Any, batch: Any) -> Any:
    """Value, gradient and variance from sums over chunks."""
    size = batch[1].shape[0]
    chunks = jax.tree.map(lambda x: x.reshape(-1, CHUNK, *x.shape[1:]), batch)

    def add(sums: Any, chunk: Any) -> tuple[Any, None]:
        values, each = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, chunk)
        part = (
            values.sum(),
            jax.tree.map(lambda g: g.sum(0), each),
            jax.tree.map(lambda g: jnp.square(g).sum(0), each),
        )
        return jax.tree.map(jnp.add, sums, part), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (value, total, squares), _ = jax.lax.scan(
        add, (jnp.zeros(()), zeros, zeros), chunks
    )
    grads = jax.tree.map(lambda g: g / size, total)
    variances = jax.tree.map(
        lambda q, g: (q / size - g**2) / (size - 1), squares, grads
    )
    return value / size, grads, variances


def _aggregating(network: Network) -> Callable[..., Any]:
    """Optax's experimental aggregator, which takes all per-example gradients."""
    aggregator = (
        optax.experimental.aggregating.get_per_element_mean_and_sum_sq_diff_grads()
    )
    return functools.partial(_aggregated, network.loss, aggregator)


def _aggregated(
    loss: Callable[..., Any], aggregator: Any, params: Any, batch: Any
) -> Any:
    """Value, gradient and variance by an Optax aggregator."""
    values, each = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, batch)
    (grads, extra), _ = aggregator.update(each, aggregator.init(params), params)
    size = values.shape[0]
    variances = jax.tree.map(
        lambda q: q / (size * (size - 1)), extra["sum_sq_diff_grads"]
    )
    return values.mean(), grads, variances


METHODS: dict[str, Callable[[Network], Callable[..., Any]]] = {
    "plain": _plain,
    "ours": _ours,
    "ours_two_pass": _ours_two_pass,
    "vmap": _vmap,
    "chunked_vmap": _chunked,
    "optax_aggregating": _aggregating,
}


def reference_variance(network: Network) -> list[np.ndarray]:
    """Eq. (44) from one float64 gradient after the other, in two passes."""
    size = network.batch[1].shape[0]
    with enable_x64(True):
        params, batch = _in_float64((network.params, network.batch))
        gradient = jax.jit(jax.grad(network.loss))
        each = functools.partial(_gradient_of, gradient, params, batch)
        mean = [np.zeros(p.shape) for p in jax.tree.leaves(params)]
        for k in range(size):
            mean = [m + g / size for m, g in zip(mean, each(k), strict=True)]
        spread = [np.zeros(p.shape) for p in jax.tree.leaves(params)]
        for k in range(size):
            spread = [
                s + (g - m) ** 2 for s, g, m in zip(spread, each(k), mean, strict=True)
            ]
    return [s / (size * (size - 1)) for s in spread]


def _in_float64(tree: Any) -> Any:
    """Floating-point leaves in float64."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        tree,
    )


def _gradient_of(
    gradient: Callable[..., Any], params: Any, batch: Any, k: int
) -> list[np.ndarray]:
    """Gradient of example `k`."""
    example = jax.tree.map(lambda x: x[k], batch)
    return [np.asarray(g) for g in jax.tree.leaves(gradient(params, example))]


def _error(variance: Any, reference: list[np.ndarray]) -> float:
    """Largest error of a variance, relative to the largest one of its parameter."""
    return max(
        float(np.abs(np.asarray(s) - r).max() / r.max())
        for s, r in zip(jax.tree.leaves(variance), reference, strict=True)
    )


def measure_case(case: str, methods: list[str], rounds: int, runs: int) -> list[dict]:
    """One record for each method on one network and batch size."""
    name, _, batch = case.partition(":")
    network = NETWORKS[name](int(batch))
    arguments = network.params, network.batch
    reference = reference_variance(network)
    compiled, records = {}, []
    for method in methods:
        start = time.perf_counter()
        lowered = jax.jit(METHODS[method](network)).lower(*arguments)
        compiled[method] = lowered.compile()
        seconds = time.perf_counter() - start
        analysis = compiled[method].memory_analysis()
        assert analysis is not None
        memory = analysis.temp_size_in_bytes
        record = {
            "network": name,
            "batch": int(batch),
            "method": method,
            "compile_seconds": round(seconds, 2),
            "temporary_megabytes": round(memory / 1e6, 2),
        }
        result = jax.block_until_ready(compiled[method](*arguments))
        if method != "plain":
            record["float32_error"] = _error(result[2], reference)
        if method == "ours":
            with enable_x64(True):
                wide = jax.jit(METHODS[method](network))(*_in_float64(arguments))
                record["float64_error"] = _error(wide[2], reference)
        records.append(record)
    times = [_timed_run(compiled, arguments, rounds) for _ in range(runs)]
    parameters = sum(p.size for p in jax.tree.leaves(network.params))
    for record in records:
        method = record["method"]
        ratios = [run[method] / run["plain"] for run in times]
        record["parameter_megabytes"] = round(4 * parameters / 1e6, 2)
        record["milliseconds"] = _digits(
            1e3 * statistics.median(run[method] for run in times)
        )
        record["ratio"] = _digits(statistics.median(ratios))
        record["ratio_of_each_run"] = [_digits(r) for r in ratios]
        print(json.dumps(record), flush=True)
    return records


def _digits(number: float) -> float:
    """A number to four significant digits."""
    return float(f"{number:.4g}")


def _timed_run(
    compiled: dict[str, Any], arguments: Any, rounds: int
) -> dict[str, float]:
    """Median seconds of each method, called in turn."""
    seconds: dict[str, list[float]] = {method: [] for method in compiled}
    for round_ in range(rounds):
        for method, function in compiled.items():
            plain = seconds["plain"]
            slow = seconds[method] and seconds[method][0] > SLOW * plain[0]
            if slow and round_ >= 1:
                continue
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            seconds[method].append(time.perf_counter() - start)
    return {method: statistics.median(s) for method, s in seconds.items()}


# ---- Where the difference of squares loses digits ----------------------------------


def _dense_loss(params: jax.Array, example: tuple[jax.Array, jax.Array]) -> jax.Array:
    """A loss whose gradient is the outer product of the example's two vectors."""
    x, cotangent = example
    return (x @ params) @ cotangent


def cancellation(differences: tuple[float, ...]) -> list[dict[str, float]]:
    """Median relative error of ŝ for examples that differ by a given part."""
    random = np.random.default_rng(0)
    base_x, base_d = random.normal(size=784), random.normal(size=100)
    rows = []
    for part in differences:
        x = base_x * (1 + part * random.normal(size=(128, 784)))
        d = base_d * (1 + part * random.normal(size=(128, 100)))
        batch = jnp.float32(x), jnp.float32(d)
        exact = np.einsum("bi,bj->bij", *map(np.float64, batch)).var(0, ddof=1) / 128
        row: dict[str, float] = {"difference": part}
        for two_pass in (False, True):
            run = dissect_optax.value_grad_and_variance(_dense_loss, two_pass=two_pass)
            variance = jax.jit(run)(jnp.zeros((784, 100)), batch)[2]
            error = np.abs(np.asarray(variance) - exact) / exact
            row["two_pass" if two_pass else "one_pass"] = float(np.median(error))
            if not two_pass:
                row["clamped"] = float(np.mean(np.asarray(variance) == 0))
        rows.append(row)
    return rows


# ---- The figure --------------------------------------------------------------------


_TITLES = {
    "mnist_mlp": "MNIST MLP",
    "cifar10_3c3d": "CIFAR-10 3c3d",
    "cifar100_allcnnc": "All-CNN-C",
    "transformer_block": "transformer block",
    "lstm": "LSTM",
    "embedding": "embedding and block",
}


def draw(results: dict[str, Any]) -> None:
    """Ratios of all methods, on a logarithmic axis, one row for each network."""
    from matplotlib.figure import Figure

    records = [r for r in results["records"] if r["method"] != "plain"]
    names = {
        "ours": ("value_grad_and_variance", "#d1495b", "o"),
        "vmap": ("vmap(grad)", "#66a182", "s"),
        "chunked_vmap": ("vmap(grad) in chunks", "#2e4057", "D"),
        "optax_aggregating": ("optax aggregating", "#8d96a3", "v"),
        "backpack_variance": ("BackPACK variance", "#edae49", "^"),
        "backpack_sum_grad_squared": ("BackPACK sum of squares", "#edae49", "x"),
        "torch_func": ("torch.func", "#00798c", "P"),
    }
    cases = list(dict.fromkeys((r["network"], r["batch"]) for r in records))
    figure = Figure(figsize=(7.5, 0.45 * len(cases) + 1.6))
    axes = figure.add_subplot()
    for method, (label, color, marker) in names.items():
        chosen = [r for r in records if r["method"] == method]
        if not chosen:
            continue
        axes.scatter(
            [r["ratio"] for r in chosen],
            [cases.index((r["network"], r["batch"])) for r in chosen],
            label=label,
            color=color,
            marker=marker,
            s=55 if method == "ours" else 25,
            zorder=3 if method == "ours" else 2,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.5, 2 * max([5.0, *(r["ratio"] for r in records)]))
    axes.set_yticks(range(len(cases)), [f"{_TITLES[n]}, {b}" for n, b in cases])
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.4)
    axes.set_xlabel("time / time of the plain gradient in the same framework")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.set_layout_engine("constrained")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, metadata={"Date": None})


def table(results: dict[str, Any]) -> str:
    """The records as a Markdown table, one row for each network and method."""
    lines = [
        "| network, batch | method | milliseconds | ratio (each run) | temporary MB "
        "| parameters MB | compile s |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results["records"]:
        runs = ", ".join(f"{ratio:.2f}" for ratio in r["ratio_of_each_run"])
        cells = (
            f"{r['network']}, {r['batch']}",
            r["method"],
            f"{r['milliseconds']:.1f}",
            f"{r['ratio']:.2f} ({runs})",
            r.get("temporary_megabytes", ""),
            r.get("parameter_megabytes", ""),
            r.get("compile_seconds", ""),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# ---- The command line --------------------------------------------------------------


def main() -> None:
    """Measure, write the results and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES), help="network:batch,…")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--torch", help="a Python with torch and backpack")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", action="store_true", help="draw and tabulate only")
    arguments = parser.parse_args()
    if arguments.figure:
        written = json.loads(arguments.output.read_text())
        draw(written)
        print(table(written))
        return
    methods = list(dict.fromkeys(["plain", *arguments.methods.split(",")]))
    results: dict[str, Any] = {"records": [], "cancellation": cancellation(DIFFERENCES)}
    if arguments.output.exists():
        results["records"] = json.loads(arguments.output.read_text())["records"]
    results["environment"] = environment()
    for case in filter(None, arguments.cases.split(",")):
        records = measure_case(case, methods, arguments.rounds, arguments.runs)
        _write(results, records, arguments.output)
    if arguments.torch:
        command = [arguments.torch, str(TORCH_SCRIPT), str(arguments.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peers = json.loads(done.stdout)
        results["torch_environment"] = peers["environment"]
        _write(results, peers["records"], arguments.output)
    draw(results)


def _write(results: dict[str, Any], records: list[dict], output: Path) -> None:
    """Write new records; they replace older ones of the same measurement."""
    for record in records:
        # What else the machine was doing belongs beside a time.
        record["load_average"] = round(os.getloadavg()[0], 2)
    merged = {
        (r["network"], r["batch"], r["method"]): r
        for r in [*results["records"], *records]
    }
    results["records"] = list(merged.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
