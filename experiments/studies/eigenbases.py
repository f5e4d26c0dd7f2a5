"""§2.1's argument on eigenvectors: how far from the axes a random basis is.

    Σ_ij |q_ij| ≤ Σ_i λ_i ‖v_i‖₁²,    1 ≤ ‖v_i‖₁ ≤ √d

The left is what the sign pays for, Eq. (12); the diagonal holds Σ λ_i of it, so that
c = Σ λ_i / Σ |q_ij| is the diagonal dominance of Eq. (13). The paper argues with the
bounds; here are the numbers for a basis on the axes, halfway from there to a uniformly
drawn rotation, and drawn uniformly, in any dimension.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dissect_optax import theory
from experiments.studies.quadratics import SPECTRA


@dataclasses.dataclass(frozen=True)
class EigenbasisStudy:
    """What determines the study.

    Attributes:
      dimensions: The dimensions d.
      fractions: Parts of the way from the axes to the rotation.
      draws: Rotations and spectra of each entry.
    """

    dimensions: tuple[int, ...] = (10, 20, 50, 100, 200)
    fractions: tuple[float, ...] = (0.0, 0.5, 1.0)
    draws: int = 5

    @property
    def name(self) -> str:
        """The study's name on the command line."""
        return "eigenbases"

    @property
    def count(self) -> int:
        """How many results it has."""
        return len(self.dimensions) * len(self.fractions)

    def run(self) -> Iterator[dict[str, Any]]:
        """One result for every dimension and fraction; see `run`."""
        return run(self)


SMOKE = EigenbasisStudy(dimensions=(10, 20), draws=2)


@jax.jit
def measure(basis: jax.Array, eigenvalues: jax.Array) -> dict[str, jax.Array]:
    """1-norms of the eigenvectors, and what they say of the mass off the diagonal."""
    norms = jnp.sum(jnp.abs(basis), axis=0)
    problem = theory.quadratic_problem(eigenvalues, basis)
    mass, trace = jnp.sum(jnp.abs(problem.hessian)), jnp.sum(eigenvalues)
    return {
        "mean_norm": jnp.mean(norms),
        "largest_norm": jnp.max(norms),
        "mass_over_trace": mass / trace,
        "bound_over_trace": jnp.sum(eigenvalues * norms**2) / trace,
        "diagonal_dominance": problem.diagonal_dominance,
    }


def run(study: EigenbasisStudy) -> Iterator[dict[str, Any]]:
    """Means over the draws, for both spectra of Figure 2."""
    for size in study.dimensions:
        keys = jax.random.split(jax.random.key(size), study.draws)
        rotations = [theory.random_rotation(key, size) for key in keys]
        for fraction in study.fractions:
            bases = [theory.partial_rotation(turn, fraction) for turn in rotations]
            result: dict[str, Any] = {"dimensions": size, "fraction": fraction}
            for name, draw in SPECTRA.items():
                found = [
                    measure(basis, draw(key, size))
                    for basis, key in zip(bases, keys, strict=True)
                ]
                result[name] = {
                    quantity: float(np.mean([entry[quantity] for entry in found]))
                    for quantity in found[0]
                }
            yield result
