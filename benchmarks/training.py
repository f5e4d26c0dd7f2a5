"""Steps per second of the experiments' training loop, beside two other loops.

`ours` is the engine's `advance`: steps, mini-batches and augmentation in one
compiled program. `plain` takes the same step as Flax's MNIST example does, one jitted
call after the other on mini-batches that NumPy shuffles and hands over. `torch` is the
same network, batch size, L2, augmentation and optimizer in PyTorch, on as many threads,
with the data as one tensor in memory: on few cores that is faster than a `DataLoader`,
whose workers would take the cores away from the network. Convolutions are measured in
both of PyTorch's layouts, and with and without augmentation.

All take turns in rounds, and a ratio is the median over the rounds of the ratios within
a round, so that a machine whose speed drifts does not favour any. While one takes its
turn the others sleep. Images and labels are random: steps cost the same, and nothing
has to be downloaded.

    python -m benchmarks.training --torch /path/to/python       (with torch)
    python -m benchmarks.training --problems mnist --members 10 (a vmapped group, too)
    python -m benchmarks.training --smoke            (in seconds, and writes nothing)

All three problems beside PyTorch take nine minutes on two CPU cores.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import environment
from benchmarks.training_loops import (
    OurLoop,
    PlainLoop,
    TorchLoop,
    TorchProcess,
    without_augmentation,
)
from dissect_optax.dissection import (
    METHODS,
    Data,
    Method,
    Settings,
    get_method,
    lower_gradient,
)
from experiments.problems import get_problem
from experiments.problems.image_problem import Examples, ImageProblem

RESULTS = Path(__file__).parent / "results" / "training.json"
IMAGES = 10_000
IN_TORCH = ("m_sgd", "adam")


class Case(NamedTuple):
    """What the images of a problem are like, and how long it is measured."""

    image_shape: tuple[int, ...]
    classes: int
    augmented: bool
    steps: int  # In one turn.
    rounds: int


CASES = {
    "mnist": Case((28, 28, 1), 10, False, steps=50, rounds=24),
    "cifar10": Case((32, 32, 3), 10, True, steps=4, rounds=10),
    "cifar100": Case((32, 32, 3), 100, True, steps=2, rounds=4),
}

# Dense teraflops per second in bfloat16 and in TF32, by how the device's name begins.
# From NVIDIA's data sheets of A100, H100 and H200; half of the rate where they print
# the one with sparsity.
PEAKS = {
    "NVIDIA A100": (312.0, 156.0),
    "NVIDIA H100 PCIe": (756.5, 378.0),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7),
    "NVIDIA H200": (989.4, 494.7),
}


class Way(NamedTuple):
    """A way to train a problem."""

    loop: str
    augmented: bool
    members: int = 1


Turn = Callable[[int], float]  # From a number of steps to the seconds of one.
PRODUCT = "product of matrices"  # The device with nothing else in its way.
_PRODUCT_SIZE = 2048


def random_dataset(case: Case) -> Data:
    """Random images and labels, on the device."""
    random = np.random.default_rng(0)
    shape = (IMAGES, *case.image_shape)
    training = Examples(
        jnp.asarray(random.integers(256, size=shape, dtype=np.uint8)),
        jnp.asarray(random.integers(case.classes, size=IMAGES, dtype=np.int32)),
    )
    return Data(training=training, test=training)


def turns_in_jax(
    problem: ImageProblem, method: Method, settings: Settings, members: int
) -> dict[Way, Turn]:
    """Every way to train in JAX, the experiments' first."""
    case = CASES[problem.name]
    arguments = method, settings, random_dataset(case)
    turns: dict[Way, Turn] = {
        Way("ours", case.augmented): OurLoop(problem, *arguments).turn,
        Way("plain", case.augmented): PlainLoop(problem, *arguments).turn,
    }
    if case.augmented:
        bare = without_augmentation(problem)
        turns[Way("ours", False)] = OurLoop(bare, *arguments).turn
    turns[Way(PRODUCT, case.augmented)] = multiply_matrices
    if members > 1:
        group = OurLoop(problem, *arguments, members)
        turns[Way("ours", case.augmented, members)] = group.turn
    return turns


def multiply_matrices(steps: int) -> float:
    """Seconds per product of two square matrices, in the precision of the loops."""
    matrix = jnp.ones((_PRODUCT_SIZE, _PRODUCT_SIZE), jnp.float32)
    start = time.perf_counter()
    for _ in range(steps):
        (matrix @ matrix).block_until_ready()
    return (time.perf_counter() - start) / steps


def turns_in_torch(
    process: TorchProcess, problem: ImageProblem, method: Method, settings: Settings
) -> dict[Way, Turn]:
    """Every way to train in PyTorch."""
    case = CASES[problem.name]
    # What has no augmentation has no convolutions either.
    both = (True, False) if case.augmented else (False,)
    return {
        Way("torch, channels last" if channels_last else "torch", augmented): TorchLoop(
            process,
            problem,
            method,
            settings,
            augmented=augmented,
            channels_last=channels_last,
        ).turn
        for augmented in both
        for channels_last in both
    }


def take_turns(
    turns: dict[Way, Turn], steps: int, rounds: int
) -> dict[Way, list[float]]:
    """Seconds per step, a list over the rounds for every way to train."""
    for turn in turns.values():  # The first turn compiles.
        turn(steps)
    seconds: dict[Way, list[float]] = {way: [] for way in turns}
    ways = list(turns)
    for _ in range(rounds):
        # To and fro: what comes before a turn may slow it down.
        for way in ways:
            seconds[way].append(turns[way](steps))
        ways.reverse()
    return seconds


