"""The gradient of a mini-batch together with its variance, Eq. (44) of the paper."""

from dissect_optax.gradient_variance._api import (
    explain_variance,
    value_grad_and_variance,
)
from dissect_optax.gradient_variance._report import (
    VarianceMemory,
    VarianceReport,
    VarianceRoute,
)

__all__ = [
    "VarianceMemory",
    "VarianceReport",
    "VarianceRoute",
    "explain_variance",
    "value_grad_and_variance",
]
