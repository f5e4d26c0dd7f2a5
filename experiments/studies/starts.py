"""What Figure 2 depends on and the paper does not say: the start, against the noise.

A stochastic quadratic problem has no scale of its own: with θ and ν multiplied by the
same number, every run is the same but for its unit. So each panel of Figure 2 is a
point on a line over σ/ν, with θ ~ N(0, σ² I) at the start, and here is the line.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.studies.quadratics import (
    METHODS,
    ORIENTATIONS,
    SPECTRA,
    QuadraticStudy,
    descend_all,
    draw_problems,
    run_keys,
)

# Both losses below it, relative to the first: the run is over.
_SOLVED = 1e-30


@dataclasses.dataclass(frozen=True)
class StartStudy:
    """What determines the study.

    Attributes:
      dimensions: d.
      steps: Steps of each run.
      seeds: Runs per point, each with its own spectrum, rotation, start and noise.
      ratios: σ/ν, the scale of the start over that of the noise.
    """

    dimensions: int = 100
    steps: int = 100
    seeds: int = 10
    ratios: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 200.0, 1e3)

    @property
    def name(self) -> str:
        """The study's name on the command line."""
        return "starts"

    @property
    def count(self) -> int:
        """How many results it has."""
        return len(SPECTRA) * len(ORIENTATIONS) * len(self.ratios)

    def run(self) -> Iterator[dict[str, Any]]:
        """One result for each panel's problem and each ratio; see `run`."""
        return run(self)


SMOKE = StartStudy(dimensions=10, steps=5, seeds=2, ratios=(0.5, 5.0))


def run(study: StartStudy) -> Iterator[dict[str, Any]]:
    """The losses of both methods after the last step, relative to the first, ν = 1."""
    drawn = QuadraticStudy(study.dimensions, study.steps, study.seeds)
    problems_of, keys = draw_problems(drawn), run_keys(drawn)
    for spectrum in SPECTRA:
        for orientation in ORIENTATIONS:
            problems = problems_of(spectrum, orientation, 1.0)
            for ratio in study.ratios:
                last = {}
                for method in METHODS:
                    losses = descend_all(
                        method, study.steps, problems, jnp.asarray(ratio), keys
                    )
                    relative = np.asarray(losses[:, -1] / losses[:, 0], np.float64)
                    last[method] = np.maximum(relative, _SOLVED).tolist()
                yield {
                    "spectrum": spectrum,
                    "orientation": orientation,
                    "start_over_noise": ratio,
                    "relative_loss": last,
                }
