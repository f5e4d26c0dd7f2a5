"""The gradient of a mini-batch together with its variance, Eq. (44) of the paper."""

from dissect_optax.gradient_variance._api import (
    VarianceRoute,
    explain_variance,
    value_grad_and_variance,
)

__all__ = ["VarianceRoute", "explain_variance", "value_grad_and_variance"]
