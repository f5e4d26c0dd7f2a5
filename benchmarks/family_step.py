"""The family beside its namesakes in Optax: time of a step, and equality.

A step is `update` and `apply_updates`, jitted, with parameters and state donated, on
one float32 array. Each member and its namesake are stepped in turn in one process, and
a ratio is the median over the rounds of the ratios within a round. The equality is the
largest difference between the updates of 60 steps along noisy gradients, in float64,
relative to the update of Optax, element by element.

    python -m benchmarks.family_step
    python -m benchmarks.family_step --size 100000 --rounds 5 --output step.json
    python -m benchmarks.family_step --equality

About three minutes on two cores, 2 GB of memory for 2e7 parameters; the equality takes
one minute.
"""

import argparse
import dataclasses
import inspect
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from benchmarks.environment import enable_x64, environment
from dissect_optax import family

LEARNING_RATE = 1e-3
SECONDS_PER_ROUND = 0.05
STEPS = 60
RESULTS = Path("benchmarks/results")

Factory = Callable[..., optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class Case:
    """A member with settings, and its namesake; None where this Optax has none."""

    name: str
    settings: dict[str, Any]
    ours: Factory
    theirs: Factory | None

    @property
    def label(self) -> str:
        """Name and settings."""
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.settings.items())})"


def namesake(name: str, settings: Iterable[str] = ()) -> Factory | None:
    """The optimizer of Optax of this name; None if it or a setting is missing."""
    module: Any = optax
    *folders, last = name.split(".")
    for folder in folders:
        module = getattr(module, folder)
    factory = getattr(module, last, None)
    if factory is None or set(settings) - set(inspect.signature(factory).parameters):
        return None
    return factory


def _core_of_adafactor(learning_rate: float, **settings: Any) -> Any:
    return optax.chain(
        optax.scale_by_factored_rms(**settings),
        optax.scale_by_learning_rate(learning_rate),
    )


def _signum_with_weight_decay(learning_rate: float, weight_decay: float) -> Any:
    return optax.chain(
        optax.ema(0.9, debias=False),
        optax.scale_by_sign(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adam": (
        {},
        {"eps": 1e-3, "eps_root": 1e-4},
        {"b1": 0.95, "b2": 0.95},
        {"nesterov": True},
    ),
    "nadam": ({}, {"eps_root": 1e-3}),
    "amsgrad": ({}, {"b2": 0.9}, {"bias_correction_mu": False}),
    "yogi": ({}, {"b2": 0.9}),
    "contrib.ademamix": ({}, {"b3": 0.99, "alpha": 2.0, "weight_decay": 0.1}),
    "adan": ({}, {"weight_decay": 0.1}),
    "adabelief": ({}, {"nesterov": True}, {"eps": 1e-3, "eps_root": 1e-3}),
    "rmsprop": (
        {},
        {"centered": True},
        {"momentum": 0.9, "nesterov": True},
        {"bias_correction": True, "initial_scale": 0.5, "eps_in_sqrt": False},
        {"centered": True, "bias_correction": True, "initial_scale": 0.5},
    ),
    "contrib.acprop": ({}, {"weight_decay": 0.1}),
    "contrib.adopt": ({}, {"nesterov": True}, {"use_clipping": False}),
    "novograd": ({}, {"weight_decay": 0.1}),
    "lion": ({}, {"weight_decay": 0.1}),
    "signum": ({}, {"beta": 0.5}),
    "sign_sgd": ({},),
}
SMALL_FACTORS = {"min_dim_size_to_factor": 2}

CASES = [
    *(
        Case(
            name.removeprefix("contrib."),
            settings,
            getattr(family, name.removeprefix("contrib.")),
            namesake(name, settings),
        )
        for name, all_settings in SETTINGS.items()
        for settings in all_settings
    ),
    Case("signum", {"weight_decay": 0.1}, family.signum, _signum_with_weight_decay),
    Case("factored_rms", SMALL_FACTORS, family.factored_rms, _core_of_adafactor),
]


# ---- Time -------------------------------------------------------------------------


