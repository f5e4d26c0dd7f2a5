"""Adam taken apart: sign, magnitude and variance of stochastic gradients.

The names below come in the order in which a gradient meets them: it is paired with a
variance, the pair moves with the momentum, the sign is taken, and the factor shortens
what is mostly noise. The optimizers are chains of these transformations.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dissect_optax._adaptation import (
    adapt_to_variance,
    gaussian_sign,
    inverse,
    inverse_sqrt,
)
from dissect_optax._estimate import Estimate
from dissect_optax._masking import masked
from dissect_optax._momentum import (
    AccumulateMomentumState,
    CorrectForMomentumState,
    accumulate_momentum,
    correct_for_momentum,
)
from dissect_optax._optimizers import (
    adam,
    adam_star,
    adam_star_mb,
    m_sgd,
    m_ssd,
    m_svag,
    m_svag_mb,
    sgd,
    ssd,
    svag,
)
from dissect_optax._sign import scale_by_sign
from dissect_optax._sources import (
    MovingAverageEstimateState,
    TwoMovingAveragesEstimateState,
    aggregate_per_example,
    attach_variance,
    moving_average_estimate,
    with_relative_variance_of,
)

if TYPE_CHECKING:
    from dissect_optax import diagnostics as diagnostics
    from dissect_optax import dissection as dissection
    from dissect_optax import family as family
    from dissect_optax.dissection import dissect
    from dissect_optax.gradient_variance import (
        VarianceMemory,
        VarianceReport,
        VarianceRoute,
        explain_variance,
        value_grad_and_variance,
    )

__version__ = "0.1.0"

# Sorted by meaning, not by alphabet: in the order in which a gradient meets them.
__all__ = [  # noqa: RUF022
    # A batch gives a gradient and its variance,
    "value_grad_and_variance",
    "explain_variance",
    "VarianceReport",
    "VarianceRoute",
    "VarianceMemory",
    # a gradient becomes an Estimate,
    "Estimate",
    "moving_average_estimate",
    "attach_variance",
    "aggregate_per_example",
    "with_relative_variance_of",
    # moves with the momentum,
    "accumulate_momentum",
    "correct_for_momentum",
    # may lose its magnitude,
    "scale_by_sign",
    # on some leaves only if wanted,
    "masked",
    # and is adapted to its variance.
    "adapt_to_variance",
    "inverse",
    "inverse_sqrt",
    "gaussian_sign",
    # The states of these transformations.
    "MovingAverageEstimateState",
    "TwoMovingAveragesEstimateState",
    "AccumulateMomentumState",
    "CorrectForMomentumState",
    # Table 1,
    "sgd",
    "ssd",
    "svag",
    "m_sgd",
    "m_ssd",
    "m_svag",
    "adam",
    # and the variants of §D.
    "adam_star",
    "m_svag_mb",
    "adam_star_mb",
    # The user's own model.
    "dissect",
]

# Names that are imported when they are used, by module. The import of `jax.extend`,
# which the gradient variance needs, takes longer than all the rest of the library, and
# `dissection` needs the packages of the extra `dissect`.
_IMPORTED_WHEN_USED = {
    "VarianceMemory": "gradient_variance",
    "VarianceReport": "gradient_variance",
    "VarianceRoute": "gradient_variance",
    "explain_variance": "gradient_variance",
    "value_grad_and_variance": "gradient_variance",
    "dissect": "dissection",
}
_MODULES_IMPORTED_WHEN_USED = ("diagnostics", "dissection", "family")


def __getattr__(name: str) -> Any:
    if name in _MODULES_IMPORTED_WHEN_USED:
        return importlib.import_module(f"dissect_optax.{name}")
    if name not in _IMPORTED_WHEN_USED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"dissect_optax.{_IMPORTED_WHEN_USED[name]}")
    except ModuleNotFoundError as error:
        if name != "dissect":
            raise
        return _raise_when_called(error)
    return globals().setdefault(name, getattr(module, name))


def _raise_when_called(error: ModuleNotFoundError) -> Any:
    """`dissect` without its packages: `from dissect_optax import *` needs none."""

    def dissect(*args: Any, **kwargs: Any) -> Any:
        raise error

    return dissect


def __dir__() -> list[str]:
    # `dissection` is not listed, since `inspect.getmembers` would import it.
    return sorted({*globals(), *__all__, "diagnostics", "family"})
