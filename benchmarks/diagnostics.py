"""Coverage and cost of the diagnostics.

    python -m benchmarks.diagnostics coverage   # how often intervals hold the truth
    python -m benchmarks.diagnostics cost       # in units of one training step
    python -m benchmarks.diagnostics watch      # one optimizer step with `watch` inside

Coverage repeats a measurement with new data 400 times and counts how often an interval
of 95 % holds the known truth; its own error is 1.1 %. A training step is value and
gradient of a mini-batch, jitted. All compared programs take turns, and a ratio is the
median over the rounds. Each command takes minutes on two cores and adds its part to
`results/diagnostics.json`.
"""

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import flatten_util

import dissect_optax as do
from benchmarks.environment import environment
from benchmarks.networks import NETWORKS
from dissect_optax import diagnostics, theory

OUTPUT = Path("benchmarks/results/diagnostics.json")
DIRECTIONS = ("gradient", "sign", "adapted_gradient", "adapted_sign")


# ---- Coverage ----------------------------------------------------------------------


class Setting(NamedTuple):
    """A problem with known answers, from which data can be drawn again and again."""

    loss: Callable[..., jax.Array]
    params: Any
    draw: Callable[[np.random.Generator], Any]
    truth: dict[str, float]
    arguments: dict[str, Any]
    # How many elements' signs cannot be known, roughly; for the reader.
    remark: str = ""


def _flat(d: diagnostics.Diagnostics) -> dict[str, diagnostics.Interval]:
    """All intervals of a measurement by name."""
    found = {
        "noise_scale": d.noise_scale,
        "relative_variance": d.relative_variance,
        "sign_success": d.sign_success,
    }
    for name, interval in (d.improvement or {}).items():
        found[f"improvement/{name}"] = interval
    if d.dominance is not None:
        found["dominance"] = d.dominance
    return found


def quadratic(
    size: int, batch_size: int, batches: int, noise: float, level: str
) -> Setting:
    """A rotated stochastic quadratic of §2, everything about it in closed form."""
    key = jax.random.key(size)
    problem = theory.quadratic_problem(
        jnp.logspace(0, 1, size), theory.random_rotation(key, size), noise=noise
    )
    params = jax.random.normal(jax.random.key(1), (size,))
    hessian = problem.hessian

    def loss(theta: jax.Array, x: jax.Array) -> jax.Array:
        return 0.5 * (theta - x) @ hessian @ (theta - x)

    gradient = problem.gradient(params)
    covariance = problem.gradient_covariance / batch_size
    std = problem.gradient_std / math.sqrt(batch_size)
    directions = (
        theory.gaussian_direction(gradient, covariance),
        theory.sign_direction(gradient, covariance),
        theory.gaussian_direction(
            gradient, covariance, theory.optimal_factor(gradient, std)
        ),
        theory.sign_direction(gradient, covariance, theory.adam_factor(gradient, std)),
    )
    ratio = float(jnp.sum(std**2) / jnp.sum(gradient**2))
    truth = {
        "noise_scale": ratio * batch_size,
        "relative_variance": ratio,
        "sign_success": float(theory.success_probability(gradient, std).mean()),
    }
    if level != "cheap":
        truth |= {
            f"improvement/{name}": float(
                theory.expected_improvement(direction, gradient, hessian)
            )
            for name, direction in zip(DIRECTIONS, directions, strict=True)
        }

    def draw(rng: np.random.Generator) -> np.ndarray:
        shape = (batch_size * batches, size)
        return (noise * rng.normal(size=shape)).astype(np.float32)

    return Setting(
        loss, params, draw, truth, {"batch_size": batch_size, "level": level}
    )


def planted_noise(
    size: int, batch_size: int, batches: int, eta2: float, tail: float = 0.0
) -> Setting:
    """Gradients of known mean and variance: a loss that is linear in θ.

    The elements have scales of their own and η² around `eta2`, and the noise has the
    skewness of a gamma variable of shape 1/tail, or is Gaussian.
    """
    rng = np.random.default_rng(size)
    scale = np.exp(rng.normal(size=size))
    mean = scale * rng.choice([-1, 1], size) * np.exp(0.5 * rng.normal(size=size))
    std = scale * math.sqrt(eta2 * batch_size)

    def loss(theta: jax.Array, x: jax.Array) -> jax.Array:
        return theta @ x

    def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        if not tail:
            return rng.normal(size=shape)
        return (rng.standard_gamma(1 / tail, shape) - 1 / tail) * math.sqrt(tail)

    def draw(rng: np.random.Generator) -> np.ndarray:
        shape = (batch_size * batches, size)
        return (mean + std * noise(rng, shape)).astype(np.float32)

    ratio = float(np.sum(std**2) / np.sum(mean**2))
    truth = {"noise_scale": ratio, "relative_variance": ratio / batch_size}
    if tail:
        # By counting: the means of mini-batches that are not Gaussian.
        counter = np.random.default_rng(0)
        agree = [
            (
                (mean + std * noise(counter, (batch_size, size)).mean(0)) * mean > 0
            ).mean()
            for _ in range(20_000)
        ]
        truth["sign_success"] = float(np.mean(agree))
    else:
        z = np.abs(mean) / std * math.sqrt(batch_size / 2)
        truth["sign_success"] = float(np.mean([0.5 + 0.5 * math.erf(x) for x in z]))
    return Setting(
        loss, jnp.zeros(size), draw, truth, {"batch_size": batch_size, "level": "cheap"}
    )