def gradient_flops(problem: ImageProblem, method: Method, settings: Settings) -> float:
    """Floating-point operations in the gradient of one step of one run."""
    image_shape = CASES[problem.name].image_shape
    training: Any = Examples(jnp.zeros((1, *image_shape), jnp.uint8), jnp.zeros(1, int))
    lowered, _ = lower_gradient(problem, method, settings, training)
    return (lowered.cost_analysis() or {}).get("flops", math.nan)


def peaks(device: str) -> dict[str, float]:
    """Operations per second of a device by number format; empty if it is not known."""
    for name, (bfloat16, tf32) in PEAKS.items():
        if device.startswith(name):
            return {"bfloat16": bfloat16 * 1e12, "tf32": tf32 * 1e12}
    return {}


def to_rows(
    problem: ImageProblem,
    method: Method,
    settings: Settings,
    seconds: dict[Way, list[float]],
    device: str,
    in_jax: dict[str, Any],
    in_torch: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row for every way to train, with the environment that it was measured in."""
    flops = gradient_flops(problem, method, settings)
    rows = []
    for way, times in seconds.items():
        median = statistics.median(times)
        is_product = way.loop == PRODUCT
        operations = 2 * _PRODUCT_SIZE**3 if is_product else flops
        rate = way.members * operations / median
        pairs = zip(times, seconds[Way("ours", way.augmented)], strict=True)
        ratio = statistics.median(t / ours for t, ours in pairs)
        rows.append(
            {
                "problem": problem.name,
                "method": method.name,
                **way._asdict(),
                "milliseconds": 1e3 * median,
                "steps_per_second": 1 / median,
                # It is no step.
                "time_over_ours": None if is_product else ratio,
                "gigaflops_per_second": rate / 1e9,
                "fractions_of_peak": {
                    number: rate / peak for number, peak in peaks(device).items()
                },
                "device": device,
                "environment": in_torch if way.loop.startswith("torch") else in_jax,
                "batch_size": settings.batch_size,
                "rounds": len(times),
                # What else the machine was doing belongs beside a time.
                "load_average": round(os.getloadavg()[0], 2),
            }
        )
    return rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; what is left of an accelerator's peak is its last column."""
    has_peak = any(row["device"] != "cpu" for row in rows)
    header = [
        "problem",
        "method",
        "loop",
        "augmentation",
        "members",
        "ms per step",
        "steps per second",
        "time / ours",
        "GFLOP/s",
    ]
    if has_peak:
        header.append("of bf16, tf32 peak")
    lines = [header, ["---"] * len(header)]
    for row in rows:
        fractions = row["fractions_of_peak"].values()
        lines.append(
            [
                row["problem"],
                f"`{row['method']}`",
                row["loop"],
                "yes" if row["augmented"] else "no",
                str(row["members"]),
                f"{row['milliseconds']:.4g}",
                f"{row['steps_per_second']:.3g}",
                "–"
                if row["time_over_ours"] is None
                else f"{row['time_over_ours']:.2f}",
                f"{row['gigaflops_per_second']:.3g}",
            ]
        )
        if has_peak:
            shares = ", ".join(f"{100 * fraction:.2g} %" for fraction in fractions)
            lines[-1].append(shares or "not known")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--method",
        choices=[name for name, method in METHODS.items() if not method.needs_variance],
        default="m_sgd",
    )
    parser.add_argument("--members", type=int, default=1, help="of a vmapped group")
    parser.add_argument("--rounds", type=int, help="instead of the problem's own")
    parser.add_argument("--torch", help="a Python with torch")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.torch and jax.default_backend() != "cpu":
        parser.error("--torch measures on the CPU; set JAX_PLATFORMS=cpu beside it")
    if args.torch and args.method not in IN_TORCH:
        parser.error(f"--torch has these methods only: {', '.join(IN_TORCH)}")

    process = TorchProcess(args.torch, IMAGES) if args.torch else None
    in_torch = {} if process is None else process.environment
    in_jax = environment() | {"flax": version("flax")}
    rows = []
    for name in args.problems:
        problem, method, case = get_problem(name), get_method(args.method), CASES[name]
        assert isinstance(problem, ImageProblem)
        settings = problem.smoke if args.smoke else problem.settings
        turns = turns_in_jax(problem, method, settings, args.members)
        if process is not None:
            turns |= turns_in_torch(process, problem, method, settings)
        steps, rounds = (1, 1) if args.smoke else (case.steps, case.rounds)
        seconds = take_turns(turns, steps, args.rounds or rounds)
        device = jax.devices()[0].device_kind
        rows += to_rows(problem, method, settings, seconds, device, in_jax, in_torch)
    print(to_markdown(rows))
    if process is not None:
        process.close()
    if not args.smoke:
        write(rows, args.output)
        print(f"\nWritten to {args.output}")


def write(rows: list[dict[str, Any]], output: Path) -> None:
    """Write rows; they replace what was measured of the same problems before."""
    older = json.loads(output.read_text()) if output.exists() else []
    replaced = {_subject(row) for row in rows}
    kept = [row for row in older if _subject(row) not in replaced]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(kept + rows, indent=2) + "\n")


def _subject(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is about; all rows of one subject took turns with each other."""
    return row["device"], row["problem"], row["method"]


if __name__ == "__main__":
    main()
