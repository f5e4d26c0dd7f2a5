"""SGD and SSD with optimal step sizes on stochastic quadratic problems, §2.2, Figure 2.

Two spectra, each in a randomly rotated and in the axis-aligned eigenbasis, at three
noise levels. The step size of every step is the exact optimum for the exact moments of
the direction, so that nothing is tuned and nothing estimated.

The paper leaves the start open. Here x* = 0 and θ is drawn from N(0, 25 I), which
reproduces every statement of §2.2: what happens depends on ‖θ‖/ν, see `starts`. The
obvious start at θ = (1, …, 1) is a sign vector away from the minimum, and SSD would
solve every axis-aligned problem in one step. Losses are without the constant
ν²/2 tr(Q).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import theory


@dataclasses.dataclass(frozen=True)
class QuadraticStudy:
    """What determines the study.

    Attributes:
      dimensions: d.
      steps: Steps of each run.
      seeds: Runs per panel and method, each with its own spectrum, rotation, start
        and noise.
      noise_levels: ν, the standard deviation of the data.
      start_scale: The standard deviation of every coordinate of the start.
    """

    dimensions: int = 100
    steps: int = 100
    seeds: int = 10
    noise_levels: tuple[float, ...] = (0.0, 0.1, 4.0)
    start_scale: float = 5.0

    @property
    def name(self) -> str:
        """The study's name on the command line."""
        return "quadratic"

    @property
    def count(self) -> int:
        """How many results it has."""
        return len(panels(self))

    def run(self) -> Iterator[dict[str, Any]]:
        """One result for each panel and method; see `run`."""
        return run(self)


SMOKE = QuadraticStudy(dimensions=10, steps=5, seeds=2)

Direction = Callable[[jax.Array, jax.Array], theory.Direction]

# The moments of each method's direction, and how a stochastic gradient becomes one.
METHODS: dict[str, tuple[Direction, Callable[[jax.Array], jax.Array]]] = {
    "sgd": (theory.gaussian_direction, jnp.positive),
    "ssd": (theory.sign_direction, jnp.sign),
}


def draw_well_conditioned(key: jax.Array, dimensions: int) -> jax.Array:
    """Eigenvalues drawn uniformly from [0.1, 1.1]."""
    return jax.random.uniform(key, (dimensions,), minval=0.1, maxval=1.1)


def draw_ill_conditioned(key: jax.Array, dimensions: int) -> jax.Array:
    """Eigenvalues drawn from [0, 1], and one in ten from [30, 60]."""
    small, large = jax.random.split(key)
    count = dimensions // 10
    return jnp.concatenate(
        [
            jax.random.uniform(large, (count,), minval=30.0, maxval=60.0),
            jax.random.uniform(small, (dimensions - count,), minval=0.0, maxval=1.0),
        ]
    )


SPECTRA = {
    "well-conditioned": draw_well_conditioned,
    "ill-conditioned": draw_ill_conditioned,
}
ORIENTATIONS = ("rotated", "axis-aligned")


def optimal_step(
    method: str, problem: theory.QuadraticProblem, params: jax.Array
) -> jax.Array:
    """The exact optimal step size (11) of a method's direction at a point."""
    make_direction, _ = METHODS[method]
    gradient = problem.gradient(params)
    direction = make_direction(gradient, problem.gradient_covariance)
    return theory.optimal_step_size(direction, gradient, problem.hessian)


def descend(
    method: str,
    steps: int,
    problem: theory.QuadraticProblem,
    start_scale: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Losses of one run, before the first and after every step, of shape [steps+1]."""
    _, take = METHODS[method]

    def advance(params: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        sample = take(problem.sample_gradient(key, params))
        moved = params - optimal_step(method, problem, params) * sample
        return moved, problem.excess_loss(moved)

    start_key, noise_key = jax.random.split(key)
    start = start_scale * jax.random.normal(start_key, problem.minimizer.shape)
    _, losses = jax.lax.scan(advance, start, jax.random.split(noise_key, steps))
    return jnp.concatenate([problem.excess_loss(start)[jnp.newaxis], losses])


@functools.partial(jax.jit, static_argnames=("method", "steps"))
def descend_all(
    method: str,
    steps: int,
    problems: theory.QuadraticProblem,
    start_scale: jax.Array,
    keys: jax.Array,
) -> jax.Array:
    """Losses of a batch of runs, of shape [seeds, steps+1]."""
    run = functools.partial(descend, method, steps)
    return jax.vmap(run, in_axes=(0, None, 0))(problems, start_scale, keys)


def draw_spectra(study: QuadraticStudy) -> dict[str, jax.Array]:
    """Eigenvalues of every seed, of shape [seeds, d], by the name of the spectrum."""
    keys = jax.random.split(jax.random.key(0), study.seeds)
    draws = {
        name: functools.partial(draw, dimensions=study.dimensions)
        for name, draw in SPECTRA.items()
    }
    return {name: jax.vmap(draw)(keys) for name, draw in draws.items()}


def draw_bases(study: QuadraticStudy) -> dict[str, jax.Array]:
    """Eigenbases of every seed, of shape [seeds, d, d], by the orientation."""
    size = study.dimensions
    keys = jax.random.split(jax.random.key(1), study.seeds)
    rotate = jax.jit(jax.vmap(functools.partial(theory.random_rotation, size=size)))
    aligned = jnp.broadcast_to(jnp.eye(size), (study.seeds, size, size))
    return {"rotated": rotate(keys), "axis-aligned": aligned}


def draw_problems(study: QuadraticStudy) -> Callable[..., theory.QuadraticProblem]:
    """The problems of all seeds by spectrum, orientation and noise, x* = 0."""
    spectra, bases = draw_spectra(study), draw_bases(study)

    def problems(
        spectrum: str, orientation: str, noise: float
    ) -> theory.QuadraticProblem:
        return theory.QuadraticProblem(
            eigenvalues=spectra[spectrum],
            basis=bases[orientation],
            minimizer=jnp.zeros((study.seeds, study.dimensions)),
            noise=jnp.full(study.seeds, noise),
        )

    return problems


def panels(study: QuadraticStudy) -> list[tuple[str, str, float, str]]:
    """Spectrum, orientation, noise and method of every set of runs."""
    return [
        (spectrum, orientation, noise, method)
        for spectrum in SPECTRA
        for orientation in ORIENTATIONS
        for noise in study.noise_levels
        for method in METHODS
    ]


def run_keys(study: QuadraticStudy) -> jax.Array:
    """A key per seed; both methods start from the same points, with equal noise."""
    return jax.random.split(jax.random.key(2), study.seeds)


def run(study: QuadraticStudy) -> Iterator[dict[str, Any]]:
    """One result for each panel and method: where it belongs, and all losses."""
    problems_of, keys = draw_problems(study), run_keys(study)
    for spectrum, orientation, noise, method in panels(study):
        problems = problems_of(spectrum, orientation, noise)
        losses = descend_all(
            method, study.steps, problems, jnp.asarray(study.start_scale), keys
        )
        dominances = jax.vmap(lambda problem: problem.diagonal_dominance)(problems)
        yield {
            "spectrum": spectrum,
            "orientation": orientation,
            "noise": noise,
            "method": method,
            "diagonal_dominance": np.asarray(dominances).tolist(),
            "eigenvalues": np.asarray(problems.eigenvalues[0]).tolist(),
            "losses": np.asarray(losses).tolist(),
        }