def time_steps(size: int, rounds: int) -> Iterator[dict[str, Any]]:
    """One row per member with its defaults, and centred RMSProp, on `size` numbers."""
    # Imported here: it needs `optax.signum`, which Optax before 0.2.7 has not.
    from benchmarks.optimizer_step import Stepper

    gradient = jax.random.normal(jax.random.key(0), (size,))
    for case in CASES:
        timed = not case.settings or case.settings == {"centered": True}
        if not timed or case.theirs is None:
            continue
        both = [
            Stepper(
                optax.with_extra_args_support(make(LEARNING_RATE, **case.settings)),
                gradient,
                {},
            )
            for make in (case.ours, case.theirs)
        ]
        steps = max(1, round(SECONDS_PER_ROUND / both[1].run(3)))
        seconds = [[stepper.run(steps) for stepper in both] for _ in range(rounds)]
        ours, theirs = (
            statistics.median(column) for column in zip(*seconds, strict=True)
        )
        yield {
            "optimizer": case.label,
            "parameters": size,
            "milliseconds": 1e3 * ours,
            "milliseconds_of_optax": 1e3 * theirs,
            "ratio": statistics.median(a / b for a, b in seconds),
            "state_buffers": both[0].state_buffers,
            "state_buffers_of_optax": both[1].state_buffers,
            "rounds": rounds,
        }


# ---- Equality ---------------------------------------------------------------------


def noisy_gradients(shape: tuple[int, ...] = (5, 4), seed: int = 0) -> np.ndarray:
    """Drifting gradients with noise of every size, and exact zeros among them."""
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.normal(size=(STEPS, *shape)), axis=0) / 8
    noise = rng.normal(size=(STEPS, *shape)) * rng.exponential(size=shape)
    seen = rng.uniform(size=(STEPS, *shape)) >= 0.1
    return np.where(seen, drift + noise, 0.0)


def updates_of(tx: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    """The updates of all steps, which move the parameters; one compiled loop."""
    tx = optax.with_extra_args_support(tx)

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), updates

    @jax.jit
    def run(gradients: Any) -> Any:
        params = jnp.ones_like(gradients[0])
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    return np.asarray(run(jnp.asarray(gradients)))


def relative_difference(case: Case) -> float:
    """Between member and namesake; to be called with float64 enabled."""
    assert case.theirs is not None
    ours, theirs = (
        updates_of(make(0.1, **case.settings), noisy_gradients())
        for make in (case.ours, case.theirs)
    )
    smallest = np.finfo(np.float64).tiny
    return float(np.max(np.abs(ours - theirs) / np.maximum(np.abs(theirs), smallest)))


def compare() -> Iterator[dict[str, Any]]:
    """One row per case that this Optax has."""
    with enable_x64(True):
        for case in CASES:
            if case.theirs is not None:
                yield {
                    "optimizer": case.name,
                    "settings": case.settings,
                    "steps": STEPS,
                    "largest_relative_difference": relative_difference(case),
                }


# ---- Tables -----------------------------------------------------------------------


def time_table(rows: list[dict[str, Any]]) -> str:
    """The times as Markdown."""
    lines = [
        "| optimizer | ms | ms of Optax | ratio | buffers | of Optax |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        "| `{optimizer}` | {milliseconds:.1f} | {milliseconds_of_optax:.1f} "
        "| {ratio:.2f} | {state_buffers} | {state_buffers_of_optax} |".format(**row)
        for row in rows
    ]
    return "\n".join(lines)


def equality_table(rows: list[dict[str, Any]]) -> str:
    """The differences as Markdown."""
    lines = ["| optimizer | settings | largest relative difference |", "|---|---|---|"]
    for row in rows:
        settings = ", ".join(f"`{k}={v}`" for k, v in row["settings"].items())
        difference = row["largest_relative_difference"]
        lines.append(
            f"| `{row['optimizer']}` | {settings or 'defaults'} | {difference:.0e} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--equality", action="store_true")
    parser.add_argument("--size", type=int, default=2 * 10**7)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.equality:
        rows = list(compare())
        print(equality_table(rows))
        output = args.output or RESULTS / "family_equality.json"
    else:
        rows = list(time_steps(args.size, args.rounds))
        print(time_table(rows))
        output = args.output or RESULTS / "family_step.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report = {"environment": environment(), "rows": rows}
    output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\nWritten to {output}")


if __name__ == "__main__":
    main()
