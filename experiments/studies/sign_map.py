"""Where the sign is the better direction: noise, conditioning and rotation together.

The exact expected improvements (11) of the stochastic gradient and of its sign. The
spectrum is geometric, with largest eigenvalue one and a given condition number; the
eigenbasis is part of the way from the axes to a uniformly drawn rotation. The answer
depends on the point, so there are two kinds:

* `random`: θ ~ N(0, σ² I), equally far from the minimum in all directions;
* `even`: Λ^(1/2)Rᵀθ ~ N(0, σ² I), the loss spread evenly over the eigendirections, as
  it comes to be when a method has reduced the steep ones and not yet the flat ones.

Only ν/σ matters. At the start of Figure 2, σ = 5, it is 0, 0.02 and 0.8; near the
minimum it is larger.
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
class MapStudy:
    """What determines the map.

    Attributes:
      dimensions: d.
      points: The kinds of points.
      draws: Points and rotations that each entry of the map is averaged over.
      noise_levels: ν/σ, the standard deviation of the data over that of the points.
      largest_condition: Condition numbers go from one to this.
      conditions: How many of them, equally spaced in the logarithm.
      fractions: How many fractions of the rotation, equally spaced from zero to one.
    """

    dimensions: int = 100
    points: tuple[str, ...] = ("random", "even")
    draws: int = 8
    noise_levels: tuple[float, ...] = (0.0, 0.02, 0.2, 0.8, 4.0, 20.0)
    largest_condition: float = 1e4
    conditions: int = 25
    fractions: int = 21

    @property
    def name(self) -> str:
        """The study's name on the command line."""
        return "map"

    @property
    def count(self) -> int:
        """How many results it has."""
        return self.fractions * len(self.points) * len(self.noise_levels)

    def run(self) -> Iterator[dict[str, Any]]:
        """One result for every point, noise and fraction; see `run`."""
        return run(self)


SMOKE = MapStudy(dimensions=6, draws=2, conditions=3, fractions=3)

# Distance to the minimum along an eigendirection, as a power of 1/λ.
_POWERS = {"random": 0.0, "even": 0.5}


def condition_numbers(study: MapStudy) -> np.ndarray:
    """The condition numbers of the map."""
    return np.geomspace(1.0, study.largest_condition, study.conditions)


def rotation_fractions(study: MapStudy) -> np.ndarray:
    """The fractions of the rotation's angles."""
    return np.linspace(0.0, 1.0, study.fractions)


@jax.jit
def compare(
    eigenvalues: jax.Array,
    basis: jax.Array,
    noise: jax.Array,
    normal: jax.Array,
    power: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logarithm (base ten) of I(sign)/I(gradient) at one point, and the dominance c.

    The point is θ = R Λ^(-power) z for a standard normal z, σ = 1.
    """
    problem = theory.quadratic_problem(eigenvalues, basis, noise=noise)
    params = jnp.matmul(basis, eigenvalues**-power * normal)
    gradient, hessian = problem.gradient(params), problem.hessian
    direction = theory.sign_direction(gradient, problem.gradient_covariance)
    of_sign = theory.expected_improvement(direction, gradient, hessian)
    of_gradient = theory.gradient_improvement(problem, params)
    return jnp.log10(of_sign / of_gradient), problem.diagonal_dominance


def run(study: MapStudy) -> Iterator[dict[str, Any]]:
    """One result for every point, noise and fraction, with all condition numbers."""
    size = study.dimensions
    rotation_key, point_key, order_key = jax.random.split(jax.random.key(2), 3)
    rotations = jax.vmap(functools.partial(theory.random_rotation, size=size))(
        jax.random.split(rotation_key, study.draws)
    )
    normals = jax.random.normal(point_key, (study.draws, size))
    positions = jnp.linspace(-1.0, 0.0, size)
    orders = jax.vmap(jax.random.permutation, in_axes=(0, None))(
        jax.random.split(order_key, study.draws), positions
    )
    conditions = condition_numbers(study)
    spectra = jnp.asarray(conditions)[:, None, None] ** orders[None, :, :]

    over_draws = jax.vmap(compare, in_axes=(0, 0, None, 0, None))
    over_all = jax.jit(jax.vmap(over_draws, in_axes=(0, None, None, None, None)))
    turn = jax.jit(jax.vmap(theory.partial_rotation, in_axes=(0, None)))
    for fraction in rotation_fractions(study):
        bases = turn(rotations, fraction)
        for points, noise in itertools.product(study.points, study.noise_levels):
            ratios, dominances = over_all(
                spectra, bases, jnp.asarray(noise), normals, _POWERS[points]
            )
            yield {
                "points": points,
                "noise": noise,
                "fraction": float(fraction),
                "conditions": conditions.tolist(),
                "log10_ratio": np.mean(ratios, axis=1).tolist(),
                "log10_ratio_std": np.std(ratios, axis=1, ddof=1).tolist(),
                "diagonal_dominance": np.mean(dominances, axis=1).tolist(),
            }
