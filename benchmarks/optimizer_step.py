"""Time of one optimizer step, ours beside Optax's.

A step is `update` and `apply_updates`, jitted, with parameters and state donated, on
one float32 array. All optimizers of one size are stepped in turn in one process, and a
ratio is the median over the rounds of the ratios within a round, so that a machine
whose speed drifts does not favour either side.

    python -m benchmarks.optimizer_step
    python -m benchmarks.optimizer_step --sizes 100000 --rounds 5 --output step.json

About two minutes on two cores, 5 GB of memory for 2e7 parameters.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dissect_optax
from benchmarks.environment import environment

LEARNING_RATE = 1e-3
SECONDS_PER_ROUND = 0.02

# Optimizer, the Optax optimizer it is held against, whether it needs `grad_variance`.
OPTIMIZERS: dict[str, tuple[optax.GradientTransformation, str, bool]] = {
    "optax.adam": (optax.adam(LEARNING_RATE), "optax.adam", False),
    "optax.signum": (optax.signum(LEARNING_RATE), "optax.adam", False),
    "sgd": (dissect_optax.sgd(LEARNING_RATE), "optax.adam", False),
    "ssd": (dissect_optax.ssd(LEARNING_RATE), "optax.adam", False),
    "svag": (dissect_optax.svag(LEARNING_RATE), "optax.adam", False),
    "m_sgd": (dissect_optax.m_sgd(LEARNING_RATE), "optax.adam", False),
    "m_ssd": (dissect_optax.m_ssd(LEARNING_RATE), "optax.signum", False),
    "m_svag": (dissect_optax.m_svag(LEARNING_RATE), "optax.adam", False),
    "adam": (dissect_optax.adam(LEARNING_RATE), "optax.adam", False),
    "adam_star": (dissect_optax.adam_star(LEARNING_RATE), "optax.adam", False),
    "m_svag_mb": (dissect_optax.m_svag_mb(LEARNING_RATE), "optax.adam", True),
    "adam_star_mb": (dissect_optax.adam_star_mb(LEARNING_RATE), "optax.adam", True),
}


class Stepper:
    """One optimizer with its parameters, stepped many times in a row."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        gradient: jax.Array,
        extra_args: dict[str, jax.Array],
    ):
        """Compile the step and warm it up."""
        self._carry = (jnp.zeros_like(gradient), optimizer.init(gradient))
        self._inputs = (gradient, extra_args)
        buffers = jax.tree.leaves(self._carry[1])
        self.state_buffers = sum(leaf.size == gradient.size for leaf in buffers)
        # Parameters and state are read and written, the rest is read.
        self.bytes_to_move = 2 * _bytes(self._carry) + _bytes(self._inputs)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(carry: Any, gradient: Any, extra_args: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(gradient, state, params, **extra_args)
            return optax.apply_updates(params, updates), state

        self._step = step
        self.run(3)

    def run(self, steps: int) -> float:
        """Seconds per step."""
        start = time.perf_counter()
        for _ in range(steps):
            self._carry = self._step(self._carry, *self._inputs)
        jax.block_until_ready(self._carry)
        return (time.perf_counter() - start) / steps


def measure(size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per optimizer on `size` parameters."""
    gradient = jax.random.normal(jax.random.key(0), (size,))
    variance = {"grad_variance": jnp.ones_like(gradient)}
    steppers = {
        name: Stepper(
            optax.with_extra_args_support(optimizer),
            gradient,
            variance if needs_variance else {},
        )
        for name, (optimizer, _, needs_variance) in OPTIMIZERS.items()
    }
    copy_rate = copy_bandwidth(gradient, rounds)
    steps = max(1, round(SECONDS_PER_ROUND / steppers["optax.adam"].run(3)))
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            seconds[name].append(stepper.run(steps))
    for name, stepper in steppers.items():
        reference = OPTIMIZERS[name][1]
        pairs = zip(seconds[name], seconds[reference], strict=True)
        median = statistics.median(seconds[name])
        yield {
            "optimizer": name,
            "parameters": size,
            "milliseconds": 1e3 * median,
            "reference": reference,
            "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
            "state_buffers": stepper.state_buffers,
            "megabytes_to_move": stepper.bytes_to_move / 1e6,
            "gigabytes_per_second": stepper.bytes_to_move / median / 1e9,
            "copy_gigabytes_per_second": copy_rate,
            "rounds": rounds,
        }


def copy_bandwidth(array: jax.Array, rounds: int) -> float:
    """Gigabytes per second, read and written, of negating an array in place."""
    negate: Callable[[jax.Array], jax.Array] = jax.jit(jnp.negative, donate_argnums=0)
    array = negate(jnp.copy(array))
    seconds = []
    for _ in range(3 * rounds):
        start = time.perf_counter()
        array = jax.block_until_ready(negate(array))
        seconds.append(time.perf_counter() - start)
    return 2 * array.nbytes / statistics.median(seconds) / 1e9


def _bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [
        "| optimizer | parameters | ms | ratio | to | state buffers | MB to move "
        "| GB/s | copy GB/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        "| {optimizer} | {parameters:.0e} | {milliseconds:.3f} | {ratio:.2f} "
        "| {reference} | {state_buffers} | {megabytes_to_move:.1f} "
        "| {gigabytes_per_second:.1f} | {copy_gigabytes_per_second:.1f} |".format(**row)
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10**5, 10**6, 2 * 10**7]
    )
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/optimizer_step.json")
    )
    args = parser.parse_args()
    rows = [row for size in args.sizes for row in measure(size, args.rounds)]
    print(to_markdown(rows))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(), "rows": rows}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nWritten to {args.output}")


if __name__ == "__main__":
    main()
