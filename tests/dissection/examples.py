"""Made-up results of a dissection; no training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from dissect_optax.dissection._result import (
    Dissection,
    MeasurementRow,
    Run,
    Setup,
    Tuning,
)

LABELS = {"m_sgd": "M-SGD", "m_ssd": "M-SSD", "m_svag": "M-SVAG", "adam": "ADAM"}
# How far the log loss falls over training: the sign gains 0.8 and 1.2, variance
# adaptation 0.2 and 0.6.
FALLS = {"m_sgd": 2.0, "m_ssd": 2.8, "m_svag": 2.2, "adam": 3.4}


def make_setup(**changes: Any) -> Setup:
    fields: dict[str, Any] = {
        "title": "A network",
        "steps": 1000,
        "batch_sizes": (8,),
        "seeds": 5,
        "methods": LABELS,
        "decays": {"b1": 0.9, "b2": 0.999},
        "schedule": "constant",
        "regularizer": False,
        "examples": 1437,
        "parameters": 2410,
        "data": "1f0c2a9b",
        "environment": {"jax": "0.10.2", "device": "cpu"},
        "seconds": 61.5,
    }
    return Setup(**(fields | changes))


def make_run(
    method: str,
    seed: int,
    fall: float,
    *,
    batch_size: int = 8,
    learning_rate: float = 0.1,
    role: Literal["tuning", "replicate", "race"] = "replicate",
    steps: int = 1000,
    evaluations: int = 11,
    noise: float = 0.02,
    share: float = 1.0,
    diverged: bool = False,
) -> Run:
    """A run whose log loss falls along a line to −fall; seeds share their start."""
    place = sum(map(ord, f"{method}{role}{learning_rate}"))
    start = 2.3 + 0.01 * seed
    shift = np.random.default_rng([seed, batch_size, place]).normal(0, noise)
    progress = np.linspace(0, share, evaluations)
    losses = start * np.exp(-(fall + shift) * progress)
    if diverged:
        losses[evaluations // 2 :] = math.nan
    return Run(
        method=method,
        batch_size=batch_size,
        seed=seed,
        learning_rate=learning_rate,
        role=role,
        steps=tuple(int(step) for step in progress / share * steps),
        training_loss=tuple(map(float, losses)),
        metrics={"test_accuracy": tuple(map(float, 1 - 0.4 * losses / start))},
        diverged=diverged,
        seconds=1.0,
    )


def make_runs(
    falls: Mapping[str, float] = FALLS,
    seeds: Sequence[int] = range(1, 6),
    **kwargs: Any,
) -> list[Run]:
    return [
        make_run(method, seed, fall, **kwargs)
        for method, fall in falls.items()
        for seed in seeds
    ]


def interval(value: float, width: float) -> dict[str, float]:
    return {"value": value, "low": value - width, "high": value + width}


def make_measurement(batch_size: int = 8, when: Any = "start") -> MeasurementRow:
    step = {"start": 0, "middle": 500, "end": 1000}[when]
    growth = 1 + step / 100
    return MeasurementRow(
        "adam",
        batch_size,
        when,
        step,
        {
            "batches": 16,
            "noise_scale": interval(40.0 * growth + batch_size, 6.0 * growth),
            "sign_success": interval(0.8 - 0.01 * growth, 0.02),
            "improvement": {
                "gradient": interval(0.11, 0.02),
                "sign": interval(0.31, 0.03),
                "adapted_gradient": interval(0.14, 0.02),
                "adapted_sign": {"value": 0.2, "low": -math.inf, "high": math.inf},
            },
            "layers": {"w": {"noise_scale": interval(12.0, 3.0)}},
        },
    )


RATES = (0.01, 0.03, 0.06, 0.1, 0.3, 0.6, 1.0)


def make_tuning_runs(
    method: str,
    fall: float,
    *,
    batch_size: int = 8,
    seeds: Sequence[int] = (90, 91, 92),
) -> list[Run]:
    """Tuning runs with the optimum at 0.1 and divergence at 1."""
    runs = []
    for rate in RATES:
        loss = abs(math.log10(rate / 0.1))
        for seed in seeds:
            runs.append(
                make_run(
                    method,
                    seed,
                    fall - loss,
                    batch_size=batch_size,
                    learning_rate=rate,
                    role="tuning",
                    diverged=rate == RATES[-1],
                )
            )
    return runs


def make_tuning(method: str, batch_size: int = 8, at_edge: bool = False) -> Tuning:
    shift = 0.1 * list(FALLS).index(method) if method in FALLS else 0.5
    candidates = tuple(
        (rate, shift - 1.0 + abs(math.log10(rate / 0.1)), rate < RATES[-1])
        for rate in RATES
    )
    return Tuning(
        method=method,
        batch_size=batch_size,
        learning_rate=0.1,
        largest_stable=0.6,
        candidates=candidates[:4] if at_edge else candidates,
        picks=(0.1, 0.1, 0.06),
        at_edge=at_edge,
        race_cost=4.5,
        full_cost=16.5,
    )


def make_example(**setup: Any) -> Dissection:
    """Five methods, two batch sizes, a race, and one replicate that diverged."""
    methods = LABELS | {"muon": "Muon <& others>"}
    sizes = (8, 128)
    runs: list[Run] = []
    for size in sizes:
        falls = FALLS | {"muon": 3.5}
        if size == 128:
            falls = {"m_sgd": 2.6, "m_ssd": 2.1, "m_svag": 2.6, "adam": 2.1, "muon": 2}
        runs += make_runs(falls, batch_size=size, evaluations=51)
        race_falls = {method: 0.4 * fall for method, fall in falls.items()}
        for rate in (0.06, 0.1):
            scaled = {method: fall * 10 * rate for method, fall in race_falls.items()}
            runs += make_runs(
                *(scaled, (90, 91, 92)),
                batch_size=size,
                learning_rate=rate,
                role="race",
                steps=100,
            )
        for method, fall in falls.items():
            runs += make_tuning_runs(method, fall, batch_size=size)
    last = next(i for i, run in enumerate(runs) if run.method == "m_svag")
    runs[last] = make_run("m_svag", 1, 2.0, evaluations=51, diverged=True)
    return Dissection(
        make_setup(methods=methods, batch_sizes=sizes, race_steps=100, **setup),
        runs,
        [
            make_tuning(method, size, method == "m_ssd")
            for method in methods
            for size in sizes
        ],
        [
            make_measurement(size, when)
            for size in sizes
            for when in ("start", "middle", "end")
        ],
    )
