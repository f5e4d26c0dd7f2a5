"""Idealised SVAG converges with a constant step size, SGD does not, Theorem 1.

Strongly convex quadratics of several condition numbers in a rotated eigenbasis, at the
constant step size 1/L for both methods. SVAG's factors are exact: they come from the
true gradient and its true variance, which only a theorist knows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import theory


@dataclasses.dataclass(frozen=True)
class ConvergenceStudy:
    """What determines the study.

    Attributes:
      dimensions: d.
      steps: T, the number of steps.
      seeds: Runs that the expected error is averaged over.
      noise: ν, the standard deviation of the data.
      conditions: The condition numbers L/μ; L is one.
      records_per_decade: How often an error is recorded, per factor of ten in the step.
    """

    dimensions: int = 10
    steps: int = 100_000
    seeds: int = 100
    noise: float = 0.1
    conditions: tuple[float, ...] = (1.0, 10.0, 100.0)
    records_per_decade: int = 12

    @property
    def name(self) -> str:
        """The study's name on the command line."""
        return "convergence"

    @property
    def count(self) -> int:
        """How many results it has."""
        return len(self.conditions) * len(METHODS)

    def run(self) -> Iterator[dict[str, Any]]:
        """One result for every condition number and method; see `run`."""
        return run(self)


SMOKE = ConvergenceStudy(dimensions=3, steps=100, seeds=4)
METHODS = ("sgd", "svag")


def recorded_steps(study: ConvergenceStudy) -> np.ndarray:
    """The steps at which errors are recorded: zero, then equally spaced logarithms."""
    decades = np.log10(study.steps)
    count = int(np.ceil(study.records_per_decade * decades)) + 1
    return np.unique([0, *np.round(np.logspace(0, decades, count)).astype(int)])


def step(
    method: str, problem: theory.QuadraticProblem, params: jax.Array, key: jax.Array
) -> jax.Array:
    """One step of size 1/L."""
    update = problem.sample_gradient(key, params)
    if method == "svag":
        gradient = problem.gradient(params)
        update = theory.optimal_factor(gradient, problem.gradient_std) * update
    return params - update / problem.lipschitz


@functools.partial(jax.jit, static_argnames="method")
def advance(
    method: str,
    problem: theory.QuadraticProblem,
    params: jax.Array,
    key: jax.Array,
    first: jax.Array,
    last: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Every seed's parameters after the steps [first, last), and the largest E‖g‖²."""
    noise = jnp.sum(jnp.square(problem.gradient_std))

    def one_step(
        count: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        params, largest = carry
        squares = jnp.sum(jnp.square(jax.vmap(problem.gradient)(params)), axis=1)
        keys = jax.random.split(jax.random.fold_in(key, count), params.shape[0])
        moved = jax.vmap(functools.partial(step, method, problem))(params, keys)
        return moved, jnp.maximum(largest, jnp.max(squares) + noise)

    return jax.lax.fori_loop(first, last, one_step, (params, jnp.zeros(())))


def make_problem(study: ConvergenceStudy, condition: float) -> theory.QuadraticProblem:
    """The quadratic of a condition number, in one rotated eigenbasis for all."""
    eigenvalues = np.geomspace(1 / condition, 1.0, study.dimensions)
    rotation = theory.random_rotation(jax.random.key(3), study.dimensions)
    return theory.quadratic_problem(eigenvalues, rotation, noise=study.noise)


def fitted_slope(steps: np.ndarray, errors: np.ndarray) -> float:
    """Slope of log error over log step in the last factor of ten."""
    late = (steps > 0) & (steps >= steps[-1] / 10)
    return float(np.polyfit(np.log(steps[late]), np.log(errors[late]), 1)[0])


def run(study: ConvergenceStudy) -> Iterator[dict[str, Any]]:
    """One result for every condition number and method, with the theorem's bound."""
    steps = recorded_steps(study)
    key = jax.random.key(4)
    for condition in study.conditions:
        problem = make_problem(study, condition)
        for method in METHODS:
            params = jnp.ones((study.seeds, study.dimensions))
            errors = [jax.vmap(problem.excess_loss)(params)]
            largest = 0.0
            for first, last in itertools.pairwise(steps):
                params, seen = advance(method, problem, params, key, first, last)
                largest = max(largest, float(seen))
                errors.append(jax.vmap(problem.excess_loss)(params))
            table = np.asarray(errors)
            mean = table.mean(axis=1)
            bound = theory.convergence_bound(
                mean[0],
                steps,
                strong_convexity=problem.strong_convexity,
                lipschitz=problem.lipschitz,
                second_moment=largest,
            )
            yield {
                "condition": condition,
                "method": method,
                "steps": steps.tolist(),
                "error": mean.tolist(),
                "standard_error": (
                    table.std(axis=1, ddof=1) / np.sqrt(study.seeds)
                ).tolist(),
                "second_moment": largest,
                "bound": np.asarray(bound).tolist(),
                "slope": fitted_slope(steps, mean),
            }
