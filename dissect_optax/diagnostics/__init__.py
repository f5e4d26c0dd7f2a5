"""Measurements on the user's own model: noise, signs, factors, and the next step.

`measure` looks at one point without training; `watch` sits in a chain and keeps the
same few numbers up to date, for `scalars` to log. They describe; none of them says
which method trains better.
"""

from dissect_optax.diagnostics._intervals import Interval
from dissect_optax.diagnostics._measure import (
    Diagnostics,
    LayerDiagnostics,
    SignBin,
    Warned,
    measure,
)
from dissect_optax.diagnostics._watch import WatchState, scalars, watch

__all__ = [  # noqa: RUF022
    "measure",
    "Diagnostics",
    "LayerDiagnostics",
    "Interval",
    "SignBin",
    "Warned",
    "watch",
    "scalars",
    "WatchState",
]