def network(batch_size: int, batches: int) -> Setting:
    """A small network on noisy labels; the truth from its exact Hessian.

    Gradient and Hessian are those of 100 000 examples, and moments of the directions
    come from as many mini-batches as these give.
    """
    examples = 100_000
    keys = jax.random.split(jax.random.key(3), 4)
    teacher = jax.random.normal(keys[0], (6, 3))
    params = {
        "hidden": 0.5 * jax.random.normal(keys[1], (6, 5)),
        "out": 0.5 * jax.random.normal(keys[2], (5, 3)),
    }

    def loss(theta: Any, example: Any) -> jax.Array:
        x, y = example
        return -jax.nn.log_softmax(jnp.tanh(x @ theta["hidden"]) @ theta["out"])[y]

    def draw_many(rng: np.random.Generator, count: int) -> Any:
        x = rng.normal(size=(count, 6)).astype(np.float32)
        noise = rng.gumbel(size=(count, 3))
        return x, np.argmax(2 * x @ np.asarray(teacher) + noise, axis=1)

    population = draw_many(np.random.default_rng(12345), examples)
    flat, unflatten = flatten_util.ravel_pytree(params)

    def flat_loss(theta: jax.Array, example: Any) -> jax.Array:
        return loss(unflatten(theta), example)

    def mean_loss(theta: jax.Array, population: Any) -> jax.Array:
        return jax.vmap(flat_loss, (None, 0))(theta, population).mean()

    hessian = np.asarray(jax.jit(jax.hessian(mean_loss))(flat, population), float)
    each = np.asarray(
        jax.jit(jax.vmap(jax.grad(flat_loss), (None, 0)))(flat, population), float
    )
    gradient, variance = each.mean(0), each.var(0) / batch_size
    factor = gradient**2 / (gradient**2 + variance)
    batches_of = each[: examples // batch_size * batch_size]
    g = batches_of.reshape(-1, batch_size, flat.size).mean(1)
    directions = (g, np.sign(g), factor * g, np.sqrt(factor) * np.sign(g))
    ratio = variance.sum() / (gradient**2).sum()
    truth = {
        "noise_scale": ratio * batch_size,
        "relative_variance": ratio,
        "sign_success": float((g * gradient > 0).mean()),
    }
    for name, z in zip(DIRECTIONS, directions, strict=True):
        curvature = np.einsum("ki,ij,kj->k", z, hessian, z).mean()
        truth[f"improvement/{name}"] = (gradient @ z.mean(0)) ** 2 / (2 * curvature)
    return Setting(
        loss,
        params,
        lambda rng: draw_many(rng, batch_size * batches),
        truth,
        {"batch_size": batch_size, "level": "normal"},
    )


def dominance(size: int, angle: float, columns: int) -> Setting:
    """The Hessian of a quadratic whose basis is turned away from the axes."""
    rotation = theory.random_rotation(jax.random.key(size), size)
    problem = theory.quadratic_problem(
        jnp.logspace(0, 3, size), theory.partial_rotation(rotation, angle)
    )
    hessian = problem.hessian
    cut = size // 3

    def loss(theta: Any, x: jax.Array) -> jax.Array:
        both = jnp.concatenate([theta["a"], theta["b"]]) - x[0]
        return 0.5 * both @ hessian @ both

    magnitudes = np.abs(np.asarray(hessian, float))
    truth = {"dominance": float(np.trace(magnitudes) / magnitudes.sum())}
    arguments = {"batch_size": 2, "level": "full", "columns": columns}
    return Setting(
        loss,
        {"a": jnp.ones(cut), "b": jnp.ones(size - cut)},
        lambda rng: rng.normal(size=(8, 1)).astype(np.float32),
        truth,
        arguments | {"curvature_examples": 2},
    )


SETTINGS: dict[str, Callable[[], Setting]] = {
    "quadratic, d = 10, B = 8, K = 32": lambda: quadratic(10, 8, 32, 1.0, "normal"),
    "quadratic, d = 50, B = 16, K = 64": lambda: quadratic(50, 16, 64, 1.0, "normal"),
    "planted noise, η² = 1/2, d = 200, K = 64": lambda: planted_noise(200, 8, 64, 0.5),
    "planted noise, η² = 4, d = 200, K = 64": lambda: planted_noise(200, 8, 64, 4.0),
    "skewed noise, η² = 1, d = 200, K = 64": lambda: planted_noise(200, 8, 64, 1.0, 2),
    "unresolved, η² = 100, d = 200, K = 64": lambda: planted_noise(200, 8, 64, 100.0),
    "network, d = 45, B = 16, K = 64": lambda: network(16, 64),
    "dominance, d = 500, rotated, 64 columns": lambda: dominance(500, 1.0, 64),
    "dominance, d = 500, half way, 64 columns": lambda: dominance(500, 0.5, 64),
    "dominance, d = 500, near axes, 64 columns": lambda: dominance(500, 0.05, 64),
}


def coverage(settings: list[str], repetitions: int) -> Iterator[dict[str, Any]]:
    """One row per setting and interval."""
    for name in settings:
        setting = SETTINGS[name]()
        found: dict[str, list[diagnostics.Interval]] = {}
        start = time.perf_counter()
        for repetition in range(repetitions):
            d = diagnostics.measure(
                setting.loss,
                setting.params,
                setting.draw(np.random.default_rng(repetition)),
                key=jax.random.key(repetition),
                progress=False,
                **setting.arguments,
            )
            for quantity, interval in _flat(d).items():
                found.setdefault(quantity, []).append(interval)
        seconds = time.perf_counter() - start
        for quantity, truth in setting.truth.items():
            intervals = found[quantity]
            finite = [i for i in intervals if math.isfinite(i.high)]
            yield {
                "setting": name,
                "quantity": quantity,
                "truth": float(truth),
                "median": statistics.median(i.value for i in intervals),
                "covered": sum(bool(i.low <= truth <= i.high) for i in intervals),
                "truth_below": sum(bool(truth < i.low) for i in intervals),
                "truth_above": sum(bool(truth > i.high) for i in intervals),
                "unbounded": len(intervals) - len(finite),
                "half_width": statistics.median(
                    (i.high - i.low) / 2 / truth for i in finite
                )
                if finite
                else None,
                "repetitions": repetitions,
                "seconds": seconds,
            }


def coverage_table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| setting | quantity | truth | median | half width | covered | unbounded |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        width = "" if row["half_width"] is None else f"{100 * row['half_width']:.0f} %"
        count = row["repetitions"]
        lines.append(
            f"| {row['setting']} | {row['quantity']} | {row['truth']:.3g} "
            f"| {row['median']:.3g} | {width} | {100 * row['covered'] / count:.1f} % "
            f"| {100 * row['unbounded'] / count:.0f} % |"
        )
    return "\n".join(lines)


# ---- Cost --------------------------------------------------------------------------


def cost(networks: list[str], batch_size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Seconds of each level beside those of training steps."""
    batches = 16
    for name in networks:
        made = NETWORKS[name](batch_size * batches)

        def mean_loss(params: Any, batch: Any, loss: Any = made.loss) -> jax.Array:
            return jax.vmap(loss, (None, 0))(params, batch).mean()

        step = jax.jit(jax.value_and_grad(mean_loss))
        first = jax.tree.map(lambda leaf: leaf[:batch_size], made.batch)

        def train(
            step: Any = step, params: Any = made.params, batch: Any = first
        ) -> None:
            for _ in range(batches):
                jax.block_until_ready(step(params, batch))

        programs: dict[str, Callable[[], Any]] = {"training": train}
        for level in ("cheap", "normal"):
            programs[level] = functools.partial(
                diagnostics.measure,
                made.loss,
                made.params,
                made.batch,
                batch_size=batch_size,
                level=level,
                progress=False,
            )
        for program in programs.values():
            program()
        seconds: dict[str, list[float]] = {key: [] for key in programs}
        for _ in range(rounds):
            for key, program in programs.items():
                start = time.perf_counter()
                program()
                seconds[key].append(time.perf_counter() - start)
        for level in ("cheap", "normal"):
            pairs = zip(seconds[level], seconds["training"], strict=True)
            yield {
                "network": name,
                "level": level,
                "batch_size": batch_size,
                "batches": batches,
                "milliseconds_of_a_step": 1e3
                * statistics.median(seconds["training"])
                / batches,
                "steps_per_mini_batch": statistics.median(a / b for a, b in pairs),
                "rounds": rounds,
            }
        yield _cost_of_product(name, made, batch_size, rounds, step, first)


def _cost_of_product(
    name: str, made: Any, batch_size: int, rounds: int, step: Any, batch: Any
) -> dict[str, Any]:
    """A product with the curvature of a mini-batch in units of a training step."""

    def mean_loss(params: Any) -> jax.Array:
        return jax.vmap(made.loss, (None, 0))(params, batch).mean()

    @jax.jit
    def product(params: Any) -> Any:
        return jax.jvp(jax.grad(mean_loss), (params,), (params,))[1]

    ratios = []
    jax.block_until_ready(product(made.params))
    for _ in range(rounds):
        times = []
        for program in (lambda: product(made.params), lambda: step(made.params, batch)):
            start = time.perf_counter()
            jax.block_until_ready(program())
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return {
        "network": name,
        "level": "one product of level full",
        "batch_size": batch_size,
        "steps_per_product": statistics.median(ratios),
        "rounds": rounds,
    }


# ---- Watch -------------------------------------------------------------------------


def _optimizers() -> dict[str, tuple[Any, str]]:
    """Optimizers with and without `watch`, and what they are held against."""

    def chain(*parts: Any) -> Any:
        return optax.chain(
            do.moving_average_estimate(0.9),
            *parts,
            do.adapt_to_variance(),
            optax.scale_by_learning_rate(1e-3),
        )

    watch = diagnostics.watch
    return {
        "m_svag's chain": (chain(), "m_svag's chain"),
        "the chain, watched after the estimate": (chain(watch()), "m_svag's chain"),
        "adam": (do.adam(1e-3), "adam"),
        "adam, gradients watched": (optax.chain(watch(), do.adam(1e-3)), "adam"),
        "optax.adam": (optax.adam(1e-3), "optax.adam"),
        "optax.adam, gradients watched": (
            optax.chain(watch(), optax.adam(1e-3)),
            "optax.adam",
        ),
    }


def watch_cost(size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per optimizer: `update` and `apply_updates`, jitted and donated."""
    gradient = jax.random.normal(jax.random.key(0), (size,))
    optimizers = _optimizers()
    steps, carries = {}, {}
    for name, (optimizer, _) in optimizers.items():

        def step(carry: Any, gradient: Any, optimizer: Any = optimizer) -> Any:
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        steps[name] = jax.jit(step, donate_argnums=0)
        carries[name] = (jnp.zeros_like(gradient), optimizer.init(gradient))
        carries[name] = jax.block_until_ready(steps[name](carries[name], gradient))
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name in optimizers:
            start = time.perf_counter()
            carries[name] = jax.block_until_ready(steps[name](carries[name], gradient))
            seconds[name].append(time.perf_counter() - start)
    for name, (_, reference) in optimizers.items():
        pairs = zip(seconds[name], seconds[reference], strict=True)
        yield {
            "optimizer": name,
            "parameters": size,
            "milliseconds": 1e3 * statistics.median(seconds[name]),
            "reference": reference,
            "ratio": statistics.median(a / b for a, b in pairs),
            "rounds": rounds,
        }


# ---- Command -----------------------------------------------------------------------


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("coverage", "cost", "watch"))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--networks", nargs="+", default=["mnist_mlp", "lstm"])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, default=2 * 10**7)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    measured = {
        "coverage": lambda: coverage(args.settings, args.repetitions),
        "cost": lambda: cost(args.networks, args.batch_size, args.rounds),
        "watch": lambda: watch_cost(args.size, args.rounds),
    }[args.what]()
    rows = _kept_rows(args.output, args.what, args.settings)
    for row in measured:
        print(json.dumps(row, ensure_ascii=False), flush=True)
        rows.append(row)
        _write(args.output, args.what, rows)
    if args.what == "coverage":
        print(coverage_table(rows))
    print(f"\nWritten to {args.output}")


def _kept_rows(path: Path, what: str, settings: list[str]) -> list[dict[str, Any]]:
    """Rows of coverage from before that are not measured again."""
    if what != "coverage" or not path.exists():
        return []
    rows = json.loads(path.read_text()).get(what, {}).get("rows", [])
    return [row for row in rows if row["setting"] not in settings]


def _write(path: Path, what: str, rows: list[dict[str, Any]]) -> None:
    """Replace one part of the report."""
    report = json.loads(path.read_text()) if path.exists() else {}
    report[what] = {"environment": environment(), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
